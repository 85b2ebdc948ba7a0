"""Folders of transformers, read and written: config.json and safetensors; nothing in them is executed (chapter 13).

Five architectures differ in a few settings and in the names of their tensors, so they are rows of one table. On disk a
matrix stands as (out, in) and every expert by itself; here E experts are two stacked tensors, in before out (D model
width, H hidden size of one expert, F = 2 H):

    experts.3.gate_proj (H, D) --+
    experts.3.up_proj   (H, D) --+-- w13_EDF[3] (D, 2 H)        experts.3.down_proj (D, H) ---- w2_EHD[3] (H, D)

`_views` gives every name on disk a view into the model: reading copies into the views, writing copies out.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minimoe.checkpoint import write_safely
from minimoe.config import ModelConfig
from minimoe.data.tokenizer import Tokenizer
from minimoe.decode import lay_out_for_decoding
from minimoe.lora import adapted
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError, need

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}     # in safetensors


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What sets one architecture apart: settings, our name to theirs; ours that it fixes; its names on disk."""

    model_type: str
    keys: dict[str, str]
    fixed: dict[str, object]
    rope_theta: float = 10_000.0        # where config.json does not say
    moe: str = "mlp"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


COMMON = {"vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
          "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "max_seq_len": "max_position_embeddings",
          "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range"}
MOE = {"n_experts": "num_experts", "top_k": "num_experts_per_tok", "aux_coef": "router_aux_loss_coef"}
QWEN = {**MOE, "expert_hidden": "moe_intermediate_size", "dense_hidden": "intermediate_size", "norm_topk": "norm_topk_prob",
        "moe_every": "decoder_sparse_step"}
EVERYWHERE = {"norm": "rms", "positions": "rope", "activation": "swiglu", "n_predict": 1}
ROUTED = {"router": "softmax"}
SPARSE = {**ROUTED, "n_shared_experts": 0, "qkv_bias": False, "n_dense_first": 0, "moe_every": 1}
ARCHITECTURES = {       # in the order in which export tries them
    "MixtralForCausalLM": _Architecture(
        "mixtral", {**MOE, "n_experts": "num_local_experts", "expert_hidden": "intermediate_size"},
        {**SPARSE, "qk_norm": "none", "norm_topk": True}, 1e6, "block_sparse_moe", ("w1", "w3", "w2")),
    "OlmoeForCausalLM": _Architecture(
        "olmoe", {**MOE, "expert_hidden": "intermediate_size", "norm_topk": "norm_topk_prob"}, {**SPARSE, "qk_norm": "full"}),
    "Qwen3MoeForCausalLM": _Architecture("qwen3_moe", QWEN, {**ROUTED, "n_shared_experts": 0, "qkv_bias": False, "qk_norm": "head"}),
    "Qwen2MoeForCausalLM": _Architecture(
        "qwen2_moe", {**QWEN, "shared_hidden": "shared_expert_intermediate_size", "qkv_bias": "qkv_bias"},
        {**ROUTED, "n_shared_experts": 1, "shared_gate": True, "qk_norm": "none"}),
    "LlamaForCausalLM": _Architecture(
        "llama", {"dense_hidden": "intermediate_size"}, {"n_experts": 1, "qkv_bias": False, "qk_norm": "none"}),
}
ABSENT = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "initializer_range": 0.02,
          "norm_topk_prob": False, "qkv_bias": True, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001}
SIZES = {"n_kv_heads": "kv_heads", "head_dim": "head_size", "dense_hidden": "dense_size", "shared_hidden": "shared_size"}
ONLY = {        # theirs that may have few values here; the keys of rope_parameters stand beside the others
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "clip_qkv": ("null",),
    "quantization_config": ("null",), "auto_map": ("null",), "rope_type": ("default", "linear"),
    "partial_rotary_factor": (1,), "layer_types": (["full_attention"],), "dtype": ("auto", *DTYPES)}
