"""Chapter 4: the check of `switch_keep`: every expert has a limited number of places in each sequence."""
from __future__ import annotations

import random
from collections import Counter

import torch

from minimoe.course.checking import (
    Learner,
    Mistake,
    Property,
    Report,
    Wrong,
    compare,
    expect_tensor,
    first_match,
    run_check,
)

LENGTHS = (5, 11, 3)        # of the sequences of a batch: different, and prime
Choices = list[list[int]]
BY_CHANCE = Mistake("dropped by chance", "who is dropped is drawn at random: places fill in the order of the tokens.")
TENSOR_KEYS = Mistake("tensors as keys", "the capacity is compared, but no count ever grows past one. Is the key of your "
                      "dictionary made of tensors? Two tensors are different keys even with one number inside: take "
                      ".tolist() or .item() first.")


def _batch(rng: random.Random, k: int, n_experts: int, lengths=LENGTHS) -> tuple[Choices, list[int]]:
    """Choices that crowd on the low-numbered experts and leave the last one empty, and the sequence of each token."""
    rows = [r for r, length in enumerate(lengths) for _ in range(length)]
    crowd = [e for e in range(n_experts - 1) for _ in range(n_experts - e)]
    experts = []
    for _ in rows:
        chosen: list[int] = []
        while len(chosen) < k:
            e = rng.choice(crowd)
            if e not in chosen:
                chosen.append(e)
        experts.append(chosen)
    return experts, rows


def fill(experts: Choices, rows: list[int], capacity: int, order=None, place=None, choices=None) -> list[list[bool]]:
    """Walks over all (token, choice) in `order`; each takes one of the `capacity` places of `place(token, choice)`."""
    n, k = len(experts), len(experts[0])
    used: Counter = Counter()
    kept = [[True] * k for _ in range(n)]
    for i, j in order or [(i, j) for i in range(n) for j in range(k)]:
        if choices is None or j in choices:
            key = place(i, j) if place else (rows[i], experts[i][j])
            used[key] += 1
            kept[i][j] = used[key] <= capacity
    return kept


def _kept(fn: Learner, experts: Choices, rows: list[int], n_experts: int, capacity: int) -> list[list[bool]]:
    kept = fn(torch.tensor(experts), torch.tensor(rows), n_experts, capacity)
    not_bool = Mistake("not booleans",
                       "kept answers yes or no: a tensor of dtype torch.bool, for example from a comparison.")
    return expect_tensor(kept, "kept", (len(experts), len(experts[0])), torch.bool,
                         not_bool if getattr(kept, "dtype", torch.bool) != torch.bool else None).tolist()


def _shape(fn, rng):
    for k, e in ((1, 3), (2, 7)):
        _kept(fn, *_batch(rng, k, e), e, 2)


def _compare(fn, experts, rows, n_experts, capacity, mistake=None):
    compare(_kept(fn, experts, rows, n_experts, capacity), fill(experts, rows, capacity),
            f"with K = {len(experts[0])} and capacity {capacity}: kept", mistake=mistake)


def _one_row(fn, rng):
    for k, e in ((1, 3), (2, 5), (3, 7)):
        for capacity in (1, 2, 3):
            _compare(fn, *_batch(rng, k, e, (11,)), e, capacity)


def _rows(fn, rng):
    for k, e in ((1, 3), (2, 5)):
        for capacity in (1, 2, 3):
            _compare(fn, *_batch(rng, k, e), e, capacity)


def _edges(fn, rng):
    experts, rows = _batch(rng, 2, 7)
    _compare(fn, experts, rows, 7, 100)                            # room for all
    _compare(fn, experts, rows, 7, 0)                              # room for none
    _compare(fn, [[4]] * len(rows), rows, 7, 2)                    # all want one expert


def _no_look_ahead(fn, rng):
    experts, rows = _batch(rng, 2, 5)
    whole = _kept(fn, experts, rows, 5, 2)
    for m in (1, 4, 7, 13):
        compare(_kept(fn, experts[:m], rows[:m], 5, 2), whole[:m], f"for the first {m} tokens alone: kept")


def _repeats(fn, rng):
    experts, rows = _batch(rng, 2, 5)
    if _kept(fn, experts, rows, 5, 2) != _kept(fn, experts, rows, 5, 2):
        raise Wrong("the same answer to the same question", "another one the second time", BY_CHANCE)


