"""minimoe evaluate and the report it writes: whole, never over an older one, and open to sections and benchmarks from outside."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from minimoe.checkpoint import SHIPPED, load, save
from minimoe.cli import main
from minimoe.evaluate import Result, write_report
from minimoe.evaluate.figures import intervals, load_map, loads
from minimoe.settings import ConfigError
from tests.evaluate_runs import tiny, tiny_run, worlds

PARTS = ["Summary", "Results", "Architecture", "Parameters", "Training", "Load and routing", "Samples"]
OWN = '''
from minimoe.evaluate import benchmark

@benchmark("vowels", metric="share", chance=0.5, questions=20)
def vowels(run, rng, n):
    return [float(rng.random() < 0.9) for _ in range(n)]

def cost(run, results):
    """What it costs."""
    return f"{run.config.model.flops_per_token():,} FLOPs, {len(results)} results"

not_a_benchmark = 7
'''
ROWS = [{"step": s, "tokens": 100 * s, "seconds": 1.0 * s, "lr": 0.1, "ce": 5.0 - s, "routing": [{"load": [0.4, 0.3, 0.2, 0.1]}] * 2,
         "val_ce": 4.5 - s, "val_bpb": 2.5 - s, "val": {"worlds": 2.5 - s}} for s in (1, 2)]


def result(task="sums", value=0.5, low=0.4, high=0.6, **options) -> Result:
    return Result(**{"task": task, "metric": "accuracy", "value": value, "low": low, "high": high, "n": 100, "chance": 0.25, **options})


@pytest.fixture
def run(tmp_path):
    """A run folder with rows, and held-out text at hand."""
    run = tiny_run()
    save(tmp_path / "runs" / "tiny", run.model, run.tokenizer, run.config)
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
    return replace(load(tmp_path / "runs" / "tiny"), corpora=worlds())


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    return tmp_path / "own.py"


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def pictures(path) -> dict[str, str]:
    """Alt text of every picture of a report; each is a whole SVG that says the same."""
    found = {file: alt for alt, file in re.findall(r"!\[(.*?)\]\((.*?)\)", path.read_text(encoding="utf-8"))}
    for file, alt in found.items():
        svg = ElementTree.parse(path.parent / file).getroot()
        assert len(alt) > 30 and svg.get("aria-label", "").split()[:5] == alt.split()[:5]
    return found


def test_a_report_has_all_parts(run):
    results = [result(), result("guess", 0.26, 0.22, 0.31), result("lost", 0.1, 0.05, 0.15), result("free", 0.7, None, None, chance=None)]
    results[0].details.update(samples=[{"context": "2 + 2 =", "answers": [" 4", " 5"], "right": 0, "chosen": 1}], note="how it was asked")
    path = write_report(run, results)
    text = path.read_text(encoding="utf-8")
    assert path.parent == run.folder / "reports" and headings(text) == PARTS
    assert sorted(pictures(path)) == [f"{path.stem}-{name}.svg" for name in ("history", "load", "results", "routing")]
    assert "Better than chance, with an interval that excludes it: sums (accuracy) 0.500 (chance 0.250)." in text
    assert "Not told apart from chance, which lies within the interval: guess (accuracy) 0.260" in text
    assert "Worse than chance: lost (accuracy) 0.100" in text and "to be read beside others only: free (accuracy) 0.700" in text
    assert "| sums  | accuracy | 0.500 | 0.400 to 0.600 |  0.250 | 100 | better         |" in text
    assert "2 of 500 steps, 200 tokens, 2 seconds" in text and "held-out text 2.500 (0.500 bits per byte), at step 2" in text
    assert f"{run.config.model.num_params():,}" in text and f"{run.config.model.active_params():,}" in text
    assert "- **sums**: how it was asked" in text and "A) ' 4'   <- right" in text and "B) ' 5'   <- chosen" in text
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [r["value"] for r in record["runs"][0]["results"]] == [0.5, 0.26, 0.1, 0.7]
    assert str(run.folder.parent) not in text + json.dumps(record), "no path of this machine"


def test_a_report_never_takes_the_place_of_another(run):
    paths = [write_report(run, [result(value=v / 10, low=v / 10, high=v / 10)]) for v in (1, 2, 3)]
    assert len(set(paths)) == 3 and [p.stem.removeprefix(paths[0].stem) for p in paths] == ["", "-2", "-3"]
    assert ["0.100" in p.read_text(encoding="utf-8") for p in paths] == [True, False, False]
    before = sorted(SHIPPED.rglob("*"))
    with pytest.raises(ConfigError, match="the shipped run lies in the package"):
        write_report(load("shipped"), [result()])
    assert sorted(SHIPPED.rglob("*")) == before


def test_several_runs_stand_beside_each_other(run, tmp_path):
    other = replace(tiny_run(tiny(n_experts=1, dense_hidden=16)), folder=None)
    path = write_report([run, other], [[result(), result("bits", 2.0, 1.9, 2.1, chance=8.0, better="lower")], [result(value=0.3)]],
                        tmp_path / "both.md", names=["sparse", "dense"])
    text = path.read_text(encoding="utf-8")
    assert headings(text) == PARTS
    assert re.search(r"\| task \| metric +\| chance \| +n \| sparse +\| dense", text)
    assert re.search(r"\| sums \| accuracy \| +0.250 \| 100 \| 0.500 \(0.400 to 0.600\) \| 0.300 \(0.400 to 0.600\)", text)
    assert "This model is dense: no layer has a router." in text and "nothing is known of their training" in text
    assert "| `n_experts`     | 4       | 1       |" in text
    assert set(pictures(path)) == {"both-results.svg", "both-history-1.svg", "both-load-1.svg", "both-routing-1.svg"}


def test_the_figure_of_scores_marks_chance_and_interval():
    figure = intervals([("a", [result(), result("bits", 2.0, 1.0, 3.0, chance=4.0, better="lower")]), ("b", [result(value=0.3)])])
    dots = re.findall(r'data-task="(\w+)" cx="([\d.]+)"', figure.svg())
    place = lambda share: pytest.approx(270 + 350 * share, abs=0.1)
    assert [(t, float(x)) for t, x in dots] == [("sums", place(0.5)), ("sums", place(0.3)), ("bits", place(0.5))]
    lines = [(float(a), float(b)) for a, b in re.findall(r'd="M([\d.]+) \d+H([\d.]+)" stroke="#\w+" stroke-width="3"', figure.svg())]
    assert lines == [(place(0.4), place(0.6)), (place(0.4), place(0.6)), (place(0.25), place(0.75))]
    marks = [float(x) for x in re.findall(r'd="M([\d.]+) \d+v14"', figure.svg())]
    assert marks == [place(0.25), place(0.25), place(1.0)]
    assert intervals([("a", [result(chance=None, value=7.0)])]) is None


def test_loads_are_shares_of_the_tokens(run):
    shares = loads(run)
    assert list(shares) == ["all"] and len(shares["all"]) == 2
    assert all(sum(layer) == pytest.approx(1) for layer in shares["all"])
    two = loads(replace(run, corpora=(*worlds(4), replace(worlds(8)[0], name="more"))))
    assert list(two) == ["all", "worlds", "more"]
    figure = load_map(two, (0, 1))
    assert len(re.findall("data-expert", figure.svg())) == 2 * 3 * 4 and figure.alt.count("Layer") == 2


def test_the_command_with_a_benchmark_and_a_section_of_ones_own(run, own, capsys):
    folder = str(run.folder)
    assert main(["evaluate", folder, "--tasks", f"{own}:vowels,arithmetic_choice", "--questions", "20", "--section", f"{own}:cost"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| vowels +\| share +\|", printed) and re.search(r"\| arithmetic_choice \| accuracy \|", printed)
    (path,) = run.folder.glob("reports/*.md")
    text = path.read_text(encoding="utf-8")
    assert headings(text) == [*PARTS, "What it costs"] and f"{run.config.model.flops_per_token():,} FLOPs, 3 results" in text
    assert f"report: {path}" in printed


def test_the_command_compares_runs_and_measures_any_text(run, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("Some text that nobody has held out. " * 200, encoding="utf-8")
    report = tmp_path / "new" / "r.md"
    assert main(["evaluate", str(run.folder), "shipped", "--tasks", "perplexity", "--text-file", str(tmp_path / "t.txt"), "--report",
                 str(report)]) == 0
    assert re.search(r"\| perplexity \| bits per byte +\| .*\| .+\(.+\) *\| .+\(.+\) *\|", capsys.readouterr().out)
    text = report.read_text(encoding="utf-8")
    assert headings(text) == PARTS and re.search(r"\| perplexity \| perplexity +\| +260 / 1,024 \|", text), "of each its own"
    assert main(["evaluate", "shipped", "--tasks", "perplexity", "--text", "A few words of text, to see."]) == 0
    done = capsys.readouterr()
    assert "| perplexity | token accuracy |" in done.out and "no report: the shipped run lies in the package" in done.err


@pytest.mark.parametrize("options, message", [
    (["--tasks", "arithmetc"], "unknown task 'arithmetc'; did you mean 'arithmetic'?"),
    (["--questions", "0"], "--questions 0: must be at least 1"),
    (["--text", " "], "the text of --text is empty"),
    (["--text", "a", "--text-file", "b"], "give one of them"),
    (["--text-file", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--text-file", "BAD"], "not UTF-8 at byte 2; convert the file to UTF-8"),
    (["--tasks", "nowhere.py:f"], "nowhere.py: no such file, so there is no f to take from it"),
    (["--tasks", "OWN:vowel"], "has no 'vowel'; did you mean 'vowels'?"),
    (["--tasks", "OWN:not_a_benchmark"], "not a benchmark; put @benchmark(\"name\") above the function"),
    (["--section", "OWN:not_a_benchmark"], "must name functions"),
    (["--tasks", "BROKEN:f"], "cannot be run (ZeroDivisionError: division by zero)"),
    (["--step", "7"], "no checkpoint of step 7"),
    (["--tasks", "arithmetic_choice", "--questions", "4", "--report", "FOLDER"], "a folder; name the report's file"),
])
def test_bad_input_is_one_line(run, own, tmp_path, capsys, options, message):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "broken.py").write_text("1 / 0", encoding="utf-8")
    names = {"BAD": str(tmp_path / "bad.txt"), "OWN": str(own), "BROKEN": str(tmp_path / "broken.py"), "FOLDER": str(tmp_path)}
    options = [re.sub("|".join(names), lambda m: names[m[0]], o) for o in options]
    assert main(["evaluate", str(run.folder), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error, error
    assert not (run.folder / "reports").exists()


def test_a_folder_without_a_tokenizer(run, capsys):
    (run.folder / "tokenizer.json").unlink()
    assert main(["evaluate", str(run.folder), "--tasks", "letters"]) == 2
    assert "no tokenizer.json, so texts cannot be scored" in capsys.readouterr().err
