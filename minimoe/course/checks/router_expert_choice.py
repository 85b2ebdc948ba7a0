"""Chapter 4: the check of `expert_choice`, where the experts choose their tokens."""
from __future__ import annotations

import random

import torch
from torch import Tensor

from minimoe.course.checking import (
    Learner,
    Mistake,
    Property,
    Report,
    Wrong,
    compare,
    expect_pair,
    expect_tensor,
    first_match,
    run_check,
    same,
)
from minimoe.course.checks.oracle import Matrix, draw, draw_bf16, shares, sigmoid, softmax, top, transpose
from minimoe.course.checks.router_capacity import fill
from minimoe.course.checks.router_topk import CUT, HALF_CUT, NOT_FLOAT32, OVERFLOW

RAW = Mistake("raw logits as weights", "the weights are the logits: take the probabilities.")


def _takes(ranks: Matrix, capacity: int) -> list[list[bool]]:
    """For each expert (column) its `capacity` tokens of the highest rank."""
    taken = [set(top(column, capacity)) for column in transpose(ranks)]
    return [[i in taken[e] for e in range(len(taken))] for i in range(len(ranks))]


def _masked(weights: Matrix, kept: list[list[bool]]) -> Matrix:
    return [[w if k else 0.0 for w, k in zip(ws, ks)] for ws, ks in zip(weights, kept)]


def _call(fn, rows, capacity, dtype=torch.float32):
    n, e = len(rows), len(rows[0])
    logits = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=dtype)
    weights, kept = expect_pair(fn(logits, capacity), f"two tensors (weights, kept), each of shape {(n, e)}")
    transposed = Mistake("experts down, tokens across",
                         "the result has a row per expert: turn it back to a row per token.")
    listed = Mistake("a list of tokens per expert", "the result lists which tokens each expert took: spread it into a "
                     "table of N x E (scatter).")
    for name, value, kind in (("weights", weights, torch.float32), ("kept", kept, torch.bool)):
        shape = tuple(getattr(value, "shape", ()))
        turned = transposed if n != e and shape == (e, n) else None
        is_list = listed if shape in ((e, capacity), (capacity, e)) else None
        expect_tensor(value, name, (n, e), kind, turned or is_list)
    return weights, kept


def _shapes(fn, rng):
    for n, e, c in ((13, 7, 3), (5, 3, 1), (11, 2, 11)):
        _call(fn, draw(rng, n, e), c)


def _kept(fn, rng):
    for n, e, c in ((13, 7, 3), (11, 5, 1), (7, 3, 7), (5, 2, 3)):
        rows = draw(rng, n, e)
        columns = zip(transpose(_call(fn, rows, c)[1].tolist()), transpose([softmax(r) for r in rows]))
        for i, (kept, probs) in enumerate(columns):     # by probability, so that tied tokens may stand for each other
            taken = [p for p, k in zip(probs, kept) if k]
            if not same(sorted(taken, reverse=True), [probs[t] for t in top(probs, c)], 1e-6):
                raise Wrong(f"with capacity {c}: expert {i} takes the tokens {sorted(top(probs, c))}",
                            f"{[t for t, k in enumerate(kept) if k]}")


def _full(fn, rng):
    """An expert takes as many as it has places for, however unpopular it is; more places than tokens take all."""
    rows = [[*row[:-1], -20.0] for row in draw(rng, 13, 5)]
    counts = [sum(column) for column in transpose(_call(fn, rows, 3)[1].tolist())]
    compare(counts, [3] * 5, "with capacity 3: the number of tokens of expert")
    rows = draw(rng, 5, 3)
    compare(_call(fn, rows, 7)[1], [[True] * 3] * 5, "5 tokens, capacity 7: kept")


def _weights(fn, rng):
    for n, e, c in ((13, 7, 3), (11, 5, 1), (7, 3, 7)):
        rows = draw(rng, n, e)
        weights, kept = _call(fn, rows, c)
        compare(weights, _masked(list(map(softmax, rows)), kept.tolist()), f"with capacity {c}: weights")


def _large(fn, rng):
    rows = [[1e4, 0.0, -1e4], [0.0, 5.0, 9990.0], [-1e4, 1e4, 9999.0], [1.0, 2.0, 3.0], [-9e3, -9e3 + 1, -9e3 + 2]]
    weights, kept = _call(fn, rows, 2)
    compare(weights, _masked(list(map(softmax, rows)), kept.tolist()), "weights")


def _bf16(fn, rng):
    rows = draw_bf16(rng, 13, 7)
    weights, kept = _call(fn, rows, 3, torch.bfloat16)
    compare(weights, _masked(list(map(softmax, rows)), kept.tolist()), "weights")


def _gradient(fn, rng):
    rows = draw(rng, 5, 3)
    coefs = torch.tensor(draw(rng, 5, 3))
    logits = torch.tensor(rows, requires_grad=True)
    weights, kept = _call(fn, logits, 2)
    if not weights.requires_grad:
        raise Wrong("weights through which the logits get a gradient", "weights without a graph", CUT)
    (weights * coefs).sum().backward()
    expected = []
    for row, cs, ks in zip(rows, coefs.tolist(), kept.tolist()):
        p = softmax(row)
        mean = sum(c * x for c, x, k in zip(cs, p, ks) if k)
        expected.append([x * ((c if k else 0.0) - mean) for x, c, k in zip(p, cs, ks)])
    compare(logits.grad, expected, "the gradient at logits", tol=1e-4)


