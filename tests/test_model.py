"""Causality, cache = no cache, padding, counts, and what a bad call says."""
import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minimoe import counts
from minimoe.attention import KVCache, attend
from minimoe.config import ModelConfig, load_config
from minimoe.model import Dropout, MoETransformer, cross_entropy
from minimoe.settings import ConfigError
from minimoe.stages import load_stages

BASE = ModelConfig(vocab_size=31, dim=24, n_layers=3, n_heads=4, n_kv_heads=2, max_seq_len=16, n_experts=4, top_k=2,
                   expert_hidden=16, qk_norm="head")
CONFIGS = {
    "grouped heads": BASE,
    "multi-head": dataclasses.replace(BASE, n_kv_heads=None, qk_norm="none"),
    "multi-query": dataclasses.replace(BASE, n_kv_heads=1, tie_embeddings=False),
    "dense": dataclasses.replace(BASE, n_experts=1, dense_hidden=40, balance="none"),
    "every second layer, shared": dataclasses.replace(BASE, moe_every=2, n_shared_experts=1, top_k=1, norm_topk=False),
    "sigmoid with bias, first dense": dataclasses.replace(BASE, router="sigmoid", balance="bias", n_dense_first=1),
    "hash": dataclasses.replace(BASE, router="hash", balance="none"),
    "wide heads": dataclasses.replace(BASE, head_dim=10),
    "learned positions, layer norm, gelu": dataclasses.replace(BASE, positions="learned", norm="layer", activation="gelu",
                                                               head_dim=7, qk_norm="none"),
    "linear scaling, biases": dataclasses.replace(BASE, rope_scaling="linear", rope_factor=2.0, qkv_bias=True),
    "ntk scaling, full norm": dataclasses.replace(BASE, rope_scaling="ntk", rope_factor=3.0, qk_norm="full"),
    "geglu, no norm": dataclasses.replace(BASE, activation="geglu", norm="none", init_std=0.1),
    "one router, learned noise, simbal": dataclasses.replace(BASE, share_router=True, router_noise="learned", balance="simbal"),
    "gated shared experts": dataclasses.replace(BASE, n_shared_experts=2, shared_hidden=12, shared_gate=True, moe_every=2),
    "two tokens ahead, untied": dataclasses.replace(BASE, n_predict=3, tie_embeddings=False, positions="learned"),
}


def model_and_tokens(cfg, b=3, t=11):
    torch.manual_seed(0)
    return MoETransformer(cfg).eval(), torch.randint(0, 31, (b, t), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_token_leaves_earlier_logits_unchanged(name):
    model, tokens = model_and_tokens(CONFIGS[name])
    for cut in (1, 6, 10):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 7) % 31
        a, b = model(tokens).logits, model(changed).logits
        assert torch.allclose(a[:, :cut], b[:, :cut], atol=1e-5)
        assert not torch.allclose(a[:, cut:], b[:, cut:], atol=1e-3)


def test_the_same_holds_in_training_with_capacity():
    model, tokens = model_and_tokens(dataclasses.replace(BASE, capacity_factor=0.5))
    model.train()
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % 31
    a, b = model(tokens), model(changed)
    assert not a.routing[0].kept.all()
    assert torch.allclose(a.logits[:, :6], b.logits[:, :6], atol=1e-5)
    # a row alone drops what it drops in the batch
    alone = model(tokens[1:2])
    assert torch.equal(alone.routing[1].kept, a.routing[1].kept[11:22])


