"""Chapter 4: the checks of the cards that ask for no new router: `predict_router` and `top1_layer` (a repair)."""
from __future__ import annotations

import random

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
    same,
)
from minimoe.course.checks.oracle import draw, gradient, shares, sigmoid, softmax, top, transpose
from minimoe.course.checks.router_topk import CUT, HALF_CUT

ANSWERS = ("smaller", "same", "larger")


# --- predict_router() -> {question: "smaller" | "same" | "larger"} ----------------------------------------------------
def _first(row, k=2, normalize=True, score=softmax):
    """The largest of the k weights."""
    p = score(row)
    weights = [p[e] for e in top(p, k)]
    return (shares(weights) if normalize else weights)[0]


def _sigmoids(row):
    return [sigmoid(x) for x in row]


def _raised(row):
    return [x + (i == top(row, 1)[0]) for i, x in enumerate(row)]


QUESTIONS = {       # question: (the largest weight before, and after, as functions of a token's logits; why)
    "shift": (lambda r: _first(r, normalize=False), lambda r: _first([x + 5 for x in r], normalize=False),
              "exp(x + 5) is exp(x) times one number for all experts, and the softmax divides it out."),
    "shift_sigmoid": (lambda r: _first(r, score=_sigmoids), lambda r: _first([x + 5 for x in r], score=_sigmoids),
                      "every sigmoid moves towards 1, so the scores become alike and their shares more equal."),
    "double": (_first, lambda r: _first([2 * x for x in r]),
               "the gap between the logits doubles, and the ratio of two weights is exp(gap)."),
    "more_choices_normalized": (_first, lambda r: _first(r, k=3), "the same probability is divided by a larger sum."),
    "more_choices": (lambda r: _first(r, normalize=False), lambda r: _first(r, k=3, normalize=False),
                     "the softmax runs over all experts, whoever is chosen afterwards."),
    "one_choice_normalized": (lambda r: _first(r, k=1), lambda r: _first(_raised(r), k=1),
                              "one weight divided by itself is 1, whatever the logit: the router cannot learn."),
}


def _answer(question: str, rng: random.Random) -> str:
    before, after, _ = QUESTIONS[question]
    found = set()
    for row in draw(rng, 17, 7):
        change = after(row) - before(row)
        found.add("same" if abs(change) < 1e-9 else "larger" if change > 0 else "smaller")
    (answer,) = found
    return answer


def _question(name: str):
    def test(fn, rng):
        given = fn()
        if not isinstance(given, dict) or given.get(name) not in ANSWERS:
            got = repr(given.get(name)) if isinstance(given, dict) else type(given).__name__
            raise Wrong(f"a dict in which {name!r} is one of {', '.join(map(repr, ANSWERS))}", got, Mistake(
                "no answer", f"give one of the three words for {name!r}; write down a guess, then see."))
        truth = _answer(name, rng)
        if given[name] != truth:
            raise Wrong(f"{truth!r}", f"{given[name]!r}", Mistake(f"{name}: {given[name]}", QUESTIONS[name][2]))
    return test


def check_predict_router(fn, seed: int = 0) -> Report:
    """Checks `predict_router() -> dict`: what becomes of a token's largest weight, "smaller", "same" or "larger"."""
    return run_check("predict_router", fn, [Property(name, 1, _question(name)) for name in QUESTIONS], seed)


# --- top1_layer(x_ND, router_ED, experts_EDD) -> y_ND -----------------------------------------------------------------
SIZES = (11, 3, 5)      # tokens, width, experts


def _inputs(rng: random.Random):
    n, d, e = SIZES
    return draw(rng, n, d), draw(rng, e, d), [draw(rng, d, d, low=-1, high=1) for _ in range(e)]


def _mix(xs, router, experts, weigh):
    """y of every token, where weigh(logits) gives a weight per expert."""
    def times(m, x):
        return [sum(a * b for a, b in zip(row, x)) for row in m]

    out = []
    for x in xs:
        weighed = [[w * v for v in times(m, x)] for w, m in zip(weigh(times(router, x)), experts)]
        out.append([sum(column) for column in transpose(weighed)])
    return out


