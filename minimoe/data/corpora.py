"""Named texts that are there on every machine, and texts of your own.

`pydocs` the interpreter's reference topics (prose), `stdlib` its library sources (code), `docstrings` questions and answers
about its library, `worlds` generated text that is the same on every machine and Python version. Each document carries a domain label; held-out documents are never
training text, and no paragraph of theirs stands in it.
"""
from __future__ import annotations

import hashlib
import os
import random
import sysconfig
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from minimoe.config import Source
from minimoe.data import docstrings
from minimoe.data.held_out import SHORT, Corpus, Document, split, tenth, without
from minimoe.data.sources import Piece, files_of, kind, read_dataset, read_file
from minimoe.settings import ConfigError, need

NAMES = ("pydocs", "stdlib", "docstrings", "worlds", "tiny_shakespeare")
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def load_corpus(source: str | Source) -> Corpus:
    """The corpus of that name, or the texts at that path or of that dataset, read whole.

    Raises ConfigError naming what is known, for an unknown name, an empty file, or a file that is not UTF-8.

    >>> load_corpus("worlds").train[0].domain
    'arithmetic'
    """
    source = Source(corpus=source) if isinstance(source, str) else source
    name = label(source)
    need(source.corpus not in NAMES or not (source.field or source.subset or source.split),
         f"{source.corpus}: a bundled corpus has no field, subset or split; leave these out")
    if source.corpus in ("pydocs", "stdlib", "docstrings", "worlds"):
        corpus = {"pydocs": _pydocs, "stdlib": _stdlib, "docstrings": _docstrings, "worlds": worlds}[source.corpus]()
        parts = [tuple(d for d in docs if wanted(d.text, d.domain, source)) for docs in (corpus.train, corpus.held_out)]
        need(bool(parts[0]), _nothing_left(source, {d.domain for d in corpus.train}))
        corpus, documents = Corpus(name, *parts), [*parts[0], *parts[1]]
    else:
        documents = documents_of(source)
        corpus = None if source.held_out else split(name, documents)
    return Corpus(name, tuple(documents), without(documents, held_apart(source))) if source.held_out else corpus


def held_apart(source: Source) -> list[Document]:
    """The documents of a source's `held_out`."""
    return documents_of(held_apart_source(source))


def held_apart_source(source: Source) -> Source:
    """What a source's `held_out` names: a file here, or else another split of the same dataset."""
    if kind(source) == "dataset" and not Path(source.held_out).exists():
        return Source(corpus=source.corpus, subset=source.subset, split=source.held_out, field=source.field)
    return Source(corpus=source.held_out, field=source.field)


def label(source: Source) -> str:
    """What a source is called in the tree and the measurements."""
    path = Path(source.corpus)
    name = path.stem if path.is_file() else path.name if path.is_dir() else source.corpus
    return "/".join([name, *filter(None, (source.subset, source.split, "+".join(source.domains)))])


def documents_of(source: Source) -> list[Document]:
    """All documents of files or of a dataset, less what `percentage` and `domains` leave out."""
    documents, seen, of_one, not_empty = [], set(), None, False
    for name, piece in ((name.removesuffix(Path(name).suffix), piece) for name, read in parts_of(source) for piece in read(None)):
        seen.add(piece.domain)
        not_empty = not_empty or bool(piece.text.strip())
        if not wanted(piece.text, piece.domain, source):
            continue
        if piece.begins or of_one != name:
            documents.append((name, [piece.text], piece.domain))
        else:
            documents[-1][1].append(piece.text)
        of_one = name
    whole = [Document(f"{name} {i}" if i else name, "".join(texts), domain) for i, (name, texts, domain) in enumerate(documents)]
    need(not_empty, f"{source.corpus}: the file is empty; name a text file with something in it")
    need(any(d.text.strip() for d in whole), _nothing_left(source, seen))
    return whole


def _nothing_left(source: Source, known: set[str]) -> str:
    return (f"{source.corpus}: no text left by domains={list(source.domains)}, percentage={source.percentage:g}; its domains "
            f"are {', '.join(sorted(known))}")


