"""LoRA: starts as the base, merged = unmerged, off = base, gradients as of a dense delta, and exact through the trainer."""
import copy
import dataclasses
import json

import pytest
import torch

from minimoe import lora
from minimoe.adapter import load_adapter, save_adapter
from minimoe.checkpoint import load
from minimoe.config import ModelConfig, TrainConfig
from minimoe.decode import lay_out_for_decoding
from minimoe.experts import Experts
from minimoe.generate import generate
from minimoe.hub import save_hf
from minimoe.lora import add_lora, adapted, disabled, merge, merged, remove, trainable_share
from minimoe.model import MoETransformer
from minimoe.router import softmax_topk, within_capacity
from minimoe.settings import ConfigError
from tests import reference
from tests.test_resume import STEPS, TRAIN, assert_same_run, small_data, trainer

MOE = ModelConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=32, n_experts=4, top_k=2,
                  expert_hidden=24, n_shared_experts=1, n_dense_first=1, dense_hidden=24)
DENSE = ModelConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, max_seq_len=32, n_experts=1, dense_hidden=24)
EVERYWHERE = ("q", "k", "v", "o", "w13", "w2")


def model_of(cfg, seed=0):
    torch.manual_seed(seed)
    model = MoETransformer(cfg).eval()
    for p in model.parameters():            # init_std would leave every delta and logit next to nothing
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def filled(model, seed=1):
    """B is zero at first, and then an adapter does nothing: as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.2, generator=generator)
    return model


def tokens_of(cfg, shape=(2, 9)):
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dispatch", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("cfg", [MOE, DENSE], ids=["moe", "dense"])
def test_begins_as_the_base_merges_to_itself_and_comes_off(cfg, dispatch):
    base = model_of(dataclasses.replace(cfg, dispatch=dispatch))
    names, x = list(base.state_dict()), tokens_of(cfg)
    before, weights = base(x).logits, copy.deepcopy(base.state_dict())
    model = add_lora(base, rank=4, alpha=8, targets=EVERYWHERE)
    assert torch.equal(model(x).logits, before)
    assert [n for n in model.state_dict() if "lora_" not in n] == names
    on = filled(model)(x).logits
    assert (on - before).abs().max() > 0.1
    with disabled(model):
        assert torch.equal(model(x).logits, before)
    assert torch.equal(model(x).logits, on)
    flat = merged(model)
    assert torch.equal(model(x).logits, on) and {type(m) for m in flat.modules()} == {type(m) for m in model_of(cfg).modules()}
    assert (flat(x).logits - on).abs().max() < 1e-5
    assert list(flat.state_dict()) == names and all(p.requires_grad for p in flat.parameters())
    assert {k: v.tolist() for k, v in lora.merged_state(model)} == {k: v.tolist() for k, v in flat.state_dict().items()}
    remove(model)
    assert torch.equal(model(x).logits, before) and all(torch.equal(model.state_dict()[n], w) for n, w in weights.items())
    assert list(model.state_dict()) == names and not adapted(model)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_trained_stopped_and_resumed_bit_for_bit(method, data, tmp_path):
    train = dataclasses.replace(TRAIN, method=method, lora_targets=EVERYWHERE, lora_rank=4, lora_dropout=0.1)
    whole = trainer(data, tmp_path / "whole", train=train)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    run = whole.fit()
    moved = [name for name, value in whole.model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved and all("lora_" in name for name in moved)
    for stop in (1, 4):
        out = tmp_path / str(stop)
        trainer(data, out, train=train).fit(stop_after=stop)
        again = trainer(data, out, train=train)
        again.fit(resume=True)
        assert_same_run(again, whole)
    for file in (load(whole.out), load(whole.out, step=STEPS)):
        assert type(file.model.blocks[0].attention.q) is torch.nn.Linear and not adapted(file.model)
    assert not adapted(run.model) and adapted(whole.model)
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in file.model.state_dict().items())


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.mark.parametrize("targets", [EVERYWHERE, ("q", "blocks.1.attention.v", "experts.w2"), ("blocks.1.ffn.experts.w13", "shared.w13")])
@pytest.mark.parametrize("cfg", [MOE, dataclasses.replace(MOE, n_predict=2, tie_embeddings=False, activation="gelu", shared_gate=True)])
def test_saved_and_loaded_it_is_the_same(cfg, targets, tmp_path):
    model = filled(add_lora(model_of(cfg), rank=3, alpha=5, targets=targets))
    save_adapter(tmp_path, model)
    again = load_adapter(model_of(cfg), tmp_path)
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(again(tokens_of(cfg)).logits, model(tokens_of(cfg)).logits)


@pytest.mark.parametrize("name", ["llama", "llama, some layers", "mixtral", "mixtral, one tensor", "qwen3", "qwen2"])
def test_peft_puts_it_on_the_exported_model(name, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    cfg, targets = {
        "llama": (DENSE, EVERYWHERE),
        "llama, some layers": (DENSE, ("blocks.0.attention.q", "blocks.1.ffn.w13", "o")),
        "mixtral": (dataclasses.replace(MOE, n_shared_experts=0, n_dense_first=0), EVERYWHERE),
        "mixtral, one tensor": (dataclasses.replace(MOE, n_shared_experts=0, n_dense_first=0), ("blocks.1.ffn.experts.w13",)),
        "qwen3": (dataclasses.replace(MOE, n_shared_experts=0, n_dense_first=1, qk_norm="head"), EVERYWHERE),
        "qwen2": (dataclasses.replace(MOE, n_dense_first=0, shared_gate=True, qkv_bias=True), (*EVERYWHERE, "shared_gate")),
    }[name]
    model, x = model_of(cfg), tokens_of(cfg)
    save_hf(model, tmp_path / "base")
    before = model(x).logits
    save_adapter(tmp_path / "adapter", filled(add_lora(model, rank=3, alpha=5, targets=targets)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        got, want = theirs(x).logits, model(x).logits
    assert (want - before).abs().max() > 0.1 and (got - want).abs().max() < 1e-4
