"""A source that is read while training: text after text from files or a dataset, tokenized and packed on the fly.

Memory holds one piece of text and the tokens that are not used up. Where the reading stands is saved with a checkpoint:
the file and the place in it, and the tokens left over, so that going on reads nothing twice.
"""
from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from minimoe.config import Source
from minimoe.data.corpora import held_apart, label, parts_of, wanted
from minimoe.data.held_out import HELD_OUT_LIMIT, Document, Overlap, leave_out
from minimoe.data.mixture import permutation
from minimoe.data.sources import Piece
from minimoe.data.tokenizer import Tokenizer
from minimoe.settings import ConfigError, need

LOOK = 100          # times the held-out size: how far into a stream its held-out documents are looked for


class RawStream:
    """The endless tokens of a source, epoch after epoch, files in another order in each; window i begins at token i T.

    A window is a function of (source, seed, i). Windows asked for in ascending order cost what is read; one that lies
    behind is found by reading from the start again.
    """

    size = None

    def __init__(self, source: Source):
        self.name, self.source, self.parts = label(source), source, parts_of(source)
        whole = next((name for name, _ in self.parts if name.endswith(".json")), None)
        need(whole is None, f"{whole}: a .json file can only be read whole; make it a .jsonl file, or leave streaming out")
        self.avoid, self.held = Overlap(()), set()
        self.held_out = self._hold_out()
        self.held = {_hash(d.text) for d in self.held_out}
        self.seed = None

    def prepare(self, tokenizer: Tokenizer, avoid: Overlap) -> None:
        """Says how to encode, and which paragraphs are held out somewhere in the mixture."""
        self.encode, self.avoid = encoder(tokenizer), avoid
        self.mark = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int32)

    def sample(self, characters: int) -> tuple[Document, ...]:
        """Training text from the beginning, for a tokenizer to learn from."""
        documents, size = [], 0
        for d, _ in self.texts():
            documents.append(d)
            size += len(d.text)
            if size >= characters:
                break
        return tuple(documents)

    def texts(self) -> Iterator[tuple[Document, bool]]:
        """The training text of one epoch, piece by piece, and whether another begins: a document, or what follows a gap."""
        gap = True
        for piece in (piece for _, read in self.parts for piece in read(None)):
            if text := self._training_text(piece):
                yield Document(self.name, text, piece.domain), piece.begins or gap
            gap = not text

    def windows(self, indices: np.ndarray, seq_len: int, seed: int) -> np.ndarray:
        """The windows of T + 1 tokens with these numbers, which ascend: (len(indices), T + 1)."""
        first = int(indices[0])
        tokens = self._span(first * seq_len, (int(indices[-1]) + 1) * seq_len + 1, seed)
        return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[(indices - first) * seq_len]

    def state(self) -> dict | None:
        """Where the reading stands, as JSON can hold it; None before the first window."""
        if self.seed is None:
            return None
        return {"seed": self.seed, "epoch": self.epoch, "part": self.part, "of": [len(self.parts), self._part_name()],
                "at": json.loads(json.dumps(self.at)), "position": self.position, "left": np.concatenate(self.left).tolist()}

    def restore(self, state: dict | None) -> None:
        """Goes on from a `state()`. Raises ConfigError where the files are others now."""
        if state is None:
            return
        self._begin(state["seed"])
        self.epoch, self.part, self.at, self.position = (state[k] for k in ("epoch", "part", "at", "position"))
        now, then = [len(self.parts), self._part_name()], state["of"]
        need(now == then, f"{self.source.corpus}: the files are not those of the run that was stopped (file {self.part + 1} "
                          f"of {then[0]} was {then[1]}, of {now[0]} is {now[1]}); put them back, or start another run")
        self.left = deque([np.array(state["left"], np.int32)])

    def _part_name(self) -> str:
        order = permutation(len(self.parts), (self.seed, self.epoch, *self.name.encode()))
        return self.parts[order[self.part]][0] if self.part < len(order) else ""

    def _begin(self, seed: int) -> None:
        self.seed, self.epoch, self.part, self.at, self.position = seed, 0, 0, None, 0
        self.left, self.feed = deque([np.array([], np.int32)]), self._feed()

    def _span(self, start: int, end: int, seed: int) -> np.ndarray:
        """Tokens start to end - 1 of the endless stream."""
        if seed != self.seed or start < self.position:
            self._begin(seed)
        count = sum(map(len, self.left))
        while self.position + count < end:
            self.left.append(next(self.feed))
            count += len(self.left[-1])
            while self.left and self.position + len(self.left[0]) <= start:
                self.position += len(self.left[0])
                count -= len(self.left.popleft())
        tokens = np.concatenate(self.left)[start - self.position:]
        self.left, self.position = deque([tokens[end - start - 1:].copy()]), end - 1    # windows share one token
        return tokens[:end - start]

    def _feed(self) -> Iterator[np.ndarray]:
        """Tokens of one piece of text after the other; what is read is in `self` before it is given."""
        found, mark = self.part > 0 or self.at is not None, self.mark[:0]
        while True:
            order = permutation(len(self.parts), (self.seed, self.epoch, *self.name.encode()))
            while self.part < len(order):
                for piece in self.parts[order[self.part]][1](self.at):
                    self.at, mark = piece.after, self.mark if piece.begins else mark
                    if text := self._training_text(piece):
                        found = True
                        yield np.concatenate([mark, self.encode(text)])
                        mark = self.mark[:0]
                self.part, self.at = self.part + 1, None
            if not found:
                raise ConfigError(f"{self.source.corpus}: no text to learn from is left by percentage="
                                  f"{self.source.percentage:g}, domains={list(self.source.domains)} and what is held out")
            self.epoch, self.part, found = self.epoch + 1, 0, False

    def _training_text(self, piece: Piece) -> str:
        if not wanted(piece.text, piece.domain, self.source) or self.held and _hash(piece.text) in self.held:
            return ""
        if found := self.avoid.found(piece.text):
            return leave_out(piece.text, lambda p: any(f in p for f in found))
        return piece.text

    def _hold_out(self) -> tuple[Document, ...]:
        """About a tenth of the pieces at the beginning, by a hash of their text, or what `held_out` names."""
        if self.source.held_out:
            return tuple(held_apart(self.source))
        held, size, looked, last, count = [], 0, 0, None, 0
        for piece in (piece for _, read in self.parts for piece in read(None)):
            if not wanted(piece.text, piece.domain, self.source):
                continue
            last, count = Document(f"{self.name} {count}", piece.text, piece.domain), count + 1
            if _hash(piece.text)[0] % 10 == 0 and size + len(piece.text) <= HELD_OUT_LIMIT:
                held.append(last)
            size, looked = sum(len(d.text) for d in held), looked + len(piece.text)
            if size > 0.9 * HELD_OUT_LIMIT or looked > LOOK * HELD_OUT_LIMIT:
                break
        need(count > 1, f"{self.source.corpus}: too little text to be streamed (less than two pieces, percentage and domains "
                        "applied), nothing could be held out: leave streaming out")
        return tuple(held) or (last,)


def encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    """Text to ids as an array: what `tokenizer.encode` gives, by one look-up a byte where every token is a byte.

    >>> encoder(Tokenizer.bytes())("aé").tolist() == Tokenizer.bytes().encode("aé")
    True
    """
    every = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000)]))
    inner = json.loads(tokenizer.inner.to_str()) if tokenizer.vocab_size < 300 else {}
    if inner.get("model", {}).get("merges") == [] and (inner["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        table, raw, ids = np.zeros(256, np.int32), np.frombuffer(every.encode(), np.uint8), tokenizer.encode(every)
        if len(ids) == len(raw):
            table[raw] = ids
            return lambda text: table[np.frombuffer(text.encode(), np.uint8)]
    return lambda text: np.array(tokenizer.encode(text), dtype=np.int32)


def _hash(text: str) -> tuple[int, int]:
    return zlib.crc32(text.encode()), len(text)
