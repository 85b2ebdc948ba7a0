"""A benchmark is one function with a decorator: it gets a run, a source of randomness and a number, and gives back scores."""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from minimoe.evaluate.results import Result, Scores
from minimoe.settings import need

if TYPE_CHECKING:
    from minimoe.checkpoint import Run


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a benchmark may give back instead of plain scores: several metrics of the same items, and samples for the report."""

    scores: Sequence[Scores]
    samples: Sequence[dict] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A task by name. `function(run, rng, n)` scores about `n` items, drawn with `rng`, and gives one number for each, or
    `Measured`. `local` says that it never fetches anything, so that it can be asked during training."""

    name: str
    function: Callable[[Run, random.Random, int], object]
    metric: str = "accuracy"
    chance: float | None = None
    better: Literal["higher", "lower"] = "higher"
    questions: int = 600
    quick: int = 60
    local: bool = True

    def __call__(self, run: Run, *, seed: int = 0, questions: int | None = None) -> list[Result]:
        """The results on a run; the same seed asks the same questions."""
        n = questions or self.questions
        need(n >= 1, f"questions={questions}: must be at least 1")
        found = self.function(run, random.Random(f"{seed} {self.name}"), n)
        if not isinstance(found, Measured):
            found = Measured(scores=[Scores(metric=self.metric, values=list(found), chance=self.chance, better=self.better)])
        return [s.result(self.name, seed, samples=[*found.samples], note=found.note) for s in found.scores]


def benchmark(name: str, *, metric: str = "accuracy", chance: float | None = None, better: Literal["higher", "lower"] = "higher",
              questions: int = 600) -> Callable[[Callable], Benchmark]:
    """Makes a benchmark of a function `f(run, rng, n)` that gives a score for each of `n` items.

    >>> @benchmark("writes e", metric="share", questions=2)
    ... def writes_e(run, rng, n):
    ...     return ["e" in run.generate(rng.choice("abc"), max_new_tokens=20) for _ in range(n)]
    >>> from minimoe.checkpoint import load
    >>> writes_e(load("shipped"))[0].n
    2
    """
    return lambda function: Benchmark(name=name, function=function, metric=metric, chance=chance, better=better, questions=questions)
