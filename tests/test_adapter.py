"""Adapters on disk: PEFT's layout, exact both ways, and what is foreign or damaged refused by name."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimoe.adapter import load_adapter, save_adapter
from minimoe.hub import save_hf
from minimoe.lora import adapted, add_lora, merge
from minimoe.settings import ConfigError
from tests.test_lora import DENSE, EVERYWHERE, MOE, filled, model_of, tokens_of


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
        "qwen3": (dataclasses.replace(MOE, n_shared_experts=0, n_dense_first=0, qk_norm="head"), ("q", "experts.w2")),
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


FOREIGN = {
    "no folder": (lambda f: None, "adapter_config.json is missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{", encoding="utf-8"), "not readable as JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]", encoding="utf-8"), "peft_type=list"),
    "another method": (lambda f: change(f, peft_type="IA3"), "peft_type=IA3: only LORA"),
    "another variant": (lambda f: change(f, use_dora=True), "use_dora=True is not supported"),
    "ranks of their own": (lambda f: change(f, rank_pattern={"q_proj": 2}), "rank_pattern=.* is not supported"),
    "no rank": (lambda f: change(f, r="four"), "r='four', .* must be numbers"),
    "another rank": (lambda f: change(f, r=2), r"q_proj is \(4, 16\) and \(16, 4\), which does not fit blocks.0.attention.q .* r=2"),
    "cut short": (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]), "damaged"),
    "half of it": (lambda f: tensors(f, lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")), "up_proj.lora_B.weight is missing"),
    "another place": (lambda f: tensors(f, lambda t: t.update(x=torch.ones(1))), "no place for x"),
    "nothing": (lambda f: tensors(f, dict.clear), "no adapter in it"),
    "gate and up apart": (lambda f: tensors(f, lambda t: t["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].add_(1)),
                          "gate_proj and .*up_proj have adapters of their own"),
}


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def tensors(folder, edit):
    path = str(folder / "adapter_model.safetensors")
    found = load_file(path)
    edit(found)
    save_file(found, path)


@pytest.mark.parametrize("name", FOREIGN)
def test_adapters_that_are_foreign_or_damaged_are_refused_by_name(name, tmp_path):
    spoil, message = FOREIGN[name]
    save_adapter(tmp_path, add_lora(model_of(DENSE), rank=4, targets=EVERYWHERE))
    spoil(tmp_path)
    model = model_of(DENSE)
    with pytest.raises(ConfigError, match=message) as error:
        load_adapter(model, tmp_path / "none" if name == "no folder" else tmp_path)
    assert "\n" not in str(error.value) and not adapted(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="no adapters to save"):
        save_adapter(tmp_path, model)


def test_of_another_model_it_is_refused(tmp_path):
    save_adapter(tmp_path / "moe", add_lora(model_of(MOE), targets=("experts.w13", "q")))
    for cfg in (DENSE, dataclasses.replace(MOE, n_experts=8), dataclasses.replace(MOE, n_layers=1, n_dense_first=0)):
        with pytest.raises(ConfigError, match="no place for|does not fit"):
            load_adapter(model_of(cfg), tmp_path / "moe")


@pytest.mark.parametrize("quantize", [False, True])
def test_export_asks_for_a_merged_model(quantize, tmp_path):
    model = add_lora(model_of(DENSE), quantize=quantize)
    with pytest.raises(ConfigError, match="merge them first"):
        save_hf(model, tmp_path)
    assert not list(tmp_path.iterdir()) and save_hf(merge(model), tmp_path) == "LlamaForCausalLM"
