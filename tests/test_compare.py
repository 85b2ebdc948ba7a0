"""minimoe compare: lengths are equal in the measure asked for, the table is what the runs logged, nothing is run twice."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from minimoe import compare as room
from minimoe.checkpoint import load
from minimoe.cli import main
from minimoe.compare import Comparison, compare, mean_interval
from minimoe.config import Config, DataConfig, ModelConfig, TrainConfig, save_config
from minimoe.data.loader import load_data
from minimoe.settings import ConfigError

MODEL = ModelConfig(dim=16, n_layers=2, n_heads=2, max_seq_len=16, n_experts=4, top_k=2, expert_hidden=16)
TRAIN = TrainConfig(steps=12, batch_size=2, warmup=4, lr=3e-3, device="cpu", dtype="float32", threads=1, eval_every=6, log_every=2)
CHARACTERS = DataConfig(mixture="small.txt", tokenizer="characters")
BASE = Config(model=MODEL, train=TRAIN, data=CHARACTERS)
BPE = dataclasses.replace(BASE, data=dataclasses.replace(CHARACTERS, tokenizer="bpe", tokenizer_vocab=300))
WIDER = dataclasses.replace(BASE, model=dataclasses.replace(MODEL, expert_hidden=48))
DENSE = dataclasses.replace(BASE, model=dataclasses.replace(MODEL, n_experts=1, top_k=1))


@pytest.fixture(autouse=True)
def small_text(tmp_path, monkeypatch):
    """Runs take their text from the current folder, and few bytes of it are held out."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{a} times {b} is {a * b}, said number {a + b}." for a in range(12) for b in range(12)]
    (tmp_path / "small.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def bytes_per_token(data: DataConfig) -> float:
    loaded = load_data(data)
    return sum(len(d.text.encode()) for d in loaded.corpora[0].train) / len(loaded.mixture.streams[0].tokens)


def test_runs_are_equal_in_what_was_asked_for():
    both = {"characters": BASE, "bpe": BPE, "wider": WIDER}
    for equal in ("bytes", "flops", "active"):
        plan, data = room.equal_cost(both, equal, dense=False)
        tokens, per_step = 32, {}
        for n, c in plan.items():
            per_step[n] = tokens * {"bytes": bytes_per_token(c.data), "flops": 3 * c.model.flops_per_token(16),
                                    "active": c.model.active_params()}[equal]
            assert room.cost_per_step(c, data[c.data], equal) == pytest.approx(per_step[n])
        costs = {n: plan[n].train.steps * per_step[n] for n in plan}
        assert plan["characters"].train.steps == 12
        assert all(abs(costs[n] - costs["characters"]) <= per_step[n] / 2 for n in plan)
        fewer = plan["bpe" if equal == "bytes" else "wider"].train
        assert fewer.steps < 11 and fewer.warmup == round(4 * fewer.steps / 12) and fewer.eval_every == round(fewer.steps / 2)
    assert plan["bpe"].model.vocab_size == 300


def test_the_table_is_what_the_runs_logged(tmp_path):
    result = compare({"four": BASE, "bpe": BPE}, out=tmp_path / "out", seeds=2, progress=False)
    ends, again = {}, []
    for name in ("four", "bpe"):
        for seed in (0, 1):
            run = load(tmp_path / "out" / name / f"seed{seed}")        # a run folder like any other
            ends.setdefault(name, []).append(rows := run.metrics())
            again.append(run.config.train.seed)
            assert rows[-1]["step"] == run.config.train.steps
    assert again == [0, 1, 0, 1] and ends["four"][0][-1]["val_bpb"] != ends["four"][1][-1]["val_bpb"]
    for entry in result.entries:
        assert entry.bpb == tuple(rows[-1]["val_bpb"] for rows in ends[entry.name])
        late = [m["max_vio"] for m in ends[entry.name][0][-1]["routing"]]
        assert entry.max_vio[0] == pytest.approx(sum(late) / len(late)) or entry.config.train.steps > 10
        assert [y for _, y in entry.curves[0]] == [r["val_bpb"] for r in ends[entry.name][0] if "val_bpb" in r]
        assert all(m is None or m > 1e7 for m in entry.memory)
    (a0, a1), (b0, b1) = (e.bpb for e in result.entries)
    middle, half = (b0 - a0 + b1 - a1) / 2, 12.706 * abs((b0 - a0) - (b1 - a1)) / 2       # s / sqrt(2) of two values
    assert result.difference("bpe", "four") == pytest.approx((middle, half), rel=1e-6)
    cells = [re.split(r" \| ", line.strip("| ")) for line in result.table().splitlines()[2:4]]
    assert cells[0][0] == "four" and cells[1][5].startswith(f"{(b0 + b1) / 2:.3f} ± ") and f"{middle:+.3f} ± {half:.3f}" in cells[1][6]
    assert cells[0][1] == f"{result.entries[0].config.model.num_params():,}"
    kept = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [e["bpb"] for e in kept["entries"]] == [[a0, a1], [b0, b1]]
    assert (tmp_path / "out" / "compare.md").read_text(encoding="utf-8") == result.table()
    groups = [g for g in ET.fromstring((tmp_path / "out" / "compare.svg").read_text(encoding="utf-8")).iter() if "data-bpb" in g.attrib]
    assert [(g.get("data-name"), float(g.get("data-bpb"))) for g in groups] == [
        ("four", pytest.approx((a0 + a1) / 2, abs=1e-5)), ("bpe", pytest.approx((b0 + b1) / 2, abs=1e-5))]


def test_what_is_finished_is_not_run_again_and_the_rest_goes_on(tmp_path, monkeypatch):
    out, said = tmp_path / "out", []
    whole = compare({"a": BASE, "b": WIDER}, out=tmp_path / "whole", seeds=2, progress=False)
    train, calls = room.train_from_config, []

    def interrupted(config, folder, **options):         # Ctrl-C in the middle of the third run
        calls.append(folder.parent.name + folder.name)
        return train(config, folder, **options, stop_after=5 if len(calls) == 3 else None)

    monkeypatch.setattr(room, "train_from_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare({"a": BASE, "b": WIDER}, out=out, seeds=2, progress=False)
    assert calls == ["aseed0", "bseed0", "aseed1"] and not (out / "compare.json").exists()
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/seed0/*") if p.is_file()}
    result = compare({"a": BASE, "b": WIDER}, out=out, seeds=2, progress=False, say=said.append)
    assert calls[3:] == ["aseed1", "bseed1"] and [line.endswith("finished before") for line in said] == [True, True, False, False]
    assert before == {p: p.stat().st_mtime_ns for p in before} and len(before) >= 10
    assert [e.bpb for e in result.entries] == [e.bpb for e in whole.entries]          # the interrupted one went on exactly
    assert (out / "a" / "seed1" / "checkpoints" / "00000005").is_dir()                # and did not begin anew
    with pytest.raises(ConfigError, match="other settings: lr was 0.003, is 0.1"):
        compare({"a": dataclasses.replace(BASE, train=dataclasses.replace(TRAIN, lr=0.1)), "b": WIDER}, out=out, seeds=2)


def test_dense_twins_from_the_command_line(tmp_path, capsys):
    save_config(BASE, "moe.yaml")
    assert main(["compare", "moe.yaml", "--dense", "--seeds", "1", "--equal", "active", "--steps", "4", "--out", "out"]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in table] == ["| moe", "| moe-dense-active", "| moe-dense-total"]
    total, active = ([int(row[i].replace(",", "")) for row in table] for i in (1, 2))
    assert active[1] == pytest.approx(active[0], rel=0.05) and total[2] == pytest.approx(total[0], rel=0.05)
    assert table[0][3] == "4" and int(table[2][3]) < 4 and table[0][7] and not table[1][7]       # a dense model has no MaxVio
    assert (tmp_path / "out" / "moe-dense-total" / "seed0" / "model.safetensors").is_file()


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    save_config(BASE, "a.yaml")
    save_config(DENSE, "dense.yaml")
    save_config(dataclasses.replace(BASE, data=DataConfig(mixture="worlds", tokenizer="characters")), "other.yaml")
    (tmp_path / "b").mkdir()
    save_config(BASE, "b/a.yaml")
    for arguments, message in (
            ([], "name at least one config"),
            (["a.yaml"], "name two configs or more, or ask for --dense"),
            (["a.yaml", "b/a.yaml"], "two configs are called 'a'"),
            (["a.yaml", "missing.yaml"], "missing.yaml: no such config file"),
            (["a.yaml", "other.yaml"], "a and other hold out different texts"),
            (["a.yaml", "dense.yaml", "--dense"], "dense is dense already"),
            (["a.yaml", "--dense", "--seeds", "0"], "seeds=0: at least 1")):
        assert main(["compare", *arguments, "--out", "out"]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="equal='time': one of bytes, flops, active"):
        compare({"a": BASE, "b": WIDER}, out="out", equal="time")


def test_intervals_are_student_s():
    for n, t in ((2, 12.706), (5, 2.776), (11, 2.228), (12, 2.201), (31, 2.042), (121, 1.980)):       # tables of t at 0.975
        values = [float(i % 2) for i in range(n)]
        middle = sum(values) / n
        s = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
        assert mean_interval(values) == pytest.approx((middle, t * s / math.sqrt(n)), rel=2e-3)


def test_one_seed_has_no_interval():
    entry = room.Entry(name="a", config=BASE, cost=1.0, total=1, active=1, bpb=(2.0,), max_vio=(None,), tokens_per_s=(1.0,),
                       memory=(None,), curves=(((1.0, 2.0),),))
    result = Comparison((entry, dataclasses.replace(entry, name="b", bpb=(1.5,))), "bytes", (0,))
    assert "±" not in result.table().splitlines()[2] and "One seed has no interval" in result.table()
    assert "-0.500 |" in result.table() and ET.fromstring(result.svg()).get("aria-label").endswith("lowest: b")
