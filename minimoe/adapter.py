"""Adapters on disk, in the layout of PEFT (https://github.com/huggingface/peft): adapter_config.json and
adapter_model.safetensors (chapter 10).

The names are those that the model has once `minimoe.hub.save_hf` has exported it, so `peft.PeftModel.from_pretrained`
puts the adapter on that. Two things are joined here and apart there, or the other way round:

    w13 of a dense layer       one A, one B (F, R)         gate_proj and up_proj: the same A twice, B cut in two
    an expert tensor           A (E, D, R), B (E, R, F)    one matrix each, (E R, D) and (F, R E), under target_parameters

PEFT 0.21 cannot read one thing: dense layers' w13 of a Qwen3-MoE model (`n_dense_first`), whose gate_proj it takes for one of
the experts. Here it loads.

Shapes: D width in, F width out, R rank, E experts.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.checkpoint import write_safely
from minimoe.lora import LoraExperts, adapted, add_lora, weight_names
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError, need

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
AS_HERE = {"bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None,
           "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}         # settings of PEFT with one value here


def save_adapter(folder: str | Path, model: MoETransformer) -> None:
    """Writes the adapters of a model (PEFT: `save_pretrained`), not its base. Experts go under PEFT's `target_parameters`,
    which knows no dropout: with adapters on experts the file says 0, and what was trained stays as it is.

    >>> import tempfile
    >>> from minimoe.config import ModelConfig
    >>> cfg = ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapter(folder, add_lora(MoETransformer(cfg), rank=2, targets="q"))
    ...     model = load_adapter(MoETransformer(cfg), folder)
    >>> model.blocks[0].attention.q.lora_A.shape
    torch.Size([2, 8])
    """
    tensors = {}
    with_adapter = {full: (m, name) for full, m, name in _weights(model)
                    if hasattr(m, "parts") and hasattr(m, m.parts[name][0])}
    need(with_adapter, "this model has no adapters to save: add_lora first")
    for full, (m, name) in with_adapter.items():
        a, b = (getattr(m, x).detach().cpu() for x in m.parts[name])
        if isinstance(m, LoraExperts):
            a, b = a.mT.flatten(0, 1), b.permute(2, 1, 0).flatten(1)
        keys = _keys(model, full, set(with_adapter))
        for key, part in zip(keys, b.chunk(len(keys))):
            tensors |= {f"{key}.lora_A.weight": a.clone(), f"{key}.lora_B.weight": part.contiguous()}
    first = next(iter(with_adapter.values()))[0]
    on_experts = any(isinstance(m, LoraExperts) for m, _ in with_adapter.values())
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
              "init_lora_weights": True, "r": first.rank, "lora_alpha": first.scale * first.rank,
              "lora_dropout": 0.0 if on_experts else first.dropout.p, **AS_HERE, **_targets(model, set(with_adapter))}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_safely(Path(folder) / WEIGHTS, lambda p: save_file(tensors, str(p), metadata={"format": "pt"}))
    write_safely(Path(folder) / CONFIG, lambda p: p.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def load_adapter(model: MoETransformer, folder: str | Path, *, quantize: bool = False) -> MoETransformer:
    """Adds to a plain model, in place, the adapters that `save_adapter` wrote, or PEFT for the exported model (PEFT:
    `PeftModel.from_pretrained`). Their values come back exactly.

    Raises ConfigError naming file, setting or tensor, before the model is touched, for what is missing, damaged, of another kind, or
    does not fit this model.
    """
    need(not adapted(model), "this model has adapters already: merge or remove them first")
    values, tensors = _read(Path(folder))
    rank, parameters, wanted = values["r"], tuple(values.get("target_parameters") or ()), {}
    experts = {full for full in weight_names(model) if ".experts." in full
               and any(f".{_theirs(model, full)[0]}".endswith(f".{t}") for t in parameters)}
    for full in weight_names(model):
        keys = _keys(model, full, experts)
        if ".experts." in full and full not in experts or f"{keys[0]}.lora_A.weight" not in tensors:
            continue
        try:
            both = [[tensors.pop(f"{key}.lora_{x}.weight") for key in keys] for x in "AB"]
        except KeyError as error:
            raise ConfigError(f"{Path(folder) / WEIGHTS}: {error.args[0]} is missing; copy the adapter again") from None
        need(all(torch.equal(a, both[0][0]) for a in both[0]), f"{Path(folder) / WEIGHTS}: {' and '.join(keys)} have adapters of their "
             f"own, where {full} is one weight with one; merge this adapter with peft, then import the merged model")
        wanted[full] = both[0][0], torch.cat(both[1])
    need(not tensors, f"{Path(folder) / WEIGHTS}: this model has no place for {min(tensors, default='')}; was the adapter made for another one?")
    need(wanted, f"{Path(folder) / WEIGHTS}: no adapter in it")
    for full, m, name in _weights(model):
        if full in wanted:
            a, b = wanted[full]
            shape = getattr(m, name).shape
            if len(shape) == 3:
                e, d, f = shape
                fits = a.shape == (e * rank, d) and b.shape == (f, rank * e)
                wanted[full] = (a.reshape(e, -1, d).mT, b.reshape(f, -1, e).permute(2, 1, 0)) if fits else wanted[full]
            else:
                fits = a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
            need(fits, f"{Path(folder) / WEIGHTS}: {_keys(model, full, experts)[0]} is {tuple(a.shape)} and {tuple(b.shape)}, which does not "
                       f"fit {full} of this model and r={rank} in {CONFIG}")
    add_lora(model, rank=rank, alpha=values["lora_alpha"], dropout=values.get("lora_dropout", 0.0), targets=wanted, quantize=quantize)
    for full, m, name in _weights(model):
        if full in wanted:
            for x, value in zip(m.parts[name], wanted[full]):
                getattr(m, x).data.copy_(value)
    return model


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        need((folder / name).is_file(), f"{folder}: not an adapter folder, {name} is missing; save_adapter writes one, as do training "
                                        "with method: lora (RUN/adapter) and peft's save_pretrained")
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG}: not readable as JSON ({error}); copy the adapter again") from None
    kind = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
    need(kind == "LORA", f"{folder / CONFIG}: peft_type={kind}: only LORA adapters are known here")
    for key, value in AS_HERE.items():
        need(not values.get(key) if not value else values.get(key, value) == value,
             f"{folder / CONFIG}: {key}={values.get(key)!r} is not supported, only {value!r}; merge this adapter with peft")
    number = lambda key, kinds: isinstance(values.get(key), kinds) and not isinstance(values[key], bool)
    need(number("r", int) and number("lora_alpha", (int, float)), f"{folder / CONFIG}: r={values.get('r')!r}, lora_alpha="
                                                                  f"{values.get('lora_alpha')!r}: must be numbers")
    try:
        return values, load_file(str(folder / WEIGHTS))
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: damaged or not a safetensors file ({str(error)[:80]}); copy the adapter again") from None


def _weights(model: MoETransformer) -> list[tuple[str, torch.nn.Module, str]]:
    """(name of the weight, its module, what the module calls it) for all that can have an adapter."""
    out = []
    for full in weight_names(model):
        path, _, last = full.rpartition(".")
        if path.endswith(".experts"):
            out.append((full, model.get_submodule(path), {"w13": "w13_EDF", "w2": "w2_EHD"}[last]))
        else:
            out.append((full, model.get_submodule(full), "weight"))
    return out


def _theirs(model: MoETransformer, full: str) -> list[str]:
    """What an exported model calls a weight of ours: modules, or the parameter of all experts."""
    name = re.sub(r"^blocks\.", "model.layers.", re.sub(r"^extra_heads\.", "model.extra_heads.", full))
    name = re.sub(r"attention\.([qkvo])$", r"self_attn.\1_proj", name).replace(".ffn.", ".mlp.")
    name = name.replace(".shared.", ".shared_expert.").replace(".shared_gate", ".shared_expert_gate")
    name = "lm_head" if name == "head" else re.sub(r"\.w2$", ".down_proj", name)
    if not name.endswith(".w13"):
        return [name]
    both = ("gate_up_proj",) if ".experts." in name else ("gate_proj", "up_proj")
    return [name.removesuffix("w13") + part for part in (both if model.cfg.gated else ("up_proj",))]


def _keys(model: MoETransformer, full: str, chosen: set[str]) -> list[str]:
    """Where the tensors of a weight's adapter stand in the file, less the end. Two parameters of one module are wrapped one in the
    other there, the second one outside."""
    if ".experts." not in full:
        return [PREFIX + name for name in _theirs(model, full)]
    path, _, last = full.rpartition(".")
    module = _theirs(model, full)[0].rpartition(".")[0]
    return [f"{PREFIX}{module}.base_layer" if last == "w13" and f"{path}.w2" in chosen else PREFIX + module]


def _targets(model: MoETransformer, chosen: set[str]) -> dict[str, list[str] | None]:
    """target_modules and target_parameters: the last part of a name where all weights that end in it have an adapter, else the whole."""
    out: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    every = {full: _theirs(model, full) for full in weight_names(model)}
    short = lambda name: re.sub(r"^model\.(layers|extra_heads)\.\d+\.", "", name) if ".experts." in name else name.rpartition(".")[2]
    for full in (full for full in every if full in chosen):
        for name in every[full]:
            alike = [f for f, names in every.items() if short(name) in map(short, names)]
            found = out["target_parameters" if ".experts." in full else "target_modules"]
            found.append(short(name) if chosen.issuperset(alike) else name)
    return {key: list(dict.fromkeys(names)) or None for key, names in out.items()}
