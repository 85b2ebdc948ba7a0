"""What a run says about itself: length, train.log, TensorBoard, Weights & Biases, the plot, evaluation as a callback."""
import dataclasses
import glob
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from minimoe import track
from minimoe.checkpoint import checkpoints, load
from minimoe.cli import main
from minimoe.config import DataConfig, TrainConfig, load_config
from minimoe.data.loader import load_data
from minimoe.plot import ticks
from minimoe.settings import ConfigError
from tests.test_resume import MODEL, TRAIN, rows, trainer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data():
    whole = load_data(DataConfig(mixture="worlds", tokenizer="characters"))
    short = tuple(dataclasses.replace(c, held_out=(min(c.held_out, key=lambda d: len(d.text)),)) for c in whole.corpora)
    return dataclasses.replace(whole, corpora=short)


def changed(**values):
    return dataclasses.replace(TRAIN, **values)


# --- length -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given, steps, eval_every", [
    ({}, 500, 100), ({"steps": 7}, 7, 100), ({"tokens": 1001}, 26, 100), ({"epochs": 2}, 50, 100),
    ({"epochs": 0.1, "eval_every": "epoch"}, 3, 25), ({"epochs": 2, "accumulate": 4}, 13, 100)])
def test_length_becomes_steps(given, steps, eval_every):
    cfg = TrainConfig(batch_size=4, **given).resolved(epoch=1000, seq_len=10)
    assert (cfg.steps, cfg.eval_every, cfg.epochs, cfg.tokens) == (steps, eval_every, None, None)


@pytest.mark.parametrize("given", [{"steps": 7, "epochs": 2}, {"epochs": 1, "tokens": 9}, {"steps": None}, {"epochs": 0},
                                   {"tokens": 0}, {"epochs": -1.0}, {"eval_every": "epochs"}, {"batch_size": "max"}])
def test_a_length_that_cannot_be_is_refused(given):
    with pytest.raises(ConfigError, match=list(given)[-1]):
        TrainConfig(**given)


def test_an_epoch_reads_every_pair_once(tmp_path):
    torch.manual_seed(0)
    inputs = torch.arange(10)[:, None].expand(10, 8).contiguous()
    seen = []
    pairs = [(row, row) for row in inputs]

    class Watched(list):
        def __getitem__(self, i):
            seen.append(i)
            return pairs[i]

    from minimoe.model import MoETransformer
    from minimoe.trainer import Trainer

    train = TrainConfig(epochs=2, batch_size=5, seq_len=8, device="cpu", dtype="float32", eval_every="epoch", log_every=3)
    t = Trainer(MoETransformer(MODEL), train, Watched(pairs), out=tmp_path, progress=False,
                evaluate_with=lambda run, step: {"at": step})
    t.fit()
    assert sorted(seen) == sorted([*range(10)] * 2) and [r.get("eval") for r in t.rows] == [{"at": 2}, None, {"at": 4}]
    assert t.rows[-1]["lr"] == pytest.approx(train.lr * 4 / 50)        # still in warm-up: the schedule counts steps
    saved = load_config(tmp_path / "config.yaml").train
    assert (saved.epochs, saved.steps, saved.eval_every) == (2, None, "epoch")      # what was asked for
    assert "length 4 steps of 40 tokens: 2.00 epochs" in (tmp_path / "train.log").read_text(encoding="utf-8")


@pytest.fixture
def common(tmp_path):
    """A command that trains a tiny model on a tiny text, so that held-out text takes no time either."""
    text = "\n\n".join(f"{i} plus {i + 1} is {2 * i + 1}, said the fox to the hen on day {i}." for i in range(60))
    (tmp_path / "small.txt").write_text(text, encoding="utf-8")
    return ["train", "--mixture", str(tmp_path / "small.txt"), "--tokenizer", "bytes", "--dim", "16", "--n-layers", "1",
            "--n-heads", "2", "--expert-hidden", "16", "--max-seq-len", "32", "--n-experts", "4", "--dtype", "float32"]


