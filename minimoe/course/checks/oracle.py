"""Slow and plain arithmetic for the checks: Python lists and `math`, nothing that a lesson or the library builds.

A matrix is a list of rows. The numbers that the checks draw are multiples of 1/1024, which float32 holds exactly, and
no two of a matrix are equal, not even without their signs: no choice among them hangs on rounding or on a tie.
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable

Matrix = list[list[float]]


def draw(rng: random.Random, n: int, e: int, low: float = -3.0, high: float = 3.0, step: int = 1024) -> Matrix:
    """(n, e) multiples of 1/step, no two of the same size; `low` is -`high`, or both have the same sign.

    >>> draw(random.Random(0), 1, 2, low=1, high=2, step=1) in ([[1.0, 2.0]], [[2.0, 1.0]])
    True
    """
    first = 1 if low < 0 < high else round(min(abs(low), abs(high)) * step)
    sizes = rng.sample(range(first, round(max(abs(low), abs(high)) * step) + 1), n * e)
    signs = (-1, 1) if low < 0 < high else (-1,) if low < 0 else (1,)
    return [[size / step * rng.choice(signs) for size in sizes[i * e : (i + 1) * e]] for i in range(n)]


def draw_bf16(rng: random.Random, n: int, e: int) -> Matrix:
    """As `draw`, but numbers that bfloat16 holds exactly too: what is inexact then is the learner's own arithmetic.

    >>> max(map(abs, draw_bf16(random.Random(0), 5, 7)[0])) <= 8
    True
    """
    return draw(rng, n, e, low=-8.0, high=8.0, step=16)


def softmax(xs: list[float]) -> list[float]:
    """exp(x) over the sum of all exp(x).

    >>> softmax([0.0, 0.0])
    [0.5, 0.5]
    """
    top = max(xs)
    es = [math.exp(x - top) for x in xs]
    return [e / sum(es) for e in es]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow.

    >>> sigmoid(0.0), sigmoid(-1e4)
    (0.5, 0.0)
    """
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) if x > -700 else 0.0


def transpose(rows: Matrix) -> Matrix:
    """Columns as rows.

    >>> transpose([[1, 2], [3, 4]])
    [[1, 3], [2, 4]]
    """
    return [list(column) for column in zip(*rows)]


def top(xs: list[float], k: int) -> list[int]:
    """The places of the k largest numbers, the largest first; of equal ones the first comes first.

    >>> top([1.0, 3.0, 2.0], 2)
    [1, 2]
    """
    return sorted(range(len(xs)), key=lambda i: -xs[i])[:k]


def shares(xs: list[float]) -> list[float]:
    """Each number over the sum of all.

    >>> shares([1.0, 3.0])
    [0.25, 0.75]
    """
    return [x / sum(xs) for x in xs]


def gradient(f: Callable[[Matrix], float], rows: Matrix, eps: float = 1e-5) -> Matrix:
    """Central differences of a number that depends on a matrix.

    >>> [round(g, 6) for g in gradient(lambda m: m[0][0] * m[0][1], [[2.0, 5.0]])[0]]
    [5.0, 2.0]
    """
    out = [[0.0] * len(row) for row in rows]
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            row[j] = x + eps
            up = f(rows)
            row[j] = x - eps
            out[i][j] = (up - f(rows)) / (2 * eps)
            row[j] = x
    return out