@pytest.mark.parametrize("length", [9, 520])          # plain products, and the kernel in float32
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_in_bfloat16_equals_the_fused_kernel_in_float64(kv_heads, length):
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, length, h, 6, generator=generator).transpose(1, 2) for h in (4, kv_heads, kv_heads, 4))
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = attend(*inputs)
        assert y.dtype == dtype
        results.append([y.detach(), *torch.autograd.grad(y, inputs, g.to(dtype))])
    for plain, fused in zip(*results):
        assert (plain.double() - fused).norm() < 0.01 * fused.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_moe_layer_is_token_local(name):
    cfg = CONFIGS[name]
    if not cfg.moe_layers:
        pytest.skip("no MoE layer")
    model, tokens = model_and_tokens(cfg)
    layer = model.blocks[cfg.moe_layers[0]].ffn
    x, rows = torch.randn(9, cfg.dim), torch.zeros(9, dtype=torch.long)
    y, _ = layer(x, tokens.flatten()[:9], rows)
    y4, _ = layer(x[4:5], tokens.flatten()[4:5], rows[:1])
    assert torch.allclose(y[4:5], y4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("split", [(11,), (1,) * 11, (4, 1, 1, 5), (7, 3, 1)])
def test_cached_equals_uncached_for_any_split(name, split):
    model, tokens = model_and_tokens(CONFIGS[name])
    want, cache, got, at = model(tokens).logits, KVCache(model.cfg, 3), [], 0
    for n in split:
        got.append(model(tokens[:, at:at + n], cache=cache).logits)
        at += n
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_lengths_equal_each_alone(name):
    model, tokens = model_and_tokens(CONFIGS[name])
    lengths, cache = [5, 2, 8], KVCache(model.cfg, 3)
    out = model(tokens[:, :8], cache=cache, lengths=lengths)
    if out.routing:
        assert len(out.routing[0].experts) == sum(lengths)      # padding is not routed
    more = [model(tokens[:, 8 + i:9 + i], cache=cache).logits for i in range(3)]
    for b, n in enumerate(lengths):
        alone = model(torch.cat((tokens[b, :n], tokens[b, 8:11]))[None]).logits[0]
        assert torch.allclose(out.logits[b, :n], alone[:n], atol=1e-4)
        assert torch.allclose(torch.cat([m[b] for m in more]), alone[n:], atol=1e-4)


COUNTED = CONFIGS | {
    "Switch": dataclasses.replace(BASE, top_k=1, norm_topk=False, capacity_factor=1.25, moe_every=2, activation="gelu"),
    "expert choice": dataclasses.replace(BASE, router="expert_choice", balance="none", top_k=3),
    "random": dataclasses.replace(BASE, router="random", balance="none"),
    "everything odd": dataclasses.replace(BASE, dim=21, n_heads=3, n_kv_heads=3, head_dim=6, expert_hidden=13, n_experts=7,
                                          top_k=3, n_dense_first=2, dense_hidden=19, vocab_size=17, max_seq_len=5),
} | {path.stem: load_config(path).model for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
     if path.stem != "stages"} | {"stages": load_stages(Path(__file__).parents[1] / "configs" / "stages.yaml").model}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_equal_the_built_model(name):
    cfg = COUNTED[name] if COUNTED[name].vocab_size else dataclasses.replace(COUNTED[name], vocab_size=500)
    with torch.device("meta"):                  # the published sizes need no memory to be counted
        model = MoETransformer(cfg)
    by_part = counts.params_by_part(cfg)
    assert cfg.num_params() == sum(p.numel() for p in model.parameters()) == sum(by_part.values())
    held = {part: 0 for part in by_part}
    names = {".experts.": "experts", "router.": "router", ".shared": "shared", "attention.": "attention", "norm": "norms",
             ".ffn.": "dense", "head.": "head", "positions": "positions", "embedding": "embedding"}
    for parameter, p in model.named_parameters():
        held[next(part for piece, part in names.items() if piece in parameter)] += p.numel()
    assert held == by_part
    unused = sum(p.numel() * (cfg.n_experts - cfg.top_k) // cfg.n_experts
                 for n, p in model.named_parameters() if ".experts." in n)
    assert cfg.active_params() == cfg.num_params() - unused
    cache = KVCache(cfg, 1, device="meta")
    assert cfg.kv_bytes_per_token() * cfg.max_seq_len == sum(t.numel() * 4 for t in (cache.k_LBGSC, cache.v_LBGSC))


def causal_attention(q, k, v, is_causal=False, attn_mask=None, enable_gqa=False):
    """Plain products over the keys that each query sees, so that a counter sees every one of them and no others."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    rows = []
    for t in range(q.shape[2]):
        scores = q[:, :, t:t + 1] @ k[:, :, :t + 1].transpose(-1, -2) / q.shape[-1] ** 0.5
        rows.append(scores.softmax(-1) @ v[:, :, :t + 1])
    return torch.cat(rows, 2)


@pytest.mark.parametrize("name", COUNTED)
def test_flops_equal_those_counted_on_the_built_model(name, monkeypatch):
    cfg = COUNTED[name] if COUNTED[name].vocab_size else dataclasses.replace(COUNTED[name], vocab_size=500)
    if cfg.num_params() > 30e6:                 # the same model, narrower: counting runs it
        cfg = dataclasses.replace(cfg, dim=cfg.n_heads * 8, head_dim=8, expert_hidden=24, vocab_size=99, dense_hidden=32)
    cfg = dataclasses.replace(cfg, dispatch="loop", max_seq_len=min(cfg.max_seq_len, 16))
    model, tokens = MoETransformer(cfg).eval(), torch.randint(0, cfg.vocab_size, (2, cfg.max_seq_len))
    torch.manual_seed(0)
    want = model(tokens).logits
    torch.manual_seed(0)                        # the random router throws the same dice
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", causal_attention)
    with FlopCounterMode(display=False) as counter:
        got = model(tokens).logits
    assert torch.allclose(got, want, atol=1e-4)
    places = cfg.flops_per_token()
    if cfg.router == "expert_choice":           # rounds its places up
        per_choice = 2 * cfg.dim * cfg.expert_hidden * (3 if cfg.gated else 2)
        taken = sum(int(r.kept.sum()) for r in model(tokens).routing) - len(cfg.moe_layers) * tokens.numel() * cfg.top_k
        assert counter.get_total_flops() == places * tokens.numel() + taken * per_choice
    else:
        assert counter.get_total_flops() == places * tokens.numel()


@pytest.mark.parametrize("equal", ["active", "total"])
def test_dense_twin_is_nearest(equal):
    cfg = ModelConfig(vocab_size=500, dim=64, n_layers=3, n_experts=8, top_k=2, expert_hidden=48)
    twin = cfg.dense_twin(equal)
    target = cfg.active_params() if equal == "active" else cfg.num_params()
    gap = lambda c: abs(c.num_params() - target)
    assert twin.dense_hidden % 8 == 0 and twin.moe_layers == ()
    for step in (-8, 8):
        assert gap(twin) <= gap(dataclasses.replace(twin, dense_hidden=twin.dense_hidden + step))


def test_losses_are_apart_and_the_total_is_their_sum():
    cfg = dataclasses.replace(BASE, aux_coef=0.5, z_coef=0.25)
    model, tokens = model_and_tokens(cfg)
    targets = tokens.roll(-1, 1)
    targets[0, :5] = -100
    out = model(tokens, targets)
    want = torch.nn.functional.cross_entropy(out.logits[targets != -100], targets[targets != -100])
    assert torch.allclose(out.losses["ce"], want)
    assert torch.allclose(out.loss, want + 0.5 * out.losses["aux"] + 0.25 * out.losses["z"])


def test_initial_weights_are_small_where_the_residual_stream_is_written():
    torch.manual_seed(0)
    model = MoETransformer(dataclasses.replace(BASE, dim=256, vocab_size=300))
    assert model.blocks[0].attention.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attention.o.weight.std().item() == pytest.approx(0.02 / 6 ** 0.5, rel=0.05)


def test_bad_calls_say_what_to_do():
    model, tokens = model_and_tokens(BASE)
    with pytest.raises(ValueError, match="max_seq_len=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="another tokenizer"):
        model(torch.tensor([[31]]))
    with pytest.raises(ConfigError, match="vocab_size is null"):
        MoETransformer(dataclasses.replace(BASE, vocab_size=None))
    choosy = MoETransformer(dataclasses.replace(BASE, router="expert_choice", balance="none"))
    with pytest.raises(ValueError, match="later"):
        choosy(tokens, cache=KVCache(BASE, 3))


def test_the_extra_heads_predict_further_ahead_and_change_nothing_else():
    cfg = dataclasses.replace(BASE, n_predict=3, mtp_coef=0.5, aux_coef=0.0)
    model, tokens = model_and_tokens(cfg)
    targets = tokens.roll(-1, 1)
    targets[0, 4:] = -100
    out = model(tokens, targets)
    twin = MoETransformer(dataclasses.replace(cfg, n_predict=1)).eval()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "extra_heads" not in k})
    assert torch.equal(twin(tokens).logits, out.logits)
    assert torch.allclose(out.loss, out.losses["ce"] + 0.5 * out.losses["mtp"])
    hidden = []
    model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    again = model(tokens, targets)
    by_hand = []
    for i, h in enumerate(hidden[1:], 1):       # head i at position t is asked for what `targets` holds at t + i
        logits = h @ model.embedding.weight.T
        pairs = [(logits[b, t], targets[b, t + i]) for b in range(3) for t in range(11 - i) if targets[b, t + i] >= 0]
        by_hand.append(torch.stack([-z.log_softmax(-1)[y] for z, y in pairs]).sum() / (targets >= 0).sum())
    assert torch.allclose(again.losses["mtp"], torch.stack(by_hand).mean(), atol=1e-5)
    out.loss.backward()
    assert all(p.grad.norm() > 0 for p in model.extra_heads[1].attention.parameters())


@pytest.mark.parametrize("what", ["experts", "blocks"])
def test_recomputing_changes_no_number(what):
    cfg = dataclasses.replace(BASE, router_noise=0.5, dropout=0.1, capacity_factor=1.0, expert_hidden=96)
    losses, gradients, kept = [], [], []
    for mode in ("none", what):
        model, tokens = model_and_tokens(cfg)
        model.train().recompute(mode)
        kept.append(0)

        def count(x):
            kept[-1] += x.numel()
            return x

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = model(tokens, tokens).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1] and all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.8 * kept[0]              # and much less is kept for the backward pass
    with pytest.raises(ValueError, match="none, experts or blocks"):
        model.recompute("all")


def test_a_compiled_model_gives_the_same_losses_and_gradients():
    """The graphs that torch.compile captures, run without a compiler of machine code: fast, and it needs none."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, tokens = model_and_tokens(dataclasses.replace(BASE, dispatch="loop"))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(tokens, tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


def test_losses_are_means_over_layers_and_rows_may_be_without_targets():
    cfg = dataclasses.replace(BASE, balance="simbal", aux_coef=0.1, z_coef=0.1)
    model, tokens = model_and_tokens(cfg)
    out = model(tokens, torch.full_like(tokens, -100))
    assert out.losses["ce"] == 0                # no target: nothing to learn, and not nan
    each = [(b.ffn.router.weight @ b.ffn.router.weight.T - torch.eye(4)).abs().sum() for b in model.blocks]
    assert torch.allclose(out.losses["simbal"], torch.stack(each).mean())
    z = [r.logits.logsumexp(-1).square().mean() for r in out.routing]
    assert torch.allclose(out.losses["z"], torch.stack(z).mean())


def test_scaled_positions_reach_further():
    base = dataclasses.replace(BASE, max_seq_len=8)
    long = dataclasses.replace(base, max_seq_len=32, rope_scaling="linear", rope_factor=4.0)
    short, stretched = MoETransformer(base), MoETransformer(long)
    assert torch.allclose(stretched.cos[::4], short.cos) and torch.allclose(stretched.sin[::4], short.sin)
    ntk = MoETransformer(dataclasses.replace(long, rope_scaling="ntk"))
    plain = MoETransformer(dataclasses.replace(long, rope_scaling="none", rope_factor=1.0))
    assert torch.allclose(ntk.cos[:, 0], plain.cos[:, 0])               # the fastest pair as before,
    assert torch.allclose(ntk.cos[:, -1], stretched.cos[:, -1], atol=1e-5)      # the slowest as in linear


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_leaves_out_its_share_and_keeps_the_mean(p):
    x = torch.ones(1000, 1001, requires_grad=True)
    y = Dropout(p)(x)
    left_out = (y == 0).double()
    assert abs(left_out.mean() - p) < 2e-3 and torch.allclose(y.max(), torch.tensor(1 / (1 - p)))
    for axis in (0, 1):                     # neither rows, columns, nor neighbors depend on each other
        assert (left_out.mean(axis) - p).abs().max() < 6 * (p * (1 - p) / 1000) ** 0.5
        assert abs((left_out * left_out.roll(1, axis)).mean() - p * p) < 2e-3
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and torch.equal(Dropout(p).eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_by_blocks_of_rows_equals_pytorchs(dtype):
    logits = torch.randn(2, 150, 5000).to(dtype).requires_grad_()             # three blocks, the last one short
    targets = torch.randint(5000, (2, 150))
    targets[0, :40] = -100
    cross_entropy(logits, targets).backward()
    got, logits.grad = logits.grad, None
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    want.backward()
    assert torch.allclose(cross_entropy(logits, targets), want, rtol=1e-6)
    assert torch.allclose(got, logits.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)
    nothing = cross_entropy(logits, torch.full_like(targets, -100))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, logits)[0].abs().sum() == 0
