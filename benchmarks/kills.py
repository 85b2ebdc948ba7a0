"""A run killed at random moments, many times: does the newest checkpoint load, and does the run end as if nothing had been?

    python benchmarks/kills.py [--kills 20] [--out FILE]

A model of 20 million parameters is saved after every step, some 250 MB, with a pause after each file, so that the saving
takes longer than the step and kills hit it also where a disk is fast. Each kill is a SIGKILL to a process of its own, at a moment drawn uniformly over the steps; then another
process resumes it. All weights, the optimizer's state and all rows but their times must equal the unbroken
run's bit for bit. At least half of the kills must leave an unfinished save behind, or the measurement says nothing.
Exit code 1 where anything of this does not hold. Needs about 2 GB of disk in the temporary folder.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from minimoe import checkpoint  # noqa: E402
from minimoe.checkpoint import load  # noqa: E402
from minimoe.config import ModelConfig, TrainConfig  # noqa: E402
from minimoe.model import MoETransformer  # noqa: E402
from minimoe.trainer import Trainer  # noqa: E402
from tests.kills import kill_after  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "kills.json"
MODEL = ModelConfig(vocab_size=2048, dim=256, n_layers=4, n_heads=4, max_seq_len=32, n_experts=8, top_k=2, expert_hidden=768,
                    dropout=0.1, router_noise=0.1)
TRAIN = TrainConfig(steps=10, batch_size=2, warmup=2, device="cpu", dtype="float32", threads=1, log_every=1, save_every=1)


PAUSE = 0.1             # seconds after each file of a save


def train(out: Path, resume: bool) -> None:
    write = checkpoint.write_safely
    checkpoint.write_safely = lambda *args: (write(*args), time.sleep(PAUSE))
    tokens = torch.randint(MODEL.vocab_size, (64, 33), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = MoETransformer(MODEL)
    Trainer(model, TRAIN, [(row[:-1], row[1:]) for row in tokens], out=out, progress=False).fit(resume=resume)


def child(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--child", str(out), *options]


def end_of(out: Path) -> tuple:
    """All that must be equal: the last checkpoint's files, and the rows without their times."""
    last = out / "checkpoints" / f"{TRAIN.steps:08d}"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return (*((last / name).read_bytes() for name in ("model.safetensors", "state/optimizer.safetensors")),
            [{k: v for k, v in row.items() if k != "seconds"} for row in rows])


def measure(kills: int, folder: Path) -> list[dict]:
    subprocess.run(child(folder / "whole"), check=True)
    whole = end_of(folder / "whole")
    shutil.rmtree(folder / "whole")
    draw, records = random.Random(0), []
    for number in range(kills):
        out, cycles = folder / str(number), draw.uniform(0, TRAIN.steps - 6)
        newest, unfinished = kill_after(child(out), out, cycles)
        loads = load(out, step=newest).model.cfg == MODEL
        subprocess.run(child(out, "--resume"), check=True)
        records.append({"cycles": round(cycles, 3), "newest": newest, "unfinished": unfinished, "loads": loads,
                        "equal": end_of(out) == whole, "left": len(list((out / "checkpoints").glob(".*")))})
        print(f"kill {number + 1} of {kills}: {records[-1]}", flush=True)
        shutil.rmtree(out)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train(args.child, args.resume)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        records = measure(args.kills, Path(folder))
    hit = sum(r["unfinished"] for r in records)
    right = all(r["loads"] and r["equal"] and not r["left"] for r in records) and 2 * hit >= args.kills
    print(f"{args.kills} kills, {hit} of them left an unfinished save; {sum(r['loads'] for r in records)} loaded, "
          f"{sum(r['equal'] for r in records)} ended bit for bit as the unbroken run: {'as it should be' if right else 'WRONG'}")
    result = {"what": __doc__.split("\n")[0], "date": datetime.date.today().isoformat(),
              "command": f"python benchmarks/kills.py --kills {args.kills}", "parameters": MODEL.num_params(),
              "machine": {"cores": os.cpu_count(), "cpu": platform.machine(), "system": platform.system()},
              "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
              "kills": args.kills, "unfinished": hit, "right": right, "records": records}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
