"""Every router, through a whole MoE layer: plain loops = loop dispatch = grouped dispatch, in outputs and gradients."""
import dataclasses

import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.experts import FeedForward, MoE
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError
from tests import reference

BASE = ModelConfig(dim=16, n_heads=1, head_dim=2, n_experts=5, top_k=2, expert_hidden=24)
ROUTERS = {
    "softmax top-k, renormalized": {},
    "softmax top-k, probabilities": {"norm_topk": False},
    "every expert": {"top_k": 5},
    "Switch: top-1 with capacity": {"top_k": 1, "norm_topk": False, "capacity_factor": 0.9},
    "top-2 with capacity": {"capacity_factor": 0.7},
    "fixed noise": {"router_noise": 0.7},
    "learned noise": {"router_noise": "learned"},
    "sigmoid scores with selection bias": {"router": "sigmoid", "balance": "bias"},
    "softmax scores with selection bias": {"router": "softmax", "balance": "bias"},
    "sigmoid, not renormalized, learned noise": {"router": "sigmoid", "norm_topk": False, "router_noise": "learned"},
    "expert choice": {"router": "expert_choice"},
    "expert choice, more places": {"router": "expert_choice", "capacity_factor": 1.6},
    "hash": {"router": "hash"},
    "random": {"router": "random"},
}
ROWS = [0] * 7 + [1] * 5


def layer_of(dispatch, **changes):
    layer = MoE(dataclasses.replace(BASE, dispatch=dispatch, **changes)).train()
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=generator)
    if layer.router.cfg.balance == "bias":
        layer.router.bias_E += torch.linspace(-0.3, 0.3, 5)
    return layer


def by_loops(layer, x_ND, ids_N, rows_N):
    """The same layer, written out: nothing of the library but its weights."""
    cfg, router = layer.router.cfg, layer.router
    n, e = len(x_ND), cfg.n_experts
    logits, noise, dice = [None] * n, [torch.zeros(e)] * n, None
    if cfg.has_router:
        logits = [router.weight @ x for x in x_ND]
    if cfg.router_noise:                        # the same draws as the layer makes: it draws once, for all tokens
        std = [torch.log1p((router.noise_weight @ x).exp()) if cfg.router_noise == "learned" else cfg.router_noise
               for x in x_ND]
        noise = [draw * s for draw, s in zip(torch.randn(n, e), std)]
    if cfg.router == "random":
        dice = torch.rand(n, e).tolist()
    bias = router.bias_E.tolist() if cfg.balance == "bias" else [0.0] * e
    choices = reference.choices(cfg, logits, noise, bias, ids_N.tolist(), rows_N.tolist(), dice)
    return reference.mixture(x_ND, choices, layer.experts.w13_EDF, layer.experts.w2_EHD, cfg.activation)


