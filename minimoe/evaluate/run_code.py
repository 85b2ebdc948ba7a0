"""Whether programs that a model wrote pass their tests: the rule of HumanEval, in processes with limits (chapter 11).

Stands in for the metric `code_eval`, which the package evaluate would download as a script. The limits stop
endless loops and floods, not malice: there is no wall to the files and the network of this machine.
"""
from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

SECONDS = 3             # of computing for one program, as in code_eval
WAIT = 20               # seconds by the clock: for programs that sleep, and machines with other work
PASSED = 86             # exit status after the last line: a program that leaves early has not passed
# before the program, in its process: limits, and as in code_eval nothing that starts or ends other processes
GUARD = f"""
import os, sys
program = sys.stdin.buffer.read()
for what, most in (("CPU", {SECONDS}), ("AS", 2**32), ("FSIZE", 2**20), ("CORE", 0)):
    try:
        import resource
        resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
    except (ImportError, ValueError, OSError):
        pass
for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "kill", "killpg"):
    setattr(os, name, None)
sys.modules["subprocess"] = sys.modules["_posixsubprocess"] = None
exec(program, {{}})
os._exit({PASSED})
"""


def passes(program: str) -> bool:
    """Whether a Python program runs to its end without an error, within the limits.

    >>> passes("assert sum([1, 2]) == 3"), passes("assert sum([1, 2]) == 4"), passes("import sys; sys.exit()")
    (True, False, False)
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # a group of its own, so that what it starts ends with it; no environment, so no keys that stand in one
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", GUARD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder, env={"SYSTEMROOT": os.environ.get("SYSTEMROOT", "")}, start_new_session=True)
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=WAIT)
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, 9) if os.name == "posix" else process.kill()
            except (ProcessLookupError, PermissionError):           # nothing is left of it
                pass
            process.wait()
        return process.returncode == PASSED


class CodeEval:
    """`compute` of the metric `code_eval`: pass@k, the chance that of k programs drawn from the n written one passes, and
    for each task which passed (Chen et al. 2021, "Evaluating large language models trained on code", section 2.1).

    >>> CodeEval().compute(["assert f() == 1"], [["def f(): return 1", "def f(): return 2"]], k=[1, 2])
    ({'pass@1': 0.5, 'pass@2': 1.0}, [[True, False]])
    """

    def compute(self, references: Sequence[str], predictions: Sequence[Sequence[str]],
                k: Sequence[int] = (1, 10, 100)) -> tuple[dict[str, float], list[list[bool]]]:
        passed = [[passes(f"{program}\n{test}") for program in programs] for test, programs in zip(references, predictions)]
        at = {n: [1 - math.comb(row.count(False), n) / math.comb(len(row), n) for row in passed]
              for n in k if all(len(row) >= n for row in passed)}
        return {f"pass@{n}": sum(shares) / len(shares) for n, shares in at.items()}, passed
