"""The loop: it learns, it repeats, it accumulates, it keeps the best; run folders; and the command line's errors."""
import dataclasses
import json

import pytest
import torch
import yaml

import minimoe
from minimoe.checkpoint import load, save
from minimoe.cli import main
from minimoe.config import Config, DataConfig, ModelConfig, TrainConfig, load_config, save_config
from minimoe.data.loader import load_data
from minimoe.model import MoETransformer
from minimoe.optimizer import make_optimizer
from minimoe.settings import ConfigError
from minimoe.trainer import Trainer, held_out_loss

MODEL = ModelConfig(vocab_size=70, dim=32, n_layers=2, n_heads=2, max_seq_len=32, n_experts=4, top_k=2, expert_hidden=32)
TRAIN = TrainConfig(steps=6, batch_size=4, warmup=2, lr=3e-3, device="cpu", dtype="float32", eval_every=3, log_every=2)


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(mixture="worlds", tokenizer="characters"))


def trainer(data, train=TRAIN, model=MODEL, out=None):
    torch.manual_seed(train.seed)
    cfg = dataclasses.replace(model, vocab_size=data.tokenizer.vocab_size)
    return Trainer(MoETransformer(cfg), train, data, out=out, progress=False)


def test_it_learns(data):
    t = trainer(data, dataclasses.replace(TRAIN, steps=80, eval_every=0, lr=1e-2))
    t.fit()
    first, last = t.rows[0], t.rows[-1]
    counts = torch.bincount(torch.from_numpy(data.mixture.streams[0].tokens).long()).double()
    unigram = -(counts / counts.sum() * (counts / counts.sum()).clamp_min(1e-9).log()).sum().item()
    assert first["ce"] > 3.5 and last["ce"] < unigram - 0.3 and last["val_ce"] < unigram - 0.3
    assert last["tokens"] == 80 * 4 * 32


def test_the_same_seed_gives_the_same_run_and_another_does_not(data):
    noisy = dataclasses.replace(MODEL, dropout=0.1, router_noise=0.5, balance="bias", router="sigmoid")
    runs = [trainer(data, dataclasses.replace(TRAIN, seed=s), noisy) for s in (0, 0, 1)]
    rows = []
    for t in runs:
        t.fit()
        rows.append([{k: v for k, v in r.items() if k != "seconds"} for r in t.rows])
    assert rows[0] == rows[1] != rows[2]
    same = zip(runs[0].model.state_dict().values(), runs[1].model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in same)
    assert runs[0].model.blocks[0].ffn.router.bias_E.abs().sum() > 0


def test_accumulation_equals_the_big_batch(data):
    # the stated exception (balance over the batch) aside
    model = dataclasses.replace(MODEL, aux_scope="sequence", z_coef=0.01)
    big = trainer(data, dataclasses.replace(TRAIN, batch_size=8), model)
    small = trainer(data, dataclasses.replace(TRAIN, batch_size=2, accumulate=4), model)
    for _ in range(4):
        a, b = big.train_step()[0], small.train_step()[0]
        assert a["ce"] == pytest.approx(b["ce"], abs=1e-5) and a["aux"] == pytest.approx(b["aux"], abs=1e-5)


def test_a_dataset_of_ones_own_with_unequal_targets():
    torch.manual_seed(0)
    inputs = torch.randint(0, 70, (12, 16))
    targets = inputs.roll(-1, 1)
    for i in range(12):
        targets[i, : i] = -100
    pairs = [(inputs[i], targets[i]) for i in range(12)]
    steps = []
    for batch_size, accumulate in ((6, 1), (3, 2)):
        torch.manual_seed(0)
        cfg = dataclasses.replace(TRAIN, batch_size=batch_size, accumulate=accumulate)
        model = MoETransformer(dataclasses.replace(MODEL, balance="none", n_predict=3))
        t = Trainer(model, cfg, pairs, progress=False)
        steps.append([[losses[name] for name in ("ce", "mtp", "grad_norm")] for losses, _ in (t.train_step() for _ in range(4))])
    assert torch.allclose(*map(torch.tensor, steps), atol=1e-5)


