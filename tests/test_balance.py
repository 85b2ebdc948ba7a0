"""Balancing losses at their minimum and above it, the sign rule at its published speed, statistics and alerts."""
import dataclasses
import re

import pytest
import torch

from minimoe import balance
from minimoe.config import ModelConfig
from minimoe.model import MoETransformer
from minimoe.router import sigmoid_topk, softmax_topk


def uniform(n=12, e=4, k=2):
    """Every expert is chosen equally often, with equal probabilities on average."""
    logits = torch.zeros(n, e)
    for i in range(n):
        for j in range(k):
            logits[i, (i * k + j) % e] = 0.5
    return softmax_topk(logits, k)


def collapsed(n=12, e=4, k=2, strength=4.0):
    logits = torch.zeros(n, e)
    logits[:, :k] = strength
    return softmax_topk(logits, k)


@pytest.mark.parametrize("rows", [None, torch.tensor([0] * 6 + [1] * 6)])
def test_the_auxiliary_loss_is_least_for_an_even_load(rows):
    even, uneven = balance.aux_loss(uniform(), rows), balance.aux_loss(collapsed(), rows)
    assert even.item() == pytest.approx(1.0, abs=1e-6) and uneven > 1.8
    assert balance.aux_loss(collapsed(k=1, strength=9.0), rows).item() == pytest.approx(4.0, rel=0.01)      # E on collapse


def test_scopes_differ_where_each_text_has_its_own_experts():
    logits = torch.full((8, 4), -5.0)
    logits[:4, :2], logits[4:, 2:] = 5.0, 5.0
    routing, rows = softmax_topk(logits, 2), torch.tensor([0] * 4 + [1] * 4)
    assert balance.aux_loss(routing).item() == pytest.approx(1.0, abs=1e-3)             # over both texts the load is even
    assert balance.aux_loss(routing, rows).item() == pytest.approx(2.0, abs=1e-3)       # within each it is not


def test_its_gradient_takes_from_the_busiest_expert():
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    logits.requires_grad_()
    balance.aux_loss(softmax_topk(logits, 1, normalize=False)).backward()
    assert logits.grad.sum(0)[0] > 0 > logits.grad.sum(0)[3]        # a step against the gradient lowers 0 and raises 3


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_losses_are_per_layer_and_averaged_over_layers(scope):
    """Each layer has a loss of its own: two layers that collapse onto different experts do not make an even load."""
    cfg = ModelConfig(vocab_size=9, dim=8, n_layers=2, n_heads=2, n_experts=4, top_k=2, expert_hidden=8, aux_scope=scope)
    one = collapsed()
    other = dataclasses.replace(one, experts=3 - one.experts, probs=one.probs.flip(1), logits=one.logits.flip(1))
    losses = MoETransformer(cfg).routing_losses([one, other], torch.tensor([0] * 6 + [1] * 6))
    assert losses["aux"].item() == pytest.approx(balance.aux_loss(one).item()) and losses["aux"] > 1.8


@pytest.mark.parametrize("seed", range(5))
def test_the_sign_rule_evens_a_skewed_router(seed):
    """DeepSeek-V3's rule at its published speed: 2,000 updates of 2,048 tokens, 16 experts, top-2."""
    generator = torch.Generator().manual_seed(seed)
    offset_E, bias_E = 0.5 * torch.randn(16, generator=generator), torch.zeros(16)
    with_rule, without = torch.zeros(16), torch.zeros(16)
    for update in range(2000):
        logits = torch.randn(2048, 16, generator=generator) + offset_E
        counts = balance.load_counts(sigmoid_topk(logits, 2, bias_E))
        balance.update_bias(bias_E, counts, 0.001)
        if update >= 1900:
            with_rule += counts
            without += balance.load_counts(sigmoid_topk(logits, 2))
    assert balance.max_violation(with_rule) <= 0.15
    assert balance.max_violation(without) >= 1.0