def test_a_length_given_as_a_flag_replaces_the_one_of_the_file(common, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("train: {steps: 9, batch_size: 2, log_every: 2}", encoding="utf-8")
    out = tmp_path / "run"
    argv = [*common, "--config", str(tmp_path / "c.yaml"), "--out", str(out)]
    assert main([*argv, "--tokens", "250", "--plot"]) == 0
    shown = capsys.readouterr().out
    assert "length 4 steps of 64 tokens" in shown and "256 tokens in" in shown and f"drawn in {out / 'plot.svg'}" in shown
    assert [r["step"] for r in rows(out)] == [2, 4] and (out / "plot.svg").read_text(encoding="utf-8").startswith("<svg")
    with pytest.raises(SystemExit):
        main([*argv, "--tokens", "250", "--epochs", "1"])
    assert "epochs=1.0, tokens=250: give the length once" in capsys.readouterr().err


# --- train.log --------------------------------------------------------------------------------------------------------
def test_train_log_holds_rows_alerts_and_the_traceback_of_a_crash(data, tmp_path):
    standard = lambda: (logging.getLogger("minimoe").handlers[:], logging.getLogger("minimoe").level, logging.root.handlers[:],
                        [name for name in logging.Logger.manager.loggerDict if name.startswith("minimoe")])
    before = standard()

    def crash(t, row):
        if t.step == 4:
            raise KeyError("somebody's callback")

    model = dataclasses.replace(MODEL, balance="none", top_k=1)         # renormalized: no gradient, so there are alerts
    t = trainer(data, tmp_path, model, on_step=crash)
    with pytest.raises(KeyError) as caught:
        t.fit()
    assert caught.value.__notes__ == [f"the traceback stands in {tmp_path / 'train.log'}"]
    text = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert "INFO    step 2: loss" in text and "WARNING step 2: MoE layer 0: the router gets no gradient" in text
    assert "Traceback" in text and "somebody's callback" in text and "held-out" in text
    assert standard() == before and not t.track.log.handlers
    trainer(data, tmp_path, model, changed(log_level="error")).fit()
    assert not (tmp_path / "train.log").exists()                        # begun anew, and nothing to say


def test_a_second_run_in_the_process_writes_to_its_own_log(data, tmp_path):
    inner = lambda t, row: trainer(data, tmp_path / "b").fit(stop_after=1) if t.step == 2 else None
    trainer(data, tmp_path / "a", on_step=inner).fit()
    a, b = ((tmp_path / name / "train.log").read_text(encoding="utf-8") for name in "ab")
    assert a.count("ended after step 7 of 7") == 1 and "ended after step 1 " not in a
    assert b.count("ended after step 1 of 7") == 1 and "step 7" not in b


def test_train_log_is_rotated_by_size(tmp_path):
    tracker = track.Tracker(tmp_path, dataclasses.replace(load("shipped").config, train=TRAIN))
    with tracker:
        for _ in range(25):
            tracker.log.info("x" * 100_000)
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(sizes) == {"train.log", "train.log.1", "train.log.2"} and max(sizes.values()) <= 1_000_000


def test_the_terminal_shows_one_line_of_a_crash(common, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*common, "--lr", "1e30", "--steps", "60", "--warmup", "0", "--out", str(out)]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if "minimoe:" in line or "Traceback" in line]
    assert len(err) == 1 and "gradient is not finite" in err[0] and err[0].endswith(f"stands in {out / 'train.log'}")
    assert "Traceback" in (out / "train.log").read_text(encoding="utf-8")


def test_color_on_a_terminal_only_and_not_with_no_color(monkeypatch):
    class Terminal:
        isatty = staticmethod(lambda: True)

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert track.colored("x", "red", Terminal()) == "\033[31mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert track.colored("x", "red", Terminal()) == "x"


