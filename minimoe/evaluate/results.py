"""A score with what gives it a meaning: the level of chance, the number of items, and an interval (chapter 11).

Shapes: N items (questions, documents), B bootstrap draws.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from minimoe.settings import need

DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Result:
    """One metric of one task. `low` and `high` are a 95 % interval, None where there are too few items for one; `chance` is what
    needs no model, None where there is no such level; `details` holds what a report shows besides."""

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    chance: float | None = None
    better: Literal["higher", "lower"] = "higher"
    details: dict = field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> str:
        """Against chance: "better", "worse", "not told apart" where the interval contains it, or "" where there is no chance level
        or no interval.

        >>> Result(task="a", metric="accuracy", value=0.3, low=0.24, high=0.36, n=200, chance=0.25).verdict
        'not told apart'
        """
        if self.chance is None or self.low is None:
            return ""
        if self.low <= self.chance <= self.high:
            return "not told apart"
        return "better" if (self.low > self.chance) == (self.better == "higher") else "worse"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One metric as it was measured: `values` are one number an item, or (N, 2) for metrics that are a ratio of two sums (nats
    and tokens, say); `transform` turns the mean, or the ratio, into what is reported."""

    metric: str
    values: Sequence
    chance: float | None = None
    better: Literal["higher", "lower"] = "higher"
    transform: Callable[[np.ndarray], np.ndarray] | None = None

    def result(self, task: str, seed: int = 0, **details: object) -> Result:
        """The value of all items, and its interval."""
        parts_N2 = as_ratios(self.values)
        need(len(parts_N2) > 0, f"{task}: there was nothing to score")
        turn = self.transform or (lambda x: x)
        value = float(turn(parts_N2[:, 0].sum() / parts_N2[:, 1].sum()))
        low, high = interval(parts_N2, seed=seed, transform=self.transform) or (None, None)
        return Result(task=task, metric=self.metric, value=value, low=low, high=high, n=len(parts_N2), chance=self.chance,
                      better=self.better, details=details)


def as_ratios(values: Sequence) -> np.ndarray:
    """(N, 2): scores become parts of 1.

    >>> as_ratios([0.5, 1.0]).tolist()
    [[0.5, 1.0], [1.0, 1.0]]
    """
    parts = np.asarray(values, dtype=float)
    return np.stack([parts, np.ones_like(parts)], axis=-1) if parts.ndim == 1 else parts


def interval(values: Sequence, *, seed: int = 0, level: float = 0.95, draws: int = DRAWS,
             transform: Callable[[np.ndarray], np.ndarray] | None = None) -> tuple[float, float] | None:
    """A percentile bootstrap interval over the items (Efron and Tibshirani 1993, chapter 13), of their mean, or for (N, 2) of the
    ratio of the sums; None for a single item.

    Where every item is right, or every one wrong, no draw differs from the others, but a further item still might: the
    bound is then the exact one, 1 - (1 - level)^(1/N), about 3/N (Hanley and Lippman-Hand 1983).

    >>> low, high = interval([0.0, 1.0] * 50)
    >>> round(low, 2), round(high, 2), interval([1.0] * 100)[0] > 0.97
    (0.4, 0.6, True)
    """
    parts_N2, turn = as_ratios(values), transform or (lambda x: x)
    n = len(parts_N2)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    sums_B2 = np.stack([parts_N2[rng.integers(n, size=n)].sum(0) for _ in range(draws)])
    low, high = np.quantile(turn(sums_B2[:, 0] / sums_B2[:, 1]), [(1 - level) / 2, (1 + level) / 2]).tolist()
    if (parts_N2 == [0, 1]).all() or (parts_N2 == [1, 1]).all():
        rest = 1 - (1 - level) ** (1 / n)
        return (float(turn(low)), float(turn(rest))) if high == 0 else (float(turn(1 - rest)), float(turn(high)))
    return low, high


def table(results: Sequence[Result], columns: Sequence[str] = ()) -> str:
    """The results as a Markdown table that also reads well in a terminal.

    >>> print(table([Result(task="sums", metric="accuracy", value=0.5, low=0.4, high=0.6, n=100, chance=0.25)]))
    | task | metric   | value | 95 % interval  | chance |   n | against chance |
    | ---- | -------- | ----: | -------------- | -----: | --: | -------------- |
    | sums | accuracy | 0.500 | 0.400 to 0.600 |  0.250 | 100 | better         |
    """
    rows = [[r.task, r.metric, number(r.value), span(r), number(r.chance), f"{r.n:,}", r.verdict] for r in results]
    return markdown(["task", "metric", "value", "95 % interval", "chance", "n", "against chance"], rows, right=(2, 4, 5))


def span(r: Result) -> str:
    return "" if r.low is None else f"{number(r.low)} to {number(r.high)}"


def number(value: float | None) -> str:
    """Three decimals below ten, else fewer.

    >>> number(0.25), number(12.345), number(1024.0), number(None)
    ('0.250', '12.35', '1,024', '')
    """
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table with columns of even width; `right` are aligned to the right.

    >>> print(markdown(["a", "b"], [["x", "12"]], right=[1]))
    | a  |  b |
    | -- | -: |
    | x  | 12 |
    """
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in (head, *rows)]
    wide = [max(2, *(len(row[i]) for row in cells)) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide))) + " |"
    rule = [("-" * (w - 1) + ":" if i in right else "-" * w) for i, w in enumerate(wide)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
