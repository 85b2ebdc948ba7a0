"""`make exercises`: what the learner gets, exercises/*.ipynb, from the one source, solutions/*.ipynb.

A solution stands between `### BEGIN SOLUTION` and `### END SOLUTION`, in a cell with nbgrader's metadata
(`solution_cell` makes it). In the exercise it becomes `raise NotImplementedError("<exercise>: your code here")`;
outputs go, and so do the tags that fold the solution away on the site. The same solutions always give the same bytes.
nbgrader does the work, as a library: a course that grades with nbgrader can take solutions/ as its source folder.

Usage: python -m minimoe.course.exercises [--check]    (--check only compares: exit code 1 if one is out of date)
"""
from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("implement", "predict", "debug", "experiment")
FOLDED = ("solution", "hide-input")     # tags of a solution cell, for the site


def solution_cell(exercise: str) -> dict[str, Any]:
    """nbgrader's metadata of the cell that holds the solution of `exercise` (letters, digits, - and _).

    >>> solution_cell("topk_router")["nbgrader"]["grade_id"]
    'topk_router'
    """
    return {"nbgrader": {"grade": False, "grade_id": exercise, "locked": False, "schema_version": 3, "solution": True,
                         "task": False}}


def check_cell(exercise: str, points: int) -> dict[str, Any]:
    """nbgrader's metadata of the cell that calls the check of `exercise`: locked, and worth `points`.

    >>> check_cell("topk_router", 13)["nbgrader"]["grade_id"]
    'check_topk_router'
    """
    return {"nbgrader": {"grade": True, "grade_id": f"check_{exercise}", "locked": True, "points": points,
                         "schema_version": 3, "solution": False, "task": False}}


@dataclass(frozen=True)
class Card:
    """The head of an exercise: its name (that of its check too), title, kind, difficulty 1 to 5, minutes, section."""

    name: str
    title: str
    kind: str
    difficulty: int
    minutes: int
    section: str


def cards(notebook: Path) -> list[Card]:
    """The cards of an exercise or solution notebook, in their order.

    A card is a Markdown cell tagged `exercise`, with a heading and this line:

    **Exercise** `name` · **Kind** implement · **Difficulty** 2 of 5 · **Time** 20 minutes · **Section** [Name](…)

    Raises:
        ValueError: a card lacks one of these; the message names it.
    """
    import nbformat

    found = []
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown" and "exercise" in cell.metadata.get("tags", []):
            title = re.match(r"## (.+)", cell.source)
            head = re.search(r"^\*\*Exercise\*\* `(\w+)` · \*\*Kind\*\* (\w+) · \*\*Difficulty\*\* ([1-5]) of 5 · "
                             r"\*\*Time\*\* (\d+) minutes · \*\*Section\*\* \[([^\]]+)\]\(\S+\)$", cell.source, re.M)
            if not (title and head) or head.group(2) not in KINDS:
                raise ValueError(f"{notebook}: the head of the card '{cell.source[:60]}' is not as `cards` wants it")
            name, kind, difficulty, minutes, section = head.groups()
            found.append(Card(name, title.group(1), kind, int(difficulty), int(minutes), section))
    return found


def student_version(source: Path) -> str:
    """The text of the exercise notebook that belongs to the solution notebook `source`.

    Raises:
        SystemExit: nbgrader is not installed, or a solution would be handed out; the message names the file.
    """
    import nbformat

    try:
        from nbgrader.preprocessors import (
            CheckCellMetadata,
            ClearHiddenTests,
            ClearOutput,
            ClearSolutions,
            ComputeChecksums,
            LockCells,
        )
        from traitlets.config import Config
    except ImportError:
        raise SystemExit("nbgrader is missing: pip install 'minimoe[teacher]'") from None

    class NamedStubs(ClearSolutions):
        """As nbgrader's, but the stub says which exercise it is."""

        def preprocess_cell(self, cell, resources, cell_index):
            name = cell.metadata.get("nbgrader", {}).get("grade_id", "this exercise")
            self.code_stub = {"python": f'raise NotImplementedError("{name}: your code here")'}
            return super().preprocess_cell(cell, resources, cell_index)

    nb, resources, config = nbformat.read(source, 4), {}, Config()
    config.ClearSolutions.enforce_metadata = True
    try:
        for step in (LockCells, NamedStubs, ClearOutput, CheckCellMetadata, ClearHiddenTests, ComputeChecksums):
            nb, resources = step(config=config).preprocess(nb, resources)
    except Exception as error:      # nbgrader has several kinds, none of which names the file
        raise SystemExit(f"{source}: {error}") from None
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        tags = cell.metadata.get("tags", [])
        if "solution" in tags:
            cell.metadata.tags = ["exercise", *(t for t in tags if t not in FOLDED)]
    nb.metadata = {"kernelspec": nb.metadata.get("kernelspec", {}), "language_info": {"name": "python"}}
    return nbformat.writes(nb) + "\n"


def out_of_date(root: Path) -> list[str]:
    """Why exercises/ is not what solutions/ gives, a line for each notebook; empty when all is well."""
    faults = []
    sources = {p.name: p for p in sorted((root / "solutions").glob("*.ipynb"))}
    for name, source in sources.items():
        target = root / "exercises" / name
        if not target.exists():
            faults.append(f"{target}: missing, run python -m minimoe.course.exercises")
        elif target.read_text(encoding="utf-8") != student_version(source):
            faults.append(f"{target}: differs from what {source} gives, run python -m minimoe.course.exercises")
    for target in sorted((root / "exercises").glob("*.ipynb")):
        if target.name not in sources:
            faults.append(f"{target}: has no source in solutions/, delete it")
    return faults


def main(argv: list[str] | None = None, root: Path | None = None) -> int:
    """Write all exercises, or with --check only compare; 0 is success, 1 a difference, 2 a wrong call."""
    argv, root = sys.argv[1:] if argv is None else argv, Path() if root is None else root
    sources = sorted((root / "solutions").glob("*.ipynb"))
    if argv not in ([], ["--check"]) or not sources:
        print(__doc__ if argv else "no solutions/*.ipynb here: run this from the top folder of the checkout",
              file=sys.stderr)
        return 2
    if argv:
        faults = out_of_date(root)
        print("\n".join(faults) or f"exercises/ is up to date ({len(sources)} notebooks)")
        return int(bool(faults))
    (root / "exercises").mkdir(exist_ok=True)
    for source in sources:
        text, target = student_version(source), root / "exercises" / source.name
        changed = not target.exists() or target.read_text(encoding="utf-8") != text
        target.write_text(text, encoding="utf-8")
        print(f"{target}: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
