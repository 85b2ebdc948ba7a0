"""A chapter's notebook as the lint sees it: cells and their sections, prose without formulas, numbers in outputs."""
from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PLOTLY = "application/vnd.plotly.v1+json"
COMPARED = ("text/plain", "text/html", "text/markdown", "text/latex", "image/svg+xml", PLOTLY)    # by nbval, exactly
HIDDEN = {"hide-input", "remove-input"}
TEXT_DIRECTIVES = r"\{(note|tip|warning|important|caution|admonition|dropdown|hint|seealso|margin|topic|card|grid)"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)")


@dataclass(frozen=True)
class Fault:
    """What is wrong, where (None: the whole chapter), and the remedy; `section` where a whole section is the matter."""

    rule: str
    cell: int | None
    message: str
    section: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell; `number` counts from 0, `section` is the level-2 heading that it stands under, "" before the first."""

    number: int
    kind: str
    source: str
    section: str
    tags: frozenset[str]
    metadata: dict
    outputs: tuple[dict, ...] = ()
    execution_count: int | None = None

    @property
    def visible(self) -> bool:
        return not self.tags & HIDDEN

    @property
    def lines(self) -> int:
        return sum(1 for line in self.source.splitlines() if line.strip())

    @cached_property
    def python(self) -> str:
        """The source without IPython's own lines (%, !)."""
        return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in self.source.splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree, empty where the source is no Python."""
        try:
            return ast.parse(self.python)
        except SyntaxError:
            return ast.Module(body=[], type_ignores=[])

    def definitions(self) -> dict[str, ast.FunctionDef | ast.ClassDef]:
        """The public functions and classes that the cell defines."""
        return {n.name: n for n in self.tree.body
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")}

    def calls(self, name: str) -> list[ast.Call]:
        """The calls of a function by its plain name, in the order of the source."""
        found = [n for n in ast.walk(self.tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == name]
        return sorted(found, key=lambda n: (n.lineno, n.col_offset))

    @property
    def prose(self) -> str:
        """Markdown without what is not read as text: code, formulas, HTML tags, addresses, comments."""
        return inline_text(unfenced(self.source))


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A notebook of the course; `stripped` is its size in bytes without outputs."""

    name: str
    cells: tuple[Cell, ...]
    stripped: int

    @property
    def code(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "code" and c.source.strip()]

    @property
    def markdown(self) -> list[Cell]:
        return [c for c in self.cells if c.kind == "markdown"]

    def under(self, section: str, kind: str = "code") -> list[Cell]:
        return [c for c in self.cells if c.section == section and c.kind == kind]


def heading(line: str) -> str | None:
    """The name of a level-2 heading: what stands before a colon; None for any other line.

    >>> heading("## Build it: a router in four steps"), heading("### Build it")
    ('Build it', None)
    """
    found = re.match(r"##\s+(.+?)\s*#*$", line)
    return found.group(1).replace("\u2019", "'").split(":")[0].strip() if found else None


def unfenced(source: str) -> str:
    """Markdown without blocks of code, of formulas and comments; what stands in a note or a dropdown stays.

    >>> unfenced("a\\n```python\\nb\\n```\\n:::{note}\\nc\\n:::")
    'a\\nc'
    """
    open_fences, kept = [], []
    for line in source.splitlines():
        fence = re.match(r"\s*(`{3,}|~{3,}|:{3,})\s*(.*)", line)
        if fence and open_fences and not fence.group(2) and fence.group(1) == open_fences[-1][0]:
            open_fences.pop()
        elif fence and (not open_fences or open_fences[-1][1]):
            open_fences.append((fence.group(1), bool(re.match(TEXT_DIRECTIVES, fence.group(2)))))
        elif not open_fences or all(is_text for _, is_text in open_fences):
            kept.append(line)
    return re.sub(r"<!--.*?-->|\$\$.*?\$\$|\\\[.*?\\\]", " ", "\n".join(kept), flags=re.S)


