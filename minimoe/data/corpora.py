"""Named texts that are there on every machine, and text files of your own.

`pydocs` the interpreter's reference topics (prose), `stdlib` its library sources (code), `worlds` generated text that is
the same on every machine and Python version. Each document carries a domain label; held-out documents are never
training text, and no paragraph of theirs stands in it.
"""
from __future__ import annotations

import os
import random
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

from minimoe.settings import ConfigError

HELD_OUT_LIMIT = 65_536      # characters: more would only make every look at the held-out text slower
NAMES = ("pydocs", "stdlib", "worlds", "tiny_shakespeare")


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


def load_corpus(name: str) -> Corpus:
    """The corpus of that name, or the text file or folder at that path.

    Raises ConfigError naming what is known, for an unknown name, an empty file, or a file that is not UTF-8.

    >>> load_corpus("worlds").train[0].domain
    'arithmetic'
    """
    if name in ("pydocs", "stdlib", "worlds"):
        return {"pydocs": _pydocs, "stdlib": _stdlib, "worlds": worlds}[name]()
    if name == "tiny_shakespeare":
        path = Path(os.environ.get("MINIMOE_DATA", "dataset")) / "tinyshakespeare.txt"
        if not path.is_file():
            raise ConfigError(f"tiny_shakespeare: {path} is not there; put tinyshakespeare.txt into that folder, "
                              "or name its folder in the variable MINIMOE_DATA")
        return _split_text("tiny_shakespeare", _read(path), "prose")
    path = Path(name)
    if path.is_file():
        return _split_text(path.stem, _read(path), "text")
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise ConfigError(f"{path}: no .txt file in this folder")
        return _hold_out(path.name, [Document(f.stem, _read(f), "text") for f in files])
    raise ConfigError(f"corpus {name!r}: neither a known name ({', '.join(NAMES)}) nor a file or folder that exists")


def worlds(documents: int = 1200, seed: int = 0) -> Corpus:
    """Small generated worlds: sums, letter counts, stories and brackets; every tenth document is held out.

    >>> worlds(4).train[0].text.splitlines()[0]
    '24 * 18 = 432'
    """
    makers = (("arithmetic", _sums), ("letters", _letters), ("stories", _story), ("brackets", _brackets))
    docs = []
    for i in range(documents):
        domain, make = makers[i % len(makers)]
        docs.append(Document(f"{domain} {i}", make(random.Random(f"{seed} {i}")), domain))
    held = [d for i, d in enumerate(docs) if i // len(makers) % 10 == 9]
    return Corpus("worlds", tuple(d for d in docs if d not in held), tuple(held))


# --- the interpreter's own texts -------------------------------------------------------------------------------------
def _pydocs() -> Corpus:
    from pydoc_data.topics import topics  # half a megabyte: only when asked for

    return _hold_out("pydocs", [Document(name, text, "prose") for name, text in sorted(topics.items())])


def _stdlib() -> Corpus:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(folder.glob("*.py")) if 2_000 < p.stat().st_size < 120_000]
    return _hold_out("stdlib", [Document(p.stem, p.read_text(encoding="utf-8"), "code") for p in files])


def _hold_out(name: str, documents: list[Document]) -> Corpus:
    """Holds out about a tenth of the documents, by a hash of their names and 64 kB at most, and every paragraph stands
    only once.

    Paragraphs repeat between documents (39 % of the characters of pydocs): the first document in the order given keeps
    it, training documents before held-out ones, so that nothing held out has been read.
    """
    is_held, size = {}, 0
    for d in documents:
        is_held[d.name] = zlib.crc32(d.name.encode()) % 10 == 0 and size + len(d.text) <= HELD_OUT_LIMIT
        size += len(d.text) * is_held[d.name]
    seen: set[str] = set()
    kept: dict[str, Document] = {}
    for d in sorted(documents, key=lambda d: is_held[d.name]):
        paragraphs = []
        for p in d.text.split("\n\n"):
            if p.strip() not in seen or len(p.strip()) < 40:
                paragraphs.append(p)
            seen.add(p.strip())
        text = "\n\n".join(paragraphs).strip("\n") + "\n"
        if text.strip():
            kept[d.name] = Document(d.name, text, d.domain)
    train = tuple(d for d in kept.values() if not is_held[d.name])
    return Corpus(name, train, _without(train, [d for d in kept.values() if is_held[d.name]]))


def _split_text(name: str, text: str, domain: str) -> Corpus:
    """One long text: the last tenth is held out, cut at a line."""
    cut = text.rfind("\n", 0, int(len(text) * 0.9)) + 1 or int(len(text) * 0.9)
    train = (Document(name, text[:cut], domain),)
    return Corpus(name, train, _without(train, [Document(f"{name}, last tenth", text[cut:], domain)]))


def _without(train: tuple[Document, ...], held_out: list[Document]) -> tuple[Document, ...]:
    """Held-out documents less the paragraphs of 40 characters or more that stand anywhere in the training text."""
    everything = "\0".join(d.text for d in train)
    result = []
    for d in held_out:
        own = [p for p in d.text.split("\n\n") if len(p.strip()) < 40 or p.strip() not in everything]
        if "".join(own).strip():
            result.append(Document(d.name, "\n\n".join(own), d.domain))
    return tuple(result)


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from None
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty; name a text file with something in it")
    return text


# --- generated worlds ------------------------------------------------------------------------------------------------
_WORDS = ("apple river stone garden window letter summer winter yellow market bridge silver button forest castle "
          "mirror pocket planet rabbit saddle ticket violin walnut zipper").split()
_NAMES = "Ann Ben Cleo Dan Eva Finn Gita Hugo".split()


def _sums(r: random.Random) -> str:
    lines = []
    for _ in range(24):
        a, b = r.randrange(2, 50), r.randrange(2, 50)
        sign = r.choice("+-*")
        lines.append(f"{a} {sign} {b} = {a + b if sign == '+' else a - b if sign == '-' else a * b}")
    return "\n".join(lines) + "\n"


def _letters(r: random.Random) -> str:
    lines = []
    for _ in range(9):
        word = r.choice(_WORDS)
        letter = r.choice(word)
        lines.append(f"the letter {letter} stands in {word} {word.count(letter)} times")
    return "\n".join(lines) + "\n"


def _story(r: random.Random) -> str:
    a, b = r.sample(_NAMES, 2)
    lines = []
    for _ in range(6):
        thing, place = r.sample(_WORDS, 2)
        lines.append(r.choice((
            f"{a} found a {thing} near the {place}. {b} wanted the {thing} too.",
            f"{b} went to the {place} and asked {a} for the {thing}.",
            f"In the morning {a} and {b} put the {thing} behind the {place}.",
            f"\"Is this your {thing}?\" said {a}. \"No,\" said {b}, \"it is from the {place}.\"")))
    return "\n".join(lines) + "\n"


def _brackets(r: random.Random) -> str:
    lines = []
    for _ in range(12):
        line, open_ = "", []
        while len(line) + len(open_) < 30:
            if open_ and r.random() < 0.48:
                line += open_.pop()
            else:
                kind = r.choice(("()", "[]", "{}", "<>"))
                line += kind[0]
                open_.append(kind[1])
        lines.append(line + "".join(reversed(open_)))
    return "\n".join(lines) + "\n"
