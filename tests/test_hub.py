"""minimoe.hub against transformers: the same logits from the same folder, both ways, and a refusal for what cannot be."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimoe.checkpoint import load
from minimoe.cli import main
from minimoe.config import ModelConfig, load_config
from minimoe.data.tokenizer import Tokenizer
from minimoe.generate import generate
from minimoe.hub import load_hf, save_hf
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]

BASE = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, initializer_range=0.2, pad_token_id=None, bos_token_id=None, eos_token_id=None)
MIXTRAL = dict(num_local_experts=4, num_experts_per_tok=2)
OLMOE = dict(num_experts=4, num_experts_per_tok=2)
QWEN3 = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, norm_topk_prob=True)
QWEN2 = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24)
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
CASES = {
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral_tied_multi_query": ("Mixtral", MIXTRAL | dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "mixtral_wide_heads_other_base": ("Mixtral", MIXTRAL | dict(head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "mixtral_top1_linear_eps": ("Mixtral", MIXTRAL | dict(num_experts_per_tok=1, rope_parameters=LINEAR, rms_norm_eps=1e-2)),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe_renormalised_all_heads": ("Olmoe", OLMOE | dict(norm_topk_prob=True, num_key_value_heads=4, num_experts=5)),
    "olmoe_tied_linear": ("Olmoe", OLMOE | dict(tie_word_embeddings=True, rope_parameters=LINEAR, num_experts_per_tok=3)),
    "qwen3": ("Qwen3Moe", QWEN3),
    "qwen3_wide_heads_dense_between": ("Qwen3Moe", QWEN3 | dict(head_dim=20, num_hidden_layers=4, decoder_sparse_step=2)),
    "qwen3_dense_first_tied": ("Qwen3Moe", QWEN3 | dict(mlp_only_layers=[0, 1], num_hidden_layers=3, tie_word_embeddings=True)),
    "qwen3_not_renormalised": ("Qwen3Moe", QWEN3 | dict(norm_topk_prob=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3_all_dense": ("Qwen3Moe", QWEN3 | dict(mlp_only_layers=[0, 1])),
    "qwen2": ("Qwen2Moe", QWEN2),
    "qwen2_small_shared_dense_first": ("Qwen2Moe", QWEN2 | dict(shared_expert_intermediate_size=8, mlp_only_layers=[0], norm_topk_prob=True)),
    "qwen2_no_bias_dense_between": ("Qwen2Moe", QWEN2 | dict(qkv_bias=False, decoder_sparse_step=2, tie_word_embeddings=True)),
    "llama": ("Llama", {}),
    "llama_tied_wide_heads": ("Llama", dict(tie_word_embeddings=True, head_dim=20, num_key_value_heads=4)),
    "llama_linear_multi_query": ("Llama", dict(rope_parameters=LINEAR, num_key_value_heads=1, num_hidden_layers=3)),
}


def theirs(kind: str, settings: dict, seed: int = 0):
    """A random model of transformers whose norms and biases are random too, and the sign of a well-scaled output."""
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**BASE, **settings})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def written(tmp_path: Path, kind: str = "Qwen3Moe", settings: dict = QWEN3) -> Path:
    theirs(kind, settings).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def reload(folder: Path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def edit(folder: Path, **changes) -> Path:
    """Changes config.json; None takes a key out."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}), encoding="utf-8")
    return folder


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in (str(folder), *words)), caught.value


