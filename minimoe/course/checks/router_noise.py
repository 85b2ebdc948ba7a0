"""Chapter 4: the check of `noisy_topk`.

The noise is the learner's own, so it cannot be compared with numbers made here. But with k = E all weights are shown,
and the logarithm of a softmax weight is the noisy logit up to one number per token: so the noise can be read off the
result, whatever draws it, and then be examined.
"""
from __future__ import annotations

import math
import random

import torch

from minimoe.course.checking import Learner, Mistake, Property, Report, Wrong, compare, run_check, same
from minimoe.course.checks.oracle import Matrix, draw, shares, softmax, top
from minimoe.course.checks.router_topk import HALF_CUT, E, N, call, check_choice, check_gradient

MANY = 499      # tokens where the size of the noise is measured: its standard deviation is then known to 1.3 %

IN_EVALUATION = Mistake("noise in evaluation", "with training=False the result still changes with the generator: noise "
                        "helps to explore while learning, and is switched off afterwards.")
UPSIDE_DOWN = Mistake("training upside down", "the noise comes with training=False and stays away with training=True.")
NO_NOISE = Mistake("no noise at all", "with training=True the result is that of the plain logits: add noise_std times "
                   "standard normal numbers to the logits.")
PER_TOKEN = Mistake("one number per token", "random numbers were drawn, but nothing moves: the same number was added "
                    "to all experts of a token, and a softmax does not see that. Draw N x E numbers.")
PER_EXPERT = Mistake("one number per expert", "all tokens get the same noise: draw N x E numbers, not E.")
ONLY_CHOOSES = Mistake("clean logits weigh", "the noise moves the choice, but the weights come from the logits "
                       "without it: here both come from the noisy logits.")
ONLY_WEIGHS = Mistake("clean logits choose", "the noise moves the weights, but the choice is made by the logits "
                      "without it: add it before the top-k.")
AFTER = Mistake("noise after the softmax", "the noise was added to the probabilities, which can turn negative: add it "
                "to the logits, before the softmax.")
TIMES = Mistake("noise as a factor", "where the logits are 0 there is no noise: it was multiplied with the logits "
                "instead of being added to them.")
VARIANCE = Mistake("noise_std as a variance", "the noise has the square root of the standard deviation that was asked: "
                   "multiply by noise_std, not by its root.")
SQUARED = Mistake("noise_std squared", "the noise has the square of the standard deviation that was asked: multiply by "
                  "noise_std once.")
UNIFORM = Mistake("uniform noise", "the noise is uniform (torch.rand), not normal: torch.randn.")
OWN_STD = Mistake("noise_std not used", "the size of the noise is the same whatever noise_std says: a fixed number or "
                  "a variable of the notebook stands in its place.")
OTHER_DICE = Mistake("the generator is not used", "the numbers come from torch's global generator: pass "
                     "generator=generator, and no call of another function can change what you draw.")
RESEEDED = Mistake("seeded at each call", "two calls in a row draw the same noise: do not seed inside the function, "
                   "the caller's generator goes on by itself.")
ALL_E = Mistake("weights over all experts", "the weights of a token do not sum to one: the softmax is over the k "
                "chosen noisy logits (Shazeer et al. 2017, eq. 3-5).")


def _dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noisy(fn: Learner, rows: Matrix, k: int, std: float, training: bool, dice: torch.Generator):
    return call(fn, rows, (k, std, training, dice), k)


def _clean(rows: Matrix, k: int) -> Matrix:
    return [shares([p[e] for e in top(p, k)]) for p in map(softmax, rows)]


def _noise(fn: Learner, rows: Matrix, std: float, seed: int) -> Matrix:
    """What was added to the logits, up to one number per token (each row is shifted to sum to zero)."""
    weights, experts = _noisy(fn, rows, len(rows[0]), std, True, _dice(seed))
    out = []
    for i, (row, ws, es) in enumerate(zip(rows, weights.tolist(), experts.tolist())):
        if not min(ws) > 0:
            raise Wrong(f"positive weights for token {i}", f"{min(ws):.4g}", AFTER)
        noise = [0.0] * len(row)
        for w, e in zip(ws, es):
            noise[e] = math.log(w) - row[e]
        mean = sum(noise) / len(noise)
        out.append([x - mean for x in noise])
    return out


