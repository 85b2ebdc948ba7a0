"""Causality, cache = no cache, padding, counts, and what a bad call says."""
import dataclasses

import pytest
import torch

from minimoe.attention import KVCache
from minimoe.config import ModelConfig
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError

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


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_the_built_model(name):
    cfg = CONFIGS[name]
    model = MoETransformer(cfg)
    assert cfg.num_params() == sum(p.numel() for p in model.parameters())
    unused = sum(p.numel() * (cfg.n_experts - cfg.top_k) // cfg.n_experts
                 for n, p in model.named_parameters() if ".experts." in n)
    assert cfg.active_params() == cfg.num_params() - unused
    cache = KVCache(cfg, 1)
    assert cfg.kv_bytes_per_token() * cfg.max_seq_len == sum(t.numel() * 4 for t in (cache.k_LBGSC, cache.v_LBGSC))


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
