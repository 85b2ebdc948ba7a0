"""Stages: handed over, finished ones left alone, interrupted ones resumed exactly; and `train --init`."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from minimoe import stages as room
from minimoe.checkpoint import checkpoints, load
from minimoe.cli import main
from minimoe.config import Config, ModelConfig, TrainConfig, load_config, to_dict
from minimoe.settings import ConfigError
from minimoe.stages import finished, load_stages, run_stages
from minimoe.start import start_from, train_from_config
from minimoe.trainer import Trainer

ROOT = Path(__file__).parents[1]
SIZES = {"dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "n_experts": 4, "top_k": 2, "expert_hidden": 16, "dropout": 0.1}
TRAIN = {"steps": 3, "batch_size": 2, "warmup": 1, "device": "cpu", "dtype": "float32", "eval_every": 0, "log_every": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("texts")
    (home / "text.txt").write_text("\n\n".join(f"{i} and {i} is {2 * i}, says the text." for i in range(60)), encoding="utf-8")
    rows = [[{"role": "user", "content": f"{i} and {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}] for i in range(30)]
    (home / "chats.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in rows), encoding="utf-8")
    return {"text": str(home / "text.txt"), "chats": str(home / "chats.jsonl")}


def sections(files: dict[str, str]) -> dict:
    text = {"mixture": files["text"], "tokenizer": "bytes"}
    return {"model": SIZES, "base": {"train": dict(TRAIN), "data": text}, "mid": {"train": dict(TRAIN, lr=5e-4), "data": dict(text)},
            "sft": {"train": dict(TRAIN, steps=5), "data": {"mixture": files["chats"], "supervised": True}}}


@pytest.fixture
def write(files, tmp_path):
    def write(*changes: str) -> str:
        path = tmp_path / "stages.yaml"
        path.write_text(yaml.safe_dump(sections(files)), encoding="utf-8")
        return load_stages(path, changes)
    return write


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """All three stages, run once."""
    home = tmp_path_factory.mktemp("whole")
    (home / "stages.yaml").write_text(yaml.safe_dump(sections(files)), encoding="utf-8")
    run_stages(load_stages(home / "stages.yaml"), home / "runs", progress=False)
    return home / "runs"


def weights(folder: Path, name: str = "model.safetensors") -> bytes:
    return (folder / name).read_bytes()


def test_each_stage_starts_from_the_one_before(whole, files):
    assert [p.name for p in sorted(whole.iterdir())] == ["base", "mid", "sft", "stages.json"]
    assert all(finished(whole / name) for name in room.ORDER)
    assert len({(whole / name / "tokenizer.json").read_bytes() for name in room.ORDER}) == 1
    assert len({weights(whole / name) for name in room.ORDER}) == 3
    config = load_config(whole / "mid" / "config.yaml")
    assert config.train.init == str(whole / "base")
    alone = train_from_config(config, None, progress=False)             # the same from the base's folder by hand
    kept = load(whole / "mid", step=3).model.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in alone.model.state_dict().items())
    scratch = train_from_config(replace(config, train=replace(config.train, init=None)), None, progress=False)
    assert not torch.equal(scratch.model.state_dict()["embedding.weight"], kept["embedding.weight"])
    assert load_config(whole / "sft" / "config.yaml").data.supervised and "val_ce" in (whole / "sft" / "metrics.jsonl").read_text(
        encoding="utf-8")


def test_finished_stages_are_not_run_again(whole, write, monkeypatch):
    monkeypatch.setattr(room, "train_from_config", lambda *args, **options: pytest.fail("ran again"))
    said, before = [], {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    done = run_stages(write(), whole, progress=False, say=said.append)
    assert [p.name for p in done] == ["base", "mid", "sft"] and [line.split(",")[0] for line in said] == [
        "base: finished before", "mid: finished before", "sft: finished before"]
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("stage, step", [("base", 2), ("mid", 1), ("sft", 4)])
def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(stage, step, whole, write, tmp_path, monkeypatch):
    log = Trainer._log

    def press(self, row):
        log(self, row)
        if self.out.name == stage and self.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    out, said = tmp_path / "runs", []
    with monkeypatch.context() as m:
        m.setattr(Trainer, "_log", press)
        done = run_stages(write(), out, progress=False, say=said.append)
    assert [p.name for p in done] == list(room.ORDER[:room.ORDER.index(stage)])
    assert said[-1] == f"{stage} was interrupted; the same command goes on from there"
    assert int(checkpoints(out / stage)[-1].name) == step and not finished(out / stage)
    run_stages(write(), out, progress=False)
    for name in room.ORDER:
        assert weights(out / name) == weights(whole / name)
        last = f"checkpoints/{5 if name == 'sft' else 3:08d}/state/optimizer.safetensors"
        assert weights(out / name, last) == weights(whole / name, last)


def test_other_settings_or_other_weights_are_refused(whole, write, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(whole, out)
    with pytest.raises(ConfigError, match=r"^mid was made with other settings: lr was 0.0005, is 0.1; put it back, remove .*mid to run"):
        run_stages(write("mid.train.lr=0.1"), out, progress=False)
    with pytest.raises(ConfigError, match="^base was made with other settings: top_k was 2, is 1"):
        run_stages(write("model.top_k=1"), out, progress=False)
    shutil.rmtree(out / "base")
    with pytest.raises(ConfigError, match="^mid started from other weights than .*base holds now: put it back, remove"):
        run_stages(write("base.train.seed=1"), out, progress=False)
    shutil.rmtree(out / "mid")
    (out / "mid").mkdir()
    (out / "mid" / "config.yaml").write_text("model: {}", encoding="utf-8")
    (out / "stages.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="base exists already, and no stage made it: name another --out"):
        run_stages(write("base.train.seed=1"), out, progress=False)


def test_stages_that_are_off(whole, write, tmp_path):
    """Of a stage that is off nothing is made; the next one starts from the last that is on, or from its init."""
    run_stages(write("mid.enabled=false"), tmp_path / "two", progress=False)
    assert not (tmp_path / "two" / "mid").exists()
    assert load_config(tmp_path / "two" / "sft" / "config.yaml").train.init == str(tmp_path / "two" / "base")
    run_stages(write("base.enabled=false", "mid.enabled=false", f"sft.train.init={whole / 'mid'}"), tmp_path / "one", progress=False)
    assert weights(tmp_path / "one" / "sft") == weights(whole / "sft")
    run_stages(write("sft.train.init=base"), tmp_path / "from base", progress=False)
    assert weights(tmp_path / "from base" / "sft") == weights(tmp_path / "two" / "sft")
    with pytest.raises(ConfigError, match="stages.yaml: mid: the stages before it are not enabled, so it needs init"):
        write("base.enabled=false")
    with pytest.raises(ConfigError, match="no stage is enabled"):
        write(*(f"{name}.enabled=false" for name in room.ORDER))
    with pytest.raises(ConfigError, match="mid: init=sft is no earlier stage"):
        write("mid.train.init=sft")
    with pytest.raises(ConfigError, match="sft: init=base, and .*base is not there; enable that stage"):
        run_stages(write("base.enabled=false", "mid.enabled=false", "sft.train.init=base"), tmp_path / "none", progress=False)


@pytest.mark.parametrize("change, error", [
    ("mid.train.lr=-1", r"stages.yaml, section 'mid', section 'train': lr=-1"),
    ("sft.data.mixtur=worlds", r"section 'sft', section 'data': unknown key 'mixtur'; did you mean 'mixture'"),
    ("sft.enabled=perhaps", r"section 'sft': enabled='perhaps': must be true or false"),
    ("base.train.warmpu=3", r"section 'base', section 'train': unknown key 'warmpu'; did you mean 'warmup'"),
    ("base.steps=3", r"section 'base': unknown key 'steps'"),
    ("nonsense", r"--set nonsense: write it as sft.train.steps=100")])
def test_errors_name_stage_and_key(change, error, write):
    with pytest.raises(ConfigError, match=error):
        write(change)


def test_methods_of_a_stage(write, tmp_path):
    run_stages(write("mid.train.method=lora", "mid.train.lora_rank=4"), tmp_path, progress=False)
    base, mid, sft = (load(tmp_path / name).model.state_dict() for name in room.ORDER)
    changed = {k for k in base if not torch.equal(base[k], mid[k])}
    assert changed == {f"blocks.0.attention.{x}.weight" for x in "qkvo"} and set(sft) == set(base)


def test_the_command(files, tmp_path, capsys):
    path, out = tmp_path / "mine.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(sections(files)), encoding="utf-8")
    command = ["stages", "--config", str(path), "--out", str(out), "--set", "mid.enabled=false", "base.train.steps=2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"base: {out / 'base'}, full" in shown and f"sft: {out / 'sft'}, from {out / 'base'}, full" in shown
    assert f"saved {out / 'base'}, {out / 'sft'}\nnext: minimoe chat {out / 'sft'}" in shown
    assert main(command) == 0 and "sft: finished before" in capsys.readouterr().out
    assert main([*command, "sft.train.lr=1.0"]) == 2 and "sft was made with other settings: lr was" in capsys.readouterr().err
    assert main(["stages", "--config", str(tmp_path / "none.yaml")]) == 2 and "no such config file" in capsys.readouterr().err


# --- train --init ---
def test_init_takes_weights_and_tokenizer(whole, files, tmp_path, capsys):
    """Without a config the sizes are those of that run; with no step that moves, its weights come out again."""
    out = tmp_path / "run"
    command = ["train", "--init", str(whole / "base"), "--mixture", files["text"], "--steps", "1", "--lr", "1e-30", "--weight-decay", "0",
               "--batch-size", "2", "--dtype", "float32", "--out", str(out)]
    assert main(command) == 0 and f"starts from {whole / 'base'}" in capsys.readouterr().out
    assert (out / "tokenizer.json").read_bytes() == (whole / "base" / "tokenizer.json").read_bytes()
    ours, theirs = (load(folder).model.state_dict() for folder in (out, whole / "base"))
    assert all(torch.allclose(ours[k], v) for k, v in theirs.items())
    state = json.loads((checkpoints(out)[0] / "state" / "progress.json").read_text(encoding="utf-8"))
    assert state["step"] == 1               # a fresh optimizer, and steps counted from the start


def test_what_init_refuses(whole, tmp_path, capsys):
    config = Config(model=ModelConfig(**SIZES), train=TrainConfig(**TRAIN))
    with pytest.raises(ConfigError, match=rf"init: {whole}/bas is no run folder; there are {whole}/base, {whole}/mid, {whole}/sft, .*shipped"):
        start_from(str(whole / "bas"), config)
    with pytest.raises(ConfigError, match="the model of .* is another one: dim is 16 there, 32 here; expert_hidden is 16 there, 8 here"):
        start_from(str(whole / "base"), replace(config, model=replace(config.model, dim=32, expert_hidden=8)))
    run, filled = start_from(str(whole / "base"), replace(config, model=replace(config.model, dropout=0.5, aux_coef=0.1)))
    assert filled.model.vocab_size == run.config.model.vocab_size and filled.model.dropout == 0.5
    with pytest.raises(ConfigError, match="vocab_size is 260 there, 300 here"):
        start_from(str(whole / "base"), replace(config, model=replace(config.model, vocab_size=300)))
    assert main(["train", "--init", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 2
    assert "is no run folder; there are" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_config_that_ships():
    config = load_stages(ROOT / "configs" / "stages.yaml")
    assert all(getattr(config, name).enabled for name in room.ORDER) and config.sft.data.supervised
    text = {s.corpus for stage in (config.base, config.mid) for s in stage.data.mixture}
    assert not text & {"docstrings", "worlds"}      # what is asked about later has not been read as questions, or as sums
    assert "minimoe stages" in (ROOT / "configs" / "stages.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert to_dict(config)["model"]["dim"] == 192


def test_training_on_conversations_from_the_command_line(whole, files, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--init", str(whole / "mid"), "--mixture", files["chats"], "--supervised", "True", "--steps", "2", "--batch-size",
                 "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    learned, measured = map(int, re.search(r"(\d+) to learn and (\d+) to measure, a row of 24 tokens each", shown).groups())
    assert learned + measured == 30 and measured and "held-out chats: " in shown
    assert f"next: minimoe chat {out}" in shown


def test_the_benchmark_runs(tmp_path):
    """From one end to the other with a tiny model; what was recorded stays as it is."""
    out, kept = tmp_path / "stages.json", ROOT / "benchmarks" / "results" / "stages.json"
    before = kept.read_bytes() if kept.exists() else None
    command = [sys.executable, str(ROOT / "benchmarks" / "stages.py"), "--quick", "--only", "stages", "lora", "--dir", str(tmp_path / "runs"),
               "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=500, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert set(parts["stages"]["runs"]) == set(room.ORDER) and set(parts["lora"]["runs"]) == {"lora"}
    for run in (*parts["stages"]["runs"].values(), *parts["lora"]["runs"].values()):
        assert list(run) == ["recall", "trained wording", "second turn", "never seen", "sums"]
        assert all(x["n"] == len(x["outcomes"]) == 4 and x["interval"][0] <= x["share"] <= x["interval"][1] for x in run.values())
    assert (kept.read_bytes() if kept.exists() else None) == before and "of_full" in done.stdout