def _mistakes():
    probs = lambda rows: [softmax(r) for r in rows]
    columns = lambda rows: transpose([softmax(c) for c in transpose(rows)])

    def made(weights, ranks, finish=_masked):
        return lambda rows, c: (finish(weights(rows), _takes(ranks(rows), c)), _takes(ranks(rows), c))

    def by_token(rows, c):
        kept = [[e in top(r, c) for e in range(len(r))] for r in rows]
        return _masked(probs(rows), kept), kept

    def switch(rows, c):
        chosen = [[top(r, 1)[0]] for r in rows]
        fits = fill(chosen, [0] * len(rows), c)
        kept = [[e == es[0] and ks[0] for e in range(len(rows[0]))] for es, ks in zip(chosen, fits)]
        return _masked(probs(rows), kept), kept

    def first_of_all(rows, c):
        flat = [p for r in probs(rows) for p in r]
        best, e = set(top(flat, c * len(rows[0]))), len(rows[0])
        kept = [[i * e + j in best for j in range(e)] for i in range(len(rows))]
        return _masked(probs(rows), kept), kept

    def own_shares(ws, kept):
        return [shares(r) if sum(r) else r for r in _masked(ws, kept)]

    def expert_shares(ws, kept):
        return transpose([shares(col) for col in transpose(_masked(ws, kept))])

    return [
        (Mistake("softmax over the tokens", "the softmax runs over the tokens (dim=0): a token's probabilities over "
                 "the experts sum to one, then each expert looks down its column."), made(columns, columns)),
        (Mistake("tokens choose", "each token took its best experts: here each expert takes its best tokens, so the "
                 "top-k runs over the tokens (dim=0)."), by_token),
        (Mistake("tokens choose, experts refuse", "each token asks for its best expert only, and full ones refuse, as "
                 "in Switch: here every expert fills all its places."), switch),
        (Mistake("one choice over the whole table", "the largest entries of the whole table were taken: each expert "
                 "takes exactly capacity tokens."), first_of_all),
        (Mistake("chosen by raw logits", "the tokens were ranked by their logits: rank by probability, since a token "
                 "whose logits are all high does not want this expert more."), made(probs, lambda rows: rows)),
        (Mistake("the least willing", "each expert took the tokens with the lowest probability."),
         made(probs, lambda rows: [[-p for p in r] for r in probs(rows)])),
        (Mistake("the first tokens", "each expert took the first tokens of the sequence, whatever their probability."),
         made(probs, lambda rows: [[float(-i)] * len(r) for i, r in enumerate(rows)])),
        (Mistake("not masked", "a token that an expert did not take has weight 0 there."),
         made(probs, probs, lambda ws, ks: ws)),
        (Mistake("renormalized per token",
                 "the weights of a token were divided by their sum: they stay the probabilities."),
         made(probs, probs, own_shares)),
        (Mistake("renormalized per expert", "the weights of an expert were divided by their sum: they stay the "
                 "probabilities."), made(probs, probs, expert_shares)),
        (Mistake("weights of one", "all weights are 1: without the probability in them the router learns nothing."),
         made(probs, probs, lambda ws, ks: [[float(k) for k in r] for r in ks])),
        (RAW, made(lambda rows: rows, probs)),
        (RAW, made(lambda rows: rows, lambda rows: rows)),
        (Mistake("sigmoid for softmax", "the scores are sigmoids: the experts compete for a token in a softmax."),
         made(lambda rows: [[sigmoid(x) for x in r] for r in rows], lambda rows: rows)),
    ]


def _diagnose(fn: Learner, rng: random.Random) -> Mistake | None:
    questions = [(draw(rng, 29, 7), c) for c in (11, 2)]
    seen = [tuple(x.tolist() for x in _call(fn, *q)) for q in questions]

    def is_it(mistake):
        return all(s[1] == m[1] and same(s[0], m[0]) for s, m in zip(seen, (mistake(*q) for q in questions)))

    return first_match((m, lambda f=f: is_it(f)) for m, f in _mistakes())


def check_expert_choice(fn, seed: int = 0) -> Report:
    """Checks `expert_choice(logits_NE, capacity) -> (weights_NE, kept_NE)` for the N tokens of one sequence.

    Softmax over the experts; each expert takes the `capacity` tokens with the highest probability for it, or all of
    them if there are no more (Zhou et al. 2022, section 3.2). The weights are the probabilities, and 0 where
    `kept` is False.
    """
    return run_check("expert_choice", fn, [
        Property("two tensors of shape (N, E), float32 and bool", 1, _shapes),
        Property("each expert takes the tokens that want it most", 3, _kept),
        Property("the weights are the probabilities of those taken, else 0", 2, _weights),
        Property("every expert is full; more places than tokens take all", 1, _full, Mistake(
            "more places than tokens", "an expert can take no more tokens than there are: min(capacity, N).")),
        Property("large logits do not overflow", 1, _large, OVERFLOW),
        Property("bfloat16 logits: everything after them in float32", 1, _bf16, NOT_FLOAT32),
        Property("the gradient of the weights reaches the logits", 2, _gradient, HALF_CUT),
    ], seed, _diagnose)
