"""What does not fit: memory (found beforehand, or one clear line), disk, precision, and files that are not what they should be."""
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimoe.checkpoint import checkpoints, load, save
from minimoe.cli import main
from minimoe.config import DataConfig, load_config
from minimoe.data.loader import load_data
from minimoe.data.tokenizer import Tokenizer
from minimoe.device import choose
from minimoe.limits import available_memory, explained, fit_batch_size, out_of_memory
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError
from minimoe.trainer import Trainer
from tests.test_resume import MODEL, TRAIN, assert_same_run, rows, trainer

ROOT = Path(__file__).parents[1]
GB = 1 << 30
WIDE = dataclasses.replace(MODEL, vocab_size=4096, max_seq_len=64, dropout=0.0, router_noise=0.0)     # logits of 1 MB a sequence
AUTO = dataclasses.replace(TRAIN, batch_size="auto")
PAIRS = [(torch.arange(64) % 77, torch.arange(64) % 77)] * 4096


@pytest.fixture(scope="module")
def data():
    whole = load_data(DataConfig(mixture="worlds", tokenizer="characters"))
    short = tuple(dataclasses.replace(c, held_out=(min(c.held_out, key=lambda d: len(d.text)),)) for c in whole.corpora)
    return dataclasses.replace(whole, corpora=short)


