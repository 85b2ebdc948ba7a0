"""Grouped = loop = plain reference, in outputs and gradients; dropped tokens are zero."""
import dataclasses

import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.experts import (
    Experts,
    batched_experts,
    cannot_group,
    choose,
    grouped_experts,
    loop_experts,
    sort_by_expert,
)
from minimoe.router import expert_choice, hash_routing, sigmoid_topk, softmax_topk, within_capacity
from tests import reference

ROUTINGS = {
    "softmax": lambda x: softmax_topk(x, 2),
    "top-1 as probability": lambda x: softmax_topk(x, 1, normalize=False),
    "every expert": lambda x: softmax_topk(x, x.shape[1]),
    "sigmoid with bias": lambda x: sigmoid_topk(x, 2, torch.linspace(-1, 1, x.shape[1])),
    "capacity": lambda x: within_capacity(softmax_topk(x, 2), 2, torch.zeros(len(x), dtype=torch.long)),
    "expert choice": lambda x: expert_choice(x, 3),
    "hash": lambda x: hash_routing(torch.arange(len(x)), 2, x.shape[1]),
    "an expert without tokens": lambda x: softmax_topk(torch.cat((x[:, :-1], x[:, -1:] - 100), 1), 2),
}


def build(dispatch, dim=16, hidden=24, experts=5):
    layer = Experts(ModelConfig(dim=dim, n_heads=1, head_dim=2, expert_hidden=hidden, n_experts=experts, dispatch=dispatch))
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return layer


def outputs_and_gradients(run, routing_of, n=11, dim=16, experts=5, weights=()):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, dim, generator=generator).requires_grad_()
    logits = torch.randn(n, experts, generator=generator).requires_grad_()
    y = run(x, routing_of(logits))
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return [y.detach(), x.grad, torch.zeros_like(logits) if logits.grad is None else logits.grad,
            *(w.grad for w in weights)]


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dispatch", ["loop", "grouped", "auto"])
def test_dispatch_equals_reference(name, dispatch):
    layer, twin = build(dispatch), build("loop")
    got = outputs_and_gradients(layer, ROUTINGS[name], weights=tuple(layer.parameters()))
    w13, w2 = twin.parameters()
    want = outputs_and_gradients(lambda x, r: reference.moe(x, r, w13, w2), ROUTINGS[name], weights=(w13, w2))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, atol=2e-5), (g - w).abs().max()


def test_odd_sizes_take_the_loop_and_grouped_says_why():
    odd = {"dim": 7, "hidden": 11, "experts": 3}
    layer = build("auto", **odd)
    x, routing = torch.randn(5, 7), softmax_topk(torch.randn(5, 3), 2)
    assert torch.allclose(layer(x, routing), reference.moe(x, routing, *layer.parameters()), atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        build("grouped", **odd)(x, routing)
    assert "float64" in cannot_group(*build("auto").double().parameters())


def test_float64_gradients_by_finite_differences():
    layer = build("auto", dim=3, hidden=2, experts=3).double()
    routing = softmax_topk(torch.randn(4, 3), 2)
    routing = dataclasses.replace(routing, weights=routing.weights.double())
    assert torch.autograd.gradcheck(lambda x, w: layer(x, dataclasses.replace(routing, weights=w)),
                                    (torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
                                     routing.weights.clone().requires_grad_()))


@pytest.mark.parametrize("dispatch", ["loop", "grouped"])
def test_a_dropped_choice_contributes_exactly_zero(dispatch):
    layer, x = build(dispatch), torch.randn(11, 16)
    routing = softmax_topk(torch.randn(11, 5), 2)
    nothing = dataclasses.replace(routing, kept=torch.zeros_like(routing.kept))
    assert torch.equal(layer(x, nothing), torch.zeros(11, 16))


def test_rounding_rows_up_changes_nothing():
    routing = ROUTINGS["an expert without tokens"](torch.randn(11, 5))
    token, weight, counts = sort_by_expert(routing, 5)
    token64, weight64, counts64 = sort_by_expert(routing, 5, round_to=64)
    assert counts64.tolist() == [64 if c else 0 for c in counts.tolist()] and len(token64) == counts64.sum()
    assert torch.equal(token64[weight64 != 0], token) and torch.equal(weight64[weight64 != 0], weight)
    layer, x = build("grouped"), torch.randn(11, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x, routing)
    assert torch.allclose(got, build("loop")(x, routing), atol=0.05, rtol=0.05)


def test_auto_chooses_by_the_number_of_pairs():
    weights = torch.zeros(8, 16, 32), torch.zeros(8, 16, 16)
    chosen = [choose("auto", n, *weights) for n in (2, 8, 64, 65)]
    assert chosen == [(loop_experts, 1), (batched_experts, 0), (batched_experts, 0), (grouped_experts, 1)]
    assert choose("auto", 1000, *(w.bfloat16() for w in weights)) == (grouped_experts, 64)
    assert choose("auto", 1000, *(w.double() for w in weights)) == (loop_experts, 1)
    assert [choose(d, 8, *weights)[0] for d in ("loop", "grouped")] == [loop_experts, grouped_experts]


def test_no_tokens_at_all():
    for dispatch in ("loop", "grouped", "auto"):
        assert build(dispatch)(torch.zeros(0, 16), softmax_topk(torch.zeros(0, 5), 2)).shape == (0, 16)
