"""Does our tokenizer cost anything over the library that it stands on?

    python benchmarks/tokenizer.py              writes benchmarks/results/tokenizer.json, about five minutes
    python benchmarks/tokenizer.py --quick      a twentieth of the text, one round: whether it runs; prints only

Trains a byte-level vocabulary of 4,096 tokens on 5 MB of text (the interpreter's own library sources) and encodes all of
it, with minimoe and with direct calls of `tokenizers`. Both sides read the same documents, in the same process, one after
the other, in every other round backwards; what is compared is the processor time of each round, ours over theirs, with the
wall time beside it. The ids must be the same.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimoe.data.tokenizer import SPECIALS, Tokenizer

RESULT = Path(__file__).parent / "results" / "tokenizer.json"
VOCAB, TARGET = 4096, 1.2


def documents(size: int) -> list[str]:
    """Library sources of `size` characters in all."""
    texts, left = [], size
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if left and "site-packages" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace")[:left])
            left -= len(texts[-1])
    return [t for t in texts if t]


def ours(texts: list[str]) -> dict[str, Callable]:
    return {"train": lambda: Tokenizer.bpe(iter(texts), VOCAB), "encode": lambda t: list(t.arrays(texts))}


def theirs(texts: list[str]) -> dict[str, Callable]:
    def train() -> tokenizers.Tokenizer:
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        inner.train_from_iterator(iter(texts), trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=list(SPECIALS), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return inner

    return {"train": train, "encode": lambda t: [np.array(e.ids, dtype=np.int32) for e in
                                                 t.encode_batch_fast(texts, add_special_tokens=False)]}


def timed(call: Callable) -> tuple[dict[str, float], object]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}, result


def measure(texts: list[str], rounds: int) -> list[dict]:
    sides, raw = {"ours": ours(texts), "theirs": theirs(texts)}, []
    for number in range(rounds):
        row = {}
        for name in sorted(sides, reverse=number % 2 == 1):
            seconds, tokenizer = timed(sides[name]["train"])
            more, ids = timed(lambda: sides[name]["encode"](tokenizer))         # noqa: B023
            row[name] = {"train": seconds, "encode": more}
            row.setdefault("ids", []).append(ids)
        if any((a != b).any() for a, b in zip(*row.pop("ids"), strict=True)):
            raise SystemExit("the two sides gave different ids")
        raw.append(row)
        print(f"round {number + 1} of {rounds}: " + json.dumps(row), file=sys.stderr)
    return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the text, one round, nothing written")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--out", type=Path, default=RESULT, help="file to write")
    args = parser.parse_args()
    texts = documents(250_000 if args.quick else 5_000_000)
    raw, rows = measure(texts, 1 if args.quick else args.rounds), []
    for clock in ("cpu", "wall"):
        for what in ("train", "encode", "both"):
            parts = ("train", "encode") if what == "both" else (what,)
            total = {side: [sum(r[side][p][clock] for p in parts) for r in raw] for side in ("ours", "theirs")}
            ratios = [a / b for a, b in zip(total["ours"], total["theirs"])]
            rows.append({"what": what, "clock": clock, "unit": "s", "target": TARGET, "ratio": statistics.median(ratios),
                         "low": min(ratios), "high": max(ratios), "met": statistics.median(ratios) <= TARGET}
                        | {side: statistics.median(values) for side, values in total.items()})
            print("{what:<7}{clock:<5} ours {ours:6.2f} s  theirs {theirs:6.2f} s  ratio {ratio:.3f} ({low:.3f} to {high:.3f})"
                  .format(**rows[-1]))
    if not args.quick:
        result = {"command": f"python {shlex.join(['benchmarks/tokenizer.py', *sys.argv[1:]])}",
                  "date": datetime.date.today().isoformat(), "characters": sum(map(len, texts)), "documents": len(texts),
                  "vocabulary": VOCAB, "machine": {"cores": os.cpu_count(), "system": platform.system(), "arch": platform.machine()},
                  "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in ("tokenizers", "numpy")}},
                  "rows": rows, "raw": raw}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
