"""The lint's rules on what is read: opening, sections, length, numbers.

A rule is a function of a chapter that yields its faults; its docstring is the reason for it.
"""
from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

from minimoe.course.chapter import Chapter, Fault, heading, inline_text, unfenced, words

SECTIONS = ("Set-up", "A first look", "Predict", "The idea", "Build it", "The library's version", "Experiment",
            "See it",
            "Break it", "Exercises", "Quiz", "Summary", "What real models do", "References")
WORDS, CODE_LINES, CELL_LINES, MEDIAN_LINES, STRIPPED = (2000, 3500), 350, 25, 12, 1_000_000
NOT_VERBS = {"the", "a", "an", "what", "why", "how", "when", "that", "understanding", "learning", "to", "you"}
TIMES = "two|three|four|five|six|seven|eight|nine|ten|hundred"
MEASURED = re.compile(
    rf"\d+\.\d+|\d\s*(?:%|percent\b|per cent\b)|\b\d[\d,]*(?:\s+times\b|\s*[x×](?!\w|\s*\d))"
    rf"|\b(?:{TIMES})\s+times\s+(?:as|more|less|fewer|faster|slower|larger|smaller|bigger|higher|lower|the)\b", re.I)
NAMED = re.compile(r"\b(?:sections?|chapters?|figures?|tables?|equations?|eq\.|appendix|versions?|python|pytorch|torch|"
                   r"arxiv:?|§)\s*\d+(?:\.\d+)*(?:(?:,| and| to|-|\u2013)\s*\d+(?:\.\d+)*)*", re.I)


def opening(chapter: Chapter) -> Iterator[Fault]:
    """A reader decides on the first screen whether to go on."""
    text = "\n\n".join(c.source for c in chapter.markdown if not c.section)
    number = re.match(r"\d*", chapter.name).group().lstrip("0") or "0"
    if not re.match(rf"\s*# {number}\. \S", text):
        yield Fault("opening", 0, f"the first line is not '# {number}. Title': write it so")
    if not re.search(r"^\*\*Claim\.\*\*\s+\S", text, re.M):
        yield Fault("opening", 0, "no paragraph starts with **Claim.**: say in one sentence what the chapter shows, "
                                  "measured how")
    items = re.search(r"^\*\*Objectives\*\*.*?\n((?:\s*\n)*(?:(?:[-*]|\d+\.) .*\n?(?:  .*\n?)*)+)", text, re.M)
    listed = re.findall(r"^(?:[-*]|\d+\.) +\W*(\w+)", items.group(1), re.M) if items else []
    if not 4 <= len(listed) <= 6:
        yield Fault("opening", 0, f"{len(listed)} items under **Objectives**: list 4 to 6")
    for word in listed:
        if word.lower() in NOT_VERBS:
            yield Fault("opening", 0, f"an objective starts with '{word}': start with the verb that the reader will "
                                      f"be able to do")
    if not re.search(r"^\*\*Time\*\*\W+.*\d+.*min", text, re.M):
        yield Fault("opening", 0, "no '**Time** … minutes': say how long the chapter takes")
    if not re.search(r"^\*\*Builds on\*\*\W+\S", text, re.M):
        yield Fault("opening", 0, "no '**Builds on** …': name the chapters or knowledge needed")


def sections(chapter: Chapter) -> Iterator[Fault]:
    """All chapters have one shape, so that a reader finds the way in the tenth as in the first."""
    found: list[tuple[int, str]] = []
    for cell in chapter.markdown:
        inside = [(cell.number, name) for name in map(heading, unfenced(cell.source).splitlines()) if name]
        found += inside
        if inside and (len(inside) > 1 or not heading(cell.source.splitlines()[0])):
            yield Fault("sections", cell.number, f"'## {inside[-1][1]}' stands inside a cell: start a cell with it")
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
        yield Fault("sections", None, f"the sections stand in the order {', '.join(once)}: put them in the order of "
                                      f"the contract")


def sizes(chapter: Chapter) -> Iterator[Fault]:
    """A chapter that is too long is not read to its end; a cell that is too long is not read at all."""
    prose = sum(words(c) for c in chapter.markdown if c.section != "References")
    if not WORDS[0] <= prose <= WORDS[1]:
        yield Fault("sizes", None, f"{prose} words of prose: {'add to' if prose < WORDS[0] else 'cut'} it, {WORDS[0]} "
                                   f"to {WORDS[1]}")
    lines = sum(c.lines for c in chapter.code if c.visible)
    if lines > CODE_LINES:
        yield Fault("sizes", None, f"{lines} visible lines of code: at most {CODE_LINES}, hide or move some to the "
                                   f"library")
    for cell in chapter.code:
        if cell.visible and cell.lines > CELL_LINES:
            yield Fault("sizes", cell.number, f"{cell.lines} lines of code in one cell: at most {CELL_LINES}, split it")
    built = [c.lines for c in chapter.under("Build it") if c.source.strip() and c.visible and "check" not in c.tags]
    if built and statistics.median(built) > MEDIAN_LINES:
        yield Fault("sizes", None, f"the median of the cells in Build it is {statistics.median(built):g} lines: at "
                                   f"most {MEDIAN_LINES}")
    if chapter.stripped > STRIPPED:
        yield Fault("sizes", None, f"{chapter.stripped:,} bytes without outputs: under {STRIPPED:,}, move images to "
                                   f"book/_static")


def numbers(chapter: Chapter) -> Iterator[Fault]:
    """A measured number in fixed text becomes wrong when the code changes: compute it, cite it, or work it by hand."""
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
                yield Fault("numbers", cell.number, f"'{found.group().strip()}' in fixed text: compute it with "
                                                    f"display(Markdown(f\"…\")), cite it "
                            "({cite:p}`…`), or mark the paragraph (worked by hand)")


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
        ("The library's version", "assert" in library and "grad" in library,
         "no assert on outputs and gradients: compare both"),
        ("Experiment", bool(re.search(r"Markdown\(\s*(?:rf|fr|f)[\"']", source("Experiment"))),
         "the result is not computed into the text: display(Markdown(f\"…\"))"),
        ("See it", tagged("See it", "widget") or "show(" in source("See it"),
         "nothing to see: show(…) or a cell tagged widget"),
        ("Break it", tagged("Break it", "check", "raises-exception"),
         "no cell tagged check or raises-exception: catch the bug"),
        ("Exercises", f"exercises/{chapter.name}.ipynb" in source("Exercises", "markdown"),
         f"no link to exercises/{chapter.name}.ipynb"),
        ("Quiz", 4 <= quiz <= 6, f"{quiz} <details> blocks: 4 to 6 questions, each with its answer folded"),
        ("What real models do", "|" in source("What real models do", "markdown")
         and "{cite" in source("What real models do", "markdown"),
         "no cited table: say what each model chose, and cite it"),
        ("References", len(source("References", "markdown").split()) > 5, "is empty: give papers and sections"),
    ]
    present = {c.section for c in chapter.cells}
    for section, holds, message in demands:
        if section in present and not holds:
            yield Fault("contents", None, f"{section}: {message}", section)
