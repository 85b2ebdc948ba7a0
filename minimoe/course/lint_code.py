"""The lint's rules on cells, figures and outputs.

A rule is a function of a chapter that yields its faults; its docstring is the reason for it.
"""
from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from minimoe.course.chapter import PLOTLY, Cell, Chapter, Fault

TAGS = {"parameters", "hide-input", "remove-input", "check", "widget", "raises-exception", "slide",
        "nbval-ignore-output",
        "nbval-skip", "exercise", "solution"}
PARAMETERS = ("SEED", "DEVICE", "DTYPE", "THREADS")
FIGURES, COMPUTED, ALT = (8, 12), 3, 40


def parameters(chapter: Chapter) -> Iterator[Fault]:
    """papermill and the reader change a run in one place, and what is committed comes out the same everywhere."""
    cells = [c for c in chapter.code if "parameters" in c.tags]
    if len(cells) != 1:
        yield Fault("parameters", None, f"{len(cells)} cells are tagged parameters: tag one, in Set-up")
        return
    assigned = {t.id for n in cells[0].tree.body if isinstance(n, (ast.Assign, ast.AnnAssign))
                for t in (n.targets if isinstance(n, ast.Assign) else [n.target]) if isinstance(t, ast.Name)}
    for name in PARAMETERS:
        if name not in assigned:
            yield Fault("parameters", cells[0].number, f"{name} is not set in the parameters cell: set it there")
    if cells[0].section != "Set-up":
        yield Fault("parameters", cells[0].number, "the parameters cell stands outside Set-up: move it")


def tags(chapter: Chapter) -> Iterator[Fault]:
    """A tag that no tool knows is a typing error; JupyterLab hides an input only by its own metadata."""
    for cell in chapter.cells:
        for tag in sorted(cell.tags - TAGS):
            yield Fault("tags", cell.number, f"unknown tag '{tag}': allowed are {', '.join(sorted(TAGS))}")
        if cell.kind == "code" and not cell.visible and not cell.metadata.get("jupyter", {}).get("source_hidden"):
            yield Fault("tags", cell.number, "the input is hidden on the site only: set the metadata "
                                             "jupyter.source_hidden to true")


# --- figures ----------------------------------------------------------------------------------------------------------
def _images(cell: Cell) -> list[str]:
    """The alternative texts of the images in a Markdown cell, "" where there is none."""
    alts = [m.group(1) for m in re.finditer(r"!\[([^\]]*)\]\(", cell.source)]
    for tag in re.findall(r"<img\b[^>]*>", cell.source):
        alts.append((re.findall(r"alt=[\"']([^\"']*)", tag) or [""])[0])
    for block in re.findall(r"(?:```|:::)\{(?:figure|image)\}.*?(?:```|:::)", cell.source, flags=re.S):
        alts.append((re.findall(r":alt:\s*(.*)", block) or [""])[0])
    return alts


def _alt(call: ast.Call) -> str | None:
    """The text of `alt=`, its computed parts as …; None where it is not written in the call."""
    value = next((k.value for k in call.keywords if k.arg == "alt"), call.args[1] if len(call.args) > 1 else None)
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        return "".join(p.value if isinstance(p, ast.Constant) else "\u2026" for p in value.values)
    return None


def figures(chapter: Chapter) -> tuple[int, int]:
    """How many figures a chapter has, and how many of them are computed."""
    drawn = shown = 0
    for cell in chapter.code:
        calls = cell.calls("show")
        drawn += len(calls) or "widget" in cell.tags
        computed = [c for c in calls if c.args and not isinstance(c.args[0], ast.Constant)]
        shown += len(computed) if calls else "widget" in cell.tags
    return drawn + sum(len(_images(c)) for c in chapter.markdown), shown


def pictures(chapter: Chapter) -> Iterator[Fault]:
    """A figure says something; whoever cannot see it must be told the same."""
    count, computed = figures(chapter)
    if not FIGURES[0] <= count <= FIGURES[1]:
        yield Fault("figures", None, f"{count} figures: have {FIGURES[0]} to {FIGURES[1]}")
    if computed < COMPUTED:
        yield Fault("figures", None, f"{computed} computed figures: have at least {COMPUTED}")
    seen: dict[str, int] = {}
    for cell in chapter.cells:
        alts = [_alt(c) for c in cell.calls("show")] if cell.kind == "code" else _images(cell)
        titles = {_same(t) for t in re.findall(r"(?:title|text)\w*\s*=\s*f?[\"']([^\"']+)", cell.source)}
        for alt in alts:
            if alt is None:
                yield Fault("alt", cell.number, "show(…) without its text: write alt=\"…\" in the call, a string")
            elif len(alt.strip()) < ALT:
                yield Fault("alt", cell.number, f"alternative text of {len(alt.strip())} characters: say in at least "
                                                f"{ALT} what is to be seen")
            elif _same(alt) in titles:
                yield Fault("alt", cell.number, "the alternative text is the title: say what the figure shows")
            elif _same(alt) in seen:
                yield Fault("alt", cell.number, f"the same alternative text as in cell {seen[_same(alt)]}: say what "
                                                f"is different")
            if alt:
                seen.setdefault(_same(alt), cell.number)
        for output in cell.outputs:
            data = output.get("data", {})
            meta = data.get(PLOTLY, {}).get("layout", {}).get("meta")
            if PLOTLY in data and not (isinstance(meta, dict) and meta.get("alt")):
                yield Fault("alt", cell.number, "a plotly figure without alternative text: show(figure, alt=\"…\")")
            if PLOTLY not in data and {"image/png", "image/jpeg"} & data.keys():
                yield Fault("alt", cell.number, "a bitmap, which has no text and is never compared: draw it with "
                                                "plotly or as SVG, and show(…)")


