"""Does a score of multiple choice mean something? The shipped model against itself with shuffled weights (chapter 11).

    python benchmarks/evaluate.py             ten shuffles; writes benchmarks/results/evaluate.json
    python benchmarks/evaluate.py --quick     the same code in a minute; prints, writes only where --out says

Shuffled is the same model in which every tensor keeps its values and loses their places: it knows nothing, but has all the
habits (of length, of place, of frequent words) that numbers of this size can give. Each shuffle is asked questions of its
own. Settled before the first run: trained must exclude chance on two tasks at least, shuffled, pooled, must contain it on all.
After a first run one rule about questions was added, and all was run again with other seeds (LOG.md).

What `minimoe evaluate` reports is the interval over questions. The questions of a group share their answers, so beside it
stands the interval over whole groups.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import os
import random
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from engine import store

from minimoe.checkpoint import Run, load
from minimoe.evaluate import interval
from minimoe.evaluate.choices import GROUP
from minimoe.evaluate.results import markdown
from minimoe.evaluate.tasks import find

RESULT = Path(__file__).parent / "results" / "evaluate.json"
TASKS = ("continuation", "next_word", "arithmetic_choice", "letters_choice")


@torch.no_grad()
def shuffled(run: Run, seed: int) -> Run:
    """The same run with the values of each parameter in another order."""
    model, g = copy.deepcopy(run.model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(p.flatten()[torch.randperm(p.numel(), generator=g)].view_as(p))
    return dataclasses.replace(run, model=model)


def ask(run: Run, seed: int, questions: int) -> dict[tuple[str, str], list[float]]:
    """The score of every question, by task and metric."""
    found = {}
    for task in TASKS:
        measured = find(task).function(run, random.Random(f"{seed} {task}"), questions)
        found |= {(task, s.metric): list(s.values) for s in measured.scores}
    return found


def row(model: str, key: tuple[str, str], runs: list[list[float]]) -> dict:
    """Pooled over the runs, with both intervals."""
    scores = np.array(sum(runs, []))
    low, high = interval(scores)
    groups = interval(scores.reshape(-1, GROUP).mean(1))
    return {"model": model, "task": key[0], "metric": key[1], "value": round(float(scores.mean()), 4), "low": round(low, 4),
            "high": round(high, 4), "over_groups": [round(x, 4) for x in groups], "n": len(scores), "chance": 1 / GROUP,
            "half_width": round((high - low) / 2, 4), "contains_chance": bool(low <= 1 / GROUP <= high),
            "each": [round(float(np.mean(r)), 4) for r in runs]}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--questions", type=int, default=400, help="of each task, and of each shuffle; trained is asked 600")
    parser.add_argument("--quick", action="store_true", help="two shuffles, 40 questions")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name} in results/, with --quick nowhere")
    args = parser.parse_args(argv)
    shuffles, questions, trained = (2, 40, 40) if args.quick else (args.shuffles, args.questions, 600)
    run, out, started = load("shipped"), args.out or (None if args.quick else RESULT), time.process_time()
    rows = [row("trained", key, [scores]) for key, scores in ask(run, 0, trained).items()]
    found = []
    for seed in range(1, shuffles + 1):
        found.append(ask(shuffled(run, seed), seed, questions))
        print(f"shuffle {seed} of {shuffles}: {time.process_time() - started:.0f} CPU s", file=sys.stderr, flush=True)
    rows += [row("shuffled", key, [f[key] for f in found]) for key in found[0]]
    print(markdown(["model", "task", "metric", "value", "95 %, questions", "95 %, groups", "n", "contains chance"],
                   [[r["model"], r["task"], r["metric"], f"{r['value']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}",
                     "{:.3f} to {:.3f}".format(*r["over_groups"]), f"{r['n']:,}", "yes" if r["contains_chance"] else "no"] for r in rows],
                   right=(3, 6)))
    if out:
        about = {"date": datetime.date.today().isoformat(), "threads": int(os.environ.get("OMP_NUM_THREADS", 2)),
                 "cpu_seconds": round(time.process_time() - started), "command": shlex.join(["python", "benchmarks/evaluate.py", *argv])}
        store(out, "cpu", "shuffled", about | {"shuffles": shuffles, "rows": rows}, __doc__.split("\n")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