def _mistakes():
    def tokens_then(f):
        return lambda experts, rows, c: f(experts, rows, c, range(len(experts)), range(len(experts[0])))

    def whole_token(test):
        return lambda experts, rows, c: [[test(ks)] * len(ks) for ks in fill(experts, rows, c)]

    def crowded(experts, rows, c):
        wanted = Counter((r, e) for r, es in zip(rows, experts) for e in es)
        return [[wanted[r, e] <= c for e in es] for r, es in zip(rows, experts)]

    def equal_pieces(rows):
        length = -(-len(rows) // (rows[-1] + 1))
        return [i // length for i in range(len(rows))]

    def ever_since(experts, rows, c):       # places are given back when the sequence or the expert changes
        kept, run = [], Counter()
        for i, es in enumerate(experts):
            if i and rows[i] != rows[i - 1] or i and es[0] != experts[i - 1][0]:
                run.clear()
            run[es[0]] += 1
            kept.append([run[es[0]] <= c] * len(es))
        return kept

    return [
        (Mistake("one capacity for the whole batch", "the places are counted over all sequences together: each "
                 "sequence has its own, else what one text loses depends on its neighbors in the batch."),
         lambda x, r, c: fill(x, r, c, place=lambda i, j: x[i][j])),
        (Mistake("last come, first served", "the last tokens keep their places and the first ones lose theirs: places "
                 "fill from the first position on, since a causal model cannot know who comes later."),
         tokens_then(lambda x, r, c, ns, ks: fill(x, r, c, [(i, j) for i in reversed(ns) for j in reversed(ks)]))),
        (Mistake("all first choices before the second", "first choices of later tokens took places before second "
                 "choices of earlier ones: by position first, then by choice, or the present depends on the future."),
         tokens_then(lambda x, r, c, ns, ks: fill(x, r, c, [(i, j) for j in ks for i in ns]))),
        (Mistake("only first choices counted", "the second choices are all kept: they take places too."),
         lambda x, r, c: fill(x, r, c, choices=(0,))),
        (Mistake("each choice has places of its own", "first and second choices are counted apart: an expert has one "
                 "set of places for both."), lambda x, r, c: fill(x, r, c, place=lambda i, j: (r[i], x[i][j], j))),
        (Mistake("one place too many", "an expert keeps capacity + 1 tokens: the first place has the number 0, so the "
                 "test is place < capacity."), lambda x, r, c: fill(x, r, c + 1)),
        (Mistake("one place too few",
                 "an expert keeps capacity - 1 tokens: look at where the count starts, at 0 or at 1."),
         lambda x, r, c: fill(x, r, c - 1)),
        (Mistake("places shared by all experts", "the places are counted per sequence, not per sequence and expert."),
         lambda x, r, c: fill(x, r, c, place=lambda i, j: r[i])),
        (Mistake("the whole token dropped", "a token loses all its choices when one expert is full: only that one "
                 "choice is dropped."), whole_token(all)),
        (Mistake("the whole token kept", "a token keeps all its choices when one of them finds a place: each choice "
                 "needs its own."), whole_token(any)),
        (Mistake("a crowded expert loses everyone", "an expert that is asked by too many keeps none at all: the first "
                 "capacity ones stay."), crowded),
        (Mistake("dropped instead of kept", "the answer is upside down: True means that the choice is kept."),
         lambda x, r, c: [[not b for b in ks] for ks in fill(x, r, c)]),
        (Mistake("nothing dropped", "every choice is kept: the capacity is not used."),
         lambda x, r, c: [[True] * len(es) for es in x]),
        (Mistake("sequences of equal length", "the batch was cut into equal pieces: sequences differ in length, row_N "
                 "says which one a token is of."), lambda x, r, c: fill(x, equal_pieces(r), c)),
        (Mistake("only runs of one expert", "the count starts again whenever another expert comes in between: count "
                 "all earlier choices of the same expert in the sequence."), ever_since),
    ]


def _diagnose(fn: Learner, rng: random.Random) -> Mistake | None:
    questions = [(*_batch(rng, k, 5), c) for k in (1, 2) for c in (1, 2, 3)]
    seen = [_kept(fn, x, r, 5, c) for x, r, c in questions]
    if seen != [_kept(fn, x, r, 5, c) for x, r, c in questions]:
        return BY_CHANCE
    if all(all(map(all, s)) for s in seen):         # all kept; does it at least ask whether there is any place?
        x, r, _ = questions[0]
        if not any(map(any, _kept(fn, x, r, 5, 0))):
            return TENSOR_KEYS
    return first_match((m, lambda f=f: all(s == f(*q) for s, q in zip(seen, questions))) for m, f in _mistakes())


def check_switch_keep(fn, seed: int = 0) -> Report:
    """Checks `switch_keep(experts_NK, row_N, n_experts, capacity) -> kept_NK`, a boolean per token and choice.

    Every expert has `capacity` places in each sequence (`row_N` says which sequence a token is of; the tokens of one
    sequence stand together, in order). Places fill by position, and at one position by choice; the rest is dropped.
    """
    return run_check("switch_keep", fn, [
        Property("a boolean for every token and choice", 1, _shape),
        Property("one sequence: an expert keeps its first ones", 3, _one_row),
        Property("several sequences: each has places of its own", 2, _rows),
        Property("room for all, room for none, all on one expert", 1, _edges),
        Property("no look-ahead: later tokens change nothing", 2, _no_look_ahead),
        Property("the same answer every time", 1, _repeats),
    ], seed, _diagnose)
