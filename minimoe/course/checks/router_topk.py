"""Chapter 4: the check of `topk_router`, and what the checks of the other routers share with it.

N tokens, E experts, K choices. All sizes are different primes, so that a mixed-up axis cannot hide.
"""
from __future__ import annotations

import math
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
from minimoe.course.checks.oracle import Matrix, draw, draw_bf16, gradient, shares, sigmoid, softmax, top, transpose

N, E = 13, 7

NOT_K = Mistake("k is not the argument", "the number of choices does not follow the argument k: a fixed number, or a "
                "global variable of another name, stands where k should.")
GLOBAL = Mistake("a global in place of the argument", "the result has the rows of another input: the function reads a "
                 "variable of the notebook instead of its argument. Restart the kernel and look at every name.")
ALL_WEIGHTS = Mistake("all E weights returned", "one weight per chosen expert is wanted, (N, k): gather the weights of "
                      "the k chosen experts.")
SAME_TWICE = Mistake("the same expert twice", "a token goes to k different experts: take the k best at once, or put "
                     "minus infinity in the place of an expert that is taken.")
DTYPE = Mistake("weights left in bfloat16", "the weights come out in the dtype of the logits: convert the logits to "
                "float32 before the softmax, and leave the weights in float32.")
NOT_FLOAT32 = Mistake("probabilities in bfloat16", "the weights are float32 but were computed in bfloat16, which has "
                      "three digits: convert the logits first, not the result.")
OVERFLOW = Mistake("overflow", "exp of a large logit is infinite in float32, and infinite over infinite is nan: take "
                   "each row's largest logit away first, as torch.softmax does.")
CUT = Mistake("weights cut from the graph", "the weights carry no gradient: .detach(), .data, .item(), .tolist(), "
              "torch.no_grad() or a new torch.tensor(...) cuts them off, and the router would never learn.")
OVERWRITTEN = Mistake("written over in place", "a tensor that the backward pass needs was written over: use the form "
                      "of the operation without the underscore.")
HALF_CUT = Mistake("part of the formula is detached", "the values are right but their gradient is not: a part of the "
                   "formula, often the sum that divides, is detached.")
SORTED = Mistake("right experts, wrong order", "the right experts, but not by falling weight: the most probable expert "
                 "stands first.")


def call(fn: Learner, rows: Matrix | Tensor, args: tuple, k: int, dtype: torch.dtype = torch.float32) -> tuple:
    """(weights, experts) of the learner for these logits, found to be well-formed."""
    n, e = len(rows), len(rows[0])
    out = fn(rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=dtype), *args)
    weights, experts = expect_pair(out, f"two tensors (weights, experts), each of shape {(n, k)}")
    shape = tuple(getattr(experts, "shape", ()))
    mistake = None
    if len(shape) == 2 and shape != (n, k):
        mistake = GLOBAL if shape[0] != n else NOT_K
    expect_tensor(experts, "experts", (n, k), torch.int64, mistake)
    full = ALL_WEIGHTS if k != e and tuple(getattr(weights, "shape", ())) == (n, e) else None
    expect_tensor(weights, "weights", (n, k), None, full)
    expect_tensor(weights, "weights", (n, k), torch.float32, DTYPE if dtype == torch.bfloat16 else None)
    for i, row in enumerate(experts.tolist()):
        if min(row) < 0 or max(row) >= e:
            raise Wrong(f"experts from 0 to {e - 1}", f"experts[{i}] = {row}")
        if len(set(row)) != k:
            raise Wrong(f"{k} different experts for token {i}", f"experts[{i}] = {row}", SAME_TWICE)
    return weights, experts


def check_choice(experts, scores: Matrix, k: int, ordered: bool, mistake: Mistake | None = None) -> None:
    """Every choice has the score of its rank; experts with equal scores may stand for each other."""
    for i, (row, score) in enumerate(zip(experts.tolist(), scores)):
        best, chosen = [score[e] for e in top(score, k)], [score[e] for e in row]
        if not ordered:
            chosen = sorted(chosen, reverse=True)
        if not same(chosen, best, 1e-6):
            raise Wrong(f"experts[{i}] = {top(score, k)}{'' if ordered else ' in any order'}", f"{row}", mistake)


def check_gradient(fn: Learner, rows: Matrix, args: tuple, k: int, weigh) -> None:
    """Compares the gradient of sum(coefficient x weight) by autograd with that of the formula by differences."""
    rng = random.Random(f"coefficients/{k}")
    coefs = draw(rng, len(rows), len(rows[0]), low=-1.0, high=1.0)
    logits = torch.tensor(rows, requires_grad=True)
    weights, experts = call(fn, logits, args, k)
    if not weights.requires_grad:
        raise Wrong("weights through which the logits get a gradient", "weights without a graph", CUT)
    chosen = experts.tolist()
    try:
        (weights * torch.tensor(coefs).gather(1, experts)).sum().backward()
    except RuntimeError as error:
        raise Wrong("a gradient", f"{type(error).__name__}: {str(error).splitlines()[0]}", OVERWRITTEN) from None
    got = logits.grad if logits.grad is not None else torch.zeros_like(logits)

    def loss(m: Matrix) -> float:
        return sum(c[e] * w for row, es, c in zip(m, chosen, coefs) for e, w in zip(es, weigh(row, es)))

    compare(got, gradient(loss, [list(r) for r in rows]), f"with k = {k}: the gradient at logits", tol=1e-4)


