"""What is learned from and what is only measured on: no held-out paragraph of 40 characters stands in training text."""
from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

HELD_OUT_LIMIT = 65_536      # characters: more would only make every look at the held-out text slower
SHORT = 40                   # characters: a paragraph below this may stand in training and held-out text alike
LONG = 4_000                 # characters: of a paragraph above this each line counts as one


@dataclass(frozen=True)
class Document:
    """One text with its name and its domain ("prose", "code", "arithmetic" …)."""

    name: str
    text: str
    domain: str


@dataclass(frozen=True)
class Corpus:
    """A named text, already split: `train` is learned from, `held_out` only measured on."""

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def tenth(documents: list[Document]) -> dict[str, bool]:
    """Which documents are held out: about a tenth by a hash of their names, and 64 kB at most."""
    is_held, size = {}, 0
    for d in documents:
        is_held[d.name] = zlib.crc32(d.name.encode()) % 10 == 0 and size + len(d.text) <= HELD_OUT_LIMIT
        size += len(d.text) * is_held[d.name]
    return is_held


def split(name: str, documents: list[Document]) -> Corpus:
    """Texts of one's own: some documents are held out, or of a single one the last tenth, cut at a line."""
    is_held = tenth(documents)
    held = [d for d in documents if is_held[d.name]]
    train = [d for d in documents if not is_held[d.name]]
    if len(documents) > 1 and not held and len(train[-1].text) <= HELD_OUT_LIMIT:
        held = [train.pop()]
    if not held or not train:
        last = documents[-1]
        cut = last.text.rfind("\n", 0, int(len(last.text) * 0.9)) + 1 or int(len(last.text) * 0.9)
        train = [*documents[:-1], replace(last, text=last.text[:cut])]
        held = [Document(f"{last.name}, last tenth", last.text[cut:], last.domain)]
    return Corpus(name, tuple(train), without(train, held))


def without(train: Iterable[Document], held_out: Iterable[Document]) -> tuple[Document, ...]:
    """Held-out documents less the paragraphs of 40 characters or more that stand anywhere in the training text."""
    overlap = Overlap(held_out)
    return less(held_out, set().union(*(overlap.found(d.text) for d in train)))


def less(held_out: Iterable[Document], found: set[str]) -> tuple[Document, ...]:
    """The documents without these paragraphs."""
    result = [replace(d, text=leave_out(d.text, lambda p: p.strip() in found)) for d in held_out]
    return tuple(d for d in result if d.text.strip())


def paragraphs(text: str) -> list[str]:
    """The text in parts, each with the blank lines after it; of a very long paragraph every line is a part.

    >>> len(paragraphs("one" + chr(10) * 3 + "two")), len(paragraphs("line" + chr(10) * 2)), len(paragraphs(("x" * 99 + chr(10)) * 50))
    (2, 1, 50)
    """
    found = re.split(r"((?:\r?\n){2,})", text)
    parts = []
    for body, blank in zip(found[::2], [*found[1::2], ""]):
        lines = body.splitlines(keepends=True) if len(body) > LONG else [body]
        parts += [*lines[:-1], lines[-1] + blank] if lines else [blank]
    return [p for p in parts if p]


def leave_out(text: str, unwanted: Callable[[str], bool]) -> str:
    """The text without some of its paragraphs."""
    parts = paragraphs(text)
    kept = [p for p in parts if not unwanted(p)]
    if len(kept) == len(parts):
        return text
    return "".join(kept) if kept and kept[-1] is parts[-1] else "".join(kept).rstrip("\r\n")


def hash_of(paragraph: str) -> str:
    """By what a paragraph is known again.

    >>> hash_of("a paragraph")
    '0ca6cc471ca5'
    """
    return hashlib.sha256(paragraph.encode()).hexdigest()[:12]


class Overlap:
    """The paragraphs of some documents, and which of them stand in another text, found in one pass over it.

    >>> Overlap([Document("d", "A paragraph that is long enough to be looked for.", "")]).found("It is short.")
    set()
    """

    def __init__(self, documents: Iterable[Document]):
        self.of_gram: dict[int, list[str]] = {}
        for p in {p.strip() for d in documents for p in paragraphs(d.text) if len(p.strip()) >= SHORT}:
            raw = p.encode()[:4096]
            best = max(range(len(raw) - 7), key=lambda i: len(set(raw[i:i + 8])))       # eight bytes that tell much
            self.of_gram.setdefault(int.from_bytes(raw[best:best + 8], "little"), []).append(p)
        self.table = np.zeros(1 << 20, bool)
        self.table[_slot(np.array(list(self.of_gram), np.uint64))] = True

    def found(self, text: str) -> set[str]:
        raw, found = text.encode(), set()
        for start in range(0, (len(raw) - 7) if self.of_gram else 0, 1 << 20):
            n = min(1 << 20, len(raw) - 7 - start)
            grams = np.ndarray((n,), "<u8", raw, start, (1,))           # the eight bytes from each place on
            for gram in set(grams[self.table[_slot(grams)]].tolist()):
                found |= {p for p in self.of_gram.get(gram, ()) if p not in found and p in text}
        return found


    def of_hashes(self, hashes: Iterable[str]) -> set[str]:
        """Its paragraphs that have one of these hashes."""
        wanted = set(hashes)
        return {p for group in self.of_gram.values() for p in group if hash_of(p) in wanted}


def _slot(grams: np.ndarray) -> np.ndarray:
    return (grams * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)