NO_NUMBERS = (  # theirs that change no logit in evaluation, or that are looked at by themselves
    "architectures", "model_type", "rope_theta", "factor", "original_max_position_embeddings", "mlp_only_layers",
    "sliding_window", "use_sliding_window", "max_window_layers", "attention_dropout", "router_jitter_noise",
    "output_router_logits", "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "id2label",
    "label2id", "transformers_version", "_name_or_path", "_attn_implementation_autoset", "unsloth_fixed")
TRAINING = (    # ours that change no logit in evaluation; a shared router is written once for each layer
    "dropout", "capacity_factor", "dispatch", "share_router", "aux_scope", "z_coef", "bias_speed", "mtp_coef")
NEVER = {"balance": "bias", "router_noise": "learned", "rope_scaling": "ntk"}       # ours, with weights or angles of their own


def _settings(raw: dict) -> tuple[str, ModelConfig, str | None]:
    """Architecture, settings and dtype (None where it does not say) of a config.json, else which key is not supported."""
    for key in ("rope_scaling", "rope_parameters"):     # rotary settings before transformers 5, and since
        _only(isinstance(rope := raw.pop(key, None) or {}, dict), key, rope, "keys and values")
        raw |= rope
    raw = {{"type": "rope_type", "torch_dtype": "dtype"}.get(key, key): value for key, value in raw.items() if value is not None}
    kind, named = raw.get("model_type"), raw.get("architectures") or [None]
    of_kind = next((name for name, arch in ARCHITECTURES.items() if arch.model_type == kind), None)
    name = str(named[0] or of_kind) if isinstance(named, list) else ""
    _only(name in ARCHITECTURES and kind in (None, ARCHITECTURES[name].model_type), "architectures", f"{named}, model_type={kind}",
          ", ".join(ARCHITECTURES))
    arch, keys, values = ARCHITECTURES[name], {**COMMON, **ARCHITECTURES[name].keys}, {**ARCHITECTURES[name].fixed}
    counts = [raw.pop(key) for key in ("num_experts", "num_local_experts") if key in raw]     # versions of transformers differ
    raw |= {keys.get("n_experts", "num_experts"): counts[0]} if counts else {}
    for key, value in raw.items():
        need(key in {*keys.values(), *ONLY, *NO_NUMBERS}, f"unknown setting {key}={_short(value)} may change the numbers; "
             "use transformers for this model, or take the key out if it changes nothing")
        value = [*dict.fromkeys(map(str, value))] if key == "layer_types" and isinstance(value, list) else value
        _only(key not in ONLY or value in ONLY[key], key, value, " or ".join(map(str, ONLY.get(key, ()))))
    for ours, theirs in keys.items():
        need(theirs in raw or theirs in ABSENT, f"{theirs} is missing; save the model again with save_pretrained")
        values[ours] = raw.get(theirs, ABSENT.get(theirs))
    _only("aux_coef" not in keys or values["n_experts"] != 1, keys.get("n_experts"), 1, "2 or more: a router must choose")
    if raw.get("rope_type") == "linear":
        values |= {"rope_scaling": "linear", "rope_factor": raw.get("factor")}
    step = values.pop("moe_every", 1)
    try:
        config = ModelConfig(**values, rope_base=raw.get("rope_theta", arch.rope_theta))
    except ConfigError as error:
        raise ConfigError(f"{keys.get(str(error).partition('=')[0], 'rope_parameters')}: {error}") from None
    # a window as long as the longest text hides nothing; Qwen writes one down even when it is not in use
    window = raw.get("sliding_window") if raw.get("use_sliding_window", "qwen" not in arch.model_type) else None
    _only(window is None or isinstance(window, int) and window >= config.max_seq_len, "sliding_window", window, "null")
    if "moe_every" in keys:
        config = dataclasses.replace(config, **_dense_layers(step, raw.get("mlp_only_layers", []), config.n_layers))
    return name, config, None if raw.get("dtype") == "auto" else raw.get("dtype")


