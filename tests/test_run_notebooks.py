"""`make notebooks`: executing twice gives the same bytes, and nothing of this machine or this minute is committed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from minimoe.course.run_notebooks import RULES as RULES_FILE
from minimoe.course.run_notebooks import main, read_rules, run, short_paths

ROOT = Path(__file__).parents[1]
RULES = read_rules(ROOT / RULES_FILE)


def write(path: Path, *cells: str, tags: tuple = ()) -> Path:
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nb.cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(cells)]
    nb.cells[-1].metadata["tags"] = list(tags)
    nbformat.write(nb, path)
    return path


def outputs(path: Path) -> list:
    return [cell.outputs for cell in nbformat.read(path, 4).cells]


def test_two_executions_give_the_same_bytes(tmp_path):
    cells = [
        "import sys, time\nfor i in range(3):\n    print(i, flush=True)\n    time.sleep(0.05)",  # one stream, however it came
        "import random\nprint(f'took {random.random():.6f} s', object())",
        "import warnings\nwarnings.warn('careful')",
        "import ipywidgets\nipywidgets.IntSlider()",
        "1 / 0",
    ]
    path = write(tmp_path / "a.ipynb", *cells, tags=("raises-exception",))
    run(path, RULES, root=tmp_path)
    first = path.read_bytes()
    run(path, RULES, root=tmp_path)
    assert path.read_bytes() == first
    text = first.decode()
    for machine in ("ipykernel_", "site-packages", "widget-view", str(tmp_path), str(Path.home())):
        assert machine not in text, f"{machine} in the committed notebook"
    assert len(outputs(path)[0]) == 1 and outputs(path)[0][0].text == "0\n1\n2\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


def test_results_that_change_are_written(tmp_path):
    """Only measured times are kept from the last execution; a number that is none must not go stale."""
    (tmp_path / "n.txt").write_text("1", encoding="utf-8")
    path = write(tmp_path / "a.ipynb", "print(open('n.txt', encoding='utf-8').read(), 'took 1.0 s')")
    run(path, RULES, root=tmp_path / "elsewhere")
    (tmp_path / "n.txt").write_text("2", encoding="utf-8")
    run(path, RULES, root=tmp_path / "elsewhere")
    assert outputs(path)[0][0].text == "2 took 1.0 s\n"


def test_a_path_of_this_machine_is_refused(tmp_path):
    path = write(tmp_path / "a.ipynb", "import os\nos.getcwd()")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cell 0 prints the path"):
        run(path, RULES, root=tmp_path)
    assert path.read_bytes() == before


def test_a_failing_notebook_is_left_as_it_was(tmp_path):
    path = write(tmp_path / "a.ipynb", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run(path, RULES, root=tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_paths_under_the_home_folder():
    root = str(Path.home() / "my course")
    assert short_paths(f"File ~/my course/minimoe/norm.py:3 and {root}/x.py", root) == "File minimoe/norm.py:3 and x.py"


def test_nothing_to_run_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "no notebook found" in capsys.readouterr().err
