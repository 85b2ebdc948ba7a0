"""The checks of the exercises: right answers pass, wrong ones are refused with the message that is meant for them.

Answers lie in tests/correct_answers/NAME.py and tests/wrong_answers/NAME.py. `python -m tests.test_checks [NAME ...]`
prints the table wrong answer x message; so does `pytest -s tests/test_checks.py -k table`.
"""
import ast
import contextlib
import importlib
import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch

from minimoe.course import CheckFailed
from minimoe.course.checking import Mistake, Property, Wrong, compare, expect_pair, expect_tensor, run_check
from minimoe.course.exercises import cards

HERE = Path(__file__).parent
CHAPTERS = sorted(p.stem for p in (HERE / "wrong_answers").glob("*.py") if p.stem != "__init__")


def answers(folder, chapter):
    """The table of answers in tests/FOLDER/CHAPTER.py."""
    path = HERE / folder / f"{chapter}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{chapter}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG if folder == "wrong_answers" else module.CORRECT


def checks_of(chapter):
    return importlib.import_module(f"minimoe.course.checks.{chapter}")


def judge(check, answer, seed=0):
    """The report of a check, printed or not, passed or not."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return check(answer, seed)
        except CheckFailed as failed:
            return failed.report


PARTS = "(made of parts)"


def called(fn):
    """The name that a learner's mistake goes by in the tables."""
    return fn.__name__ if fn.__name__ not in ("fn", "<lambda>", "top1_layer") else PARTS


def listed(folder):
    """(chapter, exercise, answer) of all tables in a folder."""
    return [(chapter, exercise, answer) for chapter in CHAPTERS
            for exercise, found in answers(folder, chapter).items() for answer in found]


WRONG = [(chapter, exercise, *pair) for chapter, exercise, pair in listed("wrong_answers")]
CORRECT = listed("correct_answers")


@pytest.mark.parametrize("chapter, exercise, fn, name", WRONG, ids=[f"{e}-{called(f)}-{n}" for _, e, f, n in WRONG])
def test_wrong_answers_are_refused_by_their_name(chapter, exercise, fn, name):
    for seed in (0, 1, 7):
        report = judge(getattr(checks_of(chapter), f"check_{exercise}"), fn, seed)
        assert not report.passed, f"accepted at seed {seed}"
        assert report.mistake.name == name, report.message
        assert report.mistake.text.split()[0] in report.message and report.points < report.out_of


@pytest.mark.parametrize("chapter, exercise, fn", CORRECT, ids=[f"{e}-{called(f)}" for _, e, f in CORRECT])
def test_correct_answers_pass_at_twenty_seeds(chapter, exercise, fn):
    for seed in range(20):
        report = judge(getattr(checks_of(chapter), f"check_{exercise}"), fn, seed)
        assert report.passed, f"seed {seed}\n{report}"


