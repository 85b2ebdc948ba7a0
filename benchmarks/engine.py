"""How fast is the engine, next to a dense layer, to transformers' Mixtral and to our own dense twin?

    python benchmarks/engine.py                     the whole table, about an hour; writes benchmarks/results/engine.json
    python benchmarks/engine.py --only generate     one part of it; the other parts of the file stay
    python benchmarks/engine.py --profile           where our time goes, and the least that it could be, into the same file
    python benchmarks/engine.py --quick             tiny sizes, one round: whether it runs; writes only where --out says

Every side runs in a process of its own. In each round all sides of a part run one after the other, in every other round
backwards, so that a machine that slows down or speeds up is even to both. A ratio, ours over theirs, is taken within each
round; its median over the rounds is what counts, with the lowest and the highest beside it.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from engine_sides import THEIRS, Work, measure

RESULT = Path(__file__).parent / "results" / "engine.json"
PARTS = ("experts", "train", "generate", "memory")
QUICK = {"dim": 32, "layers": 2, "heads": 4, "hidden": 32, "seq": 32, "batch": 2, "tokens": 64, "prompt": 4, "new": 8,
         "warmup": 1, "steps": 1}
LOWER = ("experts", "memory")       # less is better: time of a layer, memory; else tokens per second


@dataclass(frozen=True)
class Row:
    """One line of the table. Of several rivals the fastest counts. `target` is None where a figure is only reported."""

    part: str
    what: str
    against: str
    ours: Work
    rivals: tuple[Work, ...]
    target: float | None = None

    @property
    def unit(self) -> str:
        return {"experts": "ms", "memory": "MB"}.get(self.part, "tokens/s")

    def met(self, ratio: float) -> bool | None:
        if self.target is None:
            return None
        return ratio <= self.target if self.part in LOWER else ratio >= self.target


def untuned(works: tuple[Work, ...]) -> tuple[Work, ...]:
    return tuple(replace(w, tuned=False) for w in works)


def twice(part: str, what: str, against: str, ours: Work, rivals: tuple[Work, ...], target: float | None) -> list[Row]:
    """The rivals as they come, and again with the allocator settings that ours has by default."""
    return [Row(part, what, f"{against}, as it comes", ours, untuned(rivals), target),
            Row(part, what, f"{against}, same allocator", ours, rivals, target)]


def expert_rows() -> list[Row]:
    rows = []
    for experts, k, hidden, fixed, anew in ((8, 2, 512, 1.06, 1.12), (64, 8, 64, 1.36, 1.55)):
        base = Work(kind="experts", side="ours", experts=experts, top_k=k, hidden=hidden, warmup=3, steps=10)
        for dtype, goals in (("float32", (fixed, anew)), ("bfloat16", (None, None))):
            settings = (("one routing, 1 thread, CPU time", {"threads": 1, "clock": "cpu"}, goals[0]),
                        ("routing anew, 2 threads", {"fresh": True}, goals[1]))
            for text, change, goal in settings:
                ours = replace(base, dtype=dtype, **change)
                rows += twice("experts", f"expert layer, {experts} top-{k} x {hidden}, {dtype}, {text}",
                              f"dense layer {k * hidden} wide", ours, (replace(ours, side="dense"),), goal)
    return rows


def train_rows() -> list[Row]:
    rows = []
    for vocab in (65, 4096):
        ours = Work(kind="train", side="ours", vocab=vocab, dtype="auto")
        ours32 = replace(ours, dtype="float32")
        mixtral = lambda dtype, ours=ours: tuple(replace(ours, side=way, dtype=dtype) for way in THEIRS)
        what = f"training step, vocabulary {vocab}"
        rows += twice("train", what, "Mixtral, float32", ours, mixtral("float32"), 1.6)
        rows += twice("train", what, "Mixtral, bfloat16", ours, mixtral("bfloat16"), 1.35)
        rows += twice("train", f"{what}, float32", "Mixtral, float32", ours32, mixtral("float32"), 0.95)
        rows += twice("train", f"our dense twin, vocabulary {vocab}, float32", "Mixtral, float32",
                      replace(ours32, side="twin"), mixtral("float32"), None)
        rows.append(Row("train", what, "our dense twin", ours, (replace(ours, side="twin"),), 0.85))
        rows.append(Row("train", f"{what}, float32", "our dense twin, float32", ours32, (replace(ours32, side="twin"),)))
    return rows


def generate_rows() -> list[Row]:
    rows = []
    for batch, goal in ((1, 2.2), (16, 1.4)):
        ours = Work(kind="generate", side="ours", vocab=4096, batch=batch, warmup=1, steps=3)
        mixtral = tuple(replace(ours, side=way) for way in THEIRS)
        small = replace(ours, dtype="bfloat16")
        rows += twice("generate", f"generation, batch {batch}", "Mixtral", ours, mixtral, goal)
        rows.append(Row("generate", f"generation, batch {batch}, bfloat16 weights", "Mixtral, bfloat16 weights, as it comes",
                        small, untuned(tuple(replace(w, dtype="bfloat16") for w in mixtral))))
    return rows


def memory_rows() -> list[Row]:
    rows = []
    for vocab in (65, 4096):
        base = Work(kind="train", side="ours", vocab=vocab, dtype="auto", steps=4)
        mixtral = tuple(replace(base, side=way, dtype="float32") for way in THEIRS)
        for dtype, goals in (("auto", (1.0, 0.8)), ("float32", (None, None))):
            for recompute, goal in zip(("none", "experts"), goals):
                what = f"memory of training, vocabulary {vocab}" + (", float32" if dtype == "float32" else "")
                rows += twice("memory", what + (", recompute experts" if recompute == "experts" else ""),
                              "Mixtral, float32", replace(base, dtype=dtype, recompute=recompute), mixtral, goal)
    return rows


def on_gpu(rows: list[Row]) -> list[Row]:
    """The same table in bfloat16: no allocator to set, no CPU clock, and what is then the same is told once."""
    change = lambda w: replace(w, device="cuda", dtype="bfloat16", tuned=True, threads=2, clock="wall")
    text = lambda t: t.replace("float32", "bfloat16").replace(", as it comes", "").replace(", 1 thread, CPU time", "").replace(
        ", 2 threads", "")
    found = {}
    for row in rows:
        row = replace(row, what=text(row.what), against=text(row.against), ours=change(row.ours),
                      rivals=tuple(change(w) for w in row.rivals))
        found.setdefault((row.part, row.ours, row.rivals), row)
    return list(found.values())


def shrink(work: Work) -> Work:
    small = replace(work, **QUICK, vocab=min(work.vocab, 128))
    return replace(small, top_k=2, experts=min(work.experts, 16), batch=min(work.batch, 2), threads=1)


def in_own_process(work: Work) -> dict:
    command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(work))]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env)
    if done.returncode:
        raise SystemExit(f"{work.name()} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(rows: list[Row], rounds: int, quick: bool, say: Callable[[str], None]) -> list[dict]:
    """Measures every side of a part and gives its lines."""
    works = list(dict.fromkeys(w for row in rows for w in (row.ours, *row.rivals)))
    found: dict[Work, list[dict]] = {w: [] for w in works}
    key = "memory" if rows[0].part == "memory" else "value"
    for number in range(rounds):
        for i, work in enumerate(works if number % 2 == 0 else works[::-1]):
            # a process of its own costs seconds and makes figures true; --quick wants neither, but tries it once
            found[work].append(measure(work) if quick and i else in_own_process(work))
            say(f"round {number + 1}: {work.name()}: {found[work][-1][key]:.1f} {rows[0].unit}")
        for row in rows:
            check_greedy(row, found)
    return [line(row, found, key) for row in rows]


def check_greedy(row: Row, found: dict[Work, list[dict]]) -> None:
    """In float32 the same weights must write the same text on both sides, or the speeds compare different work."""
    for rival in row.rivals:
        a, b = found[row.ours][-1].get("tokens"), found[rival][-1].get("tokens")
        if row.ours.dtype == rival.dtype == "float32" and a != b:
            raise SystemExit(f"{row.what}: {rival.name()} wrote other greedy tokens: {agreement(a, b):.1%} are the same")


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of places at which two batches of token ids are the same."""
    pairs = [(x, y) for row_a, row_b in zip(a, b) for x, y in zip(row_a, row_b)]
    return sum(x == y for x, y in pairs) / len(pairs)