def _spread(noise: Matrix) -> float:
    """Standard deviation, knowing that every row was shifted to sum to zero."""
    return math.sqrt(sum(x * x for row in noise for x in row) / (len(noise) * (len(noise[0]) - 1)))


def _many(rng: random.Random) -> Matrix:
    return [[rng.uniform(-1, 1) for _ in range(E)] for _ in range(MANY)]


def _shapes(fn, rng):
    for n, e in ((N, E), (5, 3)):
        for k in (1, 2, e):
            for training in (False, True):
                _noisy(fn, draw(rng, n, e), k, 1.0, training, _dice(1))


def _evaluation(fn, rng):
    rows = draw(rng, N, E)
    for k in (3, 1, 2, E):
        seen = [_noisy(fn, rows, k, 2.0, False, _dice(s)) for s in (1, 2)]
        if k > 1 and not same(seen[0][0], seen[1][0]):
            learns = [_noisy(fn, rows, k, 2.0, True, _dice(s))[0] for s in (1, 2)]
            raise Wrong("with training=False the same weights for any generator", "weights that change with its seed",
                        UPSIDE_DOWN if same(*learns) else IN_EVALUATION)
        summed = [[sum(ws)] for ws in seen[0][0].tolist()]
        compare(seen[0][0], _clean(rows, k), f"with k = {k}: weights",
                mistake=None if same(summed, [[1.0]] * N) else ALL_E)
        check_choice(seen[0][1], [softmax(r) for r in rows], k, ordered=True)


def _training(fn, rng):
    rows = draw(rng, N, E, low=-1, high=1)
    dice, before = _dice(7), torch.get_rng_state()
    weights, experts = _noisy(fn, rows, E, 1.0, True, dice)
    if same([[dict(zip(es, ws))[e] for e in range(E)] for es, ws in zip(experts.tolist(), weights.tolist())],
            [softmax(r) for r in rows]):
        drew = not torch.equal(dice.get_state(), _dice(7).get_state()) or not torch.equal(before, torch.get_rng_state())
        in_order = experts.tolist() == [top(r, E) for r in rows]
        raise Wrong("weights that differ from those without noise", "the same weights",
                    ONLY_CHOOSES if not in_order else PER_TOKEN if drew else NO_NOISE)
    zeros = [[0.0] * E for _ in range(N)]
    if _spread(_noise(fn, zeros, 1.0, 7)) < 0.05:
        raise Wrong("noise on logits of 0", "none", TIMES)


def _added(fn, rng):
    """The same draw on other logits: what comes out beside the logits must be the same noise."""
    flat, steep = draw(rng, N, E, low=-1, high=1), draw(rng, N, E, low=-3, high=3)
    compare(_noise(fn, steep, 0.01, 3), _noise(fn, flat, 0.01, 3), "noise", tol=1e-4, mistake=AFTER)
    compare(_noise(fn, steep, 1.0, 3), _noise(fn, flat, 1.0, 3), "noise", tol=1e-3, mistake=AFTER)


def _size(fn, rng):
    rows = _many(rng)
    stds = (0.5, 2.0)
    seen = [_spread(_noise(fn, rows, std, rng.randrange(1000))) for std in stds]
    guesses = [(VARIANCE, [s ** 0.5 for s in stds]), (SQUARED, [s * s for s in stds]), (OWN_STD, [seen[0]] * 2),
               (UNIFORM, [s / 12 ** 0.5 for s in stds])]
    for std, got in zip(stds, seen):
        if not abs(got / std - 1) < 0.1:
            mistake = next((m for m, guess in guesses if all(abs(a / b - 1) < 0.1 for a, b in zip(seen, guess))), None)
            raise Wrong(f"noise of standard deviation {std} (within 10 %)", f"{got:.2g}", mistake)