def test_the_rule_is_not_the_mean_of_its_own_history():
    """One step of one step's counts: an expert that was overloaded long ago is not punished for it."""
    bias = torch.zeros(2)
    balance.update_bias(bias, torch.tensor([10.0, 0.0]), 0.1)
    balance.update_bias(bias, torch.tensor([4.0, 6.0]), 0.1)
    assert bias.tolist() == pytest.approx([0.0, 0.0])
    balance.update_bias(bias, torch.tensor([5.0, 5.0]), 0.1)
    assert bias.tolist() == pytest.approx([0.0, 0.0])


def test_simbal_is_zero_for_orthonormal_rows_only():
    rows = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0))).Q.T
    assert balance.simbal_loss(rows) < 1e-5 < balance.simbal_loss(2 * rows)


def test_statistics():
    s = balance.statistics(collapsed(strength=40.0))
    assert s == {"load": [0.5, 0.5, 0.0, 0.0], "max_vio": 1.0, "entropy": 0.6931, "dropped": 0.0}
    dropped = dataclasses.replace(collapsed(), kept=torch.tensor([[True, False]] * 12))
    assert balance.statistics(dropped)["dropped"] == 0.5
    cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=4, expert_hidden=8, router="sigmoid", balance="bias")
    model, tokens = MoETransformer(cfg), torch.randint(0, 9, (2, 4))
    out = model(tokens, tokens)
    out.loss.backward()
    router = model.blocks[0].ffn.router
    s = balance.statistics(out.routing[0], router)
    assert s["bias"] == [0.0] * 4 and s["router_grad"] == router.weight.grad.norm().item() > 0


def rows(load=(0.25,) * 4, z=2.0, router_grad=0.01, steps=range(10, 610, 10)):
    return [{"step": step, "ce": 3.0, "z": z, "routing": [{"load": list(load), "router_grad": router_grad}]} for step in steps]


def test_a_healthy_run_is_silent():
    assert balance.alerts(rows()) == []
    assert balance.alerts([]) == []
    assert balance.alerts(rows(load=(0.2, 0.2, 0.2, 0.4))) == []
    assert balance.alerts([{"step": 5, "ce": 1.0}]) == []           # a dense model


@pytest.mark.parametrize("run, fragment", [
    (rows(load=(0.3, 0.3, 0.31, 0.09)), r"expert 3 got 9\.0% of the choices over 100 steps, under 40% of its fair share of 25"),
    (rows(load=(0.9, 0.04, 0.03, 0.03)), "coefficient of variation 1.5"),
    ([*rows(), *rows(z=4.5, steps=[610])], "z-loss 4.50 is above 2 times its median"),
    (rows(z=150.0), "z-loss 150.0 is above 100"),
    (rows(router_grad=1e-9), "the router gets no gradient"),
], ids=["expert", "variation", "z against median", "z bound", "gradient"])
def test_each_alert_is_provoked(run, fragment):
    found = balance.alerts(run)
    assert any(re.search(fragment, line) for line in found), found


def test_an_expert_must_be_short_for_a_whole_window():
    short = (0.3, 0.3, 0.31, 0.09)
    assert balance.alerts(rows(load=short, steps=range(10, 100, 10))) == []         # not yet a hundred steps
    mixed = [*rows(steps=range(10, 560, 10)), *rows(load=short, steps=range(560, 610, 10))]
    assert balance.alerts(mixed) == []                                              # half a window


def test_a_top1_router_with_renormalized_weights_is_noticed():
    """A real model: the weight is always one, so the loss does not reach the router (Switch keeps the probability)."""
    torch.manual_seed(0)
    for normalize, expected in ((True, 1), (False, 0)):
        cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=4, top_k=1, expert_hidden=8,
                          norm_topk=normalize, balance="none", init_std=0.2)
        model, tokens = MoETransformer(cfg), torch.randint(0, 9, (2, 8))
        out = model(tokens, tokens.roll(-1, 1))
        out.loss.backward()
        statistics = balance.statistics(out.routing[0], model.blocks[0].ffn.router) | {"load": [0.25] * 4}
        found = balance.alerts([{"step": 1, "routing": [statistics]}])
        assert len([line for line in found if "no gradient" in line]) == expected, found
