"""benchmarks/engine.py and training.py: they run from one end to the other, tables are whole, and both sides do the same work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
KEYS = {"what", "against", "unit", "better", "target", "ratio", "low", "high", "met", "fastest", "ours", "theirs", "raw"}


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return pytest.importorskip("engine")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What `--quick` prints and what it writes where `--out` says."""
    pytest.importorskip("transformers", reason="the benchmark compares with transformers; install minimoe[hub]")
    out, kept = tmp_path_factory.mktemp("engine") / "engine.json", FOLDER / "results" / "engine.json"
    before = kept.read_bytes() if kept.exists() else None
    command = [sys.executable, str(FOLDER / "engine.py"), "--quick", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=500)
    assert done.returncode == 0, done.stderr
    assert (kept.read_bytes() if kept.exists() else None) == before, "--quick touched the recorded results"
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_table_is_whole(quick):
    printed, result = quick
    assert {"machine", "versions", "gpu", "parts"} <= set(result)
    assert {"cpu", "cores", "avx512_bf16", "amx"} <= set(result["machine"])
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    assert result["gpu"] == "not run on a GPU"
    assert list(result["parts"]) == ["experts", "train", "generate", "memory"]
    rows = [row for part in result["parts"].values() for row in part["rows"]]
    for row in rows:
        assert KEYS <= set(row)
        assert row["low"] <= row["ratio"] <= row["high"]
        assert len(row["raw"]) >= 2 and all(len(values) == 1 for values in row["raw"].values())
        assert f"| {row['what']} | {row['against']}" in printed
    assert sum(text.startswith("| ") for text in printed.splitlines()) == len(rows) + 1
    targets = {part: sorted({row["target"] for row in content["rows"]} - {None}) for part, content in result["parts"].items()}
    assert targets == {"experts": [1.06, 1.12, 1.36, 1.55], "train": [0.85, 0.95, 1.35, 1.6], "generate": [1.4, 2.2],
                       "memory": [0.8, 1.0]}
    assert all("date" in part and "--quick" in part["command"] for part in result["parts"].values())


@pytest.mark.slow
def test_both_sides_do_the_same_work(quick):
    _, result = quick
    greedy = [row for row in result["parts"]["generate"]["rows"] if "bfloat16" not in row["what"]]
    assert len(greedy) == 4
    for row in greedy:
        assert row["same_tokens"] == 1.0, row["what"]
        assert row["different_tokens"]["ours"] > 1
    for row in result["parts"]["train"]["rows"]:
        if row["against"].startswith("Mixtral") and "ours" in row["loss"]:
            assert len(set(row["params"].values())) == 1, row["what"]
            assert row["loss"]["ours"] == pytest.approx(row["loss"][row["fastest"]], abs=0.5), row["what"]


def test_a_ratio_is_taken_within_rounds_against_the_fastest(engine):
    ours = engine.Work(kind="train", side="ours")
    eager, grouped = (engine.replace(ours, side=way) for way in engine.THEIRS)
    found = {ours: [{"value": v} for v in (30.0, 60.0, 10.0)],      # the machine slows down by six: a ratio does not
             eager: [{"value": v} for v in (20.0, 40.0, 8.0)], grouped: [{"value": v} for v in (10.0, 20.0, 3.0)]}
    line = engine.line(engine.Row("train", "step", "Mixtral", ours, (eager, grouped), 1.5), found, "value")
    assert (line["fastest"], line["ratio"], line["low"], line["high"], line["met"]) == ("eager", 1.5, 1.25, 1.5, True)
    assert line["raw"]["eager"] == [20.0, 40.0, 8.0]


@pytest.mark.parametrize("part, ratio, met", [("experts", 1.1, False), ("experts", 1.0, True), ("memory", 1.0, True),
                                              ("train", 1.1, True), ("generate", 0.9, False)])
def test_less_is_better_for_time_and_memory(engine, part, ratio, met):
    work = engine.Work(kind="train", side="ours")
    assert engine.Row(part, "", "", work, (work,), 1.0).met(ratio) is met
    assert engine.Row(part, "", "", work, (work,)).met(ratio) is None
    assert engine.RESULT.parent.name == "results"


def test_on_a_gpu_the_same_table_in_bfloat16(engine):
    rows = engine.on_gpu(engine.train_rows() + engine.expert_rows())
    works = {w for row in rows for w in (row.ours, *row.rivals)}
    assert {(w.device, w.dtype, w.clock) for w in works} == {("cuda", "bfloat16", "wall")}
    assert not any(word in row.what + row.against for row in rows for word in ("float32", "allocator", "CPU", "thread"))
    assert len({(row.what, row.against) for row in rows}) == len(rows)


def test_parts_of_another_machine_are_not_mixed_in(engine, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="its version is part of the record")
    out = tmp_path / "engine.json"
    engine.store(out, "cpu", "train", {"rows": []})
    engine.store(out, "cpu", "memory", {"rows": []})
    assert list(json.loads(out.read_text(encoding="utf-8"))["parts"]) == ["train", "memory"]
    monkeypatch.setattr(engine, "machine", lambda place: {"cpu": "another"})
    engine.store(out, "cpu", "generate", {"rows": []})
    assert list(json.loads(out.read_text(encoding="utf-8"))["parts"]) == ["generate"]


