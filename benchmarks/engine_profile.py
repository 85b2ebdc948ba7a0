"""Where our training and decoding steps spend their time, and the least that they could take on this machine.

A training step cannot take less than its matrix products at the speed of one big product; decoding one token for each
sequence cannot take less than reading the weights that it uses at the speed of a plain sum. Both speeds are measured in
the same process, right before.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from engine_sides import Work, generation, seconds, training
from torch.profiler import ProfilerActivity

from minimoe import ModelConfig, device


def product_speed(work: Work, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP per second of one big matrix product: the best of ten."""
    a, b = (torch.randn(size, size, device=work.device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(work, lambda: a @ b) for _ in range(10))


def read_speed(work: Work, mb: int = 512) -> float:
    """Bytes per second of a plain sum over more memory than any cache holds: the best of ten."""
    x = torch.ones(mb * 2**18, device=work.device)
    return x.numel() * 4 / min(seconds(work, x.sum) for _ in range(10))


def bytes_per_step(cfg: ModelConfig, batch: int, positions: float) -> float:
    """Float32 weights and cached keys and values that one decoding step of `batch` sequences reads.

    Sequences that choose alike read an expert once: with even and independent choices a share 1 - (1 - K / E)^B of the
    experts is read. Of the embedding only the output head's product counts.
    """
    experts = len(cfg.moe_layers) * cfg.n_experts * 3 * cfg.dim * cfg.expert_hidden
    rest = cfg.num_params() - experts - (0 if cfg.tie_embeddings else cfg.vocab_size * cfg.dim)
    read = 1 - (1 - cfg.top_k / cfg.n_experts) ** batch
    return 4 * (rest + experts * read) + batch * positions * cfg.kv_bytes_per_token()


def profiled(work: Work, run: Callable[[], object], times: int, steps: int, rows: int) -> tuple[str, list[dict]]:
    """The table of operators by their own CPU time, and its first lines as milliseconds and calls for each of `steps`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if work.device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(times):
            run()
    averages = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in averages)
    first = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:rows]
    text = averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40)
    return text, [{"name": e.key, "ms": round(e.self_cpu_time_total / 1000 / steps, 3), "calls": round(e.count / steps, 1),
                   "share": round(e.self_cpu_time_total / total, 3)} for e in first]


def profile(place: str, size: Callable[[Work], Work], rows: int = 20) -> dict:
    """Profiles a training step in both precisions and decoding at both batch sizes; prints, and gives the numbers."""
    device.tune_cpu(2)
    found = {}
    for dtype in ("auto", "float32"):
        for vocab in (65, 4096):
            work = size(Work(kind="train", side="ours", dtype=dtype, vocab=vocab, device=place))
            chosen, cfg = device.choose(place, dtype).dtype, work.config()
            _, step = training(work)
            took = [seconds(work, step) for _ in range(work.warmup + work.steps)][work.warmup:]
            speed = product_speed(work, chosen)
            flops = 3 * cfg.flops_per_token(work.seq) * work.batch * work.seq      # the backward pass is two of the forward
            text, top = profiled(work, step, 3, 3, rows)
            found[f"training step, {dtype}, vocabulary {vocab}"] = show({
                "dtype": str(chosen).removeprefix("torch."), "ms": round(statistics.median(took) * 1000, 2),
                "floor_ms": round(flops / speed * 1000, 2), "gflop": round(flops / 1e9, 2),
                "product_gflop_per_second": round(speed / 1e9, 1), "operators": top},
                f"training step, {dtype}, vocabulary {vocab}: matrix products alone", text)
    for batch in (1, 16):
        work = size(Work(kind="generate", side="ours", vocab=4096, batch=batch, device=place))
        _, write = generation(work)
        write()
        took = [seconds(work, write) / work.new for _ in range(3)]
        speed, amount = read_speed(work), bytes_per_step(work.config(), work.batch, work.prompt + work.new / 2)
        text, top = profiled(work, write, 1, work.new, rows)
        found[f"decoding step, batch {batch}"] = show({
            "dtype": "float32", "ms": round(statistics.median(took) * 1000, 3), "floor_ms": round(amount / speed * 1000, 3),
            "mb_read": round(amount / 1e6, 2), "sum_gb_per_second": round(speed / 1e9, 2), "operators": top},
            f"decoding step, batch {batch}: reading the weights and the cache alone", text)
    return found


def show(entry: dict, what: str, text: str) -> dict:
    print(f"{text}\n{what} {entry['floor_ms']} ms, measured {entry['ms']} ms "
          f"({entry['floor_ms'] / entry['ms']:.0%}); " + ", ".join(
              f"{k} {v}" for k, v in entry.items() if k not in ("ms", "floor_ms", "operators")) + "\n", flush=True)
    return entry
