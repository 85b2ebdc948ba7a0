"""A training process that is killed at a given moment: shared by tests/test_resume.py and benchmarks/kills.py."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from minimoe.checkpoint import checkpoints

ROOT = Path(__file__).parents[1]


def kill_after(command: list[str], out: Path, cycles: float) -> tuple[int, bool]:
    """Starts the command, which trains into `out` and saves after every step, and sends SIGKILL `cycles` steps after its
    second complete checkpoint, counted in the time that lay between the first two, since machines differ.

    Gives the step of the newest complete checkpoint, and whether an unfinished save of a later one was left behind.
    """
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    seen = []
    while len(seen) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
        if len(checkpoints(out)) > len(seen):
            seen.append(time.perf_counter())
    time.sleep(cycles * (seen[1] - seen[0]))
    process.kill()
    process.communicate()
    newest = int(checkpoints(out)[-1].name)
    return newest, any(int(part.name[1:9]) > newest for part in (out / "checkpoints").glob(".*.part"))
