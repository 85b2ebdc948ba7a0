"""Models against each other at equal cost, on the same held-out text, over several seeds (chapters 5, 8 and 14).

    DIR/<name>/seed<n>/    a run folder each, with compare.json when it is finished
    DIR/compare.json  compare.md  compare.svg

Runs that are finished are not run again, and one that was interrupted goes on from its newest checkpoint.
"""
from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import numpy as np
import torch

from minimoe.checkpoint import write_safely
from minimoe.compare_figure import draw, si
from minimoe.config import Config, differences, load_config
from minimoe.data.loader import TextData, load_data
from minimoe.settings import need, to_dict
from minimoe.start import train_from_config

Equal = Literal["bytes", "flops", "active"]
MEASURES = {"bytes": "bytes of text read", "flops": "training FLOPs", "active": "active parameters x tokens"}
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)      # Student's t, 1 to 10 degrees of freedom


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of a comparison. What is a tuple has one value per seed: held-out bits per byte at the end, MaxVio (mean
    over the MoE layers, and over the rows logged in the last fifth of the run), training tokens a second, peak memory of
    the process in bytes (of the device on CUDA; None where the system does not tell), and the held-out bits per byte on the
    way, as pairs of (cost, bits per byte)."""

    name: str
    config: Config
    cost: float
    total: int
    active: int
    bpb: tuple[float, ...]
    max_vio: tuple[float | None, ...]
    tokens_per_s: tuple[float, ...]
    memory: tuple[int | None, ...]
    curves: tuple[tuple[tuple[float, float], ...], ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: `entries` in the order given, the first one being what the others are compared with."""

    entries: tuple[Entry, ...]
    equal: Equal
    seeds: tuple[int, ...]

    def difference(self, name: str, to: str) -> tuple[float, float | None]:
        """Bits per byte of `name` less those of `to`, paired by seed: mean, and half of the 95 % interval."""
        bpb = {e.name: e.bpb for e in self.entries}
        return mean_interval([a - b for a, b in zip(bpb[name], bpb[to])])

    def table(self) -> str:
        """The comparison as a Markdown table, with what its numbers mean below it."""
        first = self.entries[0].name
        head = ("", "parameters", "active", "steps", MEASURES[self.equal], "bits per byte", f"less that of {first}", "MaxVio",
                "tokens/s", "peak memory")
        lines = [head, ("---", *["---:"] * (len(head) - 1))]
        for e in self.entries:
            vio, memory = ([v for v in values if v is not None] for values in (e.max_vio, e.memory))
            lines.append((e.name, f"{e.total:,}", f"{e.active:,}", f"{e.config.train.steps:,}", si(e.cost),
                          shown(*mean_interval(e.bpb)), "" if e.name == first else shown(*self.difference(e.name, first), "+"),
                          f"{mean(vio):.2f}" if vio else "", f"{mean(e.tokens_per_s):,.0f}",
                          si(max(memory)) + "B" if memory else ""))
        spread = ("± is a 95 % t interval over the seeds, differences paired by seed." if len(self.seeds) > 1 else
                  "One seed has no interval: a difference may be chance.")
        note = (f"Held-out text, the same for all, after equal {MEASURES[self.equal]} to the nearest step; "
                f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}. {spread}")
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"

    def svg(self) -> str:
        """Held-out bits per byte on the way, mean over the seeds, and at the end with intervals."""
        rows = [(e.name, *mean_interval(e.bpb), [tuple(mean(axis) for axis in zip(*points)) for points in zip(*e.curves)])
                for e in self.entries]
        return draw(rows, MEASURES[self.equal], len(self.seeds))

    def save(self, folder: str | Path) -> None:
        """Writes compare.json, compare.md and compare.svg."""
        values = {"equal": self.equal, "seeds": self.seeds, "entries": [to_dict(e) for e in self.entries]}
        for name, text in (("json", json.dumps(values, indent=1)), ("md", self.table()), ("svg", self.svg())):
            write_safely(Path(folder) / f"compare.{name}", lambda p, text=text: p.write_text(text, encoding="utf-8"))


