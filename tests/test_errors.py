"""Whatever a person can mend is told in one line, with the place and the remedy, by every command that can meet it; exit
code 2, no traceback, and nothing that was saved before is touched."""
import hashlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from minimoe.checkpoint import SHIPPED
from minimoe.cli import main

USING = {"generate": ["--max-new-tokens", "1"], "explore": [], "export": ["--out", "OUT"], "info": [], "evaluate": ["--quick"],
         "chat": []}


def damaged(run: Path, how: str) -> Path:
    """A copy of the shipped run with one thing wrong."""
    shutil.copytree(SHIPPED, run)
    weights, config = run / "model.safetensors", run / "config.yaml"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "other sizes":
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        values["model"]["dim"] //= 2
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
    elif how == "unknown key":
        config.write_text(config.read_text(encoding="utf-8") + "\nmodle: {}\n", encoding="utf-8")
    elif how == "not yaml":
        config.write_text("model: [", encoding="utf-8")
    elif how == "tokenizer damaged":
        (run / "tokenizer.json").write_text("{", encoding="utf-8")
    return run


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def refused(words: list[str], capsys) -> str:
    """The one line that a command ends with."""
    assert main(words) == 2, words
    said = capsys.readouterr().err.replace("using shipped\n", "")
    assert said.count("\n") == 1 and said.startswith("minimoe: error: ") and len(said) < 500, said
    return said


@pytest.mark.parametrize("how, message", [
    ("truncated", "model.safetensors: damaged or not a safetensors file"), ("no weights", "model.safetensors is missing"),
    ("no config", "config.yaml is missing"), ("other sizes", "model.safetensors: does not fit config.yaml"),
    ("unknown key", "config.yaml: unknown key 'modle'; did you mean 'model'"), ("not yaml", "config.yaml: not readable as YAML at line"),
    ("tokenizer damaged", "tokenizer.json")])
@pytest.mark.parametrize("command", USING)
def test_a_run_that_cannot_be_read(command, how, message, tmp_path, capsys):
    run = damaged(tmp_path / "run", how)
    before = files(tmp_path)
    words = [word.replace("OUT", str(tmp_path / "out")) for word in USING[command]]
    assert message in refused([command, str(run), *words], capsys)
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", USING)
@pytest.mark.parametrize("words, message", [(["nowhere"], "nowhere: no such run folder; train one"),
                                            (["shipped", "--step", "7"], "no checkpoint of step 7; kept are none")])
def test_a_run_that_is_not_there(command, words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command != "info" or "--step" not in words:              # info counts, and the sizes of all steps are the same
        assert message in refused([command, *words, *USING[command]], capsys)
    assert not files(tmp_path)


@pytest.mark.parametrize("command", ["train", "stages", "compare", "info"])
@pytest.mark.parametrize("text, message", [
    ("model: {dim: -1}", "dim"), ("model: {dimm: 8}", "unknown key 'dimm'; did you mean 'dim'"), ("train: {lr: fast}", "lr='fast': must be"),
    ("train: {steps: 0}", "steps=0: must be at least 1"), ("data: {mixture: []}", "mixture is empty"), ("model: [", "not readable as YAML"),
    ("train: {batch_size: 2, batch_sise: 2}", "did you mean 'batch_size'"), (b"\xff", "not UTF-8 at byte 0"), ("3", "expected keys and values"),
    (None, "no such config file")])
def test_a_config_that_cannot_be_used(command, text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command == "stages" and isinstance(text, str):
        text = re.sub(r"^(train|data): (.*)$", r"base: {\1: \2}", text)
    if text is not None:
        Path("mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    words = [command, "--config", "mine.yaml"] if command in ("train", "stages") else [command, "mine.yaml"]
    said = refused(words, capsys)
    assert message in said and "mine.yaml" in said and set(files(tmp_path)) <= {"mine.yaml"}


@pytest.mark.parametrize("name, content, message", [
    ("empty.txt", b"", "the file is empty"), ("latin.txt", b"caf\xe9 " * 50, "not UTF-8 at byte 3"), ("nowhere.txt", None, "neither a known name"),
    ("rows.jsonl", b'{"text": "fine"}\n{"text"\n', "rows.jsonl, line 2: not JSON"), ("rows.jsonl", b'{"body": "x"}', "no field 'text'; there are body"),
    ("ids.npy", b"no numbers", "not a .npy file")])
def test_data_that_cannot_be_read(name, content, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    small = ["--dim", "16", "--n-layers", "1", "--n-heads", "2", "--expert-hidden", "16", "--steps", "1", "--tokenizer", "bytes"]
    assert message in refused(["train", "--mixture", name, "--out", "run", *small], capsys)
    assert not Path("run").exists()
    if name != "ids.npy":
        assert message in refused(["data", "prepare", name, "--out", "shards", "--tokenizer", "bytes"], capsys)
        assert not Path("shards").exists()


@pytest.mark.parametrize("module, words, extra", [
    ("datasets", ["train", "--mixture", "owner/name", "--out", "run"], "data"),
    ("gradio", ["chat", "shipped", "--web"], "chat"), ("lm_eval", ["evaluate", "shipped", "--tasks", "arc_easy"], "eval"),
    ("tensorboard", ["train", "--tensorboard", "True", "--out", "run"], "track")])
def test_a_missing_extra_is_named(module, words, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIMOE_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install minimoe[{extra}]" in refused(words, capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize("words, message", [
    (["generate", "shipped", "--prompt", ""], "the prompt is empty"), (["generate", "shipped", "--temperature", "-1"], "temperature=-1"),
    (["generate", "shipped", "--top-p", "2"], "top_p=2"), (["generate", "shipped", "--chat"], "--chat: this is a base model"), (["generate", "shipped", "--device", "tpu"], "tpu"),
    (["explore", "shipped", "--text", ""], "the text is empty"), (["evaluate", "shipped", "--text", ""], "empty"),
    (["evaluate", "shipped", "--tasks", "perplexty"], "perplexity"), (["evaluate", "shipped", "--questions", "0"], "questions")])
def test_what_a_model_is_asked_is_checked(words, message, capsys):
    assert message in refused(words, capsys)