def table(chapter) -> str:
    """Wrong answer, points, name of the mistake and what the learner is told, as lines of text."""
    lines = []
    for exercise, pairs in answers("wrong_answers", chapter).items():
        lines.append(f"\n{exercise}")
        for fn, name in pairs:
            report = judge(getattr(checks_of(chapter), f"check_{exercise}"), fn)
            shown = called(fn) if called(fn) != PARTS else f"({name})"
            lines.append(f"  {shown:<34} {report.points:>2}/{report.out_of:<3} {report.mistake.name}: "
                         f"{report.mistake.text}")
    return "\n".join(lines)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_table_of_messages(chapter):
    print(table(chapter))
    wrong, correct = answers("wrong_answers", chapter), answers("correct_answers", chapter)
    assert wrong.keys() == correct.keys()
    sheets = (HERE.parent / "solutions").glob(f"[0-9][0-9]_{chapter}.ipynb")
    kinds = {card.name: card.kind for sheet in sheets for card in cards(sheet)}
    for exercise, pairs in wrong.items():
        assert len(correct[exercise]) >= 2, exercise
        if kinds.get(exercise, "implement") == "implement":
            assert len(pairs) >= 8, exercise
        reports = [judge(getattr(checks_of(chapter), f"check_{exercise}"), fn) for fn, _ in pairs]
        texts = {r.mistake.text for r in reports}
        assert len(texts) == len({r.mistake.name for r in reports}), "two mistakes are told the same"
        if kinds.get(exercise) != "experiment":     # an experiment is right or not: few ways to go wrong
            assert len(texts) >= len(pairs) * 0.75, "different mistakes deserve different messages"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_odd_results_are_refused_and_never_break_the_check(chapter):
    zeros = torch.zeros(13, 7)
    odd = [lambda *a: None, lambda: None, lambda *a: a, lambda *a: a[0], lambda *a: (a[0], a[0]),
           lambda *a: (torch.zeros(0), torch.zeros(0)), lambda *a: ("x", "y"), lambda *a: {1: 2},
           lambda *a: torch.tensor(float("nan")), lambda *a: [[1.0]] * 5, lambda *a: zeros.bool(),
           lambda *a: (zeros, zeros.long())]
    for exercise in answers("wrong_answers", chapter):
        for fn in odd:
            assert not judge(getattr(checks_of(chapter), f"check_{exercise}"), fn).passed


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_oracles_owe_nothing_to_the_library(chapter):
    """A check that asks the module which its chapter builds would agree with the mistakes of that module."""
    folder = Path(checks_of(chapter).__file__).parent
    for path in [folder / "oracle.py", *folder.glob(f"{chapter}*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {"minimoe", f"minimoe.{chapter}"} & set(names), path


# --- the frame --------------------------------------------------------------------------------------------------------
def double_check(fn, seed=0):
    def doubles(fn, rng):
        x = [rng.uniform(-1, 1) for _ in range(3)]
        compare(expect_tensor(fn(torch.tensor(x), 2), "result", (3,)), [2 * v for v in x], "result",
                mistake=Mistake("not doubled", "Double it."))

    return run_check("double", fn, [Property("doubles", 2, doubles)], seed)


def test_a_passed_check_prints_and_returns_its_report(capsys):
    report = double_check(lambda x, k: x * k)
    assert (report.passed, report.points, report.out_of, report.message) == (True, 3, 3, "")
    assert capsys.readouterr().out.splitlines() == [
        "double: 3 of 3 points, passed", "  ok  2/2  doubles", "  ok  1/1  the inputs are left as they were"]
    assert repr(report) == "Report(double: 3 of 3 points)"


def test_a_failed_check_names_place_values_and_mistake(capsys):
    with pytest.raises(CheckFailed) as failed:
        double_check(lambda x, k: x * 3)
    printed = capsys.readouterr().out
    assert isinstance(failed.value, AssertionError) and str(failed.value) == "double, 1 of 3 points"
    assert "double: 1 of 3 points, not yet\n  no  0/2  doubles\n" in printed
    assert "expected  result[0] = " in printed and "\ngot       " in printed and "likely    Double it." in printed
    assert failed.value._render_traceback_() == ["CheckFailed: double, 1 of 3 points"]


def test_the_same_seed_prints_the_same(capsys):
    for seed in (3, 3, 4):
        with pytest.raises(CheckFailed):
            double_check(lambda x, k: x, seed)
    first, second, other = capsys.readouterr().out.split("double: ")[1:]
    assert first == second != other


def test_an_error_of_the_learner_is_told_with_its_line_and_the_inputs():
    def broken(x, factor):
        y = x * factor
        return y.reshape(2, 2)

    report = judge(double_check, broken)
    assert "a result for x float32 (3,), factor = 2" in report.message
    assert "RuntimeError in line 3 of broken" in report.message and "Traceback" not in report.message


def test_a_change_of_the_input_is_told_and_does_no_harm():
    def doubled_in_place(x, factor):
        return x.mul_(factor)

    report = judge(double_check, doubled_in_place)
    assert [r.fault is None for r in report.results] == [True, False]      # the result itself was right
    assert report.mistake.name == "changes its input" and "x[0] still" in report.message


@pytest.mark.parametrize("message", ["", "double: your code here"])
def test_a_stub_passes_through_and_names_the_exercise(message):
    def stub(x, k):
        raise NotImplementedError(*([message] if message else []))

    with pytest.raises(NotImplementedError, match="^double: your code here$") as stopped:
        double_check(stub)
    assert stopped.value._render_traceback_() == ["NotImplementedError: double: your code here"]


def test_an_operation_that_torch_lacks_is_no_stub():
    def unsupported(x, k):
        raise NotImplementedError("'aten::foo' is not implemented for 'Half'")

    assert "NotImplementedError in line 2 of unsupported" in judge(double_check, unsupported).message


def test_the_result_instead_of_the_function():
    with pytest.raises(TypeError, match=r"takes your function itself, got Tensor: write check_double\(double\)"):
        double_check(torch.zeros(3))


def test_the_callers_dice_stay_as_they_are():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        judge(double_check, lambda x, k: x * k + 0 * torch.rand(3))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_compare_and_expect_name_the_first_place():
    with pytest.raises(Wrong, match=r"expected w\[1, 0\] = 3, got 4"):
        compare(torch.tensor([[1.0, 2.0], [4.0, 0.0]]), [[1.0, 2.0], [3.0, 9.0]], "w")
    with pytest.raises(Wrong, match="got nan"):
        compare([float("nan")], [1.0], "w")
    with pytest.raises(Wrong, match="got str 'one'"):
        compare(["one"], [1.0], "w")
    with pytest.raises(Wrong, match="another shape"):
        compare([1.0], [1.0, 2.0], "w")
    with pytest.raises(Wrong, match="shape"):
        expect_tensor(torch.zeros(2), "w", (3,))
    with pytest.raises(Wrong, match="torch.float64"):
        expect_tensor(torch.zeros(2).double(), "w", (2,))
    with pytest.raises(Wrong, match="a pair, got tuple of 3"):
        expect_pair((1, 2, 3), "a pair")


if __name__ == "__main__":
    for name in sys.argv[1:] or CHAPTERS:
        print(table(name))
