"""The rules of the lint, each a function of a chapter that yields its faults; the docstring is the reason for the rule."""
from __future__ import annotations

import ast
import importlib.util
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minimoe.course.chapter import PLOTLY, Cell, Chapter, heading, inline_text, unfenced, words

SECTIONS = ("Set-up", "A first look", "Predict", "The idea", "Build it", "The library's version", "Experiment", "See it",
            "Break it", "Exercises", "Quiz", "Summary", "What real models do", "References")
TAGS = {"parameters", "hide-input", "remove-input", "check", "widget", "raises-exception", "slide", "nbval-ignore-output",
        "nbval-skip", "exercise", "solution"}
PARAMETERS = ("SEED", "DEVICE", "DTYPE", "THREADS")
WORDS, CODE_LINES, CELL_LINES, MEDIAN_LINES, FIGURES, COMPUTED = (2000, 3500), 350, 25, 12, (8, 12), 3
STRIPPED, ALT = 1_000_000, 40
NOT_VERBS = {"the", "a", "an", "what", "why", "how", "when", "that", "understanding", "learning", "to", "you"}
TIMES = "two|three|four|five|six|seven|eight|nine|ten|hundred"
MEASURED = re.compile(
    rf"\d+\.\d+|\d\s*(?:%|percent\b|per cent\b)|\b\d[\d,]*(?:\s+times\b|\s*[x×](?!\w))"
    rf"|\b(?:{TIMES})\s+times\s+(?:as|more|less|fewer|faster|slower|larger|smaller|bigger|higher|lower|the)\b", re.I)
NAMED = re.compile(r"\b(?:sections?|chapters?|figures?|tables?|equations?|eq\.|appendix|versions?|python|pytorch|torch|arxiv:?|"
                   r"§)\s*\d+(?:\.\d+)+", re.I)


@dataclass(frozen=True)
class Fault:
    """What is wrong, where (None: the whole chapter), and the remedy; `section` where a whole section is the matter."""

    rule: str
    cell: int | None
    message: str
    section: str = ""


def opening(chapter: Chapter) -> Iterator[Fault]:
    """A reader decides on the first screen whether to go on."""
    text = "\n".join(c.source.split("\n## ")[0] for c in chapter.markdown if not c.section or c.source.lstrip().startswith("# "))
    number = re.match(r"\d*", chapter.name).group().lstrip("0") or "0"
    if not re.match(rf"\s*# {number}\. \S", text):
        yield Fault("opening", 0, f"the first line is not '# {number}. Title': write it so")
    if not re.search(r"^\*\*Claim\.\*\*\s+\S", text, re.M):
        yield Fault("opening", 0, "no paragraph starts with **Claim.**: say in one sentence what the chapter shows, measured how")
    items = re.search(r"^\*\*Objectives\*\*.*?\n((?:\s*\n)*(?:(?:[-*]|\d+\.) .*\n?(?:  .*\n?)*)+)", text, re.M)
    listed = re.findall(r"^(?:[-*]|\d+\.) +\W*(\w+)", items.group(1), re.M) if items else []
    if not 4 <= len(listed) <= 6:
        yield Fault("opening", 0, f"{len(listed)} items under **Objectives**: list 4 to 6")
    for word in listed:
        if word.lower() in NOT_VERBS:
            yield Fault("opening", 0, f"an objective starts with '{word}': start with the verb that the reader will be able to do")
    if not re.search(r"^\*\*Time\*\*\W+.*\d+.*min", text, re.M):
        yield Fault("opening", 0, "no '**Time** … minutes': say how long the chapter takes")
    if not re.search(r"^\*\*Builds on\*\*\W+\S", text, re.M):
        yield Fault("opening", 0, "no '**Builds on** …': name the chapters or knowledge needed")


