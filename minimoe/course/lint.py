"""`python -m minimoe.course.lint`: does every chapter keep the contract that the course makes with its reader?

Prints a line per fault (file, cell, rule, what is wrong and what to do) and a line of figures per chapter; the exit
code is 1 if there is a fault. The rules are in `lint_text.py` and `lint_code.py`, each with its reason. What a chapter
must have:

**Opening**, before the first section: `# N. Title`, a paragraph that starts with `**Claim.**`, a list under
`**Objectives**` of 4 to 6 items that start with a verb, `**Time**` with its minutes, `**Builds on**`.

**Sections**: level-2 headings with these names, in this order, and no others (`## Build it: a router in four steps` is
fine, headings of level 3 are free):

    Set-up                 a cell with hidden input, one tagged `parameters` (SEED, DEVICE, DTYPE, THREADS), the imports
    A first look           a real output
    Predict                questions to answer before running
    The idea               a worked example `(worked by hand)`, the formula, a table of shapes
    Build it               after each cell that defines something public, a cell tagged `check` that uses it
    The library's version  an import from minimoe, and an assert on outputs and gradients
    Experiment             the result computed into the text: display(Markdown(f"…"))
    See it                 a `show(` or a cell tagged `widget`
    Break it               a real bug, and a cell tagged `check` or `raises-exception`
    Exercises              names exercises/NN_name.ipynb
    Quiz                   4 to 6 questions, each with its answer in a <details> block
    Summary
    What real models do    a table, cited
    References

Usage: python -m minimoe.course.lint [NOTEBOOK ...]       (all of notebooks/ by default)
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from minimoe.course import lint_code, lint_text
from minimoe.course.chapter import Chapter, Fault, outputs_hold_a_result, read, words
from minimoe.course.run_notebooks import RULES as SANITIZE
from minimoe.course.run_notebooks import read_rules, sanitize

RULES = (lint_code.syntax, lint_text.opening, lint_text.sections, lint_text.contents, lint_text.sizes,
         lint_text.numbers,
         lint_code.parameters, lint_code.tags, lint_code.pictures, lint_code.no_installing, lint_code.executed,
         lint_code.skipped, lint_code.errors, lint_code.checked, lint_code.shadows)
BUILDS_NOTHING = "uses the library before any of it is built, to show what the course is about"
EXEMPT = {      # chapter: {section or rule: reason}
    "00_start": {"Build it": BUILDS_NOTHING, "The library's version": BUILDS_NOTHING, "Break it": BUILDS_NOTHING},
}
SHARE = 0.7     # of the cells with output: held by nbval to a number that they computed


def lint(chapter: Chapter, sanitizing: list = (), exempt: dict[str, str] | None = None) -> list[Fault]:
    """All faults of a chapter, in the order of the rules."""
    exempt = EXEMPT.get(chapter.name, {}) if exempt is None else exempt
    found = [fault for rule in RULES for fault in rule(chapter) if not {fault.rule, fault.section} & exempt.keys()]
    return found + [f for f in compared(chapter, sanitizing) if f.rule not in exempt]


def share(chapter: Chapter, sanitizing: list = ()) -> tuple[int, int]:
    """Of how many code cells with output nbval compares a computed number, and how many have output."""
    cells = [c for c in chapter.code if c.outputs]
    return sum(outputs_hold_a_result(c, lambda text: sanitize(text, sanitizing)) for c in cells), len(cells)


def compared(chapter: Chapter, sanitizing: list = ()) -> Iterator[Fault]:
    """An output that is not compared can become wrong without anybody noticing."""
    held, cells = share(chapter, sanitizing)
    if cells and held < SHARE * cells:
        clean = lambda text: sanitize(text, sanitizing)
        missing = [c.number for c in chapter.code if c.outputs and not outputs_hold_a_result(c, clean)]
        yield Fault("compared", None, f"only {held} of {cells} cells with output have a computed number that nbval "
                    f"compares: print what cells {missing} find, rounded to what is certain")


def figures_of(chapter: Chapter, sanitizing: list = ()) -> str:
    """The line of figures: words, lines of code, pictures, the share that is compared."""
    held, cells = share(chapter, sanitizing)
    prose = sum(words(c) for c in chapter.markdown if c.section != "References")
    lines = sum(c.lines for c in chapter.code if c.visible)
    all_figures, computed = lint_code.figures(chapter)
    return (f"{chapter.name}: {prose} words, {lines} lines of code, {all_figures} figures ({computed} computed), "
            f"{held} of {cells} cells with output compared{f' ({100 * held / cells:.0f} %)' if cells else ''}")


def main(argv: list[str] | None = None) -> int:
    """Lint the notebooks; 0 none has a fault, 1 some have, 2 there is nothing to read."""
    argv = sys.argv[1:] if argv is None else argv
    paths = [Path(a) for a in argv] or sorted(Path("notebooks").glob("*.ipynb"))
    if not paths:
        print("no notebooks/*.ipynb here: run this from the top folder of the checkout", file=sys.stderr)
        return 2
    sanitizing, faults = read_rules(SANITIZE) if SANITIZE.exists() else [], 0
    for path in paths:
        try:
            chapter = read(path)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        for fault in lint(chapter, sanitizing):
            faults += 1
            print(f"{path}: {'' if fault.cell is None else f'cell {fault.cell}: '}[{fault.rule}] {fault.message}")
        print(figures_of(chapter, sanitizing))
    print(f"{faults} fault{'' if faults == 1 else 's'} in {len(paths)} notebook{'' if len(paths) == 1 else 's'}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
