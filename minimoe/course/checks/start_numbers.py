"""Chapter 0: the checks of the cards that ask for a number or a list: `active_share` and `load_shares`."""
from __future__ import annotations

import random

from minimoe.course.checking import (
    Learner,
    Mistake,
    Property,
    Report,
    Wrong,
    compare,
    first_match,
    run_check,
    same,
)
from minimoe.course.checks.oracle import softmax


# --- active_share(n_layers, n_experts, top_k, expert_params, other_params) -> share ------------------------------------
def _share(layers, experts, k, each, other):
    return (other + layers * k * each) / (other + layers * experts * each)


CONSTANT = Mistake("not the arguments", "the result is the same for every model: compute it from the arguments, not from numbers or "
                   "names outside the function.")
SHARE_MISTAKES = [
    (Mistake("top_k over n_experts", "that is the share of the experts alone: attention, embeddings and the rest are used by "
             "every token and count above and below the line."), lambda n, e, k, p, o: k / e),
    (Mistake("the rest not counted as active", "the parameters outside the experts are missing above the line: every token "
             "uses all of them."), lambda n, e, k, p, o: n * k * p / (o + n * e * p)),
    (Mistake("the rest not counted in the total", "the parameters outside the experts are missing below the line: they are "
             "part of the model."), lambda n, e, k, p, o: (o + n * k * p) / (n * e * p)),
    (Mistake("one layer only", "each of the n_layers layers has experts of its own: multiply by n_layers, above and below. "
             "other_params is for the whole model already."), lambda n, e, k, p, o: (o + k * p) / (o + e * p)),
    (Mistake("upside down", "active over total, not total over active: a share is at most 1."),
     lambda n, e, k, p, o: 1 / _share(n, e, k, p, o)),
    (Mistake("the idle share", "that is the share of the parameters which a token does not use: take it from 1."),
     lambda n, e, k, p, o: 1 - _share(n, e, k, p, o)),
    (Mistake("active over idle", "below the line stand all parameters, not only the idle ones."),
     lambda n, e, k, p, o: (o + n * k * p) / (n * (e - k) * p) if e > k else 0.0),
    (Mistake("percent", "a share is between 0 and 1: leave out the factor 100."),
     lambda n, e, k, p, o: 100 * _share(n, e, k, p, o)),
    (Mistake("one expert per token", "a token uses top_k experts in each layer, not one."),
     lambda n, e, k, p, o: _share(n, e, 1, p, o)),
    (Mistake("a number, not a share", "that is how many parameters a token uses: divide by all parameters."),
     lambda n, e, k, p, o: o + n * k * p),
    (Mistake("rounded", "the result is right to a digit or two, then rounded: return the quotient as it is."),
     lambda n, e, k, p, o: round(_share(n, e, k, p, o), 2)),
    (Mistake("whole-number division", "// drops everything after the point: divide with /."),
     lambda n, e, k, p, o: (o + n * k * p) // (o + n * e * p)),
]


def _model(rng: random.Random, k: int | None = None, experts: int | None = None):
    experts = rng.choice((5, 7, 11, 13)) if experts is None else experts
    k = rng.choice((2, 3)) if k is None else k
    return rng.choice((3, 5, 7)), experts, k, rng.randrange(101, 997), rng.randrange(1009, 9973)


def _one_share(fn: Learner, model) -> None:
    got = fn(*model)
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise Wrong("one number", type(got).__name__)
    if not same(got, _share(*model), 1e-6):
        raise Wrong(f"active_share{model} = {_share(*model):.5g}", f"{got:.5g}")


def _share_general(fn, rng):
    for _ in range(5):
        _one_share(fn, _model(rng))


def _share_top1(fn, rng):
    _one_share(fn, _model(rng, k=1))


def _share_dense(fn, rng):
    experts = rng.choice((3, 5))
    _one_share(fn, _model(rng, k=experts, experts=experts))


def _share_diagnose(fn: Learner, rng: random.Random) -> Mistake | None:
    models = [_model(rng) for _ in range(5)]
    got = [fn(*m) for m in models]
    known = first_match((m, lambda f=f: same(got, [f(*x) for x in models], 1e-6)) for m, f in SHARE_MISTAKES)
    return known or (CONSTANT if len(set(got)) == 1 else None)


def check_active_share(fn, seed: int = 0) -> Report:
    """Checks `active_share(n_layers, n_experts, top_k, expert_params, other_params) -> float`.

    Parameters that one token uses over all parameters, in a model of `n_layers` layers with `n_experts` experts of
    `expert_params` parameters each, and `other_params` parameters outside the experts in the whole model.
    """
    return run_check("active_share", fn, [
        Property("active over total, for models of several sizes", 3, _share_general),
        Property("one expert per token", 1, _share_top1),
        Property("all experts for every token: the share is 1", 1, _share_dense),
    ], seed, _share_diagnose)


# --- load_shares(experts_NK, n_experts) -> shares ----------------------------------------------------------------------
def _choices(rng: random.Random, n: int, k: int, experts: list[int]) -> list[list[int]]:
    return [rng.sample(experts, k) for _ in range(n)]


def _uneven(rng: random.Random, n: int, k: int, e: int) -> list[list[int]]:
    """n tokens of k choices among e experts, some liked better; each is chosen, and not all equally often."""
    liking = [rng.uniform(1, 5) for _ in range(e)]
    while True:
        rows = [sorted(range(e), key=lambda i: rng.random() / liking[i])[:k] for _ in range(n)]
        if min(_count(rows, e)) > 0 and len(set(_count(rows, e))) > 2:
            return rows


def _count(rows: list[list[int]], e: int) -> list[int]:
    return [sum(row.count(i) for row in rows) for i in range(e)]


def _loads(rows: list[list[int]], e: int) -> list[float]:
    return [c / sum(map(len, rows)) for c in _count(rows, e)]


LOAD_MISTAKES = [
    (Mistake("first choices only", "only the first choice of each token was counted: every choice is work for an expert."),
     lambda rows, e: _loads([r[:1] for r in rows], e)),
    (Mistake("last choices only", "only the last choice of each token was counted: every choice is work for an expert."),
     lambda rows, e: _loads([r[-1:] for r in rows], e)),
    (Mistake("divided by the tokens", "the shares sum to k: divide by the number of choices, which is tokens times k."),
     lambda rows, e: [c / len(rows) for c in _count(rows, e)]),
    (Mistake("counts, not shares", "these are counts: divide each by the sum of all."), _count),
    (Mistake("percent", "a share is between 0 and 1: leave out the factor 100."),
     lambda rows, e: [100 * x for x in _loads(rows, e)]),
    (Mistake("divided by the even share", "1 stands for an even share here: divide by the number of choices only."),
     lambda rows, e: [e * x for x in _loads(rows, e)]),
    (Mistake("divided by the busiest", "the busiest expert has 1 here: divide by the sum of the counts, not by the largest."),
     lambda rows, e: [c / max(_count(rows, e)) for c in _count(rows, e)]),
    (Mistake("divided by the experts", "the counts were divided by the number of experts: divide by the number of choices."),
     lambda rows, e: [c / e for c in _count(rows, e)]),
    (Mistake("sorted by load", "place e of the result belongs to expert e: do not sort the shares."),
     lambda rows, e: sorted(_loads(rows, e), reverse=True)),
    (Mistake("in order of appearance", "place e of the result belongs to expert e, whichever expert comes first in the text."),
     lambda rows, e: [_loads(rows, e)[i] for i in dict.fromkeys(i for row in rows for i in row)]),
    (Mistake("counted from 1", "experts are numbered from 0: the first place of the result is that of expert 0."),
     lambda rows, e: [0.0, *_loads(rows, e)[:-1]]),
    (Mistake("softmax of the counts", "a softmax exaggerates differences: a share is the count over the sum of the counts."),
     lambda rows, e: softmax([float(c) for c in _count(rows, e)])),
]


def _one_load(fn: Learner, rows: list[list[int]], e: int, mistake: Mistake | None = None) -> None:
    got = fn(rows, e)
    got = got.tolist() if hasattr(got, "tolist") else got
    if isinstance(got, dict):
        raise Wrong(f"a list of {e} numbers", "a dict", Mistake(
            "a dict", "give a list with a place for every expert, those without tokens too: [shares of expert 0, 1, 2 …]."))
    if not isinstance(got, (list, tuple)):
        raise Wrong(f"a list of {e} numbers", type(got).__name__)
    if len(got) != e:
        raise Wrong(f"{e} numbers, one for each expert", f"{len(got)} numbers", Mistake(
            "experts without tokens left out", "an expert that nobody chose has a place too, with share 0: n_experts says how "
            "many places there are."))
    compare(list(got), _loads(rows, e), f"for {len(rows)} tokens, {len(rows[0])} choices, {e} experts: shares", mistake=mistake)


def _load_one_choice(fn, rng):
    _one_load(fn, _uneven(rng, 17, 1, 5), 5)


def _load_k_choices(fn, rng):
    for k, e in ((2, 7), (3, 5)):
        _one_load(fn, _uneven(rng, 29, k, e), e)


def _load_idle(fn, rng):
    for idle in (6, 0, 3):          # the last, the first, one in the middle
        _one_load(fn, _choices(rng, 13, 2, [i for i in range(7) if i != idle]), 7)


def _load_collapse(fn, rng):
    _one_load(fn, [[2]] * 11, 5)
    _one_load(fn, [[4, 1]], 5)


def _load_diagnose(fn: Learner, rng: random.Random) -> Mistake | None:
    texts = [(_uneven(rng, 29, k, e), e) for k, e in ((3, 7), (2, 5))]
    got = [fn(rows, e) for rows, e in texts]
    return first_match((m, lambda f=f: all(same(g, f(*x), 1e-6) for g, x in zip(got, texts))) for m, f in LOAD_MISTAKES)


def check_load_shares(fn, seed: int = 0) -> Report:
    """Checks `load_shares(experts_NK, n_experts) -> list`: each expert's share of all choices.

    `experts_NK` is a list with a list of k expert numbers for each token. The result has a place for every expert.
    """
    return run_check("load_shares", fn, [
        Property("one choice per token", 1, _load_one_choice),
        Property("k choices per token: all of them count, the shares sum to 1", 2, _load_k_choices),
        Property("experts that nobody chose", 2, _load_idle),
        Property("one expert takes everything; a text of one token", 1, _load_collapse),
    ], seed, _load_diagnose)
