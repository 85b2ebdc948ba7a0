"""Tokens as a reader can see them: spaces, line ends and characters without a shape of their own get one."""
from __future__ import annotations

import unicodedata

from minimoe.explore.trace import RoutingTrace

MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}


def visible(text: str) -> str:
    """The text with a mark for each space, tab and line end, a code for what has no shape, a base for a lone accent.

    >>> visible(" if\\n"), visible("a\\u200b"), visible("\\u0301")
    ('·if↵', 'a‹200B›', '◌́')
    """
    out = []
    for i, c in enumerate(text):
        kind = unicodedata.category(c)
        if c in MARKS:
            out.append(MARKS[c])
        elif kind[0] in "CZ" or (not i and 0xFE00 <= ord(c) <= 0xFE0F):      # controls, joiners, odd spaces, selectors
            out.append(f"‹{ord(c):04X}›")
        else:
            out.append("◌" + c if kind[0] == "M" and not i else c)
    return "".join(out)


def labels(trace: RoutingTrace) -> list[str]:
    """What each token is shown as; a token that holds part of a character shows the character and which part.

    >>> layers = ()
    >>> labels(RoutingTrace(" é", (" ", "é", ""), ("", "1/2", "2/2"), (1, 2, 3), 0, 4, 2, "softmax", 1, layers))
    ['·', '‹é 1/2›', '‹é 2/2›']
    """
    shown, cut = [], ""
    for token, part, i in zip(trace.tokens, trace.parts, trace.ids):
        if not part:
            shown.append(visible(token) or f"‹id {i}›")
            continue
        before, after = "", ""
        if part.startswith("1/"):
            before, cut = visible(token[:-1]), token[-1:]
        else:
            after = visible(token)
        shown.append(f"{before}‹{visible(cut).strip('‹›')} {part}›{after}")
    return shown


def display_width(label: str) -> int:
    """Columns of a monospaced font that a label takes: wide characters count two, accents none.

    >>> display_width("ab"), display_width("漢"), display_width("e\\u0301")
    (2, 2, 1)
    """
    wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in label)
    return wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in label)
