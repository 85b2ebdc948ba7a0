"""Several token streams read in fixed shares: the order is a pure function of (seed, mixture, step).

Shapes: T tokens per window, B windows per step. Nothing is shuffled in a buffer, so there is nothing to lose when a run
stops. A stream is anything with a `name`, a `size` in tokens (None where it is not known before it is read) and
`windows(indices, seq_len, seed)`.
"""
from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from minimoe.settings import need

BLOCK = 1024        # windows; within each block every source has its exact share


@dataclass(frozen=True)
class Stream:
    """One source: its documents as one endless ring of tokens, end-of-text between documents. `tokens` is an array, or
    anything else with its `len` and `take`."""

    name: str
    tokens: np.ndarray

    @property
    def size(self) -> int:
        return len(self.tokens)

    def windows(self, indices: np.ndarray, seq_len: int, seed: int) -> np.ndarray:
        """The windows of T + 1 tokens with these numbers, (len(indices), T + 1): at stride T around the ring, shuffled
        within each epoch.

        The windows of an epoch are those that start in it; its tail goes on into the next, so that T consecutive
        windows never drop a token, and windows begin at other places in every epoch.

        >>> s = Stream("s", np.arange(5))
        >>> sorted(s.windows(np.arange(5), 2, seed=0)[:, :-1].ravel().tolist())         # 5 windows of 2 = 2 epochs
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        """
        n, result = len(self.tokens), np.empty((len(indices), seq_len + 1), np.int64)
        for row, index in zip(result, indices.tolist()):
            epoch = index * seq_len // n
            first, end = -(-epoch * n // seq_len), -(-(epoch + 1) * n // seq_len)
            shuffled = first + int(permutation(end - first, (seed, epoch, *self.name.encode()))[index - first])
            start = shuffled * seq_len % n
            if start + seq_len < n:
                row[:] = self.tokens[start:start + seq_len + 1]
            else:
                row[:] = np.take(self.tokens, range(start, start + seq_len + 1), mode="wrap")
        return result

    def window(self, index: int, seq_len: int, seed: int) -> np.ndarray:
        """The index-th window of T + 1 tokens."""
        return self.windows(np.array([index]), seq_len, seed)[0]

    def state(self) -> dict:
        """By what a run that goes on knows the text again: its size, and a checksum of both ends and the middle."""
        n, block = self.size, 1 << 16
        parts = [np.asarray(self.tokens[start:start + block], np.int64) for start in (0, n // 2, max(0, n - block))]
        return {"size": n, "crc": zlib.crc32(b"".join(p.tobytes() for p in parts))}

    def restore(self, state: dict) -> None:
        need(state == self.state(), f"{self.name}: another text than when this run began ({state['size']:,} tokens then, "
                                    f"{self.size:,} now, or other words); put it back, or start another run")


@dataclass(frozen=True)
class Mixture:
    """Streams with their shares of the tokens (normalized).

    >>> m = Mixture((Stream("a", np.zeros(9, int)), Stream("b", np.ones(9, int))), (3, 1))
    >>> float(m.windows(np.arange(1024), 2, seed=0).mean())
    0.25
    """

    streams: tuple[Stream, ...]
    ratios: tuple[float, ...]

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.ratios) / np.sum(self.ratios)

    @property
    def n_tokens(self) -> int | None:
        """What an epoch counts: the tokens of all sources, each once; None with a stream, whose length nobody knows."""
        sizes = [s.size for s in self.streams]
        return None if None in sizes else sum(sizes)

    def window(self, index: int, seq_len: int, seed: int) -> np.ndarray:
        """The index-th window of T + 1 tokens of the whole mixture."""
        return self.windows(np.array([index]), seq_len, seed)[0]

    def windows(self, indices: np.ndarray, seq_len: int, seed: int) -> np.ndarray:
        """The windows with these numbers, which ascend."""
        blocks = {b: _block(tuple(self.ends), b, seed) for b in np.unique(indices // BLOCK).tolist()}
        sources, own = np.array([blocks[i // BLOCK][:, i % BLOCK] for i in indices.tolist()]).T
        result = np.empty((len(indices), seq_len + 1), np.int64)
        for number, stream in enumerate(self.streams):
            places = np.flatnonzero(sources == number)
            if len(places):
                result[places] = stream.windows(own[places], seq_len, seed)
        return result

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) of one step, targets shifted by one; a token that nobody is to learn comes as its
        complement (`chat.Rows`), and is -100 as a target."""
        return split_rows(torch.from_numpy(self.windows(np.arange(step * batch_size, (step + 1) * batch_size), seq_len, seed)))

    def steps_until(self, batch_size: int, seq_len: int, seed: int) -> int:
        """How many steps of B windows can be made before the first source begins anew, at least one.

        >>> Mixture((Stream("a", np.zeros(100, int)), Stream("b", np.zeros(900, int))), (1, 1)).steps_until(2, 10, 0)
        7
        """
        unknown = [s.name for s in self.streams if s.size is None]
        need(not unknown, f"until=first_exhausted: how long {', '.join(unknown)} is shows only when it has been read; "
                          "write all_exhausted and give the number of steps")
        whole = np.array([-(-s.size // seq_len) for s in self.streams])         # windows of each source's first epoch
        block = 0
        while (_given(tuple(self.ends), block + 1) <= whole).all():
            block += 1
        sources, own = _block(tuple(self.ends), block, seed)
        return max(1, (block * BLOCK + int(np.argmax(own >= whole[sources]))) // batch_size)

    def state(self) -> dict[str, dict]:
        """Where each raw stream stands, and what the others hold, as JSON can keep it."""
        return {s.name: s.state() for s in self.streams}

    def restore(self, state: dict[str, dict]) -> None:
        """Goes on from a `state()`."""
        for s in self.streams:
            if s.name in state:
                s.restore(state[s.name])

    def describe(self, tokens_read: int) -> str:
        """The mixture as a tree: tokens, share and epochs of every source for a run that reads `tokens_read`."""
        lines = [f"mixture of {len(self.streams)}, {tokens_read:,} tokens to read"]
        shares = np.diff(self.ends, prepend=0)
        for i, (s, share) in enumerate(zip(self.streams, shares)):
            branch = "└─" if i == len(self.streams) - 1 else "├─"
            size = "streamed, as it is read" if s.size is None else (
                f"{s.size:>10,} tokens  {share * tokens_read / s.size:.2f} epochs")
            lines.append(f"{branch} {s.name:<18} {share:6.1%}  {size}")
        return "\n".join(lines)


def split_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of rows of T + 1 tokens, complements among them.

    >>> split_rows(torch.tensor([[5, ~6, 7]]))
    (tensor([[5, 6]]), tensor([[-100,    7]]))
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return torch.where(inputs < 0, ~inputs, inputs), targets.masked_fill(targets < 0, -100)


def _given(ends: tuple[float, ...], block: int) -> np.ndarray:
    """How many windows each source has given before this block."""
    return np.diff(np.round(np.array(ends) * BLOCK * block), prepend=0).astype(int)


@lru_cache(maxsize=8)
def _block(ends: tuple[float, ...], block: int, seed: int) -> np.ndarray:
    """Of each window of a block its source, and its number among the windows of that source: (2, BLOCK)."""
    before, after = _given(ends, block), _given(ends, block + 1)
    counts = after - before
    order = np.repeat(np.arange(len(ends)), counts)[permutation(BLOCK, (seed, block))]
    own = np.empty(BLOCK, int)
    own[np.argsort(order, kind="stable")] = np.concatenate([np.arange(b, a) for b, a in zip(before, after)])
    return np.stack([order, own])


@lru_cache(maxsize=16)
def permutation(n: int, key: tuple[int, ...]) -> np.ndarray:
    """A random order of n things that is a function of the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(n)
