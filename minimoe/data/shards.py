"""Token shards: a text encoded once, as files of raw numbers that training reads in place (chapter 9).

    index.json                  what is in the others; written last, so a folder without it was never finished
    tokenizer.json              made the tokens
    shard-00000.bin …           uint16 or uint32, little endian, end-of-text before each document
    held_out-00000.bin          whole documents of which no paragraph stands in the shards

Which tokens a step reads is a function of (seed, mixture, step), so going on costs no reading of what came before.
"""
from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minimoe.config import Source
from minimoe.data.corpora import load_corpus
from minimoe.data.held_out import Corpus, Document, Overlap, less
from minimoe.data.stream import RawStream
from minimoe.data.tokenizer import Tokenizer, make_tokenizer
from minimoe.settings import ConfigError, need

FORMAT = 1
UNFINISHED = ".index.json.part"     # stands in a folder from its beginning until all is there
LARGE = 1 << 25             # bytes: a text file beyond this is read piece by piece
CHUNK = 1 << 20             # tokens looked at at once


class Shards:
    """The training tokens of a folder as one array that stays on disk: `len` and `take`, all that a `Stream` needs."""

    def __init__(self, folder: str | Path):
        self.folder, self.index = Path(folder), read_index(folder)
        dtype, self.maps = np.dtype(self.index["dtype"]), []
        for entry in [*self.index["shards"], *self.index["held_out"]]:
            file = self.folder / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["tokens"] * dtype.itemsize:
                raise ConfigError(f"{file}: missing, or not of the size that index.json says; minimoe data verify {folder}")
        self.maps = [np.memmap(self.folder / s["file"], dtype, mode="r") for s in self.index["shards"]]
        self.ends = list(itertools.accumulate(len(m) for m in self.maps))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.take(range(*part.indices(len(self))))

    def __reduce__(self) -> tuple:              # a copy for another process opens the files, and does not carry them
        return Shards, (self.folder,)

    def take(self, indices: range, axis: None = None, out: None = None, mode: str = "wrap") -> np.ndarray:
        """As numpy's: the tokens at consecutive places, around the ring and across the files, reading only those."""
        parts, start, left = [], indices.start % len(self), len(indices)
        while left:
            i = bisect.bisect_right(self.ends, start)
            begin = start - self.ends[i] + len(self.maps[i])
            parts.append(self.maps[i][begin:begin + left])
            left, start = left - len(parts[-1]), (start + len(parts[-1])) % len(self)
        return np.concatenate(parts)

    def held_out(self, tokenizer: Tokenizer) -> tuple[Document, ...]:
        """What is measured on, as text."""
        tokens = np.concatenate([np.empty(0, int), *(np.fromfile(self.folder / e["file"], self.index["dtype"])
                                                     for e in self.index["held_out"])])
        ends = np.cumsum([d["tokens"] for d in self.index["held_out_documents"]], dtype=int)
        texts = [tokenizer.decode(ids.tolist()) for ids in np.split(tokens, ends)[:-1]]
        return tuple(Document(d["name"], text, d["domain"]) for d, text in zip(self.index["held_out_documents"], texts))


def is_shards(path: str | Path) -> bool:
    """Whether a folder holds token shards, finished or not."""
    index = Path(path) / "index.json"
    return any((Path(path) / name).is_file() for name in (UNFINISHED, "shard-00000.bin")) or (
        index.is_file() and b'"format"' in index.read_bytes()[:200])


def read_index(folder: str | Path) -> dict:
    """The index of a shard folder. ConfigError where the folder is none, was not finished, or the index is damaged."""
    file = Path(folder) / "index.json"
    need(is_shards(folder), f"{folder}: no token shards here; minimoe data prepare makes them")
    need(file.is_file(), f"{folder}: not finished, index.json is missing; run the same minimoe data prepare or merge again")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        need(index["format"] == FORMAT and index["dtype"] in ("<u2", "<u4") and len(index["shards"]) > 0,
             f"{file}: format {index['format']}, and this minimoe reads {FORMAT}; prepare the shards again")
        for entry in [*index["shards"], *index["held_out"]]:
            need({"file", "tokens", "documents", "sha256"} <= entry.keys() and entry["tokens"] >= 1, f"{file}: damaged")
        missing = {"vocab_size", "tokenizer", "tokens", "documents", "domains", "held_out_documents"} - index.keys()
        need(not missing, f"{file}: {', '.join(missing)} missing; prepare the shards again")
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: damaged ({error!r:.80}); prepare the shards again") from None
    return index