def compare(configs: Mapping[str, Config] | Sequence[str | Path], *, out: str | Path, equal: Equal = "bytes",
            dense: bool = False, seeds: int = 3, progress: bool = True,
            say: Callable[[str], None] = lambda line: None) -> Comparison:
    """Trains every config with every seed, all at the cost that the first one's steps come to, and measures them.

    `configs` are paths of YAML files, or Configs by name. `equal` is what the runs have in common, to the nearest step:
    "bytes" of training text read, tokens x the mean bytes per token of the mixture; "flops" of training, tokens x 3 x
    `flops_per_token` (backward counts twice forward; recomputation does not count); "active", active parameters x tokens.
    Warm-up and the steps between looks at the held-out text keep their share of the run. With `dense` each config is
    followed by its dense twins of equal active and of equal total parameters. Seeds count up from the first config's.
    Raises ConfigError where held-out texts differ, or a folder holds a run of other settings.

    >>> callable(compare)
    True
    """
    named = dict(configs) if isinstance(configs, Mapping) else {Path(p).stem: load_config(p) for p in configs}
    need(equal in MEASURES, f"equal={equal!r}: one of {', '.join(MEASURES)}")
    need(seeds >= 1, f"seeds={seeds}: at least 1")
    need(len(named) == len(configs), "two configs have the same name: rename one of the files")
    need(len(named) > 1 or dense and named, "nothing to compare with: name two configs or more, or ask for --dense")
    plan, data = equal_cost(named, equal, dense)
    out, found = Path(out), {name: [] for name in plan}
    first = next(iter(plan.values())).train.seed
    for seed in range(first, first + seeds):
        for name, config in plan.items():
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            folder = out / re.sub(r"[^\w.=+-]+", "_", name) / f"seed{seed}"
            finished = (folder / "compare.json").is_file()
            say(f"{name}, seed {seed}, {config.train.steps:,} steps" + (": finished before" if finished else ""))
            found[name].append(read(folder, config) if finished else run(folder, config, progress))
    entries = []
    for name, runs in found.items():
        per_step = cost_per_step(plan[name], data[plan[name].data], equal)
        curves = tuple(tuple((per_step * r["step"], r["val_bpb"]) for r in rows if "val_bpb" in r) for rows, _ in runs)
        ends = [rows[-1] for rows, _ in runs]
        entries.append(Entry(
            name=name, config=plan[name], cost=per_step * plan[name].train.steps, total=plan[name].model.num_params(),
            active=plan[name].model.active_params(), bpb=tuple(r["val_bpb"] for r in ends),
            max_vio=tuple(max_vio(rows) for rows, _ in runs), curves=curves, memory=tuple(memory for _, memory in runs),
            tokens_per_s=tuple(r["tokens"] / r["seconds"] for r in ends)))
    result = Comparison(tuple(entries), equal, tuple(range(first, first + seeds)))
    result.save(out)
    return result


def equal_cost(named: Mapping[str, Config], equal: Equal, dense: bool) -> tuple[dict[str, Config], dict]:
    """The configs with vocabulary, dense twins and lengths filled in, and the text of each data section."""
    plan, data, held_out = {}, {}, {}
    for name, config in named.items():
        if config.data not in data:
            data[config.data] = load_data(config.data)
        texts = data[config.data]
        held_out[name] = sorted(d.text for c in texts.corpora for d in c.held_out)
        first = next(iter(held_out))
        size, size_first = (sum(len(t.encode()) for t in held_out[n]) for n in (name, first))
        need(size > 0, f"{name}: its corpora hold out no text to measure on")
        need(held_out[name] == held_out[first], f"{first} and {name} hold out different texts ({size_first:,} and {size:,} "
             "bytes), so their bits per byte cannot be compared: give both the same corpora in mixture")
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or texts.tokenizer.vocab_size)
        plan[name] = dataclasses.replace(config, model=model)
        need(not dense or model.moe_layers, f"{name} is dense already: leave out --dense, or give it experts")
        for kind in ("active", "total") if dense else ():
            plan[f"{name}-dense-{kind}"] = dataclasses.replace(config, model=model.dense_twin(kind))
    need(all(isinstance(n, int) for c in plan.values() for n in (c.train.steps, c.train.batch_size)),
         "compare sets the lengths itself: give steps and batch_size as numbers")
    for name, c in plan.items():
        need(c.data.until == "all_exhausted" and c.train.parallel == "none", f"{name}: compare sets the lengths itself and runs in "
             "one process: leave out until: first_exhausted and parallel")
    costs = {name: cost_per_step(c, data[c.data], equal) for name, c in plan.items()}
    budget = next(iter(plan.values())).train.steps * next(iter(costs.values()))
    for name, config in plan.items():
        steps = round(budget / costs[name])
        need(steps >= 1, f"{name}: one step costs more than all of the first config's; give that one more steps")
        kept = {key: max(1, round(n * steps / config.train.steps)) for key in ("warmup", "eval_every")
                if isinstance(n := getattr(config.train, key), int) and n}
        plan[name] = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, **kept))
    return plan, data


