"""exercises/ is what solutions/ gives; a student's notebook stops at its stubs only; every card is complete."""
import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from minimoe.course import exercises
from minimoe.course.exercises import cards, main, out_of_date, student_version

ROOT = Path(__file__).parent.parent
SHEETS = sorted((ROOT / "solutions").glob("*.ipynb"))
each_sheet = pytest.mark.parametrize("sheet", SHEETS, ids=[s.stem for s in SHEETS])


def run(path: Path, allow_errors: bool = False):
    """The notebook, executed where it lies, with a fresh kernel."""
    from nbclient import NotebookClient

    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=120, kernel_name="python3", allow_errors=allow_errors,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    return nb


def errors(nb):
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    return [(cell, o) for cell in code for o in cell.outputs if o.output_type == "error"]


def test_exercises_are_in_sync():
    assert out_of_date(ROOT) == []
    assert SHEETS


@each_sheet
def test_generating_twice_gives_the_same_bytes_and_no_solution(sheet):
    text = student_version(sheet)
    assert text == student_version(sheet)
    assert "SOLUTION" not in text
    nb = nbformat.reads(text, 4)
    nbformat.validate(nb)
    for cell in nb.cells:
        assert not cell.get("outputs") and not {"solution", "hide-input"} & set(cell.metadata.get("tags", []))


@each_sheet
def test_every_card_is_complete(sheet):
    found, nb = cards(sheet), nbformat.read(sheet, 4)
    chapter = ROOT / "notebooks" / sheet.name
    assert 3 <= len(found) <= 5
    assert {"implement", "predict"} & {c.kind for c in found}
    assert len({c.name for c in found}) == len(found) and all(1 <= c.minutes <= 60 for c in found)
    if sheet.stem == "04_router":
        assert sorted(c.kind for c in found) == ["debug", "implement", "implement", "implement", "predict"]
    headings = re.findall(r"## ([^:\\\"]+)", chapter.read_text(encoding="utf-8")) if chapter.exists() else None
    texts = [c.source for c in nb.cells if c.cell_type == "markdown" and "exercise" in c.metadata.get("tags", [])]
    for card, text in zip(found, texts):
        assert [int(n) for n in re.findall(r"<summary>Hint (\d)", text)] == [1, 2, 3], card.name
        assert text.count("<details>") == text.count("</details>") == 3
        assert f"](../notebooks/{sheet.name})" in text
        section = re.sub(r"^Chapter \d+, ", "", card.section)
        assert headings is None or section in headings, f"{card.name}: chapter has no section {section}"


@each_sheet
def test_a_solution_and_a_check_for_every_card(sheet):
    by_id = {c.metadata.nbgrader.grade_id: c for c in nbformat.read(sheet, 4).cells if "nbgrader" in c.metadata}
    for card in cards(sheet):
        answer, check = by_id[card.name], by_id[f"check_{card.name}"]
        assert "### BEGIN SOLUTION" in answer.source and "solution" in answer.metadata.tags
        assert f"check_{card.name}({card.name})" in check.source and "check" in check.metadata.tags
        printed = "".join(o.get("text", "") for o in check.outputs)
        points = check.metadata.nbgrader.points
        assert f"{card.name}: {points} of {points} points, passed" in printed, "points of the cell and the check differ"
    assert len(by_id) == 2 * len(cards(sheet))


@each_sheet
def test_the_solution_runs_and_passes_its_own_checks(sheet, tmp_path):
    (tmp_path / "solutions").mkdir()
    copy = shutil.copy(sheet, tmp_path / "solutions")
    assert errors(run(Path(copy))) == []


@each_sheet
def test_the_exercise_stops_only_at_its_stubs(sheet, tmp_path):
    path = tmp_path / sheet.name
    path.write_text(student_version(sheet), encoding="utf-8")
    nb = run(path, allow_errors=True)
    names = [c.name for c in cards(sheet)]
    at_checks = []
    for cell, error in errors(nb):
        stub = re.match(r"(\w+): your code here$", error.evalue)
        assert error.ename == "NotImplementedError" and stub and stub.group(1) in names, (cell.source, error.evalue)
        if "check" in cell.metadata.get("tags", []):
            at_checks.append(stub.group(1))
            assert len("".join(error.traceback)) < 200          # the learner sees a line, not the insides of the check
    assert at_checks == names


def test_the_stub_is_named_after_its_exercise():
    for sheet in SHEETS:
        stubs = re.findall(r'NotImplementedError\(\\"(\w+): your code here\\"\)', student_version(sheet))
        assert stubs == [c.name for c in cards(sheet)]


def small_course(root: Path, source: str, metadata: dict | None = None):
    (root / "solutions").mkdir()
    metadata = exercises.solution_cell("twice") if metadata is None else metadata
    cell = nbformat.v4.new_code_cell(source, metadata=metadata, id="a")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), root / "solutions" / "01_x.ipynb")


TWICE = "def twice(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"


def test_command_line(tmp_path, capsys):
    assert main([], tmp_path) == 2 and main(["--chek"], tmp_path) == 2
    small_course(tmp_path, TWICE)
    assert main(["--check"], tmp_path) == 1 and "missing" in capsys.readouterr().out
    assert main([], tmp_path) == 0 and "written" in capsys.readouterr().out
    assert main([], tmp_path) == 0 and "unchanged" in capsys.readouterr().out
    assert main(["--check"], tmp_path) == 0 and "up to date" in capsys.readouterr().out
    target = tmp_path / "exercises" / "01_x.ipynb"
    source = json.loads(target.read_text(encoding="utf-8"))["cells"][0]["source"]
    stub = ast.parse("".join(source)).body[0].body[0]
    assert ast.unparse(stub) == "raise NotImplementedError('twice: your code here')"
    target.write_text(target.read_text(encoding="utf-8").replace("twice", "thrice"), encoding="utf-8")
    (tmp_path / "exercises" / "02_y.ipynb").write_text("{}", encoding="utf-8")
    assert main(["--check"], tmp_path) == 1
    out = capsys.readouterr().out
    assert "01_x.ipynb: differs" in out and "02_y.ipynb: has no source" in out


@pytest.mark.parametrize("source, metadata", [(TWICE, {}), (TWICE.replace("    ### END SOLUTION", ""), None)])
def test_a_solution_that_would_be_handed_out_stops_the_run(tmp_path, source, metadata):
    small_course(tmp_path, source, metadata)
    with pytest.raises(SystemExit, match="01_x.ipynb: .*"):
        main([], tmp_path)


def test_a_card_without_its_head_is_an_error(tmp_path):
    cell = nbformat.v4.new_markdown_cell("## 1.1 A card\n\n**Exercise** `x`", metadata={"tags": ["exercise"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match="the head of the card '## 1.1 A card"):
        cards(tmp_path / "n.ipynb")