# --- TensorBoard and W&B ----------------------------------------------------------------------------------------------
def scalars(folder):
    """{tag: [(step, value)]} and the texts, as TensorBoard itself reads them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    return ({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]},
            {tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] for tag in tags["tensors"]})


def cut_and_resume(data, out, model=MODEL, **settings):
    """Rows 2, 3, 4 and 6 are written, then the run goes on from the checkpoint of step 3."""
    train = changed(save_every=3, keep=9, **settings)
    trainer(data, out, model, train).fit(stop_after=6)
    t = trainer(data, out, model, train)
    t.fit(resume=True, from_step=3)
    assert [r["step"] for r in rows(out)] == [2, 3, 4, 6, 7] and [int(p.name) for p in checkpoints(out)] == [3, 6, 7]
    return t


def test_tensorboard_gets_every_row_once(data, tmp_path):
    pytest.importorskip("tensorboard", reason="extra track")
    model = dataclasses.replace(MODEL, router="sigmoid", balance="bias", bias_speed=0.1)
    t = cut_and_resume(data, tmp_path, model, tensorboard=True)
    numbers, _ = scalars(tmp_path / "tensorboard")
    assert len(glob.glob(str(tmp_path / "tensorboard" / "events*"))) == 2
    for name, wanted in {f"routing/{layer}/{key}": layer for layer in (0, 1) for key in (
            "load/3", "max_vio", "entropy", "dropped", "bias/0", "router_grad")}.items():
        assert [step for step, _ in numbers[name]] == [2, 3, 4, 6, 7], (name, wanted)
    assert {k: v[-1][1] for k, v in numbers.items() if k in ("ce", "val_bpb", "lr", "routing/1/load/2", "val/worlds")} == {
        "ce": pytest.approx(t.rows[-1]["ce"]), "val_bpb": pytest.approx(t.rows[-1]["val_bpb"]), "lr": pytest.approx(t.rows[-1]["lr"]),
        "routing/1/load/2": pytest.approx(t.rows[-1]["routing"][1]["load"][2]),
        "val/worlds": pytest.approx(t.rows[-1]["val"]["worlds"])}


def test_alerts_go_to_tensorboard(data, tmp_path):
    pytest.importorskip("tensorboard", reason="extra track")
    t = trainer(data, tmp_path, dataclasses.replace(MODEL, balance="none", top_k=1), changed(tensorboard=True))
    t.fit()
    numbers, texts = scalars(tmp_path / "tensorboard")
    assert "the router gets no gradient" in texts["alerts/text_summary"][0]
    assert [n for _, n in numbers["alerts"]] == [len(r.get("alerts", ())) for r in t.rows]


def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, type) after 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, whole = Path(file).read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", raw[at:at + 7])
        whole, at = whole + raw[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4):                      # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_gets_every_row_and_a_resumed_run_is_whole(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="extra track")
    import json

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    t = cut_and_resume(data, tmp_path, dataclasses.replace(MODEL, balance="none", top_k=1), wandb=True, wandb_project="moe",
                       wandb_name="first")
    files = sorted(glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "*.wandb")), key=os.path.getmtime)
    assert len(files) == 2
    found = []
    for file in files:
        until = time.monotonic() + 60           # its process may still be writing when finish() has returned
        while not (records := list(wandb_records(file))) or not records[-1].HasField("exit"):
            assert time.monotonic() < until, "no end of the W&B run on disk"
            time.sleep(0.1)
        run = next(r.run for r in records if r.HasField("run"))
        assert (run.project, run.display_name) == ("moe", "first")
        steps = [({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item})
                 for r in records if r.HasField("history")]
        found.append((run.run_id, steps, [r.alert.text for r in records if r.HasField("alert")]))
    (first, before, alerts), (second, after, _) = found
    assert first == second
    assert [row["_step"] for row in before] == [2, 3, 4, 6] and [row["_step"] for row in after] == [2, 3, 4, 6, 7]
    for row, want in zip(after, t.rows):
        assert row["ce"] == want["ce"] and row["routing/1/load/2"] == want["routing"][1]["load"][2]
        assert row["alerts"] == len(want.get("alerts", ()))
    assert "the router gets no gradient" in alerts[0]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_named_before_the_first_step(name, data, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="run folder"):
        trainer(data, None, train=changed(**{name: True}))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install minimoe\[track\]"):
        trainer(data, tmp_path / "run", train=changed(**{name: True}))
    assert not (tmp_path / "run").exists()


# --- plot -------------------------------------------------------------------------------------------------------------
def test_plot_shows_loss_rate_and_the_load_of_every_expert(data, tmp_path):
    run = trainer(data, None).fit()             # without a folder, too
    figure = run.plot()
    root = ET.fromstring(figure._repr_html_())
    assert root.get("role") == "img" and root.get("aria-label") == figure.alt and "loss from" in figure.alt
    tag = "{http://www.w3.org/2000/svg}"
    bands, lines = root.findall(f"{tag}polygon"), root.findall(f"{tag}polyline")
    assert len(bands) == 2 * MODEL.n_experts and len(lines) == 3
    assert [len(line.get("points").split()) for line in lines] == [len(run.rows), sum("val_ce" in r for r in run.rows), len(run.rows)]
    last = run.rows[-1]["routing"][1]["load"]           # the last band of layer 1: its height at the right is its share of 110
    edge = [tuple(map(float, p.split(","))) for p in bands[-1].get("points").split()]
    right = [y for x, y in edge if x == max(x for x, _ in edge)]
    assert max(right) - min(right) == pytest.approx(110 * last[-1], abs=0.2)
    assert figure.save(tmp_path / "new" / "x.svg").read_text(encoding="utf-8") == figure.svg()
    texts = [t.text for t in root.iter(f"{tag}text")]
    assert {"Loss, nats per token", "Learning rate", "MoE layer 0: load of each expert; even is 25.0%"} <= set(texts)


@pytest.mark.parametrize("low, high", [(0, 1), (2.41, 6.93), (1e-9, 3e-4), (0, 1400), (-3, 12345678), (5, 5)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 6 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert high == low or len(found) >= 2


# --- Ctrl-C, checkpoints, evaluation ----------------------------------------------------------------------------------
def test_ctrl_c_on_the_command_line_saves_and_says_how_to_go_on(common, tmp_path):
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "minimoe", *common, "--steps", "100000", "--log-every", "1", "--out", str(out)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=ROOT)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text(encoding="utf-8"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err
    (kept,) = checkpoints(out)
    assert f"stopped at step {int(kept.name)} of 100000; the same command with --resume goes on" in shown
    assert load(out, step=int(kept.name)).config.train.steps == 100000


def test_generate_export_and_train_take_the_step_of_a_kept_checkpoint(common, tmp_path, capsys):
    out = str(tmp_path / "run")
    train = [*common, "--batch-size", "2", "--steps", "6", "--save-every", "2", "--keep", "5", "--log-every", "1"]
    assert main([*train, "--out", out]) == 0
    weights = (tmp_path / "run" / "checkpoints" / "00000006" / "model.safetensors").read_bytes()
    want = rows(tmp_path / "run")
    assert main(["generate", out, "--step", "2", "--prompt", "1", "--max-new-tokens", "3"]) == 0
    assert main(["export", out, "--step", "2", "--out", str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert main(["generate", out, "--step", "3"]) == 2 and "kept are 2, 4, 6" in capsys.readouterr().err
    assert main([*train, "--out", out, "--step", "2"]) == 2 and "give --resume too" in capsys.readouterr().err
    assert main([*train, "--out", out, "--resume", "--step", "5"]) == 2 and "kept are 2, 4, 6" in capsys.readouterr().err
    assert main([*train, "--out", out, "--resume", "--step", "2", "--stop-after", "3"]) == 0
    assert "goes on from step 2; the newer checkpoints (4, 6) and the rows after it go" in capsys.readouterr().out
    assert [int(p.name) for p in checkpoints(tmp_path / "run")] == [2, 3] and [r["step"] for r in rows(tmp_path / "run")] == [1, 2, 3]
    assert main([*train, "--out", out, "--resume"]) == 0
    assert rows(tmp_path / "run") == want
    assert (tmp_path / "run" / "checkpoints" / "00000006" / "model.safetensors").read_bytes() == weights


def test_evaluation_from_outside_joins_the_row_and_changes_nothing(data, tmp_path):
    def score(run, step):
        assert run.tokenizer is data.tokenizer and not run.model.training
        return {"letters": torch.rand(()).item(), "step": step, "text": len(run.generate("1", 2, temperature=0.0))}

    plain, t = trainer(data, tmp_path / "plain"), trainer(data, tmp_path / "scored", evaluate_with=score)
    plain.fit(), t.fit()
    assert [(r["step"], r["eval"]["step"]) for r in t.rows if "eval" in r] == [(3, 3), (6, 6), (7, 7)]
    assert [{k: v for k, v in r.items() if k not in ("eval", "seconds")} for r in t.rows] == rows(tmp_path / "plain")
    assert all(0 <= r["eval"]["letters"] < 1 for r in t.rows if "eval" in r) and math.isfinite(track.flat(t.rows[-1])["eval/letters"])
