"""What this machine can hold: the largest batch for its memory, and one clear line when memory or disk run out (chapter 8)."""
from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch

from minimoe.checkpoint import checkpoints
from minimoe.config import ModelConfig, TrainConfig
from minimoe.device import Choice, choose, tune_cpu
from minimoe.lora import adapt
from minimoe.model import MoETransformer
from minimoe.optimizer import make_optimizer
from minimoe.settings import ConfigError, from_dict, need, to_dict

SHARE = 0.8             # of the free memory; the rest is for held-out text, prepared kernels and other programs
ENOUGH = 64 << 20       # bytes of growth from which a measurement is more than noise


def fit_batch_size(model: ModelConfig, train: TrainConfig, choice: Choice, seq_len: int, most: int,
                   free: int | None = None) -> tuple[int, str]:
    """The largest power of two up to `most` sequences whose training step fits, and a line that says how it was found.

    On CUDA steps are tried until memory runs out. Elsewhere a process of its own measures how much a step takes for 1,
    2, 4 … sequences, and the line through these points is held against a share of `free` bytes (default: what this
    process may still take). Raises ConfigError where not even one sequence fits.
    """
    if choice.device.type == "cuda":
        size = largest(_runs_on_cuda(model, train, choice, seq_len), most)
        why = f"tried on {choice.device}"
    else:
        free = available_memory() if free is None else free
        points = _measure(model, train, choice, seq_len, most)
        (b0, bytes0), (b1, bytes1) = points[0], points[-1]
        slope = max(0.0, (bytes1 - bytes0) / max(1, b1 - b0))
        base = max(0.0, bytes1 - slope * b1)
        size = largest(lambda b: b <= max(b1, 1) and bytes1 <= SHARE * free or base + slope * b <= SHARE * free,
                       most if slope else b1)
        why = (f"a step takes {base / 1e6:,.0f} MB and {slope / 1e6:,.2f} MB a sequence (measured up to {b1}), {SHARE:.0%} of "
               f"the {free / 1e9:,.2f} GB that are free are used")
    need(size, "batch_size=auto: not even one sequence fits in memory; set recompute: blocks, or take a smaller seq_len or model")
    return size, f"batch_size {size}: the largest power of two that fits (at most {most}); {why}"


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest power of two up to `most` that fits; 0 where 1 does not.

    >>> largest(lambda b: b < 100, most=1000), largest(lambda b: True, most=48), largest(lambda b: False, most=8)
    (64, 32, 0)
    """
    size = 0
    while (following := 2 * size or 1) <= most and fits(following):
        size = following
    return size


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the machine has free, or less where a cgroup or RLIMIT_AS says so."""
    limits = []
    try:
        info = (root / "proc/meminfo").read_text(encoding="utf-8")
        limits.append(int(re.search(r"MemAvailable:\s+(\d+)", info)[1]) << 10)
    except (OSError, TypeError):
        need(hasattr(os, "sysconf"), "batch_size=auto: this system does not say how much memory is free; give a number")
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    for folder, limit, used in (("", "memory.max", "anon"), ("memory", "memory.limit_in_bytes", "rss")):     # version 2, 1
        try:
            cgroup = root / "sys/fs/cgroup" / folder
            taken = re.search(rf"^{used} (\d+)", (cgroup / "memory.stat").read_text(encoding="utf-8"), re.M)
            limits.append(int((cgroup / limit).read_text(encoding="utf-8")) - int(taken[1]))
        except (OSError, TypeError, ValueError):            # no such cgroup, or "max"
            pass
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int((root / "proc/self/statm").read_text(encoding="utf-8").split()[0])
            reserved = (torch.get_num_threads() + 1) << 26      # address space that glibc sets aside for each thread
            limits.append(soft - pages * os.sysconf("SC_PAGE_SIZE") - reserved)
    except (ImportError, OSError):
        pass
    return max(0, min(limits))


def out_of_memory(error: BaseException) -> bool:
    """Whether it is one of the ways in which Python and PyTorch say that memory has run out.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "not enough memory", "can't allocate memory"))


@contextmanager
def explained(train: TrainConfig, out: Path | None) -> Iterator[None]:
    """Turns the end of memory, or of the disk, into one line that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(
            f"out of memory with batch_size={train.batch_size}: halve it and double accumulate={train.accumulate} for the same "
            f"update, or set recompute: blocks (now {train.recompute}); batch_size: auto finds what fits") from error
    except (OSError, safetensors.SafetensorError) as error:
        full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EACCES)
        if isinstance(error, OSError) and error.errno not in full:
            raise
        kept = [int(p.name) for p in checkpoints(out)] if out else []
        raise ConfigError(f"{out}: could not be written ({error}); make room or the folder writable, then go on with --resume from "
                          + (f"step {kept[-1]}, the last complete checkpoint" if kept else "the start")) from error


def _one_step(model: ModelConfig, train: TrainConfig, choice: Choice, seq_len: int) -> Callable[[int], None]:
    """Makes a model of its own, and gives a function that trains it on b random sequences."""
    with torch.random.fork_rng():
        inner = MoETransformer(model).to(choice.device)
    if train.method != "full":
        adapt(inner, train)
    inner.recompute(train.recompute)
    optimizer = make_optimizer(inner, train)

    def step(b: int) -> None:
        tokens = torch.randint(model.vocab_size, (b, seq_len + 1), device=choice.device,
                               generator=torch.Generator(choice.device).manual_seed(b))
        with choice.autocast():
            loss = inner(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _runs_on_cuda(model: ModelConfig, train: TrainConfig, choice: Choice, seq_len: int) -> Callable[[int], bool]:
    step = _one_step(model, train, choice, seq_len)

    def runs(b: int) -> bool:
        try:
            step(b), step(b)                    # the second has the optimizer's state beside it
            torch.cuda.synchronize(choice.device)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    return runs


def _measure(model: ModelConfig, train: TrainConfig, choice: Choice, seq_len: int, most: int) -> list[tuple[int, int]]:
    """(sequences, bytes that a training step of them adds at its peak), measured in a process of its own."""
    train = dataclasses.replace(train, batch_size=1, dtype=str(choice.dtype).removeprefix("torch."), threads=choice.threads)
    task = json.dumps({"model": to_dict(model), "train": to_dict(train), "seq_len": seq_len, "most": most})
    code = "from minimoe.limits import _measure_here; _measure_here()"
    done = subprocess.run([sys.executable, "-c", code], input=task, capture_output=True, text=True, encoding="utf-8")
    points = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    need(points and not done.returncode, "batch_size=auto: one step could not be measured "
         f"({(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1][:200]}); give a number")
    return points


def _measure_here() -> None:
    task = json.load(sys.stdin)
    train = from_dict(TrainConfig, task["train"])
    choice = choose(train.device, train.dtype, train.threads)
    tune_cpu(train.threads)
    step, before, first = _one_step(from_dict(ModelConfig, task["model"]), train, choice, task["seq_len"]), _peak(), None
    size = 1
    while size <= task["most"]:
        try:
            step(size), step(size)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or first is None:
                raise
            return
        grown = _peak() - before
        print(size, grown, flush=True)
        first = grown if first is None else first
        if grown - first >= ENOUGH:
            return
        size *= 2


def _peak() -> int:
    """The most bytes that this process has held."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) << 10
    except OSError:                             # ru_maxrss on Linux would begin with the parent's
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