def _only_best(weight):
    """A weight for the best expert, 0 for the others; `weight(logits, best)`."""
    return lambda logits: [weight(logits, e) if e == top(logits, 1)[0] else 0.0 for e in range(len(logits))]


_switch = _only_best(lambda logits, e: softmax(logits)[e])


def _run(fn: Learner, xs, router, experts):
    y = fn(torch.tensor(xs), torch.tensor(router), torch.tensor(experts))
    return expect_tensor(y, "the result", SIZES[:2])


def _layer_value(fn, rng):
    xs, router, experts = _inputs(rng)
    compare(_run(fn, xs, router, experts), _mix(xs, router, experts, _switch), "y", tol=1e-4)


def _layer_gradient(of_router: bool):
    def test(fn, rng):
        xs, router, experts = _inputs(rng)
        tensors = [torch.tensor(v, requires_grad=True) for v in (router, experts)]
        coefs = draw(rng, *SIZES[:2])
        y = fn(torch.tensor(xs), *tensors)
        if not getattr(y, "requires_grad", False):
            raise Wrong("a result with a graph", "one without", CUT)
        (y * torch.tensor(coefs)).sum().backward()
        got = tensors[0 if of_router else 1].grad
        name = f"the gradient at {'router' if of_router else 'experts'}"
        if got is None:
            raise Wrong(name, "no gradient at all", CUT)

        def loss(r, x):
            return sum(c * v for cs, vs in zip(coefs, _mix(xs, r, x, _switch)) for c, v in zip(cs, vs))

        if of_router:
            expected = gradient(lambda m: loss(m, experts), router)
            if not got.any():
                raise Wrong(f"{name} other than 0", "0 everywhere", Mistake(
                    "no gradient for the router", "the weight does not depend on the router: a softmax over the one "
                    "chosen logit is always 1. Softmax over all experts, then choose."))
        else:
            expected = [gradient(lambda m, e=e: loss(router, [*experts[:e], m, *experts[e + 1:]]), experts[e])
                        for e in range(len(experts))]
        compare(got, expected, name, tol=1e-3)
    return test


def _layer_diagnose(fn: Learner, rng: random.Random) -> Mistake | None:
    xs, router, experts = _inputs(rng)
    y = _run(fn, xs, router, experts)
    return first_match((m, lambda w=w: same(y, _mix(xs, router, experts, w), 1e-3)) for m, w in [
        (Mistake("weight 1", "the chosen expert's output comes through with weight 1: a softmax over the one chosen "
                 "logit, or no weight at all, leaves the router without a gradient."),
         _only_best(lambda logits, e: 1.0)),
        (Mistake("raw logit as weight", "the weight is the logit itself: the gradient flows, but the weight is no "
                 "probability, and may be negative."), _only_best(lambda logits, e: logits[e])),
        (Mistake("sigmoid for softmax", "the weight is a sigmoid of the chosen logit: the experts should compete, so "
                 "it is a softmax over all of them."), _only_best(lambda logits, e: sigmoid(logits[e]))),
        (Mistake("all experts mixed", "every token gets a mixture of all experts: that learns, and costs E times the "
                 "work. Use the chosen expert only."), softmax),
    ])


def check_top1_layer(fn, seed: int = 0) -> Report:
    """Checks the repaired `top1_layer(x_ND, router_ED, experts_EDD) -> y_ND`.

    A token goes to the expert with the highest logit; what this expert makes of it counts with its probability among
    all experts (Switch: Fedus et al. 2022, eq. 2), so that the router gets a gradient.
    """
    return run_check("top1_layer", fn, [
        Property("y = probability of the best expert x its output", 2, _layer_value),
        Property("the router gets the gradient of that formula", 2, _layer_gradient(True), HALF_CUT),
        Property("the experts get theirs", 1, _layer_gradient(False), HALF_CUT),
    ], seed, _layer_diagnose)
