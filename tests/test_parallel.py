"""Runs on several processes equal the run on one: losses, checkpoints, and what happens when a process dies."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimoe.checkpoint import checkpoints
from minimoe.cli import main
from minimoe.config import TrainConfig
from minimoe.cost import Machine, step_cost
from minimoe.parallel import start
from minimoe.settings import ConfigError
from tests.parallel_worker import CASES, KINDS, MODEL, STEPS, WIDE, resumed

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs in one, four and two processes; half of some runs in four, to be ended in two and here."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, "-m", "tests.parallel_worker", str(folder)], cwd=ROOT, env=ENV, capture_output=True,
                          text=True, encoding="utf-8", timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder: Path, size: int) -> dict:
    return json.loads((folder / f"{size}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_many_processes_equal_one(folder, size):
    """Cross-entropy, the other losses, the norm of the gradient and the load of each expert, at each of 20 steps."""
    alone, found = read(folder, 1)["losses"], read(folder, size)["losses"]
    assert len(found) == len(KINDS) * len(CASES) - 3
    for key, rows in found.items():
        want = alone[key.partition(": ")[2]]
        assert len(rows) == len(want) == STEPS
        for step, (got, expected) in enumerate(zip(rows, want), 1):
            # a rounding error may move a token over the edge of what an expert takes: the exception of expert choice
            limit = 1e-3 if "expert choice" in key else 1e-5
            assert got[0] == pytest.approx(expected[0], abs=limit, rel=0), f"{size} processes, {key}, step {step}"
            assert sum(got[1], []) == pytest.approx(sum(expected[1], []), abs=10 * limit + 1e-5), f"{size} processes, {key}, step {step}"
    uneven = alone["bias, uneven, one expert without tokens"][0][1][-1]
    assert uneven[0] == 0.5 and uneven[3] == 0.0


@pytest.mark.slow
def test_any_number_of_processes_goes_on_with_a_checkpoint(folder, tmp_path):
    """Begun by one process, gone on with by four, and from there by two and by one."""
    whole = resumed(tmp_path)
    assert len(whole) == STEPS
    names = [p.name for p in folder.glob("*-in-*")]
    assert len(names) == 9
    for name in names:
        ces = resumed(folder / name) if name.endswith("in-1") else read(folder, int(name[-1]))[name]
        assert ces == pytest.approx(whole[:len(ces)], abs=1.5e-5) and len(ces) == (10 if name.endswith("4") else 20), name
    files = lambda run: {p.relative_to(run): p.stat().st_size for p in (run / "checkpoints/00000020").rglob("*.safetensors")}
    assert files(folder / "ep-from-1-in-2") == files(folder / "fsdp-from-1-in-1") == files(tmp_path) != {}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_model_counts_the_bytes_that_are_really_sent(folder, size, kind):
    """The kernel's count of TCP bytes against the model's. gloo has no reduce-scatter: it does an all-reduce, twice the bytes."""
    measured = read(folder, size)["sent"]
    if measured is None:
        pytest.skip("no /proc to count bytes with")
    cost = step_cost(WIDE, seq_len=8, batch=64, devices=size, machine=Machine(), parallel=kind)
    expected = sum(cost.sent.values()) + cost.sent.get("reduce_scatter", 0)
    assert expected > 100_000
    assert measured[kind] == pytest.approx(expected, rel=0.05)


SMALL = ["train", "--mixture", "worlds", "--tokenizer", "bytes", "--dim", "16", "--n-layers", "1", "--n-heads", "2", "--n-experts", "4",
         "--expert-hidden", "16", "--max-seq-len", "32", "--batch-size", "4", "--eval-every", "0", "--log-every", "1", "--dtype", "float32",
         "--device", "cpu"]


def torchrun(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minimoe", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")


def child(parent: int, rank: int) -> int:
    """The process that torchrun started as this rank (Linux)."""
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8").split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError("no such process")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds the process of a rank in /proc")
def test_a_rank_that_dies_is_named_and_the_run_goes_on(tmp_path):
    out = tmp_path / "run"
    arguments = [*SMALL, "--out", str(out), "--parallel", "ep", "--save-every", "1", "--steps", "2000"]
    process = torchrun(*arguments)
    while not checkpoints(out):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)
    os.kill(child(process.pid, 1), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    line = "minimoe: error: rank 1 of 2 died; the same torchrun command with --resume goes on from the last checkpoint"
    assert said.count("minimoe: error") == said.count(line) == 1, said[-3000:]
    newest = int(checkpoints(out)[-1].name)
    process = torchrun(*arguments, "--resume", "--stop-after", str(newest + 2))
    shown, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    assert shown.count(f"goes on from step {newest}") == 1
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(1, newest + 3))


@pytest.mark.parametrize("change, size, message", [
    ({"parallel": "none"}, 2, "2 processes were started by torchrun, but parallel is none"),
    ({"parallel": "ddp", "batch_size": 9}, 2, "batch_size=9 cannot be shared equally by 2 ranks"),
    ({"parallel": "ep", "batch_size": 9}, 3, "n_experts=4 cannot be spread equally over 3 ranks"),
    ({"parallel": "fsdp", "device": "cuda:1"}, 2, "write cuda, cpu or auto"),
    ({"parallel": "fsdp", "compile": True}, 2, "compile does not go with parallel: fsdp"),
])
def test_settings_that_do_not_fit_are_refused(monkeypatch, change, size, message):
    for name, value in {"RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        start(TrainConfig(**change), MODEL)


def test_without_torchrun_the_command_is_named(tmp_path, capsys):
    assert main([*SMALL, "--parallel", "ddp", "--out", str(tmp_path / "run")]) == 2
    assert "start it with torchrun --nproc-per-node N -m minimoe train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