def test_a_step_without_any_target_is_refused():
    pairs = [(torch.zeros(8, dtype=torch.long), torch.full((8,), -100))] * 4
    with pytest.raises(ValueError, match="no target"):
        Trainer(MoETransformer(MODEL), TRAIN, pairs, progress=False).train_step()


def test_decay_is_for_matrices_only():
    decay, rest = make_optimizer(MoETransformer(MODEL), TRAIN).param_groups
    assert all(p.dim() >= 2 for p in decay["params"]) and all(p.dim() < 2 for p in rest["params"])
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert sum(p.numel() for g in (decay, rest) for p in g["params"]) == MODEL.num_params()


def test_run_folder_and_back(data, tmp_path):
    t = trainer(data, out=tmp_path / "run")
    run = t.fit()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in rows] == [2, 3, 4, 6]
    assert {"step", "tokens", "seconds", "ce", "lr"} <= set(rows[0]) and {"val_ce", "val_bpb"} <= set(rows[1])
    assert len(rows[0]["routing"]) == 2 and sum(rows[0]["routing"][0]["load"]) == pytest.approx(1, abs=1e-3)
    again = load(tmp_path / "run")
    assert again.config == run.config and again.generate("1 + ", 8, seed=3) == run.generate("1 + ", 8, seed=3)
    assert "".join(again.stream("1 + ", 8, seed=3)) == again.generate("1 + ", 8, seed=3)
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.endswith(".part")]


def test_stop_texts_end_the_writing_and_streaming_never_shows_a_part_of_one(data):
    run, options = trainer(data).fit(), {"temperature": 3.0, "seed": 2}
    free = run.generate("1 + ", 40, **options)
    stop = free[9:12]
    want = free[:free.index(stop)]
    for given in (stop, (stop, "never written")):
        assert run.generate("1 + ", 40, stop=given, **options) == want
        pieces = list(run.stream("1 + ", 40, stop=given, **options))
        assert "".join(pieces) == want and len(pieces) > 3
    almost = free[9:11] + "\x00"                # begins like what is written, and is not: held back, then shown
    assert "".join(run.stream("1 + ", 40, stop=almost, **options)) == free
    with pytest.raises(ConfigError, match="stop"):
        run.generate("1 + ", 4, stop="")
    with pytest.raises(TypeError, match="topk"):
        run.generate("1 + ", 4, topk=3)


def test_layout_for_decoding_changes_no_value(data):
    run = trainer(data).fit()
    plain = MoETransformer(run.model.cfg).eval()
    plain.load_state_dict(run.model.state_dict())
    tokens = torch.randint(0, 60, (2, 9))
    assert run.model.blocks[0].attention.q.weight.stride()[0] == 1 != plain.blocks[0].attention.q.weight.stride()[0]
    assert torch.allclose(run.model(tokens).logits, plain(tokens).logits, atol=1e-5)


def test_alerts_stand_in_the_metrics(data):
    t = trainer(data, model=dataclasses.replace(MODEL, balance="none", top_k=1))    # renormalized: no gradient
    t.fit()
    assert any("no gradient" in line for row in t.rows for line in row.get("alerts", ()))


def test_the_bias_rule_counts_the_whole_step(data):
    """Four micro-batches of one row move the selection bias as one batch of four."""
    model = dataclasses.replace(MODEL, router="sigmoid", balance="bias", bias_speed=0.1)
    biases = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        t = trainer(data, dataclasses.replace(TRAIN, steps=1, batch_size=batch_size, accumulate=accumulate), model)
        t.fit()
        biases.append(torch.stack([b.ffn.router.bias_E for b in t.model.blocks]))
    assert torch.equal(*biases) and biases[0].abs().max().item() == pytest.approx(0.1)