def outputs_and_gradients(layer, run):
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(len(ROWS), layer.router.cfg.dim, generator=generator).requires_grad_()
    torch.manual_seed(2)
    y_ND = run(x_ND, torch.arange(len(ROWS)) * 3, torch.tensor(ROWS))
    (y_ND * torch.randn(y_ND.shape, generator=generator)).sum().backward()
    return {"output": y_ND.detach(), "x": x_ND.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
@pytest.mark.parametrize("dispatch", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("name", ROUTERS)
def test_dispatch_equals_plain_loops(name, dispatch, activation):
    layer, twin = (layer_of(d, activation=activation, **ROUTERS[name]) for d in (dispatch, "loop"))
    got = outputs_and_gradients(layer, lambda *args: layer(*args)[0])
    want = outputs_and_gradients(twin, lambda *args: by_loops(twin, *args))
    assert got.keys() == want.keys() and got["output"].abs().max() > 0.1
    for part in got:
        assert got[part] is not None, f"{part} gets no gradient"
        assert torch.allclose(got[part], want[part], atol=2e-5), (part, (got[part] - want[part]).abs().max())
    if "router.weight" in got and layer.router.cfg.top_k < 5:
        assert got["router.weight"].norm() > 1e-3


@pytest.mark.parametrize("name", ROUTERS)
def test_odd_sizes_equal_plain_loops(name):
    """Sizes that grouped_mm refuses: auto takes the loop."""
    odd = {"dim": 7, "expert_hidden": 11, **ROUTERS[name]}
    layer, twin = layer_of("auto", **odd), layer_of("loop", **odd)
    got = outputs_and_gradients(layer, lambda *args: layer(*args)[0])
    want = outputs_and_gradients(twin, lambda *args: by_loops(twin, *args))
    assert all(torch.allclose(got[part], want[part], atol=2e-5) for part in got)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        layer_of("grouped", **odd)(torch.randn(12, 7), torch.arange(12), torch.tensor(ROWS))


@pytest.mark.parametrize("name", [n for n in ROUTERS if "capacity" in n])
@pytest.mark.parametrize("dispatch", ["loop", "grouped"])
def test_what_is_dropped_adds_zero_and_depends_on_earlier_tokens_of_its_row_only(name, dispatch):
    layer = layer_of(dispatch, **ROUTERS[name])
    x, ids, rows = torch.randn(12, 16, generator=torch.Generator().manual_seed(3)), torch.arange(12), torch.tensor(ROWS)
    y, routing = layer(x, ids, rows)
    nothing_left = ~routing.kept.any(1)
    assert nothing_left.any() and torch.equal(y[nothing_left], torch.zeros_like(y[nothing_left]))
    swapped = torch.cat((x[7:], x[:7]))         # the rows in the other order, and another row beside the first
    other, _ = layer(swapped, ids, torch.tensor([0] * 5 + [1] * 7))
    assert torch.allclose(other[5:], y[:7], atol=1e-6) and torch.allclose(other[:5], y[7:], atol=1e-6)
    later = x.clone()
    later[4:7] += 1.0
    assert torch.allclose(layer(later, ids, rows)[0][:4], y[:4], atol=1e-6)


def test_one_router_for_all_layers():
    cfg = dataclasses.replace(BASE, vocab_size=20, n_layers=3, share_router=True, router_noise="learned", balance="simbal")
    torch.manual_seed(0)
    shared, own = MoETransformer(cfg), MoETransformer(dataclasses.replace(cfg, share_router=False))
    own.load_state_dict(shared.state_dict())
    tokens = torch.randint(0, 20, (2, 6))
    for model in (shared, own):
        torch.manual_seed(1)
        model.train()(tokens, tokens).loss.backward()
    assert shared.blocks[0].ffn.router.weight is shared.blocks[2].ffn.router.weight
    for name in ("weight", "noise_weight"):
        total = sum(getattr(b.ffn.router, name).grad for b in own.blocks)
        assert torch.allclose(getattr(shared.blocks[1].ffn.router, name).grad, total, atol=1e-6)


@pytest.mark.parametrize("gate", [False, True])
def test_shared_experts_stand_outside_the_router(gate):
    cfg = dataclasses.replace(BASE, n_shared_experts=2, shared_hidden=12, shared_gate=gate)
    layer = MoE(cfg)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, ids, rows = torch.randn(6, 16), torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long)
    y, routing = layer(x, ids, rows)
    assert routing.probs.shape == (6, 5) and int(routing.experts.max()) < 5     # not one of those that are chosen
    alone = layer.shared(x) * (torch.sigmoid(x @ layer.shared_gate.weight.T) if gate else 1)
    assert torch.allclose(y - layer.experts(x, routing), alone, atol=1e-6)
    assert layer.shared.w2.weight.shape == (16, 24)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_a_dense_layer_is_one_expert(activation):
    layer = FeedForward(dataclasses.replace(BASE, activation=activation), 24)
    x = torch.randn(3, 16)
    want = torch.stack([reference.expert(row, layer.w13.weight.T, layer.w2.weight.T, activation) for row in x])
    assert torch.allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize("changes, fragment", [
    ({"router": "hash", "balance": "simbal"}, "has no matrix"), ({"router": "random", "share_router": True}, "has no matrix"),
    ({"router": "expert_choice", "router_noise": 0.1}, "router_noise=0.1"), ({"router": "hash", "balance": "bias"}, "balance"),
    ({"shared_gate": True}, "n_shared_experts"), ({"router_noise": "loud"}, "router_noise"),
    ({"rope_factor": 2.0}, "rope_factor"), ({"positions": "learned", "rope_scaling": "ntk"}, "positions: rope"),
    ({"n_predict": 0}, "n_predict"), ({"shared_hidden": 0}, "shared_hidden")])
def test_impossible_combinations_are_named(changes, fragment):
    with pytest.raises(ConfigError, match=fragment):
        dataclasses.replace(BASE, **changes)