def line(row: Row, found: dict[Work, list[dict]], key: str) -> dict:
    best = min if row.part == "experts" else max
    rival = best(row.rivals, key=lambda w: statistics.median(r["value"] for r in found[w]))
    figures = {w: [round(r[key], 3) for r in found[w]] for w in (row.ours, *row.rivals)}
    ratios = [a[key] / b[key] for a, b in zip(found[row.ours], found[rival])]
    ratio = statistics.median(ratios)
    result = {"what": row.what, "against": row.against, "unit": row.unit, "better": "lower" if row.part in LOWER else "higher",
              "target": row.target, "ratio": round(ratio, 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3),
              "met": row.met(round(ratio, 3)), "fastest": rival.side,
              "ours": statistics.median(figures[row.ours]), "theirs": statistics.median(figures[rival]),
              "raw": {w.name(): values for w, values in figures.items()}}
    details = {w.side: found[w][0] for w in (row.ours, rival)}
    for name in ("loss", "first_loss", "params", "dtype", "memory_before", "resident_before", "different_tokens"):
        if name in found[row.ours][0]:
            result[name] = {side: values[name] for side, values in details.items()}
    if row.part == "generate":
        # against the same model's text in float32, where that was asked for too
        plain = {replace(w, tuned=True): found[w][0]["tokens"] for w in found if w.dtype == "float32"}
        text = {w: plain.get(replace(w, dtype="float32", tuned=True)) for w in (row.ours, rival)}
        result["same_tokens_as_float32"] = {w.side: t and round(agreement(found[w][0]["tokens"], t), 4) for w, t in text.items()}
        result["same_tokens"] = round(agreement(*(values["tokens"] for values in details.values())), 4)
    return result


