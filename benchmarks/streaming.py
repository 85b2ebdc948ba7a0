"""How much memory does a stream need? A large text beside a small one, each read once by a process of its own.

    python benchmarks/streaming.py                          2 GB against 20 MB; writes benchmarks/results/streaming.json
    python benchmarks/streaming.py --megabytes 200 20       other sizes; nothing is written but where --out says

The text is generated, every line another, and read by the byte tokenizer in windows of 1,024. What is counted: the tokens
that came, and their sum, which must be those of the file; the peak of resident memory; the CPU seconds.
"""
from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "streaming.json"
MOST = 150          # MB that the peaks may be apart


def write_text(path: Path, megabytes: float) -> tuple[int, int]:
    """Writes paragraphs that each occur once; returns the number of bytes and their sum."""
    lines = [f"@@@@@@@@ {n * n} and {n * 7919 % 1000003} stand in é line\n" + "\n" * (n % 5 == 4) for n in range(20_000)]
    pattern, count, total = "".join(lines).encode(), 0, 0
    with open(path, "wb") as file:
        for i in itertools.count():
            raw = pattern.replace(b"@@@@@@@@", b"%08d" % i)
            file.write(raw)
            count, total = count + len(raw), total + int(np.frombuffer(raw, np.uint8).sum(dtype=np.int64))
            if count >= megabytes * 1e6:
                return count, total


def read_once(path: Path, held_out: Path) -> dict[str, float]:
    """Reads the whole file as a training run does, and what that took."""
    from minimoe.config import DataConfig, Source
    from minimoe.data.loader import load_data

    source = Source(corpus=str(path), streaming=True, held_out=str(held_out))
    data = load_data(DataConfig(mixture=(source,), tokenizer="bytes"))
    started, seq_len, rows, step = time.process_time(), 1024, 64, 0
    byte_of = np.zeros(data.tokenizer.vocab_size, np.int64)
    for c in range(0x80):
        byte_of[data.tokenizer.encode(chr(c))] = c
    for c in range(0x80, 0x800):
        byte_of[data.tokenizer.encode(chr(c))] = list(chr(c).encode())
    end, left = data.tokenizer.end_of_text, path.stat().st_size + 1         # one end-of-text stands before the file
    count = total = marks = 0
    while left > 0:
        batch = data.mixture.batch(step, rows, seq_len, seed=0)[0].numpy().ravel()
        tokens = batch[:left]
        marks += int((tokens == end).sum())
        count, total, left, step = count + len(tokens), total + int(byte_of[tokens].sum()), left - len(tokens), step + 1
    assert marks == 1 and end in batch[len(tokens):][:1], "the file does not end where its second reading begins"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return {"tokens": count - marks, "sum": total, "peak_mb": round(peak, 1),
            "cpu_seconds": round(time.process_time() - started, 2)}


def compare(folder: Path, sizes: list[float]) -> list[dict]:
    """Writes a text of each size, reads each in a process of its own, and checks that nothing was lost or repeated."""
    rows = []
    (folder / "held.txt").write_text("This paragraph is only measured on, and stands nowhere else.\n", encoding="utf-8")
    for megabytes in sizes:
        path = folder / f"{megabytes:g}.txt"
        count, total = write_text(path, megabytes)
        done = subprocess.run([sys.executable, __file__, "--read", str(path), str(folder / "held.txt")], text=True,
                              capture_output=True, encoding="utf-8", cwd=Path(__file__).parents[1])
        path.unlink()
        if done.returncode:
            raise SystemExit(done.stderr)
        row = json.loads(done.stdout)
        assert (row["tokens"], row["sum"]) == (count, total), f"{path}: {count} bytes of sum {total}, read were {row}"
        rows.append({"megabytes": megabytes} | row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs=2, default=[2000, 20], help="sizes of the two texts")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--read", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read_once(*args.read)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), args.megabytes)
    apart = rows[0]["peak_mb"] - rows[1]["peak_mb"]
    for r in rows:
        print(f"{r['megabytes']:>6g} MB: peak {r['peak_mb']:.0f} MB, {r['tokens'] / r['cpu_seconds'] / 1e6:.0f} M tokens per "
              f"CPU second")
    print(f"apart: {apart:.0f} MB, at most {MOST} wanted; no token lost or repeated")
    out = args.out or (RESULT if args.megabytes == [2000, 20] else None)
    if out:
        result = {"command": f"python benchmarks/streaming.py --megabytes {rows[0]['megabytes']:g} {rows[1]['megabytes']:g}", "rows": rows, "apart_mb": round(apart, 1), "most_mb": MOST,
                  "machine": {"processor": platform.processor() or platform.machine(), "system": platform.system()},
                  "versions": {"python": platform.python_version(), **{m: metadata.version(m) for m in ("torch", "numpy")}}}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