# --- training.py -----------------------------------------------------------------------------------------------------
@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    pytest.importorskip("transformers", reason="its version is part of the record")
    return pytest.importorskip("training")


@pytest.mark.slow
def test_training_runs_whole(tmp_path):
    """All rows at tiny sizes, on a text that stands in for Shakespeare's."""
    pytest.importorskip("transformers", reason="its version is part of the record")
    text = "".join(f"{i} speaks: what is the {i * i}th word of all these {i % 7} words?\n" for i in range(400))
    (tmp_path / "tinyshakespeare.txt").write_text(text, encoding="utf-8")
    out, kept = tmp_path / "training.json", FOLDER / "results" / "training.json"
    before = kept.read_bytes() if kept.exists() else None
    done = subprocess.run([sys.executable, str(FOLDER / "training.py"), "--quick", "--out", str(out)], capture_output=True,
                          text=True, encoding="utf-8", timeout=500, env=os.environ | {"MINIMOE_DATA": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert (kept.read_bytes() if kept.exists() else None) == before, "--quick touched the recorded results"
    result = json.loads(out.read_text(encoding="utf-8"))
    assert list(result["parts"]) == ["shakespeare", "loader", "moellama", "resume"]
    for part in result["parts"].values():
        assert "--quick" in part["command"] and part["threads"] >= 1
        for row in part["rows"]:
            assert row["ratio"] > 0 and row["met"] is None and f"| {row['what']} |" in done.stdout
    sides = result["parts"]["shakespeare"]["sides"]
    assert set(sides) == {"ours", "twin", "baseline"}
    assert sides["ours"]["params"]["median"] > 2 * sides["twin"]["params"]["median"]
    assert all(side["loss"]["median"] < 6 for side in sides.values())


def test_held_out_loss_counts_every_target_once(training):
    """Windows of 64 that do not overlap: only what stands in the same window can help."""
    import numpy as np
    import torch
    from training_sides import held_out

    ids = np.arange(200) % 10

    def knows_the_window(tokens):       # certain of the next token, but for the first place of a window
        logits = torch.full((*tokens.shape, 10), 0.0)
        logits[:, 1:].scatter_(2, ((tokens[:, 1:] + 1) % 10)[..., None], 50.0)
        return logits

    windows = -(-199 // 64)
    assert held_out(knows_the_window, ids) == pytest.approx(windows * np.log(10) / 199, rel=1e-5)


def test_the_baselines_are_as_published(training):
    import baseline_dense
    import baseline_moe
    import numpy as np
    from training_sides import MOELLAMA

    dense = baseline_dense.Training(np.arange(400) % 65, 65, seed=0)
    assert sum(p.numel() for p in dense.model.parameters()) == 804_096     # nanoGPT prints 0.80M, positions left out
    assert [round(baseline_dense.learning_rate(s), 6) for s in (99, 100, 2000)] == [0.00099, 0.001, 0.0001]
    assert dense.step() == pytest.approx(np.log(65), abs=0.3)
    assert MOELLAMA.num_params() == 21_214_464
    moe = baseline_moe.TutorialMoE(vocab=50, dim=16, layers=1, heads=2, hidden=8)
    ours = sum(p.numel() for n, p in baseline_moe.TutorialMoE().named_parameters() if "bias" not in n)
    assert ours == MOELLAMA.num_params()        # the same model but for the biases of the experts
    import torch

    tokens = torch.arange(33).expand(4, 33) % 5
    losses = [moe.step(tokens[:, :-1], tokens[:, 1:]) for _ in range(200)]
    assert losses[-1] < losses[0] - 0.5


def test_a_share_of_the_time_only_counts_where_the_loss_is_reached(training):
    side = lambda seconds, loss: [{"value": seconds, "loss": loss, "tokens": 1}] * 3
    reached = training.rows("shakespeare", {"ours": side(5.0, 1.89), "twin": side(4.0, 1.9), "baseline": side(50.0, 1.9)})
    missed = training.rows("shakespeare", {"ours": side(5.0, 1.91), "twin": side(4.0, 1.9), "baseline": side(50.0, 1.9)})
    slow = training.rows("shakespeare", {"ours": side(15.0, 1.89), "twin": side(4.0, 1.9), "baseline": side(50.0, 1.9)})
    assert [training.met(lines[0]) for lines in (reached, missed, slow)] == [True, False, False]
    assert reached[0]["ratio"] == 0.1 and training.met(reached[1]) is None


def test_the_speed_of_the_loader_is_its_share(training):
    figures = {"value": 0.03, "loader_tokens_per_second": 100.0, "training_tokens_per_second": 3.0}
    line = training.rows("loader", {"ours": [figures]})[0]
    assert line["ratio"] == 0.03 and training.met(line) is False
    faster = [{"value": 9.0}], [{"value": 3.0}]
    assert training.met(training.rows("moellama", dict(zip(("ours", "baseline"), faster)))[0]) is True
    assert training.met(training.rows("moellama", dict(zip(("baseline", "ours"), faster)))[0]) is False
