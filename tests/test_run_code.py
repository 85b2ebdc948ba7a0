"""Programs that a model wrote: only one that runs to its end within the limits has passed."""

from __future__ import annotations

from minimoe.evaluate import run_code


def test_programs_run_within_limits(monkeypatch):
    for program in ("import os; os._exit(0)", "open('a', 'w').write('x' * 10**7)", "import subprocess", "import os; os.fork()", "input()",
                    "x = [0] * 10**10", "a = '\ud800'; assert 0"):
        assert not run_code.passes(program), program
    assert run_code.passes("import os, tempfile; assert len(os.environ) < 9; print('x' * 10**6); open('a', 'w').write('é')")
    monkeypatch.setattr(run_code, "GUARD", run_code.GUARD.replace(f'"CPU", {run_code.SECONDS}', '"CPU", 1'))
    assert not run_code.passes("while True: pass")
    monkeypatch.setattr(run_code, "WAIT", 0.5)
    assert not run_code.passes("import time; time.sleep(60)")
    monkeypatch.undo()
    assert run_code.CodeEval().compute(["assert f()"] * 2, [["f = int"] * 3 + ["f = lambda: 1"], ["f = lambda: 1"] * 4], k=[1, 2, 10]) == (
        {"pass@1": (1 / 4 + 1) / 2, "pass@2": (1 / 2 + 1) / 2}, [[False] * 3 + [True], [True] * 4])