# --- topk_router(logits_NE, k, normalize) -----------------------------------------------------------------------------
def _weigh(row: list[float], chosen: list[int], normalize: bool) -> list[float]:
    p = softmax(row)
    weights = [p[e] for e in chosen]
    return shares(weights) if normalize else weights


def _topk(rows: Matrix, k: int, normalize: bool) -> tuple[Matrix, list[list[int]]]:
    experts = [top(row, k) for row in rows]
    return [_weigh(row, es, normalize) for row, es in zip(rows, experts)], experts


def _topk_shapes(fn, rng):
    for n, e in ((N, E), (5, 3)):
        for k in (1, 2, e):
            for normalize in (False, True):
                call(fn, draw(rng, n, e), (k, normalize), k)


def _topk_choice(fn, rng):
    for k in (3, 1, 2, E):
        for normalize in (False, True):
            rows = draw(rng, N, E)
            check_choice(call(fn, rows, (k, normalize), k)[1], [softmax(r) for r in rows], k, ordered=True)


def _topk_weights(normalize):
    def test(fn, rng):
        for k in (3, 1, 2, E):
            rows = draw(rng, N, E)
            weights = call(fn, rows, (k, normalize), k)[0]
            compare(weights, _topk(rows, k, normalize)[0], f"with k = {k}: weights")
    return test


def _topk_whole(fn, rows, k, normalize, dtype=torch.float32, tol=1e-5):
    weights, experts = call(fn, rows, (k, normalize), k, dtype)
    compare(weights, _topk(rows, k, normalize)[0], "weights", tol)
    check_choice(experts, [softmax(r) for r in rows], k, ordered=True)


def _topk_edges(fn, rng):
    ties = draw(rng, 5, E)
    ties[1] = [0.5] * E
    ties[3][:4] = [3.5, 3.5, 3.5, 1.0]
    unwanted = [[*row[:-1], -60.0] for row in draw(rng, N, E)]
    for rows in (ties, draw(rng, 11, 5, low=-8, high=-1), unwanted):
        for k, normalize in ((2, True), (1, False), (len(rows[0]), False)):
            _topk_whole(fn, rows, k, normalize)


def _topk_large(fn, rng):
    for rows in ([[1e4, -1e4, 9999.0, 1e4 - 2], [0.0, 1e4, -3.0, 1.0]], [[-1e4, -9999.0, -1e4 - 1]]):
        for k, normalize in ((2, False), (2, True), (1, False)):
            _topk_whole(fn, rows, k, normalize, tol=2e-3)   # float32 near 1e4 has steps of 1e-3


def _topk_bf16(fn, rng):
    rows = draw_bf16(rng, N, E)
    _topk_whole(fn, rows, 2, False, torch.bfloat16)
    _topk_whole(fn, rows, 3, True, torch.bfloat16)


def _topk_gradient(fn, rng):
    for k, normalize in ((1, False), (3, False), (2, True)):
        check_gradient(fn, draw(rng, 5, E), (k, normalize), k, lambda row, es, z=normalize: _weigh(row, es, z))


