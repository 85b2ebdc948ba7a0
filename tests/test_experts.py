"""Grouped = loop = plain reference, in outputs and gradients; dropped tokens are zero."""
import dataclasses

import pytest
import torch

from minimoe import experts
from minimoe.config import ModelConfig
from minimoe.experts import Experts, batched, blocked, cannot_group, choose, cut, grouped, looped, sort_by_expert
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


@pytest.mark.parametrize("counts", [[1088, 0, 64, 3008], [0, 0, 0, 0], [128, 128, 128, 128]])
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-12), (torch.bfloat16, 0.01)])
def test_blocks_of_few_sizes_give_the_product_of_all_rows(counts, dtype, most):
    """In bfloat16 the gradient of a weight is rounded once a block, the smallest first."""
    generator, n = torch.Generator().manual_seed(0), sum(counts)
    x, w, grad = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, 16), (4, 16, 24), (n, 24)))
    found = []
    for product, kind in ((looped, torch.float64), (blocked, dtype)):
        given = [t.to(kind, copy=True).requires_grad_() for t in (x, w)]
        y = product(*given, torch.tensor(counts))
        y.backward(grad.to(kind))
        found.append([y.detach().double(), *(t.grad.double() for t in given)])
    for want, got in zip(*found):
        assert got.shape == want.shape and (got - want).norm() <= most * want.norm()
    frozen = blocked(given[0], w, torch.tensor(counts))
    assert torch.equal(torch.autograd.grad(frozen.sum(), given[0])[0], looped(torch.ones_like(grad), w.mT, torch.tensor(counts)))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_of_many_tokens_in_bfloat16_goes_through_blocks(recompute, monkeypatch):
    """Near the loop in float32, in values and gradients, dropped choices included, and the same to the bit each time."""
    used, product = [], experts.blocked
    monkeypatch.setattr(experts, "blocked", lambda *args: used.append(args[0].dtype) or product(*args))
    routing_of = lambda logits: within_capacity(softmax_topk(logits * 2, 2), 700, torch.zeros(len(logits), dtype=torch.long))
    layer, twin = build("auto"), build("loop")
    layer.recompute = recompute
    want = outputs_and_gradients(twin, routing_of, n=1500, weights=tuple(twin.parameters()))
    found = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(outputs_and_gradients(layer, routing_of, n=1500, weights=tuple(layer.parameters())))
        layer.zero_grad()
    assert set(used) == {torch.bfloat16} and len(used) == (8 if recompute else 4)
    for got, again, exact in zip(*found, want):
        assert torch.equal(got, again) and (got - exact).norm() < 0.02 * exact.norm()


def test_any_number_of_rows_is_cut_into_few_sizes():
    """Each size of a block is a kernel that oneDNN keeps: six of them, however uneven the experts are."""
    found = set()
    for rows in range(0, 10_000, 64):
        experts, sizes = cut([64, rows, 128])
        assert sizes == [64, *sorted(sizes[1:-1]), 128] and sum(sizes[1:-1]) == rows
        assert experts == [0] + [1] * (len(sizes) - 2) + [2] and len(sizes) - 2 <= rows // 1024 + 3
        found |= set(sizes)
    assert len(found) == 6


def test_auto_chooses_by_the_number_of_pairs():
    weights = torch.zeros(8, 16, 32), torch.zeros(8, 16, 16)
    chosen = [choose("auto", n, *weights) for n in (2, 8, 64, 65)]
    assert chosen == [(looped, 1), (batched, 0), (batched, 0), (grouped, 1)]
    assert [choose("auto", n, *(w.bfloat16() for w in weights)) for n in (1000, 5000)] == [(grouped, 64), (blocked, 64)]
    assert choose("auto", 1000, *(w.double() for w in weights)) == (looped, 1)
    assert [choose(d, 8, *weights)[0] for d in ("loop", "grouped")] == [looped, grouped]


def test_no_tokens_at_all():
    for dispatch in ("loop", "grouped", "auto"):
        assert build(dispatch)(torch.zeros(0, 16), softmax_topk(torch.zeros(0, 5), 2)).shape == (0, 16)
