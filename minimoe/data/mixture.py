"""Several token streams read in fixed shares: the order is a pure function of (seed, mixture, step).

Shapes: T tokens per window. Nothing is shuffled in a buffer, so there is nothing to lose when a run stops.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

BLOCK = 1024        # windows; within each block every source has its exact share


@dataclass(frozen=True)
class Stream:
    """One source: its documents as one endless ring of tokens, end-of-text between documents."""

    name: str
    tokens: np.ndarray

    def window(self, index: int, seq_len: int, seed: int) -> np.ndarray:
        """The index-th window of T + 1 tokens, at stride T around the ring, shuffled within each epoch.

        The windows of an epoch are those that start in it; its tail goes on into the next, so that T consecutive
        windows never drop a token, and windows begin at other places in every epoch.

        >>> s = Stream("s", np.arange(5))
        >>> sorted(int(t) for i in range(5) for t in s.window(i, 2, seed=0)[:-1])       # 5 windows of 2 = 2 epochs
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        """
        n = len(self.tokens)
        epoch = index * seq_len // n
        first, end = -(-epoch * n // seq_len), -(-(epoch + 1) * n // seq_len)
        shuffled = first + _permutation(end - first, (seed, epoch, *self.name.encode()))[index - first]
        start = int(shuffled) * seq_len % n
        return np.take(self.tokens, range(start, start + seq_len + 1), mode="wrap")


@dataclass(frozen=True)
class Mixture:
    """Streams with their shares of the tokens (normalized).

    >>> m = Mixture((Stream("a", np.zeros(9, int)), Stream("b", np.ones(9, int))), (3, 1))
    >>> float(np.mean([m.window(i, 2, seed=0).mean() for i in range(1024)]))
    0.25
    """

    streams: tuple[Stream, ...]
    ratios: tuple[float, ...]

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.ratios) / np.sum(self.ratios)

    @property
    def n_tokens(self) -> int:
        """What an epoch counts: the tokens of all sources, each once."""
        return sum(len(s.tokens) for s in self.streams)

    def window(self, index: int, seq_len: int, seed: int) -> np.ndarray:
        """The index-th window of T + 1 tokens of the whole mixture."""
        block, place = divmod(index, BLOCK)
        # how many windows each source has given before this block, and after it
        before, after = (np.diff(np.round(self.ends * BLOCK * b), prepend=0).astype(int) for b in (block, block + 1))
        order = np.repeat(np.arange(len(self.streams)), after - before)[_permutation(BLOCK, (seed, block))]
        source = order[place]
        return self.streams[source].window(int(before[source] + (order[:place] == source).sum()), seq_len, seed)

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) of one step, targets shifted by one."""
        windows = [self.window(step * batch_size + i, seq_len, seed) for i in range(batch_size)]
        both = torch.from_numpy(np.stack(windows).astype(np.int64))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def describe(self, tokens_read: int) -> str:
        """The mixture as a tree: tokens, share and epochs of every source for a run that reads `tokens_read`."""
        lines = [f"mixture of {len(self.streams)}, {tokens_read:,} tokens to read"]
        shares = np.diff(self.ends, prepend=0)
        for i, (s, share) in enumerate(zip(self.streams, shares)):
            branch = "└─" if i == len(self.streams) - 1 else "├─"
            lines.append(f"{branch} {s.name:<18} {share:6.1%}  {len(s.tokens):>10,} tokens  "
                         f"{share * tokens_read / len(s.tokens):.2f} epochs")
        return "\n".join(lines)


def _permutation(n: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(n)
