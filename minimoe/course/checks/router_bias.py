"""Chapter 4: the check of `sigmoid_bias_router`."""
from __future__ import annotations

import random

import torch

from minimoe.course.checking import Learner, Mistake, Property, Report, compare, first_match, run_check, same
from minimoe.course.checks.oracle import Matrix, draw, draw_bf16, shares, sigmoid, softmax, top
from minimoe.course.checks.router_topk import HALF_CUT, NOT_FLOAT32, E, N, call, check_choice, check_gradient


def _biases(rng: random.Random, e: int) -> list[float]:
    return [rng.choice((-1, 1)) * rng.uniform(0.1, 0.5) for _ in range(e)]


def _bias_call(fn, rows, bias, k, dtype=torch.float32):
    return call(fn, rows, (torch.tensor(bias), k), k, dtype)


def _scores(rows: Matrix) -> Matrix:
    return [[sigmoid(x) for x in row] for row in rows]


def _biased(scores: Matrix, bias: list[float]) -> Matrix:
    return [[s + b for s, b in zip(row, bias)] for row in scores]


def _bias_weights(rows: Matrix, experts: list[list[int]]) -> Matrix:
    return [shares([s[e] for e in es]) for s, es in zip(_scores(rows), experts)]


def _bias_whole(fn, rows, bias, k, dtype=torch.float32, tol=1e-5):
    weights, experts = _bias_call(fn, rows, bias, k, dtype)
    compare(weights, _bias_weights(rows, experts.tolist()), "weights", tol)
    check_choice(experts, _biased(_scores(rows), bias), k, ordered=False)


def _bias_shapes(fn, rng):
    for n, e in ((N, E), (5, 3)):
        for k in (1, 2, e):
            _bias_call(fn, draw(rng, n, e), _biases(rng, e), k)


def _bias_choice(zero):
    def test(fn, rng):
        for k in (3, 1, 2, E):
            rows, bias = draw(rng, N, E), [0.0] * E if zero else _biases(rng, E)
            experts = _bias_call(fn, rows, bias, k)[1]
            check_choice(experts, _biased(_scores(rows), bias), k, ordered=False)
    return test


def _bias_weigh(fn, rng):
    for k in (3, 1, 2, E):
        rows = draw(rng, N, E)
        weights, experts = _bias_call(fn, rows, _biases(rng, E), k)
        compare(weights, _bias_weights(rows, experts.tolist()), f"with k = {k}: weights")


def _bias_edges(fn, rng):
    tied = draw(rng, 5, E)
    tied[2] = [0.25] * E
    _bias_whole(fn, tied, [0.0] * E, 3)
    _bias_whole(fn, draw(rng, N, 5, low=-9, high=-1), _biases(rng, 5), 2, tol=2e-3)     # 1 + tanh cancels here
    _bias_whole(fn, draw(rng, N, E), [*_biases(rng, E)[:-1], -9.0], 2)      # an expert that the bias shuts out


def _bias_large(fn, rng):
    _bias_whole(fn, [[1e4, -1e4, 3.0, 2.0], [0.0, 1e4, 1.0, -200.0]], [0.0, -0.125, 0.25, 0.0], 2)


def _bias_bf16(fn, rng):
    _bias_whole(fn, draw_bf16(rng, N, E), _biases(rng, E), 3, torch.bfloat16)


def _bias_gradient(fn, rng):
    for k in (3, 2):
        rows, bias = draw(rng, 5, E), _biases(rng, E)
        check_gradient(fn, rows, (torch.tensor(bias), k), k, lambda row, es: shares([sigmoid(row[e]) for e in es]))