def _fresh(fn, rng):
    noise = _noise(fn, _many(rng), 1.0, rng.randrange(1000))
    if same(noise[0], noise[1], 1e-3):
        raise Wrong("other noise for token 1 than for token 0", "the same", PER_EXPERT)
    for e in range(E):
        mean = sum(row[e] for row in noise) / MANY
        if abs(mean) > 6 / math.sqrt(MANY):
            raise Wrong(f"noise around 0 for expert {e}", f"a mean of {mean:.2g}", PER_EXPERT)


def _whose_dice(fn, rng):
    rows, seed = draw(rng, N, E), rng.randrange(1000)
    before, dice = torch.get_rng_state(), _dice(seed)
    first = _noisy(fn, rows, E, 1.0, True, dice)[0]
    if not torch.equal(before, torch.get_rng_state()):
        raise Wrong("torch's global generator left alone", "a draw from it", OTHER_DICE)
    if same(first, _noisy(fn, rows, E, 1.0, True, dice)[0]):
        raise Wrong("other noise in the second call", "the same noise", RESEEDED)
    compare(_noisy(fn, rows, E, 1.0, True, _dice(seed))[0], first, "the generator set back, weights",
            mistake=OTHER_DICE)


def _consistent(fn, rng):
    rows, seed = draw(rng, N, E), rng.randrange(1000)
    noisy = [[x + z for x, z in zip(r, zs)] for r, zs in zip(rows, _noise(fn, rows, 1.0, seed))]
    for k in (3, 1, 2):
        weights, experts = _noisy(fn, rows, k, 1.0, True, _dice(seed))
        clean = all(sorted(es) == sorted(top(r, k)) for r, es in zip(rows, experts.tolist()))
        for i, (es, r) in enumerate(zip(experts.tolist(), noisy)):
            if not same([r[e] for e in es], [r[e] for e in top(r, k)], 1e-3):
                raise Wrong(f"with k = {k}: experts[{i}] = {top(r, k)}, by the noisy logits", f"{es}",
                            ONLY_WEIGHS if clean else None)
        compare(weights, [softmax([r[e] for e in top(r, k)]) for r in noisy], f"with k = {k}: weights", 1e-3)


def _gradient(fn, rng):
    rows, seed = draw(rng, 5, E), rng.randrange(1000)
    noise = {tuple(r): zs for r, zs in zip(rows, _noise(fn, rows, 1.0, seed))}
    where = {i: noise[tuple(r)] for i, r in enumerate(rows)}

    def nearest(row):       # the formula is asked with one logit moved a little: find whose noise belongs to it
        return where[min(range(len(rows)), key=lambda i: sum(abs(a - b) for a, b in zip(row, rows[i])))]

    check_gradient(fn, rows, (2, 1.0, True, _dice(seed)), 2,
                   lambda row, es: softmax([row[e] + nearest(row)[e] for e in es]))


def check_noisy_topk(fn, seed: int = 0) -> Report:
    """Checks `noisy_topk(logits_NE, k, noise_std, training, generator) -> (weights_NK, experts_NK)`.

    In training noise_std times standard normal numbers, N x E of them drawn from `generator`, are added to the logits;
    the k largest noisy logits are chosen, the largest first, and the softmax over those k gives the weights (Shazeer et
    al. 2017, section 2.1, with a fixed noise). In evaluation the same without noise.
    """
    from_noisy = Mistake("choice and weights disagree", "the k chosen are the largest noisy logits, and the weights "
                         "are the softmax over exactly these: draw once, use the sum for both.")
    return run_check("noisy_topk", fn, [
        Property("two tensors of shape (N, k), float32 and int64", 1, _shapes),
        Property("evaluation: no noise", 2, _evaluation),
        Property("training: noise on the logits, in choice and weights", 1, _training),
        Property("the generator alone decides what is drawn", 1, _whose_dice),
        Property("the noise is added, and does not depend on the logits", 1, _added, AFTER),
        Property("a number of its own for each token and expert", 1, _fresh),
        Property("its standard deviation is noise_std", 2, _size),
        Property("the k largest noisy logits, and their softmax", 2, _consistent, from_noisy),
        Property("the gradient of the weights reaches the logits", 2, _gradient, HALF_CUT),
    ], seed)