def inline_text(text: str) -> str:
    """A paragraph without code spans, roles, formulas, tags and addresses; the words of a link stay.

    >>> inline_text("see [this](http://x.y/1.5) and `z = 2.5`, $a = 3.5$")
    'see [this] and  ,  '
    """
    text = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", " ", text, flags=re.S)
    text = re.sub(r"(?<![\\$])\$[^$]+?(?<!\\)\$|\\\(.*?\\\)", " ", text, flags=re.S)
    text = re.sub(r"(!?\[[^\]]*\])\([^)]*\)", r"\1", text)
    return re.sub(r"<[^>]*>|https?://\S+", " ", text)


def read(path: Path) -> Chapter:
    """The chapter in a notebook file.

    Raises:
        ValueError: the file is no notebook of format 4; the message names it.
    """
    try:
        nb = json.loads(path.read_text(encoding="utf-8"))
        raw = nb["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a notebook of format 4: {error!r}") from None
    cells, section = [], ""
    for number, c in enumerate(raw):
        source = "".join(c["source"])
        if c["cell_type"] == "markdown":
            fence = False
            for line in source.splitlines():
                fence ^= line.lstrip().startswith(("```", "~~~"))
                section = (not fence and heading(line)) or section
        cells.append(Cell(number=number, kind=c["cell_type"], source=source, section=section,
                          metadata=c.get("metadata", {}),
                          tags=frozenset(c.get("metadata", {}).get("tags", [])), outputs=tuple(c.get("outputs", [])),
                          execution_count=c.get("execution_count")))
        c.update({"outputs": [], "execution_count": None} if c["cell_type"] == "code" else {})
    return Chapter(name=path.stem, cells=tuple(cells), stripped=len(json.dumps(nb, indent=1).encode()))


def words(cell: Cell) -> int:
    """How many words of prose a Markdown cell has; rows of tables are not prose.

    >>> text = "Two words\\n\\n| a | b |"
    >>> words(Cell(number=0, kind="markdown", section="", tags=frozenset(), metadata={}, source=text))
    2
    """
    lines = [line for line in cell.prose.splitlines() if not line.lstrip().startswith("|")]
    return sum(1 for word in " ".join(lines).split() if re.search(r"[A-Za-z]", word))


def outputs_hold_a_result(cell: Cell, clean=lambda text: text) -> bool:
    """Whether nbval compares an output of the cell, and that output holds a number which its source does not.

    `clean` takes out what nbval does not compare either (measured times).
    """
    if cell.tags & {"nbval-ignore-output", "nbval-skip"}:
        return False
    own = {float(n) for n in NUMBER.findall(cell.source)}
    return any(abs(float(n)) not in own and float(n) not in own
               for output in cell.outputs for text in _compared(output) for n in NUMBER.findall(clean(text)))


def _compared(output: dict):
    if "text" in output:
        yield "".join(output["text"])
    if "evalue" in output:
        yield output["evalue"]
    for mime, value in output.get("data", {}).items():
        if mime == PLOTLY:
            yield json.dumps([{k: v for k, v in trace.items() if k != "type"} for trace in value.get("data", [])])
        elif mime in COMPARED:
            yield _read_html("".join(value)) if mime in ("text/html", "image/svg+xml") else "".join(value)


def _read_html(html: str) -> str:
    """The text of the page, the data inside it (JSON), and what an SVG draws; not its scripts, styles and sizes."""
    data = re.findall(r"<script[^>]*json[^>]*>(.*?)</script>", html, flags=re.S)
    drawn = re.findall(r"\s(?:d|points|x|y|x1|y1|x2|y2|cx|cy|r|width|height)=[\"']([^\"']*)[\"']",
                       " ".join(re.findall(r"<svg\b[^>]*>(.*?)</svg>", html, flags=re.S)))
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", html, flags=re.S)
    return " ".join([re.sub(r"<[^>]*>", " ", text), *data, *drawn])