def _same(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# --- code and outputs -------------------------------------------------------------------------------------------------
def no_installing(chapter: Chapter) -> Iterator[Fault]:
    """`make setup` installs everything; a notebook that installs changes what the others run with."""
    for cell in chapter.code:
        if re.search(r"^\s*[!%]?.*\b(?:pip3?|uv|conda)\b.*\binstall\b", cell.source, re.M):
            yield Fault("install", cell.number, "installs a package: list it in pyproject.toml instead")


def executed(chapter: Chapter) -> Iterator[Fault]:
    """A notebook without outputs passes every comparison of outputs."""
    last = 0
    for cell in chapter.code:
        if cell.execution_count is None:
            yield Fault("executed", cell.number, "was never executed: run make notebooks")
        elif cell.execution_count <= last:
            yield Fault("executed", cell.number, "was executed out of order: run make notebooks")
        last = cell.execution_count or last


def skipped(chapter: Chapter) -> Iterator[Fault]:
    """What is skipped can break without anybody noticing."""
    for cell in chapter.code:
        work = (ast.Call, ast.BinOp, ast.For, ast.While)
        if "nbval-skip" in cell.tags and any(isinstance(n, work) for n in ast.walk(cell.tree)):
            yield Fault("skip", cell.number, "is tagged nbval-skip and computes: tag it nbval-ignore-output, so that "
                                             "it still runs")


def errors(chapter: Chapter) -> Iterator[Fault]:
    """An error that nobody wanted is a broken chapter; one that was announced and does not come, a wrong one."""
    for cell in chapter.code:
        failed = any(o.get("output_type") == "error" for o in cell.outputs)
        if failed and "raises-exception" not in cell.tags:
            yield Fault("errors", cell.number, "its output is an error: mend it, or tag it raises-exception where "
                                               "that is the lesson")
        if not failed and "raises-exception" in cell.tags:
            yield Fault("errors", cell.number, "is tagged raises-exception and raises none: take the tag away")


def syntax(chapter: Chapter) -> Iterator[Fault]:
    """What is no Python cannot be read by the other rules."""
    for cell in chapter.code:
        try:
            ast.parse(cell.python)
        except SyntaxError as error:
            yield Fault("syntax", cell.number, f"line {error.lineno}: {error.msg}")


def checked(chapter: Chapter) -> Iterator[Fault]:
    """What is built is checked at once, while the reader still knows what it was meant to do."""
    cells = chapter.under("Build it")
    for i, cell in enumerate(cells):
        for name in cell.definitions():
            if not any("check" in c.tags and re.search(rf"\b{name}\b", c.source) for c in cells[i:]):
                yield Fault("check", cell.number, f"{name} is never checked in Build it: add a cell tagged check that "
                                                  f"uses it")


def shadows(chapter: Chapter) -> Iterator[Fault]:
    """Two things of one name that differ teach two truths, unless a cell holds one to the other."""
    aliases, comparing = {}, []
    for cell in chapter.code:
        nodes = list(ast.walk(cell.tree))
        for n in nodes:
            if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "minimoe":
                aliases |= {a.asname: a.name for a in n.names if a.asname and a.asname != a.name}
        if re.search(r"\bassert|assert_close|allclose|torch\.equal", cell.source):
            comparing.append(nodes)
    for cell in chapter.code:
        for name, node in cell.definitions().items():
            if name not in _library() or _bare(node) in _library()[name]:
                continue
            others = {alias for alias, real in aliases.items() if real == name}
            if not any(_uses(nodes, {name}) and (_uses(nodes, others) or any(
                    isinstance(n, ast.Attribute) and n.attr == name for n in nodes)) for nodes in comparing):
                yield Fault("shadows", cell.number, f"{name} is also a name of minimoe and is never compared with it: "
                                                    f"import the "
                            f"library's as Library{name} and assert that both agree, or choose another name")


def _uses(nodes: list[ast.AST], names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in nodes)


@cache
def _library() -> dict[str, set[str]]:
    """Every public function and class of the library, by name: the code of each that has this name."""
    root, found = Path(importlib.util.find_spec("minimoe").submodule_search_locations[0]), {}
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("course", "cli"):
            for n in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_"):
                    found.setdefault(n.name, set()).add(_bare(n))
    return found


def _bare(node: ast.AST) -> str:
    """The code of a definition without its docstrings."""
    copy = ast.parse(ast.unparse(node))
    for n in ast.walk(copy):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n) is not None and len(n.body) > 1:
            n.body = n.body[1:]
    return ast.dump(copy)
