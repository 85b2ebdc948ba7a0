"""Which choice bought what: from switch-small to optimal-small, one key at a time (the systems page, chapter 14).

    MINIMOE_DATA=<folder with tinyshakespeare.txt> python benchmarks/ladder.py                  forwards, three seeds
    MINIMOE_DATA=<the same> python benchmarks/ladder.py --backwards                             the same keys, last one first
    python benchmarks/ladder.py --quick                              the same code on generated text in a few minutes

Each rung keeps what the rungs before it changed. All runs read the same bytes of training text, those of --steps steps of
the first rung, and are measured on the same held-out text. Order matters: a key that buys nothing early may buy something
late, which is why there is a way back. Stopped by Ctrl-C or otherwise, the same command goes on where it was.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

from minimoe.checkpoint import write_safely
from minimoe.compare import Comparison, compare, equal_cost, mean_interval, shown
from minimoe.compare_figure import si
from minimoe.config import Config, load_config
from minimoe.settings import need, to_dict

ROOT = Path(__file__).parents[1]
FIRST, LAST = "switch-small", "optimal-small"

# In this order forwards. Keys that make no sense apart are one rung: a gated expert has three matrices where GELU has two, so
# its hidden size is two thirds; the one weight of top-1 must stay a probability, or the router gets no gradient.
RUNGS = (("positions",), ("tie_embeddings",), ("n_kv_heads",), ("qk_norm",), ("activation", "expert_hidden", "dense_hidden"),
         ("init_std",), ("capacity_factor",), ("moe_every",), ("n_experts",), ("top_k", "norm_topk"),
         ("balance",), ("z_coef",), ("tokenizer",))


def key_of(config: Config, key: str) -> object:
    return next(section[key] for section in to_dict(config).values() if key in section)


def with_keys(config: Config, source: Config, keys: tuple[str, ...]) -> Config:
    """`config` with those keys as they are in `source`."""
    for section in ("model", "train", "data"):
        mine, theirs = getattr(config, section), getattr(source, section)
        found = {k: getattr(theirs, k) for k in keys if hasattr(theirs, k)}
        config = dataclasses.replace(config, **{section: dataclasses.replace(mine, **found)})
    return config


def ladder(first: Config, last: Config, rungs: tuple[tuple[str, ...], ...] = RUNGS) -> dict[str, Config]:
    """The configs by name, from `first` to `last`; ConfigError where the rungs do not lead there, or one changes nothing."""
    result, config = {"start": first}, first
    for number, keys in enumerate(rungs, 1):
        before, config = config, with_keys(config, last, keys)
        need(config != before, f"rung {keys[0]}: both ends have the same")
        result[f"{number:02d} {keys[0]}={key_of(config, keys[0])}"] = config
    left = [k for section, values in to_dict(config).items() for k, v in values.items()
            if section != "generate" and v != to_dict(last)[section][k]]
    need(not left, f"the rungs leave out {', '.join(left)}: name them in RUNGS, or make both ends equal in them")
    return result


def steps_table(result: Comparison) -> tuple[list[dict], str]:
    """What each rung changed in bits per byte against the one below it, paired by seed, and the verdict in words."""
    rows, lines = [], ["| rung | bits per byte | less that of the rung below | | MaxVio | tokens/s | peak memory |",
                       "| --- | ---: | ---: | --- | ---: | ---: | ---: |"]
    average = lambda values: sum(values) / len(values)
    for below, e in zip((None, *result.entries), result.entries):
        change = result.difference(e.name, below.name) if below else (0.0, None)
        sure = change[1] is not None and abs(change[0]) > change[1]
        verdict = ("" if below is None else "one seed: not judged" if change[1] is None else
                   "buys nothing that these seeds can tell" if not sure else "better" if change[0] < 0 else "worse")
        rows.append({"rung": e.name, "bpb": e.bpb, "change": change[0], "interval": change[1], "verdict": verdict,
                     "max_vio": e.max_vio, "tokens_per_s": e.tokens_per_s, "memory": e.memory,
                     "steps": e.config.train.steps, "bytes": e.cost, "total": e.total, "active": e.active})
        lines.append(f"| {e.name} | {shown(*mean_interval(e.bpb))} | {shown(*change, '+') if below else ''} | {verdict} | "
                     f"{average(e.max_vio):.2f} | {average(e.tokens_per_s):,.0f} | "
                     + (si(max(e.memory)) + "B" if None not in e.memory else "") + " |")
    return rows, "\n".join(lines)


def machine() -> dict[str, object]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    return {"system": platform.system(), "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backwards", action="store_true", help="from optimal-small to switch-small")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rung; default 3")
    parser.add_argument("--steps", type=int, default=240, help="steps of switch-small, whose bytes every run reads; default 240")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default PyTorch's choice")
    parser.add_argument("--mixture", help="other text: a corpus name or a file; default the configs' own")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 6 steps, generated text: to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the runs; default runs/ladder, runs/ladder-backwards")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.steps, args.mixture = 2, 6, args.mixture or "worlds"
    name = "ladder-backwards" if args.backwards else "ladder"
    out = args.out or Path("runs") / (name + "-quick" * args.quick)
    ends = []
    for end in (FIRST, LAST):
        config = load_config(ROOT / "configs" / f"{end}.yaml")
        train = dataclasses.replace(config.train, steps=args.steps, warmup=max(1, args.steps // 10),
                                    eval_every=0 if args.quick else max(1, args.steps // 3), threads=args.threads)
        data = dataclasses.replace(config.data, mixture=args.mixture) if args.mixture else config.data
        ends.append(dataclasses.replace(config, train=train, data=data))
    if args.backwards:          # the same bytes as forwards: this first rung reads what the last one there did
        train = equal_cost(dict(zip((FIRST, LAST), ends)), "bytes", dense=False)[0][LAST].train
        climb = ladder(*(dataclasses.replace(end, train=train) for end in ends[::-1]), RUNGS[::-1])
    else:
        climb = ladder(*ends)
    started = time.perf_counter()
    result = compare(climb, out=out, equal="bytes", seeds=args.seeds, say=lambda line: print(line, flush=True))
    rows, table = steps_table(result)
    whole = result.difference(result.entries[-1].name, result.entries[0].name)
    seconds = time.perf_counter() - started
    title = f"From {FIRST} to {LAST}" if not args.backwards else f"From {LAST} to {FIRST}"
    text = (f"# {title}, one key at a time\n\n{args.seeds} seeds, {si(result.entries[0].cost)}B of training text read by every "
            f"run, the same held-out text. ± is a 95 % t interval of the difference, paired by seed.\n\n{table}\n\n"
            f"From the first rung to the last: {shown(*whole, '+')} bits per byte.\n")
    record = {"date": f"{datetime.date.today()}", "command": shlex.join(["python", "benchmarks/ladder.py", *(argv or sys.argv[1:])]),
              "machine": machine(), "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "wall_seconds": round(seconds), "seeds": result.seeds, "from_first_to_last": whole, "rungs": rows,
              "configs": {e.name: to_dict(e.config) for e in result.entries[:1] + result.entries[-1:]}}
    results = out if args.quick else ROOT / "benchmarks" / "results"
    for suffix, content in (("json", json.dumps(record, indent=1) + "\n"), ("md", text), ("svg", result.svg() + "\n")):
        write_safely(results / f"{name}.{suffix}", lambda p, content=content: p.write_text(content, encoding="utf-8"))
    print(f"\n{text}\n{seconds:.0f} s; wrote {results / name}.json, .md and .svg")


if __name__ == "__main__":
    main()
