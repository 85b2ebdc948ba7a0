"""A run that was stopped, interrupted or killed goes on as if nothing had happened: the same losses, the same weights, bit for bit."""
import dataclasses
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

from minimoe import checkpoint
from minimoe.checkpoint import checkpoints, load
from minimoe.cli import main
from minimoe.config import DataConfig, ModelConfig, Source, TrainConfig
from minimoe.data.loader import load_data
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError
from minimoe.trainer import Trainer
from tests.kills import kill_after

STEPS = 7
MODEL = ModelConfig(vocab_size=300, dim=16, n_layers=2, n_heads=2, max_seq_len=16, n_experts=4, top_k=2, expert_hidden=16,
                    dropout=0.1, router_noise=0.3)
TRAIN = TrainConfig(steps=STEPS, batch_size=2, accumulate=2, warmup=2, lr=3e-3, device="cpu", dtype="float32", eval_every=3,
                    log_every=2, save_every=0)
MODELS = {
    "auxiliary loss": MODEL,
    "selection bias": dataclasses.replace(MODEL, router="sigmoid", balance="bias", bias_speed=0.1),
    "SimBal, one learned-noise router": dataclasses.replace(MODEL, balance="simbal", share_router=True, router_noise="learned"),
    "expert choice, two tokens ahead": dataclasses.replace(MODEL, router="expert_choice", balance="none", router_noise=0.0, n_predict=2),
    "capacity, recomputed": dataclasses.replace(MODEL, capacity_factor=1.0, z_coef=0.01),
}


def small_data():
    """Two sources, and of each the shortest held-out document only, so that evaluation takes no time."""
    mixture = (Source(corpus="worlds", ratio=2.0), Source(corpus="pydocs", ratio=1.0))
    data = load_data(DataConfig(mixture=mixture, tokenizer="characters"))
    shortest = [dataclasses.replace(c, held_out=(min(c.held_out, key=lambda d: len(d.text)),)) for c in data.corpora]
    return dataclasses.replace(data, corpora=tuple(shortest))


@pytest.fixture(scope="module")
def data():
    return small_data()


def trainer(data, out, model=MODEL, train=TRAIN, **options):
    torch.manual_seed(train.seed)
    return Trainer(MoETransformer(dataclasses.replace(model, vocab_size=data.tokenizer.vocab_size)), train, data, out=out,
                   progress=False, **options)


def rows(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_run(got: Trainer, want: Trainer):
    assert rows(got.out) == rows(want.out) and len(rows(want.out)) > 3
    a, b = got.model.state_dict(), want.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)
    for folder in ("", f"checkpoints/{got.cfg.steps:08d}/", f"checkpoints/{got.cfg.steps:08d}/state/"):
        file = folder + ("optimizer.safetensors" if "state" in folder else "model.safetensors")
        assert (got.out / file).read_bytes() == (want.out / file).read_bytes(), file


@pytest.mark.parametrize("name", MODELS)
def test_stopped_at_any_step_it_goes_on_bit_for_bit(name, data, tmp_path):
    train = dataclasses.replace(TRAIN, recompute="blocks" if "recomputed" in name else "none")
    whole = trainer(data, tmp_path / "whole", MODELS[name], train)
    whole.fit()
    for stop in range(1, STEPS):
        out = tmp_path / str(stop)
        first = trainer(data, out, MODELS[name], train)
        first.fit(stop_after=stop)
        assert first.step == stop and [p.name for p in checkpoints(out)] == [f"{stop:08d}"]
        again = trainer(data, out, MODELS[name], train)
        again.fit(resume=True)
        assert_same_run(again, whole)


def test_ctrl_c_ends_with_the_step_and_saves(data, tmp_path):
    whole = trainer(data, tmp_path / "whole")
    whole.fit()
    press = lambda t, row: os.kill(os.getpid(), signal.SIGINT) if t.step == 4 else None
    first = trainer(data, tmp_path / "run", on_step=press)
    first.fit()
    assert first.step == 4 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = trainer(data, tmp_path / "run")
    again.fit(resume=True)
    assert_same_run(again, whole)


KILLED = """
import sys, time
from pathlib import Path
from minimoe import checkpoint
from tests.test_resume import TRAIN, dataclasses, small_data, trainer

write = checkpoint.write_safely
def slowly(path, *args):                # long enough to be killed in the middle
    time.sleep(0.04)
    write(path, *args)
    time.sleep(0.04)
checkpoint.write_safely = slowly
trainer(small_data(), Path(sys.argv[1]), train=dataclasses.replace(TRAIN, save_every=1, steps=30)).fit()
"""