def _dense_layers(step: int, dense: list[int], n: int) -> dict[str, int]:
    """The moe_every and n_dense_first that put experts where decoder_sparse_step and mlp_only_layers put them."""
    need(isinstance(step, int) and step > 0 and isinstance(dense, list),
         f"decoder_sparse_step={_short(step)}, mlp_only_layers={_short(dense)}: must be a step from 1 and a list")
    sparse = [i for i in range(n) if i not in dense and (i + 1) % step == 0]
    for every, first in ((every, first) for every in (step, *range(1, n + 1)) for first in range(n + 1)):
        if sparse == [i for i in range(first, n) if (i + 1) % every == 0]:
            return {"moe_every": every, "n_dense_first": first}
    _only(False, "mlp_only_layers", dense, "the lowest layers, with experts in every n-th above them")


def _only(condition: bool, key: str, value: object, possible: str) -> None:
    need(condition, f"{key}={_short(value)} is not supported, only {possible}; use transformers for this model")


def _choose(cfg: ModelConfig) -> str:
    """The first architecture that holds every setting that changes a logit, else what keeps the nearest from fitting."""
    known = {*COMMON, *EVERYWHERE, *TRAINING, *NEVER, "rope_base", "rope_factor"}
    known |= {key for arch in ARCHITECTURES.values() for key in (*arch.keys, *arch.fixed)}
    nowhere = [f"{key}={value}" for key, value in NEVER.items() if getattr(cfg, key) == value]
    nowhere += [f"{f.name}={getattr(cfg, f.name)}" for f in dataclasses.fields(cfg)         # a setting newer than the table
                if f.name not in known and getattr(cfg, f.name) != f.default]
    wrong = {}
    for name, arch in ARCHITECTURES.items():
        fixed = {**EVERYWHERE, **arch.fixed}
        if "shared_hidden" in arch.keys:            # several shared experts are one with all their hidden values
            fixed["n_shared_experts"] = cfg.n_shared_experts or 1
        if cfg.head_size * cfg.n_heads != cfg.dim and (name == "OlmoeForCausalLM" or name == "LlamaForCausalLM" and cfg.dim % cfg.n_heads):
            fixed["head_dim"] = "dim / n_heads"
        if ("aux_coef" in arch.keys) == (cfg.n_experts > 1):
            wrong[name] = nowhere + [f"{key}={getattr(cfg, key)} (needs {value})" for key, value in fixed.items()
                                     if getattr(cfg, key) != value]
    nearest = min(wrong, key=lambda name: len(wrong[name]))         # the first of the shortest: empty where one fits
    need(not wrong[nearest], f"{', '.join(wrong[nearest])}: fits no architecture, the nearest is {nearest}; export a model without")
    return nearest