IDS = torch.randint(0, 61, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_parity(case, tmp_path, record_property):
    """Import gives their logits, export gives them back, import again gives the same bits."""
    kind, settings = CASES[case]
    reference = theirs(kind, settings)
    expected = logits_of(reference, IDS)
    assert expected.std() > 0.5, "logits near zero would agree whatever the model"
    reference.save_pretrained(tmp_path / "hf")
    ours = load_hf(tmp_path / "hf")
    assert not ours.training and (ours.head.weight is ours.embedding.weight) == reference.config.tie_word_embeddings
    assert ours.cfg.num_params() == sum(p.numel() for p in ours.parameters())
    difference = (logits_of(ours, IDS) - expected).abs().max().item()
    record_property("largest difference", f"{difference:.1e} at scale {expected.std():.1f}")
    assert difference < 1e-4
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1 and same_weights(ours, load_hf(tmp_path / "shards"))
    save_hf(ours, tmp_path / "back")
    back = reload(tmp_path / "back")
    if case != "qwen3_all_dense":
        assert type(back) is type(reference)
    assert (logits_of(back, IDS) - expected).abs().max() <= 1e-5
    again = load_hf(tmp_path / "back")
    assert same_weights(ours, again) and again.cfg == dataclasses.replace(
        ours.cfg, **{key: getattr(again.cfg, key) for key in ("n_kv_heads", "head_dim")})       # written out where they were null


def test_settings_as_before_transformers_5(tmp_path):
    folder = written(tmp_path, "Llama", {"rope_parameters": LINEAR | {"rope_theta": 500.0}})
    expected = load_hf(folder)
    edit(folder, rope_parameters=None, rope_theta=500, rope_scaling={"type": "linear", "factor": 4.0}, dtype=None, torch_dtype="float32")
    assert load_hf(folder).cfg == expected.cfg and expected.cfg.rope_base == 500 and expected.cfg.rope_factor == 4
    folder = written(tmp_path, settings=QWEN3 | {"num_experts": 3})
    assert load_hf(edit(folder, num_local_experts=None, num_experts=3, rope_parameters=None)).cfg.n_experts == 3
    for kind, settings in (("Mixtral", MIXTRAL), ("Qwen2Moe", QWEN2)):          # what a missing key means
        folder = edit(written(tmp_path, kind, settings), **dict.fromkeys(("rope_parameters", "norm_topk_prob", "qkv_bias")))
        assert (logits_of(load_hf(folder), IDS) - logits_of(reload(folder), IDS)).abs().max() < 1e-4


def test_dtypes(tmp_path):
    """The folder's own dtype unless another is asked for; the angles stay float32, and it runs."""
    theirs("Qwen2Moe", QWEN2).bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_hf(tmp_path).parameters()} == {torch.bfloat16}
    wide, own = load_hf(tmp_path, dtype=torch.float32), load_hf(edit(tmp_path, dtype=None))
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and own.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(own.cos, wide.cos) and own.cos.dtype == torch.float32
    assert (logits_of(own, IDS).float() - logits_of(wide, IDS)).abs().mean() < 0.1 * logits_of(wide, IDS).std()
    assert same_weights(wide, load_hf(tmp_path, torch.bfloat16).float())
    assert generate(own, [1, 2, 3], 4, temperature=0) is not None
    with pytest.raises(ConfigError, match="dtype=torch.int8"):
        load_hf(tmp_path, torch.int8)


@pytest.mark.parametrize("step,dense,n", [(1, [], 4), (2, [], 5), (3, [], 5), (1, [0, 1], 4), (2, [0], 4), (2, [1], 6), (3, [2], 9),
                                          (1, [0, 2], 4), (2, [0, 1, 2, 4], 6), (7, [], 4), (1, [0, 1, 2, 3], 4)])
def test_dense_layers(step, dense, n, tmp_path):
    settings = QWEN3 | dict(decoder_sparse_step=step, mlp_only_layers=dense, num_hidden_layers=n)
    reference = theirs("Qwen3Moe", settings)
    reference.save_pretrained(tmp_path)
    sparse = tuple(i for i, layer in enumerate(reference.model.layers) if hasattr(layer.mlp, "experts"))
    model = load_hf(tmp_path)
    assert model.cfg.moe_layers == sparse
    assert (logits_of(model, IDS) - logits_of(reference, IDS)).abs().max() < 1e-4