def parts_of(source: Source) -> list[tuple[str, Callable[[object], Iterator[Piece]]]]:
    """The files of a source by name, each with what reads it from a place on; a dataset or a bundled text is one part.

    Raises ConfigError naming what is known, for a corpus that is nowhere.
    """
    if kind(source) == "dataset":
        return [(source.corpus, lambda at: read_dataset(source, at))]
    if source.corpus in ("pydocs", "docstrings", "worlds"):
        corpus = load_corpus(source.corpus)
        documents = [*corpus.train, *corpus.held_out]
        return [(source.corpus, lambda at: (Piece(d.text, d.domain, True, i) for i, d in enumerate(documents, 1)
                                            if i > (at or 0)))]
    if source.corpus == "tiny_shakespeare":
        files = {_shakespeare(): "prose"}
    else:
        files = dict.fromkeys(_library(), "code") if source.corpus == "stdlib" else files_of(source.corpus)
    need(bool(files), f"corpus {source.corpus!r}: neither a known name ({', '.join(NAMES)}) nor a file or folder that exists "
                      "nor the owner/name of a dataset")
    return [(f.name, lambda at, f=f, domain=domain: read_file(f, source, domain, at or 0)) for f, domain in files.items()]


def wanted(text: str, domain: str, source: Source) -> bool:
    """Whether `percentage` and `domains` keep this text: the same answer in every run.

    >>> 2400 < sum(wanted(str(i), "prose", Source(percentage=25.0)) for i in range(10_000)) < 2600
    True
    """
    if source.domains and domain not in source.domains or not text:
        return False
    return source.percentage == 100 or zlib.crc32(text.encode()) // 10 % 100_000 < source.percentage * 1000


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
    return _hold_out("stdlib", [Document(p.stem, p.read_text(encoding="utf-8"), "code") for p in _library()])


def _docstrings() -> Corpus:
    """Question and answer in two lines, each pair in one of its wordings; the pairs never seen are held out."""
    groups = ([], [])
    for pair in docstrings.pairs():
        questions = pair.questions()
        question = questions[zlib.crc32(pair.answer.encode()) % len(questions)]
        groups[pair.never_seen].append(Document(pair.name, f"{question}\n{pair.answer}\n", "docstrings"))
    return Corpus("docstrings", *map(tuple, groups))


def _library() -> list[Path]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [p for p in files if 2_000 < p.stat().st_size < 120_000]


def _hold_out(name: str, documents: list[Document]) -> Corpus:
    """Holds out about a tenth of the documents, and every paragraph stands only once.

    Paragraphs repeat between documents (39 % of the characters of pydocs): the first document in the order given keeps
    it, training documents before held-out ones, so that nothing held out has been read.
    """
    is_held = tenth(documents)
    seen: set[str] = set()
    kept: dict[str, Document] = {}
    for d in sorted(documents, key=lambda d: is_held[d.name]):
        paragraphs = []
        for p in d.text.split("\n\n"):
            if p.strip() not in seen or len(p.strip()) < SHORT:
                paragraphs.append(p)
            seen.add(p.strip())
        text = "\n\n".join(paragraphs).strip("\n") + "\n"
        if text.strip():
            kept[d.name] = Document(d.name, text, d.domain)
    train = tuple(d for d in kept.values() if not is_held[d.name])
    return Corpus(name, train, without(train, [d for d in kept.values() if is_held[d.name]]))


def _shakespeare() -> Path:
    path = Path(os.environ.get("MINIMOE_DATA", "dataset")) / "tinyshakespeare.txt"
    if not path.is_file():
        try:
            download(*SHAKESPEARE, path)
        except (OSError, ConfigError) as error:
            raise ConfigError(f"tiny_shakespeare: {path} is not there, and {SHAKESPEARE[0]} cannot be had ({error}); put "
                              "tinyshakespeare.txt into that folder, or name its folder in the variable MINIMOE_DATA") from None
    return path


def download(url: str, sha256: str, path: Path) -> None:
    """Fetches a file; only one that is whole comes to stand at `path`."""
    with urllib.request.urlopen(url, timeout=30) as reply:
        raw = reply.read()
    got = hashlib.sha256(raw).hexdigest()
    need(got == sha256, f"{len(raw)} bytes with SHA-256 {got[:12]}… came, not {sha256[:12]}…")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(raw)
    os.replace(part, path)


# --- generated worlds ------------------------------------------------------------------------------------------------
WORLD_WORDS = ("apple river stone garden window letter summer winter yellow market bridge silver button forest castle "
          "mirror pocket planet rabbit saddle ticket violin walnut zipper").split()
WORLD_NAMES = "Ann Ben Cleo Dan Eva Finn Gita Hugo".split()


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
        word = r.choice(WORLD_WORDS)
        letter = r.choice(word)
        lines.append(f"the letter {letter} stands in {word} {word.count(letter)} times")
    return "\n".join(lines) + "\n"


def _story(r: random.Random) -> str:
    a, b = r.sample(WORLD_NAMES, 2)
    lines = []
    for _ in range(6):
        thing, place = r.sample(WORLD_WORDS, 2)
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
