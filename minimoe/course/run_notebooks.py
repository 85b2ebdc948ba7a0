"""`make notebooks`: execute notebooks in place, so that running them again gives the same bytes.

What differs from run to run is dropped (timestamps, widget views whose ids are new each time) or, where only a measured
time differs, kept as it was committed; `tests/nbval_sanitize.cfg` says what counts as a measured time, here as in the
tests.

Usage: python -m minimoe.course.run_notebooks [NOTEBOOK ...]        (all of notebooks/ and solutions/ by default)
"""

from __future__ import annotations

import configparser
import json
import os
import re
import sys
import time
from pathlib import Path

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
RULES = Path("tests/nbval_sanitize.cfg")
# the folders of a path: from where a word begins or a color ends (the m); bounded, as a line of HTML can be long
PATH = r"(?<![^\s\"'(m])[^\s\"'(\x1b]{0,300}"


def read_rules(path: Path) -> list[tuple[re.Pattern, str]]:
    """The (pattern, replacement) pairs of an nbval sanitize file."""
    rules = configparser.RawConfigParser()
    rules.read_string(path.read_text(encoding="utf-8"))
    return [(re.compile(rules[name]["regex"]), rules[name]["replace"]) for name in rules.sections()]


def sanitize(text: str, rules: list[tuple[re.Pattern, str]]) -> str:
    """`text` with everything that a rule matches replaced.

    >>> sanitize("took 1.5 s", [(re.compile(r"took [0-9.]+ s"), "TIME")])
    'TIME'
    """
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def normalize(nb, root: str) -> None:
    """Drop from an executed notebook, in place, what would differ in the next run or on another machine.

    Widget views go too: a widget that must show something without a kernel gives `text/html` beside its view.

    Raises:
        ValueError: an output names the folder of the checkout `root`, which is nobody else's.
    """
    for key in ("widgets", "papermill"):
        nb.metadata.pop(key, None)
    nb.metadata["language_info"] = {"name": "python"}  # without the version
    for number, cell in enumerate(nb.cells):
        cell.metadata.pop("execution", None)
        cell.metadata.pop("papermill", None)
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            data.pop(WIDGET_VIEW, None)
            if PLOTLY in data:
                data.pop("image/png", None)     # Lab adds one when it saves
            if output.output_type == "error":
                output.traceback = [short_paths(line, root) for line in output.traceback]
            if "text" in output:
                output.text = short_paths(output.text, root)
        shown = ("display_data", "execute_result")
        cell.outputs = [o for o in cell.outputs if o.output_type not in shown or o.data]
        if root in json.dumps(cell.outputs, ensure_ascii=False):
            raise ValueError(f"cell {number} prints the path {root}: print a relative one")


def short_paths(text: str, root: str) -> str:
    """A traceback or warning without this machine's folders: `root` and installed packages become relative.

    >>> short_paths("File /home/me/course/minimoe/norm.py:3", "/home/me/course")
    'File minimoe/norm.py:3'
    """
    text = re.sub(PATH + r"ipykernel_\d+[/\\]\d+\.py", "<cell>", text)
    home = str(Path.home())
    if root.startswith(home + os.sep):  # tracebacks write ~ for it
        text = text.replace("~" + root[len(home) :] + os.sep, "")
    text = text.replace(root + os.sep, "")
    return re.sub(PATH + r"(site|dist)-packages[/\\]", "", text)


def keep_times(new, old, rules) -> None:
    """Where a cell's outputs differ from the stored ones in measured times only, put the stored ones back, in place."""
    stored = {cell.get("id"): cell for cell in old.cells if cell.cell_type == "code"}
    for cell in new.cells:
        before = stored.get(cell.get("id"))
        if cell.cell_type != "code" or before is None or before.source != cell.source:
            continue
        texts = [sanitize(json.dumps(c.outputs, sort_keys=True), rules) for c in (cell, before)]
        if texts[0] == texts[1]:
            cell.outputs = before.outputs


def run(path: Path, rules=(), root: Path | None = None, timeout: int = 600) -> float:
    """Execute one notebook in place, from its own folder and with a fresh kernel; return the seconds that it took.

    The file is replaced only when every cell has run.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed that is not tagged `raises-exception`.
    """
    import nbformat
    from nbclient import NotebookClient

    started = time.perf_counter()
    nb = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(path.parent)}}
    options = {"record_timing": False, "coalesce_streams": True, "extra_arguments": ["--IPKernelApp.log_level=ERROR"]}
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources=resources, **options).execute()
    normalize(nb, str((root or Path.cwd()).resolve()))
    keep_times(nb, nbformat.read(path, 4), rules)
    scratch = path.with_suffix(".tmp")
    nbformat.write(nb, scratch)
    scratch.replace(path)
    return time.perf_counter() - started


def main(argv: list[str]) -> int:
    found = [path for folder in ("notebooks", "solutions") for path in sorted(Path(folder).glob("*.ipynb"))]
    paths = [Path(arg) for arg in argv] or found
    if not paths:
        print("no notebook found: run this from the top folder of the checkout", file=sys.stderr)
        return 2
    rules = read_rules(RULES)
    for path in paths:
        before = path.read_bytes()
        seconds = run(path, rules)
        print(f"{path}: {seconds:.1f} s, {'unchanged' if path.read_bytes() == before else 'new outputs'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