def table(lines: list[dict]) -> str:
    text = ["| what | against | ours | theirs | ratio (lowest to highest) | to reach | met |", "|---|---|---|---|---|---|---|"]
    for x in lines:
        goal = "reported" if x["target"] is None else f"at {'most' if x['better'] == 'lower' else 'least'} {x['target']}"
        notes = ""
        if "same_tokens" in x:
            share = x["same_tokens_as_float32"]
            notes = ", the same tokens" if x["same_tokens"] == 1 else \
                f", {x['same_tokens']:.0%} the same tokens ({' and '.join(f'{s or 0:.0%}' for s in share.values())} as in float32)"
        figure = lambda v: f"{v:,.1f}" if v < 1000 else f"{v:,.0f}"
        rival = f" ({x['fastest']})" if x["fastest"] in THEIRS else ""
        text.append(f"| {x['what']} | {x['against']}{rival}{notes} | {figure(x['ours'])} {x['unit']} | {figure(x['theirs'])} "
                    f"| {x['ratio']:.2f} ({x['low']:.2f} to {x['high']:.2f}) | {goal} "
                    f"| {'' if x['met'] is None else 'yes' if x['met'] else 'no'} |")
    return "\n".join(text)


def machine(place: str) -> dict:
    """What the numbers were made on: no names of hosts or users."""
    info, flags = {"cpu": platform.processor() or platform.machine()}, ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = {k.strip(): v.strip() for k, _, v in (text.partition(":") for text in lines)}
        info["cpu"], flags = fields.get("model name", info["cpu"]), fields.get("flags", "")
    if place == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
    return info | {"cores": os.cpu_count(), "avx512_bf16": "avx512_bf16" in flags.split(),
                   "amx": "amx_bf16" in flags.split(), "system": platform.system()}


def versions() -> dict:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in ("torch", "transformers")}


def store(out: Path, place: str, part: str, content: dict, what: str = __doc__.split("\n")[0]) -> None:
    """Replaces one part of the file. Parts that another machine or other versions measured are dropped, not mixed in."""
    whole = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    about = {"machine": machine(place), "versions": versions()}
    record = whole if place == "cpu" else whole.get("gpu")
    if not isinstance(record, dict) or any(record.get(k) != v for k, v in about.items()):
        record = about
    record.setdefault("parts", {})[part] = content
    if place == "cpu":
        whole = {"what": what} | record | {"gpu": whole.get("gpu", "not run on a GPU")}
    else:
        whole["gpu"] = record
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_suffix(".part")
    scratch.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    scratch.replace(out)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--profile", action="store_true", help="profile our training and decoding step instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name} in results/, with --quick nowhere")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(measure(Work(**json.loads(args.worker)))))
        return
    place = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    out, started, lines = args.out or (None if args.quick else RESULT), time.perf_counter(), []
    about = {"date": datetime.date.today().isoformat(), "command": shlex.join(["python", "benchmarks/engine.py", *argv])}
    keep = lambda part, content: out and store(out, place, part, about | content)
    if args.profile:
        from engine_profile import profile

        keep("profile", profile(place, shrink if args.quick else lambda w: w))
        return
    makers = {"experts": expert_rows, "train": train_rows, "generate": generate_rows, "memory": memory_rows}
    for part in args.only:
        rows, rounds = makers[part](), 1 if args.quick else args.rounds
        rows = on_gpu(rows) if place == "cuda" else rows
        if args.quick:
            rows = [replace(r, ours=shrink(r.ours), rivals=tuple(map(shrink, r.rivals))) for r in rows]
        found = run(rows, rounds, args.quick, lambda text: print(text, file=sys.stderr, flush=True))
        if args.quick:          # targets are for the real sizes
            found = [x | {"met": None} for x in found]
        keep(part, {"rounds": rounds, "rows": found})
        lines += found
    print(table(lines))
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