def _bias_mistakes():
    def made(scores, ranks, weigh):
        """scores(rows, bias) that weigh, ranks(rows, bias) that choose, weigh(chosen scores, all scores)."""
        def mistake(rows, bias, k):
            experts = [top(r, k) for r in ranks(rows, bias)]
            return [weigh([s[e] for e in es], s) for s, es in zip(scores(rows, bias), experts)], experts
        return mistake

    plain, norm = lambda rows, bias: _scores(rows), lambda w, s: shares(w)
    biased = lambda rows, bias: _biased(_scores(rows), bias)
    inside = lambda rows, bias: _scores(_biased(rows, bias))
    soft = lambda rows, bias: [softmax(r) for r in rows]
    return [
        (Mistake("bias in the weights too", "the weights were taken from score + bias: the bias only chooses. Gather "
                 "the weights from the scores without it."), made(biased, biased, norm)),
        (Mistake("bias only in the weights",
                 "the bias moved the weights and not the choice: it is the other way round."),
         made(biased, plain, norm)),
        (Mistake("bias not used", "the choice is by the scores alone: add the bias before the top-k."),
         made(plain, plain, norm)),
        (Mistake("bias taken away",
                 "the bias was subtracted: a positive bias makes an expert more likely to be chosen."),
         made(plain, lambda rows, bias: _biased(_scores(rows), [-b for b in bias]), norm)),
        (Mistake("bias on the logits", "the choice is by logit + bias, before the sigmoid or without one: the bias is "
                 "measured in scores, add it after the sigmoid."), made(plain, inside, norm)),
        (Mistake("bias on the logits, in the weights too", "the bias was added to the logits, and so moves choice and "
                 "weights: add it after the sigmoid, and for the choice only."), made(inside, inside, norm)),
        (Mistake("softmax for sigmoid",
                 "the scores are a softmax: here every expert is scored on its own, by a sigmoid."),
         made(soft, lambda rows, bias: _biased(soft(rows, bias), bias), norm)),
        (Mistake("not renormalized",
                 "the weights of a token do not sum to one: divide the chosen scores by their sum."),
         made(plain, biased, lambda w, s: w)),
        (Mistake("divided by the sum of all scores", "the chosen scores were divided by the sum over all experts: only "
                 "the chosen ones count, so that the weights sum to one."),
         made(plain, biased, lambda w, s: [x / sum(s) for x in w])),
        (Mistake("softmax of the chosen scores", "the chosen scores went through a softmax: they are scores already, "
                 "divide them by their sum."), made(plain, biased, lambda w, s: softmax(w))),
        (Mistake("the lowest scores", "the k lowest of score + bias were chosen: take the highest."),
         made(plain, lambda rows, bias: [[-x for x in r] for r in biased(rows, bias)], norm)),
    ]


def _bias_diagnose(fn: Learner, rng: random.Random) -> Mistake | None:
    """As `recognize`, whatever the order of the experts."""
    rows, bias = draw(rng, 4 * N, E), _biases(rng, E)
    seen = [_bias_call(fn, rows, bias, k) for k in (3, 2)]
    seen = [[dict(zip(es, ws)) for ws, es in zip(w.tolist(), x.tolist())] for w, x in seen]

    def is_it(mistake):
        made = [[dict(zip(es, ws)) for ws, es in zip(*mistake(rows, bias, k))] for k in (3, 2)]
        pairs = [pair for a, b in zip(seen, made) for pair in zip(a, b)]
        return all(s.keys() == m.keys() and all(same(s[e], m[e]) for e in m) for s, m in pairs)

    return first_match((m, lambda f=f: is_it(f)) for m, f in _bias_mistakes())


def check_sigmoid_bias_router(fn, seed: int = 0) -> Report:
    """Checks `sigmoid_bias_router(logits_NE, bias_E, k) -> (weights_NK, experts_NK)` (DeepSeek-V3, eq. 12-16).

    Scores are sigmoids of the logits. The k experts with the highest score + bias are chosen, in any order; the weights
    are their scores without the bias, divided by their sum. Weights are float32 whatever the dtype of the logits.
    """
    return run_check("sigmoid_bias_router", fn, [
        Property("two tensors of shape (N, k), float32 and int64", 1, _bias_shapes),
        Property("without bias: the k highest scores", 1, _bias_choice(zero=True)),
        Property("the bias moves the choice", 2, _bias_choice(zero=False)),
        Property("the unbiased scores weigh, and sum to one", 2, _bias_weigh),
        Property("ties, negative logits, an expert that the bias shuts out", 1, _bias_edges),
        Property("large logits do not overflow", 1, _bias_large, Mistake(
            "overflow in the sigmoid", "exp of a large logit is infinite, and infinite over infinite is nan: use "
            "torch.sigmoid, which takes the safe one of its two forms.")),
        Property("bfloat16 logits: everything after them in float32", 1, _bias_bf16, NOT_FLOAT32),
        Property("the gradient of the weights reaches the logits", 2, _bias_gradient, HALF_CUT),
    ], seed, _bias_diagnose)
