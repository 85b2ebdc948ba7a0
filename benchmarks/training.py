"""How fast is training: seconds to a loss, the share of the loader, tokens per second, the start of a resumed run?

    MINIMOE_DATA=FOLDER python benchmarks/training.py       the whole table, about ten minutes on two quiet cores; FOLDER
                                                            holds tinyshakespeare.txt; writes results/training.json
    python benchmarks/training.py --only loader resume      some rows; the other rows of the file stay
    python benchmarks/training.py --quick                   a few steps of everything, for whether it runs; writes only
                                                            where --out says

Every side runs in a process of its own, the sides of a row take turns, and a ratio is taken between medians. Two threads,
or as many as OMP_NUM_THREADS says.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine import store
from training_sides import Work, measure

RESULT = Path(__file__).parent / "results" / "training.json"
GOAL = 1.898            # the loss that the baseline ends at
SEEDS = 5


def shakespeare_plan(quick: bool) -> list[Work]:
    """Five seeds of ours and of its dense twin, between two runs of the baseline."""
    ours = [Work(kind="shakespeare", side="ours", seed=s, steps=2 if quick else None) for s in range(1 if quick else SEEDS)]
    pairs = [work for w in ours for work in (w, replace(w, side="twin"))]
    baseline = [replace(ours[0], side="baseline", seed=s) for s in range(1 if quick else 2)]
    return baseline[:1] + pairs + baseline[1:]


def loader_plan(quick: bool) -> list[Work]:
    work = Work(kind="loader", side="ours", steps=1 if quick else 10, batches=8 if quick else 200)
    return [replace(work, batch=2, seq=32, tokenizer="bytes") if quick else work] * (1 if quick else 3)


def moellama_plan(quick: bool) -> list[Work]:
    ours = Work(kind="moellama", side="ours", steps=1 if quick else 6)
    ours = replace(ours, batch=2, seq=32) if quick else ours
    there, back = [ours, replace(ours, side="baseline")], [replace(ours, side="baseline"), ours]
    return there if quick else there + back + there


def resume_plan(quick: bool) -> list[Work]:
    if quick:
        return [Work(kind="resume", side="pydocs", seq=32, tokenizer="bytes")]
    return [Work(kind="resume", side=side) for side in ("moellama", "pydocs")] * 3


PLANS = {"shakespeare": shakespeare_plan, "loader": loader_plan, "moellama": moellama_plan, "resume": resume_plan}


def in_own_process(work: Work) -> dict:
    command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(work))]
    env = {"OMP_NUM_THREADS": "2"} | os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env)
    if done.returncode:
        raise SystemExit(f"{work} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> dict:
    return {"median": round(statistics.median(values), 4), "low": round(min(values), 4), "high": round(max(values), 4),
            "values": [round(v, 4) for v in values]}


def rows(kind: str, found: dict[str, list[dict]]) -> list[dict]:
    """The lines of the table that the figures of a kind make, by side; `better` lower or higher than `target`."""
    median = lambda side, key="value": statistics.median(f[key] for f in found[side])
    if kind == "shakespeare":
        lines, theirs = [], median("baseline")
        for side, text in (("ours", "configs/shakespeare.yaml"), ("twin", "its dense twin")):
            reached = sum(f["loss"] <= GOAL for f in found[side])
            lines.append({"what": f"seconds of training to a loss of {GOAL}, {text}", "against": "baseline (a), nanoGPT's recipe",
                          "ours": median(side), "theirs": theirs, "unit": "s", "ratio": median(side) / theirs,
                          "better": "lower", "target": 0.2 if side == "ours" else None,
                          "holds": median(side, "loss") <= GOAL if side == "ours" else None,
                          "note": f"loss {median(side, 'loss'):.3f} against {median('baseline', 'loss'):.3f}; {reached} of "
                                  f"{len(found[side])} seeds at most {GOAL}; {found[side][0]['tokens']:,} tokens against "
                                  f"{found['baseline'][0]['tokens']:,}"})
        return lines
    if kind == "loader":
        return [{"what": "loader, three sources packed to 256", "against": "the training step", "unit": "tokens/s",
                 "ours": median("ours", "loader_tokens_per_second"), "theirs": median("ours", "training_tokens_per_second"),
                 "ratio": median("ours"), "better": "lower", "target": 0.02, "note": "ratio: the loader's share of the time"}]
    if kind == "moellama":
        return [{"what": "moellama, training", "against": "baseline (b), a module and a mask per expert", "unit": "tokens/s",
                 "ours": median("ours"), "theirs": median("baseline"), "ratio": median("ours") / median("baseline"),
                 "better": "higher", "target": 3.0, "note": ""}]
    return [{"what": f"resume, {side}", "against": f"reading {found[side][0]['state_mb']:.0f} MB of state", "unit": "s",
             "ours": median(side, "start_seconds"), "theirs": median(side, "reading_seconds"), "ratio": median(side),
             "better": "lower", "target": 2.0, "note": "ratio: seconds more than reading"} for side in found]


def met(row: dict) -> bool | None:
    if row["target"] is None:
        return None
    good = row["ratio"] <= row["target"] if row["better"] == "lower" else row["ratio"] >= row["target"]
    return good and row.get("holds") in (None, True)


def table(lines: list[dict]) -> str:
    text = ["| what | against | ours | theirs | ratio | to reach | met | |", "|---|---|---|---|---|---|---|---|"]
    for x in lines:
        figure = lambda v: f"{v:,.2f}" if v < 1000 else f"{v:,.0f}"
        goal = "reported" if x["target"] is None else f"at {'most' if x['better'] == 'lower' else 'least'} {x['target']}"
        text.append(f"| {x['what']} | {x['against']} | {figure(x['ours'])} {x['unit']} | {figure(x['theirs'])} {x['unit']} "
                    f"| {x['ratio']:.3f} | {goal} | {'' if x['met'] is None else 'yes' if x['met'] else 'no'} | {x['note']} |")
    return "\n".join(text)


def run(kind: str, quick: bool, say: Callable[[str], None]) -> tuple[list[dict], dict]:
    """Measures one kind: its lines, and all figures by side."""
    found: dict[str, list[dict]] = {}
    for number, work in enumerate(PLANS[kind](quick)):
        # a process of its own costs seconds and makes figures true; --quick wants neither, but tries it once
        figures = measure(work) if quick and number else in_own_process(work)
        found.setdefault(work.side, []).append(figures)
        say(f"{kind}, {work.side}, seed {work.seed}: " + ", ".join(f"{k} {v:,.4g}" for k, v in figures.items()))
    lines = [row | {"met": None if quick else met(row)} for row in rows(kind, found)]       # targets are for real sizes
    return lines, {side: {key: spread([f[key] for f in figures]) for key in figures[0]} for side, figures in found.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=tuple(PLANS), nargs="+", default=tuple(PLANS))
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name} in results/, with --quick nowhere")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(measure(Work(**json.loads(args.worker)))))
        return
    out, started, lines = args.out or (None if args.quick else RESULT), time.perf_counter(), []
    about = {"date": datetime.date.today().isoformat(), "threads": int(os.environ.get("OMP_NUM_THREADS", 2)),
             "command": shlex.join(["python", "benchmarks/training.py", *argv])}
    for kind in args.only:
        found, sides = run(kind, args.quick, lambda text: print(text, file=sys.stderr, flush=True))
        if out:
            store(out, "cpu", kind, about | {"rows": found, "sides": sides}, __doc__.split("\n")[0])
        lines += found
    print(table(lines))
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