# --- memory -----------------------------------------------------------------------------------------------------------
def test_auto_batch_size_follows_the_memory_that_is_free():
    """Measured for real in a process of its own: with four times the memory about four times the batch, and never below
    what a step must hold (logits and their gradient, float32)."""
    choice, sizes = choose("cpu", "float32"), {}
    for free in (GB // 8, GB // 2):
        sizes[free], why = fit_batch_size(WIDE, AUTO, choice, 64, most=100_000, free=free)
        assert f"batch_size {sizes[free]}: the largest power of two that fits" in why and "MB a sequence" in why
        assert sizes[free] * 64 * 4096 * 4 * 2 < free
    small, large = sizes.values()
    assert 4 <= small and large in (2 * small, 4 * small, 8 * small)
    assert fit_batch_size(WIDE, AUTO, choice, 64, most=5, free=GB)[0] == 4         # the data holds no more
    with pytest.raises(ConfigError, match="not even one sequence fits.*recompute"):
        fit_batch_size(WIDE, AUTO, choice, 64, most=64, free=1 << 20)


def test_auto_batch_size_under_a_limit_of_the_process(tmp_path):
    """The whole way, under RLIMIT_AS: what is found trains, is saved as a number, and a resumed run keeps it."""
    code = """
import json, resource, sys
import torch
from tests.test_limits import AUTO, GB, MoETransformer, PAIRS, Trainer, WIDE, dataclasses
from pathlib import Path
pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + int(sys.argv[2]), -1))
t = Trainer(MoETransformer(WIDE), dataclasses.replace(AUTO, steps=2, accumulate=1), PAIRS, out=Path(sys.argv[1]), progress=False)
t.fit()
print(t.cfg.batch_size, t.config.train.batch_size)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("RLIMIT_AS is held against /proc/self/statm, which is Linux's")
    run = lambda *args: subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    done = run(tmp_path, GB // 2)
    assert done.returncode == 0, done.stderr
    size = int(done.stdout.split()[0])
    assert 4 <= size <= 256 and done.stdout.split()[1] == str(size)         # 2 MB a sequence at least, and 0.4 GB of room
    assert load_config(tmp_path / "config.yaml").train.batch_size == size
    assert f"batch_size {size}: the largest power of two" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_resumed_run_keeps_the_batch_size_found(tmp_path, capsys, monkeypatch):
    from minimoe import trainer as module

    text = tmp_path / "small.txt"
    text.write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(300)), encoding="utf-8")
    argv = ["train", "--mixture", str(text), "--tokenizer", "bytes", "--dim", "16", "--n-layers", "1", "--n-heads", "2",
            "--expert-hidden", "16", "--max-seq-len", "32", "--steps", "4", "--batch-size", "auto", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(module, "fit_batch_size", lambda *args, **kwargs: (8, "batch_size 8: said"))
    assert main([*argv, "--stop-after", "2"]) == 0 and "batch_size 8: said" in capsys.readouterr().out
    monkeypatch.setattr(module, "fit_batch_size", lambda *args, **kwargs: (4, "found anew"))
    assert main([*argv, "--resume"]) == 0 and "found anew" not in capsys.readouterr().out
    assert load(tmp_path / "run").config.train.batch_size == 8 and rows(tmp_path / "run")[-1]["tokens"] == 4 * 8 * 32


def test_free_memory_is_the_smallest_of_all_limits(tmp_path):
    for name, text in {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n", "proc/self/statm": "10 1 1",
                       "sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.stat": "anon 1000\nfile 5\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert available_memory(tmp_path) == 800 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("300000\n", encoding="utf-8")
    assert available_memory(tmp_path) == 299_000
    old = tmp_path / "sys/fs/cgroup/memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("200000\n", encoding="utf-8")
    (old / "memory.stat").write_text("cache 7\nrss 50000\n", encoding="utf-8")
    assert available_memory(tmp_path) == 150_000


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_names_what_to_change(error, data, tmp_path):
    def full(*args):
        raise error

    t = trainer(data, tmp_path)
    t.fit(stop_after=2)
    t.forward = full
    with pytest.raises(ConfigError, match="batch_size=2: halve it and double accumulate=2.*recompute") as caught:
        t.fit(resume=True)
    assert "\n" not in str(caught.value) and [int(p.name) for p in checkpoints(tmp_path)] == [2]
    assert "Traceback" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_real_allocation_that_fails_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value) and not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"), explained(TRAIN, None):
        raise RuntimeError("shapes differ")
    with pytest.raises(FileNotFoundError), explained(TRAIN, None):
        raise FileNotFoundError(2, "a user's own file")


# --- disk -------------------------------------------------------------------------------------------------------------
FULL = """
import resource, signal, sys
from pathlib import Path
from minimoe.settings import ConfigError
from tests.test_limits import MODEL, TRAIN, MoETransformer, PAIRS, Trainer, dataclasses
out, limit = Path(sys.argv[1]), int(sys.argv[2])
model, train = dataclasses.replace(MODEL, vocab_size=77, dim=64, max_seq_len=64), dataclasses.replace(TRAIN, save_every=1, keep=1)
make = lambda: Trainer(MoETransformer(model), train, PAIRS, out=out, progress=False)
make().fit(stop_after=2)
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
else:
    room = __import__("os").statvfs(out)
    (out.parent / "filler").write_bytes(b"x" * (room.f_bavail * room.f_bsize - 300_000))       # a checkpoint has 0.8 MB
try:
    make().fit(resume=True)
except ConfigError as error:
    print(error)
if not limit:
    print(sorted(p.name for p in (out / "checkpoints").iterdir()), file=sys.stderr)
    __import__("shutil").copytree(out, sys.argv[3])
"""


@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(way, tmp_path):
    """On a tmpfs of 4 MB where a namespace can be made, and with a limit on the size of files, which always runs."""
    out = tmp_path / "run"
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4m none "$0" && exec "$@"', str(tmp_path / "disk")]
    (tmp_path / "disk").mkdir()
    if way == "tmpfs":
        if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
            pytest.skip("no namespace with a tmpfs can be made here; the limit on the size of files stands in for it")
        command = [*inside, sys.executable, "-c", FULL, str(tmp_path / "disk" / "run"), "0", str(out)]
    else:
        command = [sys.executable, "-c", FULL, str(out), "200000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "could not be written" in done.stdout and "--resume from step 2" in done.stdout
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["00000002"]       # and no half one takes up room
    model, train = dataclasses.replace(MODEL, vocab_size=77, dim=64, max_seq_len=64), dataclasses.replace(TRAIN, save_every=1, keep=1)
    assert load(out, step=2).model is not None
    again = Trainer(MoETransformer(model), train, PAIRS, out=out, progress=False)
    again.fit(resume=True)
    assert again.step == TRAIN.steps and [r["step"] for r in rows(out)] == [2, 3, 4, 6, 7]


# --- float16 ----------------------------------------------------------------------------------------------------------
def scaled(data, out, start=2.0 ** 10):
    t = trainer(data, out)
    t.scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=3)
    return t


def test_the_gradient_scale_changes_no_number_and_is_resumed(data, tmp_path):
    """The scaler's arithmetic on the CPU in float32, where powers of two are exact: the same run as without."""
    whole, plain = scaled(data, tmp_path / "whole"), trainer(data, tmp_path / "plain")
    whole.fit(), plain.fit()
    assert whole.scaler.get_scale() == 2.0 ** 12 and all(r["skipped"] == 0 for r in whole.rows)
    same = zip(whole.model.state_dict().values(), plain.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in same)
    scaled(data, tmp_path / "cut").fit(stop_after=4)
    again = scaled(data, tmp_path / "cut")
    again.fit(resume=True)
    assert again.scaler.state_dict() == whole.scaler.state_dict()
    assert_same_run(again, whole)


def test_a_gradient_that_overflows_leaves_the_step_out(data, tmp_path):
    t = scaled(data, tmp_path, start=2.0 ** 127)
    before = [p.clone() for p in t.model.parameters()]
    losses, _ = t.train_step()
    assert losses["skipped"] == 1.0 and losses["grad_norm"] == 0.0 and t.scaler.get_scale() == 2.0 ** 126
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    t.model.embedding.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        t.train_step()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_and_auto_batch_size_on_a_gpu(tmp_path):
    torch.manual_seed(0)
    cfg = dataclasses.replace(AUTO, device="cuda", dtype="float16", steps=8)
    t = Trainer(MoETransformer(WIDE), cfg, PAIRS[:64], out=tmp_path, progress=False)
    t.fit(stop_after=5)
    assert t.scaler.is_enabled() and t.cfg.batch_size == 64 and t.rows[-1]["ce"] < t.rows[0]["ce"]
    again = Trainer(MoETransformer(WIDE), dataclasses.replace(cfg, batch_size=64), PAIRS[:64], out=tmp_path, progress=False)
    again.fit(resume=True)
    assert again.step == 8 and again.scaler.get_scale() >= 1


# --- files that are not what they should be ---------------------------------------------------------------------------
class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(data, tmp_path, capsys):
    out, mark = tmp_path / "run", tmp_path / "executed"
    trainer(data, out).fit(stop_after=2)
    for file in ("model.safetensors", "checkpoints/00000002/model.safetensors", "checkpoints/00000002/state/optimizer.safetensors"):
        before = (out / file).read_bytes()
        for write in (lambda p: p.write_bytes(pickle.dumps(Touch(mark))), lambda p: torch.save(Touch(mark), p)):
            write(out / file)
            with pytest.raises(ConfigError, match="damaged"):
                load(out) if file == "model.safetensors" else trainer(data, out).fit(resume=True)
        if file == "model.safetensors":
            assert main(["generate", str(out)]) == 2 and capsys.readouterr().err.count("\n") == 1
        (out / file).write_bytes(before)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()                        # it would have been


def test_a_tokenizer_or_an_architecture_that_does_not_fit_is_named(data, tmp_path, capsys):
    cfg = dataclasses.replace(MODEL, vocab_size=data.tokenizer.vocab_size)
    save(tmp_path, MoETransformer(cfg), data.tokenizer)
    data.tokenizer.save(tmp_path / "own.json")
    Tokenizer.bytes().save(tmp_path / "tokenizer.json")
    assert main(["generate", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "tokenizer.json does not fit: it has 260 tokens, the model's vocab_size is" in err
    (tmp_path / "own.json").replace(tmp_path / "tokenizer.json")
    for other in (dataclasses.replace(cfg, n_layers=3), dataclasses.replace(cfg, n_kv_heads=1), dataclasses.replace(cfg, n_experts=8)):
        save(tmp_path / "other", MoETransformer(other))
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
        assert main(["generate", str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "does not fit config.yaml" in err
