"""Four bits a weight: no worse than bitsandbytes, no larger than promised, and never two full copies at a time."""
import dataclasses
import gc
import weakref

import pytest
import torch

from minimoe.lora import add_lora, disabled, merge, remove
from minimoe.nf4 import LEVELS, NF4
from minimoe.router import softmax_topk
from tests.test_lora import EVERYWHERE, MOE, Holder, experts_of, filled, model_of, tokens_of

normal = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0))
TENSORS = {
    "normal": lambda: normal(256, 512) * 0.02,
    "experts": lambda: normal(4, 96, 128),
    "bfloat16": lambda: normal(256, 512).bfloat16(),
    "few and odd": lambda: normal(77, 13),
    "uniform": lambda: torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) - 0.5,
    "heavy tails": lambda: normal(256, 512) ** 3,
    "rows of all sizes": lambda: normal(256, 512) * torch.logspace(-12, 4, 256)[:, None],
    "columns of all sizes": lambda: normal(256, 512) * torch.logspace(-3, 1, 512),
    "rows of zeros": lambda: normal(256, 512) * (torch.arange(256) % 3 > 0)[:, None],
    "all positive": lambda: normal(256, 256).abs(),
}


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("name", TENSORS)
def test_error_is_no_worse_than_bitsandbytes(name, record_property):
    """With its scales in float32, and with its double quantization."""
    functional = pytest.importorskip("bitsandbytes").functional
    w = TENSORS[name]()
    ours = rms(NF4(w).dequantize(torch.float32) - w.float())
    for double in (False, True):
        codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)
        theirs = rms(functional.dequantize_4bit(codes, state).float() - w.float())
        record_property(f"error over bitsandbytes', double={double}", round(ours / theirs, 4))
        assert 0 < ours <= theirs


def test_levels_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), torch.tensor(LEVELS))


def test_zeros_stay_zero_and_what_stands_for_itself_comes_back():
    assert not NF4(torch.zeros(3, 50)).dequantize().any()
    exact = torch.tensor(LEVELS).repeat(8, 8) * 2.0 ** torch.arange(8)[:, None]
    assert torch.allclose(NF4(exact).dequantize(), exact, rtol=1e-2)
    q = NF4(normal(70, 70).bfloat16())
    assert q.dequantize().dtype == torch.bfloat16 and q.dequantize().shape == (70, 70)
    assert torch.equal(q.dequantize(torch.float32).bfloat16(), q.dequantize())


def test_many_blocks_are_as_the_same_blocks_alone():
    """More than are worked on at once, and a last group that is not full."""
    w = normal(700, 900)
    whole, part = NF4(w).dequantize().flatten(), NF4(w.flatten()[:2**20 // 2]).dequantize()
    assert torch.equal(whole[:2**19], part) and rms(whole - w.flatten()) < 0.1


def test_bytes_of_the_quantized_weights():
    cfg = dataclasses.replace(MOE, dim=64, expert_hidden=64, dense_hidden=96)
    model = model_of(cfg)
    full = {name: p.numel() for name, p in model.named_parameters()}
    buffers = set(dict(model.named_buffers()))
    add_lora(model, rank=4, targets="q", quantize=True)
    gone = set(full) - set(dict(model.named_parameters()))
    taken = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in buffers)
    assert len(gone) == 4 * 2 + 2 + 2 + 2 and taken <= 0.27 * sum(2 * full[name] for name in gone)
    assert not any(word in name for name in gone for word in ("embedding", "norm", "router"))


@pytest.mark.parametrize("dispatch", ["loop", "grouped", "auto"])
def test_one_full_copy_at_a_time(dispatch, monkeypatch):
    """Forward and backward, linear layers and experts, with the model in training and with blocks computed again."""
    alive, most, made, dequantize = weakref.WeakSet(), 0, 0, NF4.dequantize

    def watched(self, dtype=None):
        nonlocal most, made
        w = dequantize(self, dtype)
        alive.add(w.untyped_storage())
        most, made = max(most, len(alive)), made + 1
        return w

    monkeypatch.setattr(NF4, "dequantize", watched)
    gc.disable()
    try:
        for recompute in ("none", "blocks"):
            cfg = dataclasses.replace(MOE, dispatch=dispatch)
            model = filled(add_lora(model_of(cfg), rank=4, targets=EVERYWHERE, quantize=True)).train()
            model.recompute(recompute)
            made = 0
            model(tokens_of(cfg), tokens_of(cfg)).loss.backward()
            assert made >= 2 * 14 - 3 and most == 1, f"{most} at a time"       # 14 weights, forward and backward; the first q, k and v need no gradient of x
    finally:
        gc.enable()
    keep = [watched(NF4(torch.ones(64))) for _ in range(2)]
    assert most == len(keep), "the watch does not see copies that are kept"


@pytest.mark.parametrize("dispatch", ["loop", "grouped", "auto"])
def test_computes_as_the_tensors_that_it_stands_for(dispatch):
    """Off, removed and merged; gradients too, against adapters beside the dequantized weights."""
    cfg = dataclasses.replace(MOE, dispatch=dispatch, qkv_bias=True)
    make = lambda quantize: filled(add_lora(model_of(cfg), rank=4, targets=EVERYWHERE, quantize=quantize))
    small, x = make(True), tokens_of(cfg)
    twin = add_lora(remove(make(True)), rank=4, targets=EVERYWHERE)
    twin.load_state_dict({k: v for k, v in small.state_dict().items() if "lora_" in k}, strict=False)
    for model in (small, twin):
        model(x, x).loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (small, twin)]
    assert list(grads[0]) == list(grads[1]) and all(torch.allclose(g, grads[1][n], atol=1e-6) for n, g in grads[0].items())
    on = small(x).logits
    assert (on - model_of(cfg)(x).logits).abs().max() > 0.1
    with disabled(small):
        off = small(x).logits
    assert torch.equal(off, remove(make(True))(x).logits) and (merge(small)(x).logits - on).abs().max() < 1e-5


def test_gradient_of_the_input_is_that_of_the_full_weight():
    layer = experts_of("loop")
    full = experts_of("loop")
    add_lora(Holder(layer), targets="w2", quantize=True)
    full.load_state_dict({name: getattr(layer, f"nf4_{name}").dequantize() for name in layer.parts})
    grads = []
    for run in (layer, full):
        x = normal(9, 16).requires_grad_()
        run(x, softmax_topk(normal(9, 5), 2)).square().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, atol=1e-5)
