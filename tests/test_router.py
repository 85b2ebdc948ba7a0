"""Routers against plain loops; capacity; no look-ahead; gradients."""
import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.router import (
    Router,
    capacity,
    expert_choice,
    hash_routing,
    random_routing,
    sigmoid_topk,
    softmax_topk,
    within_capacity,
)
from tests import reference


def logits(n=13, e=7, scale=3.0, seed=0):
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_topk_equals_loops(k, normalize):
    x = logits()
    r = softmax_topk(x, k, normalize)
    for n, row in enumerate(x.tolist()):
        probs = reference.softmax(row)
        chosen = reference.topk(row, k)
        assert r.experts[n].tolist() == chosen
        total = sum(probs[e] for e in chosen) if normalize else 1.0
        assert r.weights[n].tolist() == pytest.approx([probs[e] / total for e in chosen], abs=1e-6)
    assert torch.allclose(r.probs.sum(-1), torch.ones(13))
    assert r.kept.all() and r.weights.dtype == torch.float32


def test_large_logits_stay_finite():
    r = softmax_topk(torch.tensor([[1e4, -1e4, 0.0]]), 2)
    assert torch.isfinite(r.weights).all() and r.experts[0, 0] == 0


def test_half_precision_logits_are_scored_in_float32():
    # in bfloat16 both probabilities round to the same number and the choice would be a tie
    x = torch.tensor([[4.0, 4.03125, 0.0]], dtype=torch.bfloat16)
    assert softmax_topk(x, 1).experts.item() == 1 and softmax_topk(x, 1).probs.dtype == torch.float32


def test_top1_without_renormalizing_reaches_the_router():
    x = logits().requires_grad_()
    softmax_topk(x, 1, normalize=False).weights.sum().backward()
    assert x.grad.norm() > 0.01
    y = logits().requires_grad_()
    softmax_topk(y, 1, normalize=True).weights.sum().backward()
    assert y.grad.norm() < 1e-5                     # why Switch does not renormalize: the weight is always one


def test_selection_bias_chooses_but_does_not_weigh():
    x, bias = logits(), torch.linspace(-2, 2, 7)
    r = sigmoid_topk(x, 3, bias)
    for n, row in enumerate(x.sigmoid().tolist()):
        chosen = reference.topk([s + b for s, b in zip(row, bias.tolist())], 3)
        assert r.experts[n].tolist() == chosen
        total = sum(row[e] for e in chosen)
        assert r.weights[n].tolist() == pytest.approx([row[e] / total for e in chosen], abs=1e-5)
    assert torch.allclose(r.probs.sum(-1), torch.ones(13))


@pytest.mark.parametrize("k", [1, 2])
def test_capacity_equals_loops_and_rows_do_not_compete(k):
    rows = torch.tensor([0] * 6 + [1] * 7)
    r = softmax_topk(logits(), k)
    got = within_capacity(r, 2, rows).kept
    assert got.tolist() == reference.kept_within(r.experts.tolist(), rows.tolist(), 2)
    assert not got.all()
    alone = within_capacity(softmax_topk(logits()[6:], k), 2, rows[6:] - 1).kept
    assert torch.equal(alone, got[6:])              # the second row does not see the first


def test_dropping_depends_on_earlier_tokens_only():
    x, rows = logits(), torch.zeros(13, dtype=torch.long)
    before = within_capacity(softmax_topk(x, 2), 2, rows).kept
    changed = torch.cat((x[:9], -x[9:]))
    assert torch.equal(within_capacity(softmax_topk(changed, 2), 2, rows).kept[:9], before[:9])


def test_capacity_formula():
    assert [capacity(f, t, k, e) for f, t, k, e in ((1.0, 8, 2, 4), (1.25, 10, 1, 4), (1.0, 1, 1, 64))] == [4, 4, 1]


def test_expert_choice_takes_the_likeliest_tokens_of_each_row():
    x, rows = logits(), torch.tensor([0] * 6 + [1] * 7)
    r = expert_choice(x, 2, rows)
    probs = x.softmax(-1)
    for row, tokens in ((0, range(6)), (1, range(6, 13))):
        for e in range(7):
            best = sorted(tokens, key=lambda n: -probs[n, e])[:2]
            assert sorted(n for n in tokens if r.kept[n, e]) == sorted(best), (row, e)
    assert r.kept.sum(0).tolist() == [4] * 7


def test_expert_choice_looks_ahead():
    x = logits()
    later = torch.cat((x[:9], x[9:] + 5 * torch.randn(4, 7, generator=torch.Generator().manual_seed(1))))
    assert not torch.equal(expert_choice(x, 3).kept[:9], expert_choice(later, 3).kept[:9])


def test_hash_is_a_function_of_the_token_and_spreads():
    r = hash_routing(torch.arange(1000), 2, 8)
    assert torch.equal(r.experts, hash_routing(torch.arange(1000), 2, 8).experts)
    counts = torch.bincount(r.experts.flatten(), minlength=8)
    assert counts.min() > 200 and (r.experts[:, 0] != r.experts[:, 1]).all()


def test_random_routing_repeats_with_its_generator_and_never_picks_twice():
    draw = lambda: random_routing(50, 3, 5, torch.Generator().manual_seed(3)).experts
    assert torch.equal(draw(), draw())
    assert all(len(set(row)) == 3 for row in draw().tolist())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_noise_acts_in_training_only(kind):
    cfg = ModelConfig(dim=8, n_heads=2, n_experts=5, router=kind, router_noise=1.0)
    router = Router(cfg)
    torch.nn.init.normal_(router.weight)
    x, ids, rows = torch.randn(64, 8), torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long)
    run = lambda: router(x, ids, rows).experts
    router.train()
    assert not torch.equal(run(), run())
    router.eval()
    assert torch.equal(run(), run())


def test_capacity_acts_in_training_only_and_per_row_length():
    cfg = ModelConfig(dim=8, n_heads=2, n_experts=4, top_k=1, capacity_factor=1.0, norm_topk=False)
    router = Router(cfg)
    torch.nn.init.zeros_(router.weight)             # all ties: every token takes the same expert
    rows = torch.tensor([0] * 8 + [1] * 4)
    args = torch.randn(12, 8), torch.zeros(12, dtype=torch.long), rows
    assert router.train()(*args).kept.flatten().tolist() == [True] * 2 + [False] * 6 + [True] + [False] * 3
    assert router.eval()(*args).kept.all()