SETTINGS = {        # changes to config.json, and what the message names
    "sliding_window": dict(sliding_window=16, use_sliding_window=True),
    "layer_types": dict(layer_types=["sliding_attention", "full_attention"]),
    "rope_type=yarn": dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "n_group": dict(n_group=2),
    "rope_type=dynamic": dict(rope_scaling={"type": "dynamic", "factor": 4.0}, rope_parameters=None),
    "mscale": dict(rope_parameters={"mscale": 2.0}), "rope_factor": dict(rope_parameters={"rope_type": "linear"}),
    "full_attention": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "partial_rotary_factor": dict(partial_rotary_factor=0.5), "rope_parameters": dict(rope_parameters="linear"),
    "clip_qkv": dict(clip_qkv=8.0), "attention_bias": dict(attention_bias=True), "mlp_bias": dict(mlp_bias=True),
    "hidden_act": dict(hidden_act="gelu"), "architectures": dict(architectures={"a": 1}), "quantization_config": dict(quantization_config={}),
    "auto_map": dict(auto_map={"AutoModelForCausalLM": "modeling.Evil"}),
    "attention_multiplier": dict(attention_multiplier=0.5), "dtype=float8_e4m3fn": dict(dtype="float8_e4m3fn"),
    "DeepseekV3ForCausalLM": dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3"),
    "deepseek_v3": dict(architectures=None, model_type="deepseek_v3"), "model_type=mixtral": dict(model_type="mixtral"),
    "Qwen3MoeForSequenceClassification": dict(architectures=["Qwen3MoeForSequenceClassification"]),
    "hidden_size": dict(hidden_size=None), "num_experts_per_tok": dict(num_experts_per_tok=None),
    "num_hidden_layers": dict(num_hidden_layers="2"), "rms_norm_eps": dict(rms_norm_eps=-1),
    "num_experts=1": dict(num_local_experts=1), "decoder_sparse_step=0": dict(decoder_sparse_step=0),
    "mlp_only_layers": dict(mlp_only_layers=[1, 2], num_hidden_layers=4),
}


@pytest.mark.parametrize("word", SETTINGS)
def test_refused_settings(word, tmp_path):
    refused(edit(written(tmp_path), **SETTINGS[word]), "config.json", word)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    folder = edit(written(tmp_path), use_sliding_window=False, sliding_window=16, max_window_layers=1, attention_dropout=0.1)
    expected = load_hf(folder).cfg
    edit(folder, use_sliding_window=True, sliding_window=64, layer_types=["full_attention"] * 2, _name_or_path="x")
    assert load_hf(folder).cfg == expected


def tensors(change):
    """Rewrites model.safetensors through `change(state)`."""
    def damage(folder: Path) -> None:
        change(state := load_file(folder / "model.safetensors"))
        save_file(state, folder / "model.safetensors")
    return damage


def index(change=lambda shard_of, folder: None, cut: int | None = None):
    """Two shards with an index, changed."""
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shard_of = {key: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, key in enumerate(state)}
        for shard in set(shard_of.values()):
            save_file({k: v for k, v in state.items() if shard_of[k] == shard}, folder / shard)
        change(shard_of, folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of})[:cut], encoding="utf-8")
    return damage