def _topk_mistakes():
    """Each usual mistake as a function (rows, k, normalize) -> (weights, experts)."""
    def pick(ps, experts, normalize):
        weights = [[p[e] for e in es] for p, es in zip(ps, experts)]
        return [shares(w) if normalize else w for w in weights], experts

    def scored(score, choose=top):
        return lambda rows, k, z: pick(*(lambda ps: (ps, [choose(p, k) for p in ps]))(score(rows)), z)

    def each(f):
        return lambda rows: [f(row) for row in rows]

    def kept_as_zero(rows, k, z):
        experts = [top(row, k) for row in rows]
        ps = [softmax([x if i in es else 0.0 for i, x in enumerate(row)]) for row, es in zip(rows, experts)]
        return pick(ps, experts, z)

    def over_all_tokens(rows, k, z):
        weights, experts = _topk(rows, k, False)
        total = sum(map(sum, weights))
        return [[w / total for w in ws] for ws in weights] if z else weights, experts

    def renormalized_by_softmax(rows, k, z):
        weights, experts = _topk(rows, k, False)
        return [softmax(w) if z else w for w in weights], experts

    probs = each(softmax)
    return [
        (Mistake("softmax over the tokens", "the softmax runs over the tokens (dim=0): it is each token's row of E "
                 "probabilities that sums to one, so dim=-1."),
         scored(lambda rows: transpose(list(map(softmax, transpose(rows)))))),
        (Mistake("always renormalized", "the weights sum to one although normalize=False: they were divided by their "
                 "sum, or, which gives the same numbers, the softmax was taken after the top-k. With k = 1 every "
                 "weight is then 1."),
         lambda rows, k, z: _topk(rows, k, True)),
        (Mistake("never renormalized", "with normalize=True the k weights of a token must be divided by their sum."),
         lambda rows, k, z: _topk(rows, k, False)),
        (Mistake("normalize upside down", "normalize=True gives what normalize=False should, and the other way round."),
         lambda rows, k, z: _topk(rows, k, not z)),
        (Mistake("normalized over all tokens", "each token's weights are divided by that token's own sum (dim=-1, "
                 "keepdim=True), not by the sum over all tokens."), over_all_tokens),
        (Mistake("raw logits as weights", "the weights are the logits themselves: some are negative, and they do not "
                 "sum to one. Take the probabilities of the chosen experts."), scored(lambda rows: rows)),
        (Mistake("log-probabilities as weights", "the weights are logarithms of probabilities: log_softmax in place of "
                 "softmax."), scored(each(lambda r: [math.log(p) for p in softmax(r)]))),
        (Mistake("sigmoid for softmax", "each score was squashed on its own by a sigmoid: here the experts compete, "
                 "so it is a softmax over all of them."), scored(each(lambda r: list(map(sigmoid, r))))),
        (Mistake("softmax twice", "the probabilities went through a second softmax, which makes them nearly equal."),
         scored(each(lambda r: softmax(softmax(r))))),
        (Mistake("softmax to renormalize", "with normalize=True the k probabilities went through a second softmax. It makes "
                 "them sum to one, and also nearly equal: divide them by their sum, which keeps their ratio."),
         renormalized_by_softmax),
        (Mistake("scaled like attention", "the logits were divided by the root of the number of experts: that belongs "
                 "to attention, a router takes its logits as they are."),
         scored(each(lambda r: softmax([x / len(r) ** 0.5 for x in r])))),
        (Mistake("zero for the others", "the logits of experts that were not chosen were set to 0, and exp(0) is 1: "
                 "they still take a share. Softmax first, then choose."), kept_as_zero),
        (Mistake("equal weights", "every weight is 1/k: the probabilities were used for choosing and then forgotten."),
         lambda rows, k, z: ([[1 / k] * k for _ in rows], _topk(rows, k, z)[1])),
        (Mistake("the least probable", "the k experts with the smallest probability were taken: sort descending, or "
                 "largest=True."), scored(probs, lambda p, k: top([-x for x in p], k))),
        (Mistake("top-k of the absolute value", "the choice is by the size of the logit without its sign: a logit of "
                 "-3 says no, as strongly as it can."),
         lambda rows, k, z: pick(probs(rows), [top(list(map(abs, r)), k) for r in rows], z)),
        (SORTED, scored(probs, lambda p, k: top(p, k)[::-1])),
        (SORTED, scored(probs, lambda p, k: sorted(top(p, k)))),
    ]


def _topk_diagnose(fn: Learner, rng: random.Random) -> Mistake | None:
    return recognize(fn, rng, [(3, False), (3, True), (2, False)], _topk, _topk_mistakes())


def recognize(fn, rng, cases, truth, mistakes):
    rows = draw(rng, N, E)
    seen = [tuple(x.tolist() for x in call(fn, rows, case, case[0])) for case in cases]

    def is_it(mistake):
        return all(s[1] == m[1] and same(s[0], m[0]) for s, m in zip(seen, (mistake(rows, *case) for case in cases)))

    return None if is_it(truth) else first_match((m, lambda f=f: is_it(f)) for m, f in mistakes)


def check_topk_router(fn, seed: int = 0) -> Report:
    """Checks `topk_router(logits_NE, k, normalize) -> (weights_NK, experts_NK)`.

    Softmax over all experts, the k most probable ones, the most probable first; with `normalize` the k weights of a
    token are divided by their sum (Mixtral), without they stay probabilities (OLMoE, Switch). Weights are float32
    whatever the dtype of the logits; of tied experts any will do.
    """
    return run_check("topk_router", fn, [
        Property("two tensors of shape (N, k), float32 and int64", 1, _topk_shapes),
        Property("the k most probable experts, the most probable first", 2, _topk_choice),
        Property("normalize=False: the probabilities among all experts", 2, _topk_weights(False)),
        Property("normalize=True: the weights of a token sum to one", 2, _topk_weights(True)),
        Property("ties, negative logits, an expert that nobody wants", 1, _topk_edges, Mistake(
            "a threshold instead of a choice", "comparing with the k-th largest value lets every tied expert in: "
            "choose exactly k, by torch.topk or by sorting.")),
        Property("large logits do not overflow", 1, _topk_large, OVERFLOW),
        Property("bfloat16 logits: everything after them in float32", 1, _topk_bf16, NOT_FLOAT32),
        Property("the gradient of the weights reaches the logits", 2, _topk_gradient, HALF_CUT),
    ], seed, _topk_diagnose)