def _views(model: MoETransformer, name: str) -> dict[str, Tensor]:
    """A view into the model for every tensor that the architecture keeps on disk, by its name there, shaped as there."""
    arch, state, out = ARCHITECTURES[name], dict(model.state_dict()), {}
    if model.cfg.tie_embeddings:
        del state["head.weight"]

    def three(at: str, w13_FD: Tensor, w2_DH: Tensor, names: tuple[str, ...] = _Architecture.gate_up_down) -> None:
        out.update({f"{at}.{part}.weight": w for part, w in zip(names, (*w13_FD.chunk(2), w2_DH))})

    renamed = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    in_block = {"attention_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
                "ffn.router.weight": f"{arch.moe}.gate.weight", "ffn.shared_gate.weight": "mlp.shared_expert_gate.weight",
                **{f"attention.{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")},
                **{f"attention.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}}
    for i in range(model.cfg.n_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        renamed |= {ours + key: theirs + value for key, value in in_block.items()}
        for part, at in (("ffn", "mlp"), ("ffn.shared", "mlp.shared_expert")):
            if f"{ours}{part}.w13.weight" in state:
                three(theirs + at, *(state.pop(f"{ours}{part}.{w}.weight") for w in ("w13", "w2")))
        if i in model.cfg.moe_layers:
            experts = [state.pop(f"{ours}ffn.experts.{w}") for w in ("w13_EDF", "w2_EHD")]
            for e, (w13_DF, w2_HD) in enumerate(zip(*experts)):
                three(f"{theirs}{arch.moe}.experts.{e}", w13_DF.T, w2_HD.T, arch.gate_up_down)
    out |= {theirs: state.pop(ours) for ours, theirs in renamed.items() if ours in state}
    need(not state, f"{name} has no place for {', '.join(state)}: export a model without")
    return out


class _Unfilled(TorchFunctionMode):
    """Weights made inside have this dtype and device, and nothing in them; the rotary angles are as always. The device
    "meta" alone would not do: it draws the initial weights all the same, and for that imports 90 MB of PyTorch."""

    def __init__(self, dtype: torch.dtype, device: str):
        super().__init__()
        self.new = {"dtype": dtype, "device": device}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.empty, torch.ones):
            return torch.empty(*args, **{**(kwargs or {}), **self.new})
        return None if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_") else func(*args, **(kwargs or {}))


@torch.no_grad()
def load_hf(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> MoETransformer:
    """The model of a folder that transformers wrote, in evaluation mode: Mixtral (Jiang et al. 2024), OLMoE
    (Muennighoff et al. 2024), Qwen2-MoE (Yang et al. 2024), Qwen3-MoE (Yang et al. 2025) or Llama 2 (Touvron et al. 2023).

    `dtype` None is the folder's own. Weights are read piece by piece: the peak is little above what the model holds.
    Dropout and jitter are not taken over; router_aux_loss_coef is as it stands, though their loss adds up over the k
    choices and ours takes the mean. Raises ConfigError naming file, setting or tensor, for what does not fit, and the remedy.

    >>> import tempfile
    >>> model = MoETransformer(ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=2, expert_hidden=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_hf(model, folder)
    ...     again = load_hf(folder)
    'MixtralForCausalLM'
    >>> torch.equal(model.blocks[0].ffn.experts.w13_EDF, again.blocks[0].ffn.experts.w13_EDF), again.training
    (True, False)
    """
    path = Path(folder) / "config.json"
    need(path.parent.is_dir(), f"{folder}: no such folder; download the model first, then name the folder that holds it")
    need(path.is_file(), f"{path}: missing; name a folder that transformers' save_pretrained wrote")
    raw = _json(path)
    try:
        name, config, stated = _settings(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    need(dtype in (None, *DTYPES.values()), f"dtype={dtype}: one of {', '.join(f'torch.{d}' for d in DTYPES)}, or None")
    with _Unfilled(torch.float32, "meta"):          # names and shapes: what does not fit is refused before memory is taken
        found = _stored(Path(folder), _views(MoETransformer(config), name))
    dtype = dtype or (DTYPES[stated] if stated else found["model.embed_tokens.weight"][1])
    with _Unfilled(dtype, device):
        model = MoETransformer(config).to(device)
    lay_out_for_decoding(model)         # before the values come: what nobody has written to takes no memory
    views, file, opened, held = _views(model, name), None, None, 0
    budget = max(2**20, sum(view.numel() for view in views.values()) * dtype.itemsize // 100)
    for key in sorted(views, key=lambda key: found[key][0]):
        (path, stored), view = found[key], views[key]
        row_bytes = view[0].numel() * stored.itemsize
        step = max(1, budget // row_bytes)
        for row in range(0, len(view), step):
            if path != opened or held > budget:     # what was read stays in memory until the file is closed
                file = None
                file, opened, held = safetensors.safe_open(str(path), framework="pt"), path, 0
            view[row:row + step].copy_(file.get_slice(key)[row:row + step])
            held += step * row_bytes
    return model.eval()


def _stored(folder: Path, wanted: dict[str, Tensor]) -> dict[str, tuple[Path, torch.dtype]]:
    """File and dtype of every tensor, from one file or from the shards that the index names; all that is wanted, no more."""
    single, index, shard_of, found = folder / "model.safetensors", folder / "model.safetensors.index.json", {}, {}
    if not single.is_file():
        pickle = next((p for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".pth")), None)
        need(index.is_file() or not pickle, f"{pickle}: pickle weights can run code and are not opened; let transformers "
                                            "write them as safetensors with save_pretrained")
        need(index.is_file(), f"{single}: missing, and no {index.name}; download the weights too")
        shard_of = _json(index).get("weight_map")
        need(isinstance(shard_of, dict) and shard_of and all(str(s) == Path(str(s)).name for s in shard_of.values()),
             f"{index}: its weight_map does not name files of this folder; download it again")
    wrong = []
    for path in [folder / shard for shard in sorted({*shard_of.values()})] or [single]:
        need(path.is_file(), f"{path}: missing, although {index.name} names it; download it again")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                here = {key: file.get_slice(key) for key in file.keys() if not key.endswith("rotary_emb.inv_freq")}  # old Llama
                for key, at in here.items():
                    shape, kind = tuple(at.get_shape()), at.get_dtype()
                    found[key] = path, STORED.get(kind)
                    if key not in wanted or shard_of.get(key, path.name) != path.name:
                        wrong.append(f"{path}: {key} is not part of this " + ("file" if key in wanted else "model"))
                    elif shape != wanted[key].shape or kind not in STORED:
                        wrong.append(f"{path}: {key} is {shape} {kind}, not {tuple(wanted[key].shape)} {' or '.join(STORED)}")
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: damaged ({_short(error)}); download it again") from None
    wrong = [f"{folder / shard_of.get(key, single.name)}: {key} is missing" for key in wanted if key not in found] + wrong
    need(not wrong, f"{wrong and wrong[0]}{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}; the weights do not fit "
                    "config.json: download both again")
    return found


def save_hf(model: MoETransformer, folder: str | Path, tokenizer: Tokenizer | None = None) -> str:
    """Writes config.json and one model.safetensors that transformers loads, in the model's dtype, and with a tokenizer
    its two files; gives the architecture, the first of Mixtral, OLMoE, Qwen3-MoE, Qwen2-MoE and Llama (the papers:
    `load_hf`) that fits. What only training uses stays behind. Raises ConfigError naming the setting that fits none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_hf(MoETransformer(ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_experts=1)), folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    'LlamaForCausalLM'
    ['config.json', 'model.safetensors']
    """
    need(not adapted(model), "this model has adapters: merge them first (minimoe.lora.merge), or save them alone with save_adapter")
    cfg, folder, name, end = model.cfg, Path(folder), _choose(model.cfg), None
    arch, linear = ARCHITECTURES[name], {"factor": cfg.rope_factor} if cfg.rope_scaling == "linear" else {}
    raw = {"architectures": [name], "model_type": arch.model_type, "hidden_act": "silu",
           **{theirs: getattr(cfg, SIZES.get(ours, ours)) for ours, theirs in {**COMMON, **arch.keys}.items()},
           "rope_parameters": {"rope_type": "linear" if linear else "default", "rope_theta": cfg.rope_base, **linear},
           "rope_theta": cfg.rope_base,             # where versions before 5 read it
           "dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}
    if "aux_coef" in arch.keys and cfg.balance != "aux":
        raw["router_aux_loss_coef"] = 0.0
    if "moe_every" in arch.keys:
        raw["mlp_only_layers"] = list(range(min(cfg.n_dense_first, cfg.n_layers)))
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    if tokenizer is not None:
        write_safely(folder / "tokenizer.json", tokenizer.save)
        end = tokenizer.end_of_text
        texts["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": cfg.max_seq_len,
                                          "eos_token": None if end is None else tokenizer.inner.id_to_token(end)}
    state = {key: view.cpu().clone(memory_format=torch.contiguous_format) for key, view in _views(model, name).items()}
    write_safely(folder / "model.safetensors", lambda path: save_file(state, str(path), metadata={"format": "pt"}))
    texts["config.json"] = {**raw, "bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    for file, values in texts.items():
        text = json.dumps(values, indent=2) + "\n"
        write_safely(folder / file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return name


def _json(path: Path) -> dict:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({_short(error)}); download it again") from None


def _short(value: object) -> str:
    return " ".join(str(value).split())[:80]