KEY = "model.layers.1.mlp.experts.2.up_proj.weight"
DAMAGES = {
    ": no such folder": (lambda f: f.rename(f.with_name("elsewhere")), "download"),
    "config.json: missing": (lambda f: (f / "config.json").unlink(), "save_pretrained"),
    "config.json: damaged": (lambda f: (f / "config.json").write_text('{"hidden', encoding="utf-8"), "download"),
    "config.json: damaged ('list'": (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), "download"),
    "config.json: damaged ('utf-8'": (lambda f: (f / "config.json").write_bytes(b'{"\xff'), "download"),
    "model.safetensors: missing": (lambda f: (f / "model.safetensors").unlink(), "download"),
    "model.safetensors: damaged": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 50), "download"),
    "model.safetensors: damaged (": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "download"),
    "pytorch_model.bin: pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "save_pretrained"),
    f"model.safetensors: {KEY} is missing": (tensors(lambda s: s.pop(KEY)), "download"),
    "model.safetensors: extra is not part": (tensors(lambda s: s.update(extra=torch.zeros(2))), "download"),
    f"model.safetensors: {KEY} is (3, 32) F32, not (16, 32)": (tensors(lambda s: s.update({KEY: torch.zeros(3, 32)})), "download"),
    f"{KEY} is (16, 32) I8": (tensors(lambda s: s.update({KEY: torch.zeros(16, 32, dtype=torch.int8)})), "F32 or BF16"),
    "index.json: damaged": (index(cut=90), "download"),
    "index.json: its weight_map": (index(lambda s, f: s.update({KEY: "../elsewhere.safetensors"})), "download"),
    "00002-of-00002.safetensors: missing": (index(lambda s, f: (f / "model-00002-of-00002.safetensors").unlink()), "download"),
    f"{KEY} is not part of this file": (index(lambda s, f: s.update({KEY: next(v for v in s.values() if v != s[KEY])})), "download"),
    "lm_head.weight is missing": (index(lambda s, f: [save_file({k: v for k, v in load_file(f / n).items() if k != "lm_head.weight"}, f / n)
                                                     for n in set(s.values())]), "download"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_refused_files(words, tmp_path):
    folder = written(tmp_path)
    DAMAGES[words][0](folder)
    refused(folder, words, DAMAGES[words][1])


TINY = ModelConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, max_seq_len=64, n_experts=4, top_k=2, expert_hidden=16, init_std=0.2)
CHANGES = dict(         # another value for every setting of ours, with what it needs
    vocab_size=70, dim=48, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=12, max_seq_len=80, norm="layer", norm_eps=1e-2,
    positions="learned", rope_base=500.0, rope_scaling=("linear", dict(rope_factor=3.0)), rope_factor=(2.0, dict(rope_scaling="ntk")),
    qk_norm="head", qkv_bias=True, dropout=0.5, tie_embeddings=False, init_std=0.3, activation="geglu", dense_hidden=40, n_experts=5,
    top_k=3, expert_hidden=24, n_shared_experts=(2, dict(shared_gate=True)), shared_hidden=(8, dict(n_shared_experts=1)),
    shared_gate=(True, dict(n_shared_experts=1, qkv_bias=True)), moe_every=(2, dict(qk_norm="head")),
    n_dense_first=(1, dict(qk_norm="head", dense_hidden=24)), router="sigmoid", norm_topk=False, router_noise="learned", share_router=True,
    capacity_factor=1.0, dispatch="loop", balance="bias", aux_coef=0.3, aux_scope="sequence", z_coef=0.1,
    bias_speed=(0.1, dict(balance="none")), n_predict=2, mtp_coef=0.5)
REFUSED = {"norm", "positions", "rope_factor", "qkv_bias", "activation", "shared_hidden", "router", "norm_topk", "router_noise", "balance",
           "n_predict"}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig)])
def test_export_of_every_setting(field, tmp_path):
    """Whatever a setting is, transformers computes the same from what is written, or the export names it."""
    value, others = CHANGES[field] if isinstance(CHANGES[field], tuple) else (CHANGES[field], {})
    cfg = dataclasses.replace(TINY, **{field: value}, **others)
    assert getattr(cfg, field) != getattr(TINY, field)
    model = MoETransformer(cfg).eval()
    if field in REFUSED:
        with pytest.raises(ConfigError) as caught:
            save_hf(model, tmp_path / "hf")
        named = {"rope_factor": "rope_scaling=ntk", "shared_hidden": "n_shared_experts=1"}.get(field, f"{field}={value}")
        assert named in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "hf").exists()
        return
    save_hf(model, tmp_path / "hf")
    expected = logits_of(model, IDS)
    assert expected.std() > 0.3
    assert (logits_of(reload(tmp_path / "hf"), IDS) - expected).abs().max() < 1e-4
    assert torch.equal(logits_of(load_hf(tmp_path / "hf"), IDS), expected) or field == "dispatch"


