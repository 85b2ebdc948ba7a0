"""The cost model: against what the engine keeps, against its own limits, and pipelines against the formula."""
from __future__ import annotations

import dataclasses

import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.cost import Machine, activations_per_token, pipeline_schedule, step_cost
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError

CFG = ModelConfig(vocab_size=500, dim=64, n_layers=2, n_heads=4, n_experts=8, top_k=2, expert_hidden=64, max_seq_len=64)
LARGE = dataclasses.replace(CFG, vocab_size=50_000, dim=4096, n_layers=32, n_heads=32, expert_hidden=14336, max_seq_len=4096)


@pytest.mark.parametrize("change", [{}, {"n_layers": 4}, {"n_experts": 1}, {"top_k": 4}, {"dim": 128, "n_kv_heads": 2},
                                    {"n_shared_experts": 2}, {"activation": "gelu", "expert_hidden": 256}, {"vocab_size": 2000}])
def test_activations_are_those_that_autograd_keeps(change):
    cfg = dataclasses.replace(CFG, **change)
    model, kept = MoETransformer(cfg), {}
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    tokens = torch.randint(0, cfg.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens, tokens)
    measured = sum(x.untyped_storage().nbytes() for x in kept.values()) / 4 / tokens.numel()
    assert activations_per_token(cfg) == pytest.approx(measured, rel=0.1)


def test_from_one_to_ten_thousand_devices():
    one = step_cost(LARGE, 4096, 20_000, 1, Machine())
    assert sum(one.sent.values()) == one.communication == 0 and not one.fits
    assert one.total == one.compute == pytest.approx(3 * LARGE.flops_per_token(4096) * 4096 * 20_000 / Machine().flops)
    for kind in ("ddp", "fsdp"):
        costs = [step_cost(LARGE, 4096, 20_000, r, Machine(), kind) for r in (1, 10, 100, 1000, 10_000)]
        assert all(a.compute == pytest.approx(10 * b.compute) for a, b in zip(costs, costs[1:]))
        assert all(a.communication < b.communication for a, b in zip(costs, costs[1:]))     # a step of fixed size scales only so far
    at_1000 = {kind: step_cost(LARGE, 4096, 20_000, 1000, Machine(), kind) for kind in ("ddp", "fsdp")}
    assert at_1000["ddp"].memory - at_1000["fsdp"].memory > 0.9 * 16 * LARGE.num_params()
    assert sum(at_1000["fsdp"].sent.values()) == pytest.approx(1.5 * sum(at_1000["ddp"].sent.values()), rel=0.01)


def test_spread_experts_save_memory_and_send_by_the_token():
    ddp, ep = (step_cost(LARGE, 4096, 8, 8, Machine(), kind) for kind in ("ddp", "ep"))
    assert ep.sent["all_to_all"] == 4 * 32 * 4096 * 2 * 4096 * 4 * 7 / 8          # ways, layers, tokens, choices, width, bytes
    assert ep.sent["all_reduce"] < ddp.sent["all_reduce"] / 10
    experts = 16 * 32 * 8 * 3 * 4096 * 14336
    assert ddp.memory - ep.memory == pytest.approx(experts * 7 / 8)
    half = step_cost(LARGE, 4096, 8, 8, Machine(), "ep", bytes_per_value=2)
    assert half.sent["all_to_all"] == ep.sent["all_to_all"] / 2


@pytest.mark.parametrize("arguments, message", [((64, 6, "ddp"), "cannot be shared"), ((64, 16, "ep"), "n_experts=8"), ((64, 8, "zero"), "one of ddp")])
def test_what_cannot_be_is_refused(arguments, message):
    batch, devices, kind = arguments
    with pytest.raises(ConfigError, match=message):
        step_cost(CFG, 64, batch, devices, Machine(), kind)


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("p, m", [(1, 3), (2, 1), (4, 4), (4, 12), (8, 5), (8, 64)])
def test_the_bubble_is_that_of_the_formula(p, m, kind, backward):
    slots, bubble = pipeline_schedule(p, m, kind, backward)
    assert bubble == pytest.approx((p - 1) / (m + p - 1))
    at = {(s.stage, s.microbatch, s.forward): s for s in slots}
    assert len(at) == len(slots) == 2 * p * m
    for s in slots:                             # every piece of work after what it needs, and one at a time
        if s.forward and s.stage:
            assert s.start >= at[s.stage - 1, s.microbatch, True].end
        if not s.forward:
            assert s.start >= (at[s.stage + 1, s.microbatch, False] if s.stage + 1 < p else at[s.stage, s.microbatch, True]).end
    for stage in range(p):
        mine = [s for s in slots if s.stage == stage]
        assert all(a.end <= b.start for a, b in zip(mine, mine[1:]))
        held = max(sum(1 if x.forward else -1 for x in mine[:i]) for i in range(1, len(mine) + 1))
        assert held == (m if kind == "gpipe" else min(p - stage, m))