def fitting_tokenizer(folders: Iterable[Shards], given: Tokenizer | None, kind: str) -> Tokenizer:
    """The one tokenizer of all shards of a mixture; `given`, or the one that `kind` names, must be the same. Of kinds that
    learn from the training text ("bpe", "characters") the shards have theirs."""
    for shards in folders:
        own = Tokenizer.load(shards.folder)
        learned = kind == "bpe" or kind == "characters" and own.characters_only
        given = given or (own if learned else make_tokenizer(kind, [], 0))
        need(own.fingerprint() == given.fingerprint(),
             f"{shards.folder}: made with another tokenizer; train with --tokenizer {shards.folder}, or prepare it again with "
             "--tokenizer")
    return given


# --- writing ---------------------------------------------------------------------------------------------------------
class Writer:
    """Writes tokens into files of `size` tokens, each under a temporary name until it is whole, and counts them."""

    def __init__(self, folder: Path, stem: str, tokenizer: Tokenizer, size: int):
        self.folder, self.stem, self.mark, self.size = folder, stem, tokenizer.end_of_text, size
        self.dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        self.entries: list[dict] = []
        self.file = None

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.file is None:
                self.name = f"{self.stem}-{len(self.entries):05d}.bin"
                self.file = open(self.folder / f".{self.name}.part", "wb")
                self.sha, self.tokens, self.documents = hashlib.sha256(), 0, 0
            part, tokens = np.split(tokens, [self.size - self.tokens])
            raw = part.astype(self.dtype).tobytes()
            self.file.write(raw)
            self.sha.update(raw)
            self.tokens += len(part)
            self.documents += int((part == self.mark).sum()) if self.mark is not None else 0
            if self.tokens == self.size:
                self.finish()

    def finish(self) -> list[dict]:
        """Closes the file under way; gives an index entry for each that was written."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.folder / f".{self.name}.part", self.folder / self.name)
            self.entries.append({"file": self.name, "tokens": self.tokens, "documents": self.documents,
                                 "sha256": self.sha.hexdigest()})
            self.file = None
        return self.entries


def prepare(corpora: Sequence[str], out: str | Path, tokenizer: str = "bpe", tokenizer_vocab: int = 4096,
            shard_tokens: int = 1 << 24) -> dict:
    """Encodes corpora (names or paths) into shards of `shard_tokens` tokens, and returns the index.

    Memory is bounded for text files over 32 MB, which are read piece by piece: their held-out pieces are chosen by hash.
    Raises ConfigError for what `load_corpus` refuses, a folder that is in use, or a vocabulary that misses a character.
    """
    need(len(corpora) > 0 and shard_tokens >= 1, "name at least one corpus, and shard_tokens of at least 1")
    need(tokenizer_vocab >= 261, f"tokenizer_vocab={tokenizer_vocab}: at least 261 (bytes and specials)")
    need_free(out)
    sources = [_open(name) for name in corpora]
    held = [d for s in sources for d in s.held_out]
    overlap, found = Overlap(held), set()
    made = make_tokenizer(tokenizer, (d.text for s in sources for d, _ in _train(s)), tokenizer_vocab)
    out = start_folder(out)
    writer, domains = Writer(out, "shard", made, shard_tokens), {}
    with gone_after_an_error(out), tqdm(desc="tokens", unit="token", unit_scale=True, disable=None) as bar:
        pairs = (pair for s in sources for pair in _train(s))
        while batch := list(itertools.islice(pairs, 64)):
            found = found.union(*(overlap.found(d.text) for d, _ in batch))
            for (d, begins), ids in zip(batch, made.arrays(d.text for d, _ in batch)):
                if begins and made.end_of_text is not None:
                    ids = np.append(np.int32(made.end_of_text), ids)
                writer.add(ids)
                domains[d.domain] = domains.get(d.domain, 0) + len(ids)
                bar.update(len(ids))
        return _finish(out, made, writer, less(held, found), domains, [s.name for s in sources])


def merge(folders: Sequence[str | Path], out: str | Path, strategy: str = "proportional", ratios: Sequence[float] = (),
          shard_tokens: int = 1 << 24) -> dict:
    """Shards made of several, and their index. `proportional` takes every token, `equal` as many from each, `weighted` in
    the given ratios; no token twice, so the source that is shortest for its share sets the size, and of the others the
    beginning is taken. Domains of a source that is cut are counted by its share.

    Raises ConfigError, naming the folder, for different tokenizers.
    """
    parts = [Shards(folder) for folder in folders]
    need(len({p.folder.resolve() for p in parts}) == len(parts) > 1, "merge: name at least two folders, each once")
    for p in parts[1:]:
        need(p.index["tokenizer"] == parts[0].index["tokenizer"],
             f"{p.folder}: made with another tokenizer than {parts[0].folder}; prepare both with the same --tokenizer")
    if strategy == "weighted":
        need(len(ratios) == len(parts) and all(r > 0 for r in ratios),
             f"ratios={list(ratios)}: one above 0 for each of the {len(parts)} folders")
    else:
        need(not ratios, f"ratios belong to strategy=weighted, not to {strategy}")
    shares = {"weighted": list(ratios), "equal": [1.0] * len(parts), "proportional": [len(p) for p in parts]}[strategy]
    rounds = min(len(p) / share for p, share in zip(parts, shares))
    counts = [min(len(p), round(rounds * share)) for p, share in zip(parts, shares)]
    need(min(counts) > 0, f"ratios={list(ratios)}: nothing would be taken of {parts[int(np.argmin(counts))].folder}")
    tokenizer, out = Tokenizer.load(parts[0].folder), start_folder(out)
    held = [d for p in parts for d in p.held_out(tokenizer)]
    reach = max((len(tokenizer.encode(d.text)) for d in held), default=0)        # so that no paragraph is missed at a seam
    overlap, found = Overlap(held), set()
    writer, domains = Writer(out, "shard", tokenizer, shard_tokens), {}
    with tqdm(total=sum(counts), desc="tokens", unit="token", unit_scale=True, disable=None) as bar:
        for p, count in zip(parts, counts):
            for start in range(0, count, CHUNK):
                found |= overlap.found(tokenizer.decode(p[start:min(count, start + CHUNK + reach)].tolist()))
                writer.add(p[start:min(count, start + CHUNK)])
                bar.update(min(CHUNK, count - start))
            ends = np.cumsum(list(p.index["domains"].values())) * count // len(p)
            for domain, n in zip(p.index["domains"], np.diff(ends, prepend=0)):
                domains[domain] = domains.get(domain, 0) + int(n)
    return _finish(out, tokenizer, writer, less(held, found), domains, [p.folder.name for p in parts])


@contextmanager
def gone_after_an_error(out: Path) -> Iterator[None]:
    """Takes the folder away where a text turns out to be one that cannot be encoded; a kill leaves it to be begun anew."""
    try:
        yield
    except ValueError:
        shutil.rmtree(out)
        raise


def need_free(out: str | Path) -> None:
    """ConfigError where a folder holds something else than an interrupted prepare."""
    out = Path(out)
    need((out / UNFINISHED).is_file() or not out.exists() or out.is_dir() and not any(out.iterdir()),
         f"{out} exists already: name another --out")


def start_folder(out: str | Path) -> Path:
    """An empty folder to write shards into; what an interrupted prepare left behind is taken away."""
    out = Path(out)
    if (out / UNFINISHED).is_file():
        for pattern in ("shard-*.bin", "held_out-*.bin", ".*.part", "tokenizer.json"):
            for file in out.glob(pattern):
                file.unlink()
    need_free(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).touch()
    return out


def _finish(out: Path, tokenizer: Tokenizer, writer: Writer, held: Sequence[Document], domains: dict[str, int],
            sources: list[str]) -> dict:
    shards, held_writer, documents = writer.finish(), Writer(out, "held_out", tokenizer, 1 << 40), []
    need(shards, f"{', '.join(sources)}: no token to write")
    mark = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for d in held:
        ids = np.array(mark + tokenizer.encode(d.text), dtype=np.int32)
        held_writer.add(ids)
        documents.append({"name": d.name, "domain": d.domain, "tokens": len(ids)})
    tokenizer.save(out / "tokenizer.json")
    index = {"format": FORMAT, "dtype": writer.dtype, "vocab_size": tokenizer.vocab_size,
             "tokenizer": hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest(), "sources": sources,
             "tokens": sum(s["tokens"] for s in shards), "documents": sum(s["documents"] for s in shards),
             "domains": domains, "shards": shards, "held_out": held_writer.finish(), "held_out_documents": documents}
    (out / UNFINISHED).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(out / UNFINISHED, out / "index.json")
    return index


def _open(name: str) -> Corpus | RawStream:
    """A corpus read whole, or a large file read piece by piece."""
    path = Path(name)
    large = path.is_file() and path.suffix != ".json" and path.stat().st_size > LARGE       # a .json is read whole or not at all
    return RawStream(Source(corpus=name, streaming=True)) if large else load_corpus(name)


def _train(source: Corpus | RawStream) -> Iterator[tuple[Document, bool]]:
    """Documents, or pieces of one, and whether end-of-text goes before."""
    return source.texts() if isinstance(source, RawStream) else ((d, True) for d in source.train)