def test_the_weights_kept_are_the_best_on_held_out_text(data, tmp_path):
    t = trainer(data, dataclasses.replace(TRAIN, steps=9, lr=3e-3), out=tmp_path)
    losses = iter([3.0, 2.0, 4.0])
    kept = []
    t.evaluate = lambda: (kept.append({k: v.clone() for k, v in t.model.state_dict().items()}),
                          {"val_ce": next(losses), "val_bpb": 1.0, "val": {}})[1]
    t.fit()
    assert torch.equal(load(tmp_path).model.state_dict()["embedding.weight"], kept[1]["embedding.weight"])


@pytest.mark.parametrize("n, stride", [(101, None), (101, 16), (97, 32), (20, 16), (2, None), (65, 1)])
def test_held_out_loss_counts_every_token_once(data, n, stride):
    model, seq_len = trainer(data).model.eval(), 32
    tokens = data.mixture.streams[0].tokens[:n]
    total, count = held_out_loss(model, tokens, seq_len, batch_size=2, stride=stride)
    assert count == n - 1
    text, by_hand, stride = torch.tensor(tokens.astype("int64")), 0.0, stride or seq_len
    for i in range(1, n):                       # token i, from the window in which it is counted
        start = 0 if i <= seq_len else -(-(i - seq_len) // stride) * stride
        logits = model(text[None, start:i]).logits[0, -1]
        by_hand += torch.nn.functional.cross_entropy(logits, text[i]).item()
    assert total == pytest.approx(by_hand, rel=1e-4)


def test_names_are_what_they_should_be_in_a_fresh_process():
    import subprocess
    import sys

    code = "import minimoe; assert all(callable(getattr(minimoe, n)) for n in minimoe.__all__); print(len(minimoe.__all__))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) >= 9


# --- bad input: one clear line, exit code 2, nothing touched ---------------------------------------------------------
def write_config(path, **sections):
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return str(path)


SMALL = {"model": {"dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16, "n_experts": 2, "top_k": 1, "expert_hidden": 16},
         "train": {"steps": 2, "batch_size": 2, "device": "cpu", "dtype": "float32"},
         "data": {"mixture": "worlds", "tokenizer": "bytes"}}


def test_train_and_generate_from_the_command_line(tmp_path, capsys):
    config, out = write_config(tmp_path / "small.yaml", **SMALL), str(tmp_path / "run")
    assert main(["train", "--config", config, "--out", out, "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert "xz -9e" in printed and "device cpu" in printed and "parameters" in printed
    assert load(out).config.train.steps == 3
    assert main(["generate", out, "--prompt", "1 + 1", "--max-new-tokens", "5", "--seed", "4"]) == 0
    assert capsys.readouterr().out.startswith("1 + 1")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main(["train", "--config", config, "--out", out]) == 2          # refused, and left alone
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def expect(capsys, argv, *fragments):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    for fragment in fragments:
        assert fragment in err, err


def test_a_misspelt_key_names_the_nearest(tmp_path, capsys):
    bad = write_config(tmp_path / "c.yaml", **(SMALL | {"model": {"n_expert": 4}}))
    expect(capsys, ["train", "--config", bad], "c.yaml", "'n_expert'", "'n_experts'")
    bad = write_config(tmp_path / "c.yaml", modle={})
    expect(capsys, ["train", "--config", bad], "'model'")


@pytest.mark.parametrize("section, values, fragment", [
    ("model", {"top_k": 9}, "top_k=9"), ("model", {"dim": "wide"}, "dim='wide'"), ("model", {"router": "softmx"}, "one of"),
    ("train", {"lr": -1}, "lr=-1"), ("train", {"steps": 1.5}, "steps=1.5"), ("data", {"mixture": []}, "mixture"),
    ("data", {"mixture": [{"corpus": "worlds", "ratio": -1}]}, "ratio=-1"), ("data", {"mixture": "wurlds"}, "wurlds"),
    ("train", {"device": "cuda:99"}, "cuda:99"), ("train", {"dtype": "float16"}, "float16"),
    ("data", {"mixture": [{"corpus": "worlds", "weight": 1}]}, "'weight'")])
def test_bad_values_are_named(tmp_path, capsys, section, values, fragment):
    bad = write_config(tmp_path / "c.yaml", **(SMALL | {section: SMALL[section] | values}))
    expect(capsys, ["train", "--config", bad, "--out", str(tmp_path / "run")], fragment)
    assert not (tmp_path / "run").exists()


def test_bad_files_are_named(tmp_path, capsys):
    text, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    text.write_bytes("caf\u00e9 ".encode("latin-1") * 50)
    empty.write_bytes(b"")
    for file, fragment in ((text, "not UTF-8 at byte 3"), (empty, "is empty")):
        bad = write_config(tmp_path / "c.yaml", **(SMALL | {"data": {"mixture": str(file)}}))
        expect(capsys, ["train", "--config", bad, "--out", str(tmp_path / "run")], file.name, fragment)
    (tmp_path / "c.yaml").write_text("model: [", encoding="utf-8")
    expect(capsys, ["train", "--config", str(tmp_path / "c.yaml")], "c.yaml", "line")
    expect(capsys, ["train", "--config", str(tmp_path / "none.yaml")], "none.yaml: no such config")
    expect(capsys, ["generate", str(tmp_path / "nowhere")], "nowhere", "no such run folder")
    expect(capsys, ["nonsense"], "'nonsense'")


def test_damaged_and_foreign_weights_are_refused(tmp_path, capsys, data):
    cfg = dataclasses.replace(MODEL, vocab_size=data.tokenizer.vocab_size)
    save(tmp_path, MoETransformer(cfg), data.tokenizer)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:1000], b"", b"\x80\x04pickle", b"\xff" * 2000):
        weights.write_bytes(damaged)
        expect(capsys, ["generate", str(tmp_path)], "model.safetensors", "damaged")
    weights.write_bytes(whole)
    save_config(Config(model=dataclasses.replace(cfg, dim=64)), tmp_path / "config.yaml")
    expect(capsys, ["generate", str(tmp_path)], "does not fit config.yaml", "(77, 32)" if cfg.vocab_size == 77 else "")
    weights.unlink()
    expect(capsys, ["generate", str(tmp_path)], "model.safetensors is missing")


def test_bad_prompts_are_named(tmp_path, capsys, data):
    save(tmp_path, MoETransformer(dataclasses.replace(MODEL, vocab_size=data.tokenizer.vocab_size)), data.tokenizer)
    expect(capsys, ["generate", str(tmp_path), "--prompt", ""], "prompt is empty")
    expect(capsys, ["generate", str(tmp_path), "--prompt", "§"], "'§'")
    save(tmp_path, MoETransformer(MODEL))
    (tmp_path / "tokenizer.json").unlink()
    expect(capsys, ["generate", str(tmp_path), "--prompt", "x"], "tokenizer.json")


def test_a_full_disk_leaves_the_old_file(tmp_path, data, monkeypatch):
    model = MoETransformer(dataclasses.replace(MODEL, vocab_size=data.tokenizer.vocab_size))
    save(tmp_path, model, data.tokenizer)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(state, path):
        open(path, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minimoe.checkpoint.save_file", full)
    with pytest.raises(OSError):
        save(tmp_path, model, data.tokenizer)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_config_round_trip(tmp_path):
    config = Config(model=MODEL, train=TRAIN, data=DataConfig(mixture=("worlds", "pydocs")))
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    with pytest.raises(ConfigError, match="twice"):
        DataConfig(mixture=("worlds", "worlds"))


def test_every_option_has_a_help_text_and_a_flag(capsys):
    import ast
    import inspect

    from minimoe import config, model_config

    documented = set()
    for cls in ast.parse(inspect.getsource(config) + inspect.getsource(model_config)).body:
        if isinstance(cls, ast.ClassDef):
            for field, text in zip(cls.body, cls.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    documented.add(field.target.id)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    names = [f.name for section in (ModelConfig, TrainConfig, DataConfig, minimoe.config.GenerateConfig)
             for f in dataclasses.fields(section)]
    assert len(names) == len(set(names))            # unique over all sections, so that flags are flat
    for name in names:
        assert name in documented and "--" + name.replace("_", "-") in shown, name