def sections(chapter: Chapter) -> Iterator[Fault]:
    """All chapters have one shape, so that a reader finds the way in the tenth as in the first."""
    found: list[tuple[int, str]] = []
    for cell in chapter.markdown:
        found += [(cell.number, name) for name in map(heading, unfenced(cell.source).splitlines()) if name]
    names = [name for _, name in found]
    for section in SECTIONS:
        if section not in names:
            yield Fault("sections", None, f"no section '## {section}': write it", section)
    for number, name in found:
        if name not in SECTIONS:
            yield Fault("sections", number, f"'## {name}' is no section of the contract: use a heading of level 3")
    known = [name for name in names if name in SECTIONS]
    for i, name in enumerate(known):
        if name in known[:i]:
            yield Fault("sections", None, f"'## {name}' comes twice: join the two", name)
    once = list(dict.fromkeys(known))
    if once != [s for s in SECTIONS if s in once]:
        yield Fault("sections", None, f"the sections stand in the order {', '.join(once)}: put them in the order of the contract")


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
            yield Fault("tags", cell.number, "the input is hidden on the site only: set the metadata jupyter.source_hidden to true")


def sizes(chapter: Chapter) -> Iterator[Fault]:
    """A chapter that is too long is not read to its end; a cell that is too long is not read at all."""
    prose = sum(words(c) for c in chapter.markdown if c.section != "References")
    if not WORDS[0] <= prose <= WORDS[1]:
        yield Fault("sizes", None, f"{prose} words of prose: {'add to' if prose < WORDS[0] else 'cut'} it, {WORDS[0]} to {WORDS[1]}")
    lines = sum(c.lines for c in chapter.code if c.visible)
    if lines > CODE_LINES:
        yield Fault("sizes", None, f"{lines} visible lines of code: at most {CODE_LINES}, hide or move some to the library")
    for cell in chapter.code:
        if cell.visible and cell.lines > CELL_LINES:
            yield Fault("sizes", cell.number, f"{cell.lines} lines of code in one cell: at most {CELL_LINES}, split it")
    built = [c.lines for c in chapter.under("Build it") if c.source.strip() and c.visible and "check" not in c.tags]
    if built and statistics.median(built) > MEDIAN_LINES:
        yield Fault("sizes", None, f"the median of the cells in Build it is {statistics.median(built):g} lines: at most {MEDIAN_LINES}")
    if chapter.stripped > STRIPPED:
        yield Fault("sizes", None, f"{chapter.stripped:,} bytes without outputs: under {STRIPPED:,}, move images to book/_static")


# --- figures -----------------------------------------------------------------------------------------------------------
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
        calls = _shows(cell)
        drawn += len(calls) or "widget" in cell.tags
        shown += sum(not isinstance(c.args[0], ast.Constant) for c in calls if c.args) if calls else "widget" in cell.tags
    return drawn + sum(len(_images(c)) for c in chapter.markdown), shown


def _shows(cell: Cell) -> list[ast.Call]:
    try:
        return cell.calls("show")
    except SyntaxError:
        return []


def pictures(chapter: Chapter) -> Iterator[Fault]:
    """A figure says something; whoever cannot see it must be told the same."""
    count, computed = figures(chapter)
    if not FIGURES[0] <= count <= FIGURES[1]:
        yield Fault("figures", None, f"{count} figures: have {FIGURES[0]} to {FIGURES[1]}")
    if computed < COMPUTED:
        yield Fault("figures", None, f"{computed} computed figures: have at least {COMPUTED}")
    seen: dict[str, int] = {}
    for cell in chapter.cells:
        alts = _images(cell) if cell.kind == "markdown" else [_alt(c) for c in _shows(cell)] if cell.kind == "code" else []
        titles = {_same(t) for t in re.findall(r"(?:title|text)\w*\s*=\s*f?[\"']([^\"']+)", cell.source)}
        for alt in alts:
            if alt is None:
                yield Fault("alt", cell.number, "show(…) without its text: write alt=\"…\" in the call, as a string")
            elif len(alt.strip()) < ALT:
                yield Fault("alt", cell.number, f"alternative text of {len(alt.strip())} characters: say in at least {ALT} what is to be seen")
            elif _same(alt) in titles:
                yield Fault("alt", cell.number, "the alternative text is the title: say what the figure shows")
            elif _same(alt) in seen:
                yield Fault("alt", cell.number, f"the same alternative text as in cell {seen[_same(alt)]}: say what is different")
            if alt:
                seen.setdefault(_same(alt), cell.number)
        for output in cell.outputs:
            data = output.get("data", {})
            meta = data.get(PLOTLY, {}).get("layout", {}).get("meta")
            if PLOTLY in data and not (isinstance(meta, dict) and meta.get("alt")):
                yield Fault("alt", cell.number, "a plotly figure without alternative text: show(figure, alt=\"…\")")
            if PLOTLY not in data and {"image/png", "image/jpeg"} & data.keys():
                yield Fault("alt", cell.number, "a bitmap, which has no text and is never compared: draw it with plotly or as SVG, and show(…)")


