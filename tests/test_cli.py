"""The program: every command's help is complete, a typo is answered with the nearest name, and what the using commands do."""
import json
import re
import subprocess
import sys

import pytest

from minimoe import load
from minimoe.cli import COMMANDS, main
from minimoe.cli.data import ACTIONS

WORDS = [[name] for name in COMMANDS if name != "data"] + [["data", action] for action in ACTIONS]


def options_of(words: list[str], capsys, monkeypatch) -> dict[str, str]:
    """Each option of a command, positional ones in brackets, with the help text that stands beside it."""
    monkeypatch.setenv("COLUMNS", "79")
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    found, name = {}, None
    for line in capsys.readouterr().out.splitlines():
        option = re.match(r"(?:│ |  )(-h, --help|--[a-z][\w-]*|\[?\{\S+|\[?[A-Z]{3,}\b\]?)(.*)", line)
        if option:
            name, line = option[1], option[2].partition("  ")[2]
            found[name] = ""
        if re.match(r"[╭╰]|\s*-{9}", line) or not option and not line.strip("│ "):
            name = None
        if name:
            found[name] += " " + line.strip("│ ")
    return found


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_option_of_every_command_has_a_help_text_and_a_default(words, capsys, monkeypatch):
    options = options_of(words, capsys, monkeypatch)
    assert len(options) > 1
    for name, text in options.items():
        if name == "-h, --help":
            continue
        words_of_help = re.sub(r"\((default|required|repeatable|fixed)[^)]*\)", "", text).split()
        assert len(words_of_help) >= 2, f"{name}: no help text, only {text!r}"
        assert re.search(r"\((default|required|repeatable)", text), f"{name}: no default in {text!r}"


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_an_option_that_is_none_ends_with_2_and_names_the_nearest(words, capsys, monkeypatch):
    options = options_of(words, capsys, monkeypatch)
    wrong, place = next((o for o in options if o.startswith("--")), "--help") + "x", [] if "PATH" not in options else ["here"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *place, wrong, "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and wrong in said and wrong[:-1] in said.replace(wrong, "")


def test_the_program_lists_its_commands_and_refuses_others(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S.*minimoe {name}|^  {name} +\w+ ", listed, re.M) for name in COMMANDS)
    assert main(["explor"]) == 2 and "explore" in capsys.readouterr().err


def test_generate_from_a_file_of_prompts(tmp_path, capsys):
    """In batches and in order, each as it would be alone at temperature 0; .jsonl may hold line ends."""
    run, prompts = load("shipped"), ["The for statement", "class A:\n    def", "import"]
    path, out = tmp_path / "p.jsonl", tmp_path / "answers.jsonl"
    path.write_text("\n".join([json.dumps(prompts[0]), "", json.dumps({"prompt": prompts[1]}), prompts[2]]), encoding="utf-8")
    common = ["generate", "shipped", "--prompts", str(path), "--max-new-tokens", "12", "--temperature", "0", "--stop", "th"]
    assert main([*common, "--batch-size", "2", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [r["prompt"] for r in rows] == prompts
    assert [r["text"] for r in rows] == [run.generate(p, 12, temperature=0, stop="th") for p in prompts]
    assert "3 prompts, " in (said := capsys.readouterr().err) and "tokens/s" in said
    assert main(common) == 0 and f"--- 'import'\nimport{rows[2]['text']}" in capsys.readouterr().out
    assert main([*common, "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("content, words, message", [
    (None, [], "no such file"), (b"\xff\xfe", [], "not UTF-8 at byte 0"), (b" \n", [], "the file is empty"),
    (b'{"prompt": 3}', [], "line 1: no text in the field prompt"), (b'"fine"\n{"prompt"', [], "line 2: not JSON"),
    (b"fine", ["--batch-size", "0"], "must be at least 1"), (b"fine", ["--max-new-tokens", "0"], "max_new_tokens=0")])
def test_a_bad_file_of_prompts_is_one_line(tmp_path, capsys, content, words, message):
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    assert main(["generate", "shipped", "--prompts", str(tmp_path / "p.jsonl"), *words]) == 2
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1 and "Traceback" not in said
    assert main(["generate", "shipped", "--out", str(tmp_path / "o")]) == 2 and "--prompts" in capsys.readouterr().err


def test_explore_prints_the_routing_and_writes_page_figure_and_numbers(tmp_path, capsys):
    page, figure, numbers = (tmp_path / "new" / name for name in ("out.html", "out.svg", "out.json"))
    assert main(["explore", "shipped", "--text", "for x in xs:", "def f(): pass", "--html", str(page), "--svg", str(figure),
                 "--json", str(numbers), "--layer", "2"]) == 0
    said = capsys.readouterr().out
    traces = json.loads(numbers.read_text(encoding="utf-8"))
    assert [t["text"] for t in traces] == ["for x in xs:", "def f(): pass"]
    layer = next(entry for entry in traces[0]["layers"] if entry["index"] == 2)
    first = f"{layer['experts'][0][0]} {layer['weights'][0][0]:.2f}   {layer['experts'][0][1]} {layer['weights'][0][1]:.2f}"
    assert re.search(rf"^for +{first}$", said, re.M) and "layer 2, softmax router, top-2 of 8 experts" in said
    assert "def f(): pass" in page.read_text(encoding="utf-8") and figure.read_text(encoding="utf-8").startswith("<svg")
    (tmp_path / "mine.txt").write_text("while True:", encoding="utf-8")
    assert main(["explore", "shipped", "--text-file", str(tmp_path / "mine.txt")]) == 0 and re.search(r"^w  .*\nh  ", capsys.readouterr().out, re.M)
    for words, message in ((["--layer", "9"], "layer 9 has no router"), (["--text", ""], "the text is empty"),
                           (["--text-file", str(tmp_path / "none")], "no such file"), (["--text"], "at least one text")):
        assert main(["explore", "shipped", *words]) == 2
        assert message in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_without_a_run_the_newest_is_taken_and_said(tmp_path, monkeypatch, capsys):
    from minimoe import save

    monkeypatch.chdir(tmp_path)
    assert main(["explore", "--text", "a"]) == 0 and "using shipped" in capsys.readouterr().err
    run = load("shipped")
    save(tmp_path / "runs" / "stages" / "sft", run.model, run.tokenizer, run.config)
    (tmp_path / "runs" / "other" / "checkpoints" / "00000001").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "checkpoints" / "00000001" / "model.safetensors").write_bytes(b"not a run folder")
    assert main(["explore", "--text", "a"]) == 0 and "runs/stages/sft" in capsys.readouterr().err.replace("\\", "/")


def test_a_closed_pipe_is_no_error():
    code = f"{sys.executable} -m minimoe explore shipped --text {'abc ' * 40!r} | head -1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == ""


def test_info_counts_runs_configs_and_stages(capsys):
    counts = {"shipped": load("shipped").config.model.num_params(), "configs/stages.yaml": 4_923_456}
    counts["configs/pydocs.yaml"] = counts["shipped"]                       # made by it
    for what, parameters in counts.items():
        assert main(["info", what]) == 0 and capsys.readouterr().out.split()[0] == f"{parameters:,}"
