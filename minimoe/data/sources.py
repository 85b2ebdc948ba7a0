"""Files and datasets read as pieces of text, one after the other, from any place on: what a stream goes on from.

A row of a table is one piece; a text file is read in pieces of some kilobytes, cut between paragraphs where it can be.
"""
from __future__ import annotations

import csv
import glob
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from minimoe.config import Source
from minimoe.settings import ConfigError, need

PIECE = 16_384                                                  # bytes of a text file that are read at once
CUTS = (rb"\S\r?\n(?=\r?\n\S)", rb"\S\r?\n(?=\S)", rb"\n")     # at the first two, tokens are those of the uncut text


@dataclass(frozen=True)
class Piece:
    """Some text: its domain, whether a document begins with it, and the place `after` it to go on from (JSON)."""

    text: str
    domain: str
    begins: bool
    after: object
    messages: tuple[dict[str, str], ...] | None = None      # of role and content, where the row is a conversation


def kind(source: Source) -> str:
    """What a source is: "dataset" (of the Hugging Face hub, or saved to disk), "tokens" (.npy) or "files".

    >>> kind(Source(corpus="owner/name")), kind(Source(corpus="ids.npy"))
    ('dataset', 'tokens')
    """
    path = Path(source.corpus)
    if source.subset or source.split or (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "dataset"
    if path.suffix == ".npy":
        return "tokens"
    is_name = re.fullmatch(r"[\w-]+/[\w.-]+", source.corpus) and path.suffix not in READERS and not path.exists()
    return "dataset" if is_name else "files"


def files_of(corpus: str) -> dict[Path, str]:
    """The files that a path, folder or pattern names, sorted, each with its domain: the subfolder that it lies in."""
    path = Path(corpus)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*.*") if p.suffix in READERS and p.is_file())
        need(bool(found), f"{path}: no {', '.join(READERS)} file in this folder")
    else:
        found = sorted(map(Path, glob.glob(corpus, recursive=True)))
    for file in found:
        need(file.suffix in READERS or path == file, f"{file}: not a text that is known; known are {', '.join(READERS)}")
    top = Path(os.path.commonpath(found)) if len(found) > 1 else found[0].parent if found else path
    inside = {f: f.parent.relative_to(path if path.is_dir() else top).parts for f in found}
    return {f: parts[0] if parts else "text" for f, parts in inside.items()}


def read_file(path: Path, source: Source, domain: str = "text", start: int = 0) -> Iterator[Piece]:
    """The pieces of a file from a place on. Raises ConfigError naming file and place for what cannot be read.

    >>> [piece.text for piece in read_file(Path("pyproject.toml"), Source())][0][:14]
    '[build-system]'
    """
    if start == 0 and path.stat().st_size == 0:
        raise ConfigError(f"{path}: the file is empty; name a text file with something in it")
    return READERS.get(path.suffix, _text)(path, source, domain, start)


def read_text(path: Path) -> str:
    """A whole text file. Raises ConfigError where it is missing, empty or not UTF-8.

    >>> read_text(Path("pyproject.toml"))[:14]
    '[build-system]'
    """
    need(path.is_file(), f"{path}: no such file")
    text = _decode(path.read_bytes(), path, 0)
    need(bool(text.strip()), f"{path}: the file is empty; name a text file with something in it")
    return text


def _text(path: Path, source: Source, domain: str, start: int) -> Iterator[Piece]:
    with open(path, "rb") as file:
        file.seek(start)
        while raw := file.read(PIECE):
            if len(raw) == PIECE:
                raw = raw[:_cut(raw)]
                file.seek(start + len(raw))
            yield Piece(_decode(raw, path, start), domain, start == 0, start := start + len(raw))


def _cut(raw: bytes) -> int:
    """Where to end a piece: after a paragraph, else after a line, else before a character."""
    for pattern in CUTS:
        if ends := [m.end() for m in re.finditer(pattern, raw[len(raw) // 2:])]:
            return len(raw) // 2 + ends[-1]
    return next((i for i in range(len(raw) - 1, len(raw) - 4, -1) if raw[i] & 0xC0 != 0x80), len(raw))


def _decode(raw: bytes, path: Path, start: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {start + error.start}; convert the file to UTF-8") from None


def _lines(path: Path, start: int) -> Iterator[tuple[str, int]]:
    """Lines with the place after each."""
    with open(path, "rb") as file:
        file.seek(start)
        for raw in file:
            yield _decode(raw, path, start), (start := start + len(raw))


def _line_number(path: Path, after: int) -> int:
    with open(path, "rb") as file:                      # counted only when an error is to be told
        return sum(1 for _ in iter(lambda: file.tell() < after and file.readline(), False))


def _jsonl(path: Path, source: Source, domain: str, start: int) -> Iterator[Piece]:
    for line, after in _lines(path, start):
        if not line.strip():
            continue
        where = lambda: f"{path}, line {_line_number(path, after)}"             # noqa: B023
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where()}: not JSON ({error.msg}, column {error.colno}); mend or remove that line") from None
        yield _row(row, source, domain, after, where)


def _json(path: Path, source: Source, domain: str, start: int) -> Iterator[Piece]:
    try:
        rows = json.loads(_decode(path.read_bytes(), path, 0))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    rows = rows if isinstance(rows, list) else [rows]
    for i in range(start, len(rows)):
        yield _row(rows[i], source, domain, i + 1, lambda: f"{path}, entry {i + 1}")        # noqa: B023


def _csv(path: Path, source: Source, domain: str, start: int) -> Iterator[Piece]:
    csv.field_size_limit(2**31 - 1)                     # the module's own limit is 128 kB a field
    header = next(csv.reader(line.lstrip("\ufeff") for line, _ in _lines(path, 0)))
    _choose(header, source, lambda: str(path), "column")
    place = [start]

    def lines() -> Iterator[str]:
        for line, place[0] in _lines(path, start):
            yield line

    where = lambda: f"{path}, line {_line_number(path, place[0])}"
    rows, header_to_come = csv.reader(lines()), start == 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ConfigError(f"{where()}: not CSV ({error}); mend or remove that line") from None
        if row and not header_to_come:
            need(len(row) == len(header), f"{where()}: {len(row)} columns, not {len(header)} as in the first line")
            yield _row(dict(zip(header, row)), source, domain, place[0], where, "column")
        header_to_come = False


def _parquet(path: Path, source: Source, domain: str, start: int) -> Iterator[Piece]:
    try:
        file = extra("pyarrow.parquet").ParquetFile(path)
    except (OSError, ValueError) as error:              # pyarrow's own errors are ValueErrors
        raise ConfigError(f"{path}: not a parquet file ({str(error)[:80]})") from None
    names = file.schema_arrow.names
    wanted = [_choose(names, source, lambda: str(path), "column"), *(n for n in names if n == "domain")]
    number = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number + rows <= start:                      # a whole group was read before: skipped without reading
            number += rows
            continue
        for batch in file.iter_batches(64, row_groups=[group], columns=wanted):
            for row in batch.to_pylist():
                number += 1
                if number > start:
                    yield _row(row, source, domain, number, lambda: f"{path}, row {number}", "column")     # noqa: B023


READERS: dict[str, Callable[[Path, Source, str, int], Iterator[Piece]]] = {
    ".txt": _text, ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def read_dataset(source: Source, state: dict | None = None) -> Iterator[Piece]:
    """The rows of a dataset from a saved state on: a Hugging Face name, or a folder here, through `datasets`."""
    datasets, path, split = extra("datasets"), Path(source.corpus), source.split or "train"
    with _told(source):
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data = datasets.load_from_disk(source.corpus)
            if isinstance(data, dict):
                need(split in data, f"{source.corpus}: no split {split!r}; there are {', '.join(data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(source.corpus, source.subset, split=split, streaming=source.streaming)
        rows = data.to_iterable_dataset() if isinstance(data, datasets.Dataset) else data
        if state:
            rows.load_state_dict(state)
        for row in rows:
            yield _row(row, source, "text", rows.state_dict(), lambda: f"{source.corpus}, split {split}")


@contextmanager
def _told(source: Source) -> Iterator[None]:
    """Whatever a library says about a dataset that cannot be had, in one line."""
    try:
        yield
    except (ConfigError, GeneratorExit):
        raise
    except Exception as error:                          # of datasets, huggingface_hub, pyarrow, the network
        said = " ".join(str(error).split())[:160]
        raise ConfigError(f"corpus {source.corpus!r}: neither a file here nor a dataset that can be read "
                          f"({type(error).__name__}: {said}); look at its name, subset, split, and the network") from None


def extra(module: str) -> ModuleType:
    """A module of the extra `data`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{module.partition('.')[0]} is not installed, and this source needs it: "
                          "pip install minimoe[data]") from None


def _choose(names: list[str], source: Source, where: Callable[[], str], word: str) -> str:
    """The field that holds the text."""
    if source.field is None:
        found = next((n for n in ("text", "messages", "conversations") if n in names), None)
    else:
        found = source.field if source.field in names else None
    if found is None:
        raise ConfigError(f"{where()}: no {word} {source.field or 'text'!r}; there are {', '.join(map(str, names))}: "
                          "name one in field")
    return found


def _row(row: object, source: Source, domain: str, after: object, where: Callable[[], str], word: str = "field") -> Piece:
    value = row
    if isinstance(row, dict):
        value = row[_choose(list(row), source, where, word)]
        value = "" if value is None else value
        domain = row["domain"] if isinstance(row.get("domain"), str) else domain
    messages = None
    if isinstance(value, list):                         # a chat
        try:
            messages = tuple({"role": m.get("role", m.get("from")), "content": m.get("content", m.get("value"))} for m in value)
            value = "\n".join(f"{m['role']}: {m['content']}" for m in messages) + "\n"
        except AttributeError:
            value = None
    if not isinstance(value, str):
        raise ConfigError(f"{where()}: {word} is neither a text nor chat messages (a list of role and content)")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where()}: half a surrogate pair, which is no character; mend that text") from None
    return Piece(value, domain, True, after, messages)