def test_kill_at_any_moment_loses_nothing_older(data, tmp_path):
    """SIGKILL three times, in the middle of writing; each time the newest complete checkpoint loads, and the run that goes
    on ends as the unbroken one."""
    train = dataclasses.replace(TRAIN, save_every=1, steps=30)
    whole = trainer(data, tmp_path / "whole", train=train)
    whole.fit()
    draw = random.Random(0)
    for kill in range(3):
        out = tmp_path / str(kill)
        newest, _ = kill_after([sys.executable, "-c", KILLED, str(out)], out, draw.uniform(0.0, 5.0))
        assert 1 <= newest < 30
        assert load(out, step=newest).model is not None and load(out).model is not None
        again = trainer(data, out, train=train)
        again.fit(resume=True)
        assert_same_run(again, whole)
        assert not list((out / "checkpoints").glob(".*"))       # what was left unfinished is gone


def test_the_newest_are_kept_and_each_can_be_loaded(data, tmp_path):
    train = dataclasses.replace(TRAIN, save_every=2, keep=3)
    t = trainer(data, tmp_path, train=train)
    t.fit()
    assert [int(p.name) for p in checkpoints(tmp_path)] == [4, 6, 7]
    last = load(tmp_path, step=7).model.state_dict()
    assert all(torch.equal(last[k], v) for k, v in t.model.state_dict().items())
    assert not torch.equal(load(tmp_path, step=4).model.embedding.weight, last["embedding.weight"])
    with pytest.raises(ConfigError, match="no checkpoint of step 5; kept are 4, 6, 7"):
        load(tmp_path, step=5)


def test_going_on_with_other_settings_is_refused_with_the_difference(data, tmp_path):
    trainer(data, tmp_path).fit(stop_after=2)
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(ConfigError, match=r"lr was 0.003, is 0.1"):
        trainer(data, tmp_path, train=dataclasses.replace(TRAIN, lr=0.1)).fit(resume=True)
    with pytest.raises(ConfigError, match=r"top_k was 2, is 1"):
        trainer(data, tmp_path, dataclasses.replace(MODEL, top_k=1)).fit(resume=True)
    assert sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    trainer(data, tmp_path).fit(stop_after=2)
    state = tmp_path / "checkpoints" / "00000002" / "state"
    (state / "optimizer.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match="state: damaged"):
        trainer(data, tmp_path).fit(resume=True)


def test_a_failed_save_leaves_the_older_one(data, tmp_path, monkeypatch):
    train = dataclasses.replace(TRAIN, save_every=1)
    trainer(data, tmp_path, train=train).fit(stop_after=2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_weights", full)
    with pytest.raises(ConfigError, match="No space left on device.*go on with --resume from step 2"):
        trainer(data, tmp_path, train=train).fit(resume=True)
    assert [int(p.name) for p in checkpoints(tmp_path)] == [1, 2]


def test_stop_and_resume_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    common = ["train", "--mixture", "worlds", "--tokenizer", "characters", "--dim", "16", "--n-layers", "1", "--n-heads", "2",
              "--expert-hidden", "16", "--max-seq-len", "128", "--steps", "4", "--eval-every", "2", "--out", str(out)]
    assert main([*common, "--resume", "--stop-after", "2"]) == 0
    shown = capsys.readouterr().out
    assert "no complete checkpoint to go on from, so this run starts at step 0" in shown
    assert "stopped at step 2 of 4; the same command with --resume goes on" in shown
    assert main(common) == 2 and "--resume" in capsys.readouterr().err
    assert main([*common, "--resume", "--lr", "0.5"]) == 2 and "lr was 0.001, is 0.5" in capsys.readouterr().err
    assert main([*common, "--resume"]) == 0
    assert "goes on from step 2" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == [2, 4]
    assert main([*common, "--overwrite", "--stop-after", "1"]) == 0
    assert [int(p.name) for p in checkpoints(out)] == [1]


def test_another_text_under_the_same_name_is_noticed(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"{i} and {i} is {2 * i}\n" for i in range(900)), encoding="utf-8")
    cfg = dataclasses.replace(TRAIN, steps=4, save_every=2, eval_every=0)
    start = lambda: trainer(load_data(DataConfig(mixture=str(text), tokenizer="bytes")), train=cfg, out=tmp_path / "run")
    start().fit(stop_after=2)
    text.write_text(text.read_text(encoding="utf-8").replace("12 and 12", "13 and 11"), encoding="utf-8")
    with pytest.raises(ConfigError, match="mine: another text than when this run began"):
        start().fit(resume=True)
    with pytest.raises(ConfigError, match="stop_after=0"):
        start().fit(stop_after=0)