MEASURE = """
import sys, torch
from minimoe.hub import load_hf
def kib(key):       # not ru_maxrss: it is handed on by the process that starts this one
    return int(next(line for line in open("/proc/self/status", encoding="utf-8") if line.startswith(key)).split()[1])
before = kib("VmRSS")
model = load_hf(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((kib("VmHWM") - before) * 1024 / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of a process from /proc")
def test_peak_memory(record_property):
    """At most 1.1 times the weights in the dtype asked for, from float32 shards with tensors larger than a tenth."""
    cfg = dataclasses.replace(TINY, vocab_size=12_000, dim=768, n_layers=3, n_experts=8, expert_hidden=896, tie_embeddings=False)
    with tempfile.TemporaryDirectory() as folder:           # 300 MB: not left behind
        save_hf(MoETransformer(cfg), folder)
        index()(Path(folder))
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, "-c", MEASURE, folder, dtype]
            ratio = float(subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, check=True).stdout)
            record_property(f"peak over weights, read as {dtype}", f"{ratio:.3f}")
            assert 1 <= ratio <= 1.1


def test_commands(tmp_path, capsys):
    """The shipped run goes out, transformers reads model and tokenizer, and it comes back as the same run."""
    hf, run = str(tmp_path / "hf"), str(tmp_path / "run")
    pydocs = dataclasses.replace(load_config(ROOT / "configs" / "pydocs.yaml").model, vocab_size=1024)
    assert save_hf(MoETransformer(pydocs), tmp_path / "pydocs") == "MixtralForCausalLM"
    assert main(["export", "shipped", "--out", hf]) == 0 and main(["import", hf, "--out", run]) == 0
    ours, back, model = load("shipped"), load(run), reload(tmp_path / "hf")
    text = "The for statement is used to iterate\n\tover é"
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text) and tokenizer.decode(ours.tokenizer.encode(text)) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id == ours.tokenizer.end_of_text
    assert same_weights(ours.model, back.model) and back.generate(text, 9) == ours.generate(text, 9)
    greedy = model.generate(torch.tensor([ours.tokenizer.encode(text)]), max_new_tokens=9, do_sample=False)
    assert ours.tokenizer.decode(greedy[0].tolist()) == text + ours.generate(text, 9, temperature=0)
    capsys.readouterr()
    assert main(["export", run, "--out", hf]) == 2 and main(["import", hf, "--out", run]) == 2
    assert capsys.readouterr().err.count("exists already") == 2
    assert main(["import", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2 and not (tmp_path / "new").exists()


def test_import_without_a_tokenizer(tmp_path, capsys):
    """It says so, evaluates on ids, and says what is missing when it is given a text."""
    folder = written(tmp_path, "Mixtral", MIXTRAL)
    for number, write in enumerate([lambda p: None, lambda p: p.write_text("{}", encoding="utf-8"), Tokenizer.bytes().save]):
        write(folder / "tokenizer.json")
        run = str(tmp_path / f"run{number}")
        assert main(["import", str(folder), "--out", run]) == 0
        assert "tokenizer.json" in (said := capsys.readouterr().out) and len(said.splitlines()) == 2
        assert len(generate(load(run).model, [1, 2, 3], 5)) == 5
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        load(run).generate("a text")
    raw = json.loads(Tokenizer.characters("ab").inner.to_str())         # merges over whole texts, as SentencePiece does
    raw["model"]["vocab"]["ab"], raw["model"]["merges"] = len(raw["model"]["vocab"]), [["a", "b"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    assert main(["import", str(folder), "--out", str(tmp_path / "merging")]) == 0
    assert load(tmp_path / "merging").encode("aab") == [4, 6]       # not taken for one token a character