def cost_per_step(config: Config, data: TextData, equal: Equal) -> float:
    """What one update costs in the measure `equal`; `compare` says how each is counted."""
    train, model = config.train, config.model
    seq_len = train.seq_len or model.max_seq_len
    tokens = train.batch_size * train.accumulate * seq_len
    if equal == "bytes":
        need(data.rows is None, "equal=bytes: of conversations only the answers are learned; take flops or active")
        need(all(c.train for c in data.corpora), "equal=bytes: how many bytes a token has is known of texts that are read whole, "
             "not of streams, shards or .npy files; take flops or active")
        per_token = [sum(len(d.text.encode()) for d in c.train) / len(s.tokens)
                     for c, s in zip(data.corpora, data.mixture.streams)]
        return tokens * float(np.average(per_token, weights=data.mixture.ratios))
    return tokens * (3 * model.flops_per_token(seq_len) if equal == "flops" else model.active_params())


def run(folder: Path, config: Config, progress: bool) -> tuple[list[dict], int | None]:
    """Trains, or goes on training; marks the folder as finished; its rows and the peak memory."""
    reset_peak_memory()
    train_from_config(config, folder, resume=True, progress=progress)
    if json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] < config.train.steps:
        raise KeyboardInterrupt                 # the trainer has saved; the same command goes on from there
    note = json.dumps({"peak_memory": peak_memory()})
    write_safely(folder / "compare.json", lambda p: p.write_text(note, encoding="utf-8"))
    return read(folder, config)


def read(folder: Path, config: Config) -> tuple[list[dict], int | None]:
    """The rows and the peak memory of a finished run, which must be one of these settings."""
    different = differences(load_config(folder / "config.yaml"), config)
    need(not different, f"{folder} holds a run with other settings: {'; '.join(different)}. Name another --out")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, json.loads((folder / "compare.json").read_text(encoding="utf-8"))["peak_memory"]


def max_vio(rows: list[dict]) -> float | None:
    """MaxVio over the last fifth of a run; None for a dense model.

    >>> max_vio([{"step": 1, "routing": [{"max_vio": 9.0}]}, {"step": 10, "routing": [{"max_vio": 1.0}, {"max_vio": 0.5}]}])
    0.75
    """
    late = [layer["max_vio"] for r in rows if r["step"] > 0.8 * rows[-1]["step"] for layer in r.get("routing", ())]
    return mean(late) if late else None


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval by Student's t; None where there is one value only.

    >>> mean_interval([1.0, 2.0, 3.0])          # 4.303 x 1 / sqrt(3)
    (2.0, 2.484...)
    """
    n = len(values)
    if n == 1:
        return values[0], None
    z, df = 1.959964, n - 1                     # beyond the table: Abramowitz & Stegun 26.7.5, two terms
    t = T_975[df - 1] if df <= len(T_975) else z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    return mean(values), t * stdev(values) / math.sqrt(n)


def shown(middle: float, half: float | None, sign: str = "") -> str:
    """A mean with its interval; a difference (`sign` "+") whose interval holds zero says so.

    >>> shown(1.5, 0.25), shown(0.1, 0.2, "+"), shown(0.1, None, "+")
    ('1.500 ± 0.250', '+0.100 ± 0.200 (holds 0)', '+0.100')
    """
    spread = "" if half is None else f" ± {half:.3f}"
    return f"{middle:{sign}.3f}{spread}" + (" (holds 0)" if sign and half is not None and abs(middle) <= half else "")


def reset_peak_memory() -> None:
    """Peak memory counts from here. What an earlier run freed is given back first, where the C library can."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except (AttributeError, OSError):       # another C library, or not allowed
            return


def peak_memory() -> int | None:
    """Bytes: allocated on the CUDA device, else resident in this process (Linux); None elsewhere."""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):
        return used
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