def _same(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# --- code and outputs --------------------------------------------------------------------------------------------------
def no_installing(chapter: Chapter) -> Iterator[Fault]:
    """`make setup` installs everything; a notebook that installs changes what the others run with."""
    for cell in chapter.code:
        if re.search(r"^\s*[!%]?.*\b(?:pip3?|uv|conda)\b.*\binstall\b", cell.source, re.M):
            yield Fault("install", cell.number, "installs a package: list it in pyproject.toml instead")


def numbers(chapter: Chapter) -> Iterator[Fault]:
    """A measured number in fixed text becomes wrong when the code changes: it is computed, or cited, or worked by hand."""
    for cell in chapter.markdown:
        if cell.section == "References":
            continue
        by_hand = False
        for paragraph in re.split(r"\n\s*\n", unfenced(cell.source)):
            for line in paragraph.splitlines():
                if re.match(r"#+ ", line):
                    by_hand = "(worked by hand)" in line
            if by_hand or "(worked by hand)" in paragraph or re.search(r"\{cite", paragraph):
                continue
            found = MEASURED.search(NAMED.sub(" ", inline_text(paragraph)))
            if found:
                yield Fault("numbers", cell.number, f"'{found.group().strip()}' in fixed text: compute it with display(Markdown(f\"…\")), cite it "
                            "({cite:p}`…`), or mark the paragraph (worked by hand)")


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
        if "nbval-skip" in cell.tags and any(isinstance(n, (ast.Call, ast.BinOp, ast.For, ast.While)) for n in ast.walk(cell.tree)):
            yield Fault("skip", cell.number, "is tagged nbval-skip and computes: tag it nbval-ignore-output, so that it still runs")


def errors(chapter: Chapter) -> Iterator[Fault]:
    """An error that nobody wanted is a broken chapter; one that was announced and does not come, a wrong one."""
    for cell in chapter.code:
        failed = any(o.get("output_type") == "error" for o in cell.outputs)
        if failed and "raises-exception" not in cell.tags:
            yield Fault("errors", cell.number, "its output is an error: mend it, or tag it raises-exception where that is the lesson")
        if not failed and "raises-exception" in cell.tags:
            yield Fault("errors", cell.number, "is tagged raises-exception and raises none: take the tag away")


def syntax(chapter: Chapter) -> Iterator[Fault]:
    """What is no Python cannot be read by the other rules."""
    for cell in chapter.code:
        try:
            cell.tree.body.clear
        except SyntaxError as error:
            yield Fault("syntax", cell.number, f"line {error.lineno}: {error.msg}")


# --- what a section must hold ------------------------------------------------------------------------------------------
def contents(chapter: Chapter) -> Iterator[Fault]:
    """A heading without what belongs under it keeps the contract in name only."""
    def source(section, kind="code"):
        return "\n\n".join(c.source for c in chapter.under(section, kind))

    def tagged(section, *wanted):
        return any(c.tags & set(wanted) for c in chapter.under(section))

    idea, quiz = source("The idea", "markdown"), source("Quiz", "markdown").count("<details")
    library = source("The library's version")
    demands = [
        ("Set-up", any(not c.visible for c in chapter.under("Set-up")), "no hidden cell: fold the preparations away"),
        ("A first look", any(c.outputs for c in chapter.under("A first look")), "no output: start with a real result"),
        ("The idea", "(worked by hand)" in idea, "no example (worked by hand): give one with real numbers"),
        ("The idea", "$" in idea or "{math}" in idea, "no formula: write it"),
        ("The idea", bool(re.search(r"^\s*\|.*\|", idea, re.M)), "no table: list the shapes"),
        ("The library's version", "minimoe" in library, "nothing is imported from minimoe: show the library's own"),
        ("The library's version", "assert" in library and "grad" in library, "no assert on outputs and gradients: compare both"),
        ("Experiment", bool(re.search(r"Markdown\(\s*(?:rf|fr|f)[\"']", source("Experiment"))),
         "the result is not computed into the text: display(Markdown(f\"…\"))"),
        ("See it", tagged("See it", "widget") or "show(" in source("See it"), "nothing to see: show(…) or a cell tagged widget"),
        ("Break it", tagged("Break it", "check", "raises-exception"), "no cell tagged check or raises-exception: catch the bug"),
        ("Exercises", f"exercises/{chapter.name}.ipynb" in source("Exercises", "markdown"), f"no link to exercises/{chapter.name}.ipynb"),
        ("Quiz", 4 <= quiz <= 6, f"{quiz} <details> blocks: 4 to 6 questions, each with its answer folded"),
        ("What real models do", "|" in source("What real models do", "markdown")
         and "{cite" in source("What real models do", "markdown"), "no cited table: say what each model chose, and cite it"),
        ("References", len(source("References", "markdown").split()) > 5, "is empty: give papers and sections"),
    ]
    present = {c.section for c in chapter.cells}
    for section, holds, message in demands:
        if section in present and not holds:
            yield Fault("contents", None, f"{section}: {message}", section)


def checked(chapter: Chapter) -> Iterator[Fault]:
    """What is built is checked at once, while the reader still knows what it was meant to do."""
    cells = chapter.under("Build it")
    for i, cell in enumerate(cells):
        for name in _definitions(cell):
            if not any("check" in c.tags and re.search(rf"\b{name}\b", c.source) for c in cells[i:]):
                yield Fault("check", cell.number, f"{name} is never checked in Build it: add a cell tagged check that uses it")


def _definitions(cell: Cell) -> dict[str, ast.AST]:
    """The public functions and classes that a cell defines."""
    try:
        body = cell.tree.body
    except SyntaxError:
        return {}
    return {n.name: n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")}


def shadows(chapter: Chapter) -> Iterator[Fault]:
    """Two things of one name that differ teach two truths, unless a cell holds one to the other."""
    aliases, comparing = {}, []
    for cell in chapter.code:
        try:
            nodes = list(ast.walk(cell.tree))
        except SyntaxError:
            continue
        for n in nodes:
            if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "minimoe":
                aliases |= {a.asname: a.name for a in n.names if a.asname and a.asname != a.name}
        if re.search(r"\bassert|assert_close|allclose|torch\.equal", cell.source):
            comparing.append(nodes)
    for cell in chapter.code:
        for name, node in _definitions(cell).items():
            if name not in _library() or _bare(node) in _library()[name]:
                continue
            others = {alias for alias, real in aliases.items() if real == name}
            if not any(_uses(nodes, {name}) and (_uses(nodes, others) or any(
                    isinstance(n, ast.Attribute) and n.attr == name for n in nodes)) for nodes in comparing):
                yield Fault("shadows", cell.number, f"{name} is also a name of minimoe and is never compared with it: import the "
                            f"library's as Library{name} and assert that both agree, or choose another name")


def _uses(nodes: list[ast.AST], names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in nodes)


@cache
def _library() -> dict[str, set[str]]:
    """Every public function and class of the library, by name: the code of each that has this name."""
    root, found = Path(importlib.util.find_spec("minimoe").submodule_search_locations[0]), {}
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in ("course", "cli.py"):
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


RULES = (syntax, opening, sections, parameters, tags, sizes, pictures, no_installing, numbers, executed, skipped, errors,
         contents, checked, shadows)
