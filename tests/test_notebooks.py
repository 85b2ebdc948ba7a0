"""Every chapter and every solution runs with other parameters than the committed ones, and was committed with outputs.

That the committed outputs are *true* is what `pytest --nbval notebooks solutions` tests, the second half of `make test`.
"""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb")) + sorted(ROOT.glob("solutions/*.ipynb"))
# what papermill sets, where a notebook has it
SHORT = {"STEPS": 20, "BATCH": 4, "CHARACTERS": 60_000, "WINDOWS": 8, "DRAWS": 20}
LIMIT = 180  # seconds; generous, since it only has to catch a notebook that does not come back

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")


@pytest.mark.parametrize("folder", ["notebooks", "solutions"])
def test_there_are_notebooks(folder):
    assert any(path.parent.name == folder for path in NOTEBOOKS), f"no notebook in {folder}/"


@each_notebook
def test_committed_with_outputs(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    assert code, f"{path.name} has no code"
    # nbval calls a notebook without outputs a success
    never = [cell.source.splitlines()[0] for cell in code if cell.execution_count is None]
    assert not never, f"cells that never ran (make notebooks runs them): {never}"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "cells did not run in order"


@each_notebook
def test_runs_with_short_parameters(path, tmp_path, record_property):
    known = papermill.inspect_notebook(str(path))
    parameters = {name: value for name, value in SHORT.items() if name in known}
    before = sorted(path.parent.iterdir())
    started = time.perf_counter()
    try:
        papermill.execute_notebook(
            str(path), str(tmp_path / path.name), parameters, cwd=str(path.parent), kernel_name="python3",
            execution_timeout=LIMIT, progress_bar=False, log_output=False, request_save_on_cell_execute=False,
        )  # fmt: skip
    except papermill.PapermillExecutionError:
        # papermill does not know the tag raises-exception: it runs on, and complains at the end
        assert not unexpected(tmp_path / path.name), unexpected(tmp_path / path.name)
    seconds = time.perf_counter() - started
    record_property("seconds", round(seconds, 1))
    assert seconds < LIMIT, f"{path.name} took {seconds:.0f} s with {parameters}"
    new = [p.name for p in path.parent.iterdir() if p not in before and p.name != ".ipynb_checkpoints"]
    assert not new, f"{path.name} leaves files beside itself: {new}"


def unexpected(path: Path) -> list[str]:
    """The errors in an executed notebook that no tag announced, and the cells that did not run."""
    wrong = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        errors = [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]
        if "raises-exception" not in cell.metadata.get("tags", []):
            wrong += errors
        if cell.execution_count is None:
            wrong.append(f"did not run: {cell.source.splitlines()[0]}")
    return wrong
