"""The Language Model Evaluation Harness on runs: its own tasks offline on rows in the real formats, models that know and that
guess, the same scores as through transformers."""

from __future__ import annotations

import json
import random
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import tests.harness_rows as rows  # noqa: E402
from minimoe.checkpoint import Run  # noqa: E402
from minimoe.cli import main  # noqa: E402
from minimoe.config import Config, DataConfig, EvaluateConfig, ModelConfig  # noqa: E402
from minimoe.data.tokenizer import Tokenizer  # noqa: E402
from minimoe.evaluate import during_training  # noqa: E402
from minimoe.evaluate.harness import HOMES, run_harness  # noqa: E402
from minimoe.evaluate.harness_model import RunModel  # noqa: E402
from minimoe.hub import save_hf  # noqa: E402
from minimoe.model import MoETransformer  # noqa: E402
from minimoe.settings import ConfigError  # noqa: E402

CHOICE = ["arc_easy", "arc_challenge", "mmlu", "hellaswag", "winogrande"]
WORDS = [*rows.NOUNS, "for i in", "x =", "é", "the\n", "of", "(1, 2)", "\n\n", "a:"]
TEXT = " ".join(random.Random(0).choices(WORDS, k=4000))
JINJA = ("{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}<|end|>{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")


class Model(LM):
    """Asks `score(context, answer)` and `write(context)`, and keeps what it was asked."""

    def __init__(self, score=None, write=None):
        super().__init__()
        self.score, self.write, self.asked = score, write, []

    def loglikelihood(self, requests):
        self.asked += [r.args for r in requests]
        return [(self.score(*r.args), False) for r in requests]

    def generate_until(self, requests):
        self.asked += [r.args for r in requests]
        return [self.write(r.args[0]) for r in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def knows(facts: rows.Facts) -> Model:
    """Finds the right answers likely, and writes them."""
    return Model(score=lambda context, answer: -1.0 if any(context.endswith(c) and a == answer for c, a in facts) else -500.0,
                 write=lambda context: next((a for c, a in facts if context.endswith(c)), "no idea"))


def guesses(seed: int = 0) -> Model:
    """Finds anything as likely as the dice say, and writes the same always."""
    return Model(score=lambda *texts: -50 - random.Random(zlib.crc32(repr((seed, texts)).encode())).random(),
                 write=lambda context: "    return 7\nIt is #### 7\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder with the seven data sets, and the facts in each."""
    folder = tmp_path_factory.mktemp("harness") / "data"
    return folder, rows.write_all(folder)


@pytest.fixture(scope="module")
def tiny() -> Run:
    """A random model of experts whose probabilities differ, which reads 96 tokens."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.bpe([TEXT], 400)
    cfg = ModelConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, n_experts=4, top_k=2,
                      expert_hidden=16, init_std=0.3)
    return Run(MoETransformer(cfg).eval(), tokenizer, Config(model=cfg))


@pytest.mark.parametrize("task", HOMES)
def test_a_model_that_knows_scores_one(data, task):
    folder, facts = data
    results = run_harness(knows(facts[task]), [task], local=folder, allow_code=True)
    assert {r.value for r in results} == {1.0}
    assert results[0].task == task and results[0].n == len(facts[task]) and results[0].low < 1
    metrics = {"gsm8k": ["exact_match, strict-match", "exact_match, flexible-extract"], "humaneval": ["pass@1"], "mmlu": ["acc"],
               "winogrande": ["acc"]}
    assert [r.metric for r in results if r.task == task] == metrics.get(task, ["acc", "acc_norm"])
    # ten of the forty questions of ARC have three choices
    chances = {"winogrande": 1 / 2, "gsm8k": 0, "humaneval": 0, "arc_easy": (30 / 4 + 10 / 3) / 40, "arc_challenge": (30 / 4 + 10 / 3) / 40}
    assert [r.chance for r in results] == pytest.approx([chances.get(task, 1 / 4)] * len(results))
    assert len(results) == (5 if task == "mmlu" else len(metrics.get(task, "ab")))


@pytest.mark.parametrize("task", HOMES)
def test_a_model_that_guesses_scores_chance(data, task):
    for r in run_harness(guesses(), [task], local=data[0], allow_code=True):
        if task in CHOICE:
            assert r.low < r.chance < r.high and 0 < r.value < 0.8, r
            assert "equally likely" not in r.details["note"]
        else:
            assert r.value == 0.0 and r.high > 0, r


def test_equal_likelihoods_are_counted_and_said(data):
    """The harness takes the first of equals; whoever reads the score must know."""
    (result,) = run_harness(Model(score=lambda *texts: -3.0), ["winogrande"], local=data[0])
    assert result.value == 0.5 and "in 40 of 40 questions the best answers are equally likely" in result.details["note"]


def test_winogrande_scores_the_same_end_after_two_beginnings(data):
    model = guesses()
    run_harness(model, ["winogrande"], local=data[0], limit=1)
    (context1, end1), (context2, end2) = model.asked
    assert end1 == end2 == " was too wide." and context1 != context2


def test_examples_come_from_their_own_split(data, tmp_path):
    model = guesses()
    (result,) = run_harness(model, ["mmlu_virology"], local=data[0], shots=5, limit=1)
    context, dev = model.asked[0][0], (data[0] / "mmlu" / "virology" / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    assert context.startswith("The following are multiple choice questions (with answers) about virology.\n\n")
    places = [context.index(json.loads(line)["question"]) for line in dev]
    assert places == sorted(places) and context.count("Answer:") == 6 and "5 worked examples, the first 1 of" in result.details["note"]
    (tmp_path / "mmlu" / "virology").mkdir(parents=True)
    (tmp_path / "mmlu" / "virology" / "test.jsonl").write_text("\n".join(dev), encoding="utf-8")
    assert run_harness(model, ["mmlu_virology"], local=tmp_path)[0].n == 5           # without examples none are needed
    with pytest.raises(ConfigError, match="put dev.jsonl beside"):
        run_harness(model, ["mmlu_virology"], local=tmp_path, shots=5)


def test_parquet_as_in_the_repositories(data, tmp_path):
    import datasets

    folder, facts = data
    (tmp_path / "hellaswag" / "data").mkdir(parents=True)
    table = datasets.Dataset.from_list([json.loads(line) for line in open(folder / "hellaswag" / "validation.jsonl", encoding="utf-8")])
    for i in range(2):
        table.shard(2, i).to_parquet(str(tmp_path / "hellaswag" / "data" / f"validation-0000{i}-of-00002.parquet"))
    results = run_harness(knows(facts["hellaswag"]), ["hellaswag"], local=tmp_path)
    assert [(r.value, r.n) for r in results] == [(1.0, 40)] * 2


def test_what_cannot_be_done_is_one_line(data, tmp_path, monkeypatch):
    model, folder = guesses(), data[0]
    cases = [
        (dict(tasks=["humaneval"], local=folder), "humaneval: runs programs .* say --allow-code"),
        (dict(tasks=["arc_easy"], local=tmp_path), r"arc_easy: no test\.jsonl or test\*\.parquet in .*arc_easy or .*ARC-Easy"),
        (dict(tasks=["mmlu", "arc_easy"], local=tmp_path), "mmlu_abstract_algebra: no test.jsonl"),
        (dict(tasks=["arc_easy"], download=False), "arc_easy: nothing is downloaded during training"),
        (dict(tasks=["arc_easy"], local=folder, limit=0), "limit=0"),
        (dict(tasks=["arc_easy"]), "arc_easy: its data cannot be had .* give --local FOLDER"),
    ]
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text('{"question": "1+1?"}\n', encoding="utf-8")
    cases.append((dict(tasks=["gsm8k"], local=tmp_path), "gsm8k: its data cannot be had or do not fit .*answer"))
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande" / "validation.jsonl").write_text("not JSON\n", encoding="utf-8")
    cases.append((dict(tasks=["winogrande"], local=tmp_path), "winogrande: its data cannot be had or do not fit"))
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            run_harness(model, **arguments)
        assert "\n" not in str(caught.value)
    assert not model.asked
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"pip install minimoe\[eval\]"):
        run_harness(model, ["arc_easy"])


def test_the_command(data, capsys):
    asked = ["evaluate", "shipped", "--local", str(data[0]), "--limit", "4", "--tasks"]
    assert main([*asked, "arc_easy,perplexity", "gsm8k", "--text", "The for statement."]) == 0
    out, err = capsys.readouterr()
    tasks = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert [*dict.fromkeys(tasks[2:])] == ["perplexity", "arc_easy", "gsm8k"] and "it/s" not in err
    for tasks, message in (("humaneval", "say --allow-code"), ("perplexty", "did you mean 'perplexity'")):
        assert main([*asked, tasks]) == 2
        assert message in capsys.readouterr().err
    assert main([*asked, "humaneval", "--allow-code"]) == 0
    out, err = capsys.readouterr()
    assert "| pass@1 | 0.000 |" in out and "runs the programs that the model writes" in err


def test_quick_looks_during_training(data, tiny):
    """The harness's tasks beside own ones, of local data only; what is missing is said before the first step."""
    run = replace(tiny, config=replace(tiny.config, evaluate=EvaluateConfig(
        during=("winogrande", "arithmetic_choice"), during_questions=8, local=str(data[0]))))
    row = during_training(run.config.evaluate)(run, 5)
    assert row["winogrande"]["acc"]["chance"] == 0.5 and "arithmetic_choice" in row
    for cfg, message in ((EvaluateConfig(during=("winogrande",)), "name the folder"), (EvaluateConfig(during=("humaneval",), local=str(data[0])), "runs programs"),
                         (EvaluateConfig(during=("winogrande",), local="nowhere"), "no validation.jsonl")):
        with pytest.raises(ConfigError, match=message):
            during_training(cfg)


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="no task 'helaswag' here or in the harness; did you mean 'hellaswag'"):
        run_harness(guesses(), ["helaswag"])


def test_nothing_stays_behind(data, tiny):
    """Neither the state of anybody's dice nor the way in which programs are run; a model in training goes on training."""
    import evaluate as metrics

    before, load = random.getstate(), metrics.load
    tiny.model.train()
    run_harness(tiny, ["gsm8k", "winogrande"], local=data[0], limit=2)
    assert tiny.model.training and random.getstate() == before and metrics.load is load
    tiny.model.eval()


OWN = {         # what the seven do not have: nothing before an answer, a whole text, few tokens to write
    "choice": dict(output_type="multiple_choice", doc_to_text="{{context}}", doc_to_choice="{{choices}}", doc_to_target="{{label}}",
                   metric_list=[dict(metric=m, aggregation="mean", higher_is_better=True) for m in ("acc", "acc_norm")]),
    "text": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{context}}", metric_list=[
        dict(metric="word_perplexity"), dict(metric="byte_perplexity"), dict(metric="bits_per_byte")]),
    "write": dict(output_type="generate_until", doc_to_text="{{context}}x", doc_to_target="{{choices[0]}}",
                  generation_kwargs=dict(until=["\n", "e"], max_gen_toks=24),
                  metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)]),
}


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """Contexts of no token, of few, and of more than the model reads; some end in spaces."""
    folder, rng = tmp_path_factory.mktemp("own"), random.Random(1)
    docs = [{"context": "for"[:length] + TEXT[(at := rng.randrange(9000)):at + length], "choices": [TEXT[at + length:][:n] for n in (3, 9, 30)], "label": i % 3}
            for i, length in enumerate([0, 1, 5, 40, 41, 42, 43, 44, 300, 700, 2000])]
    docs.append({"context": "for \n ", "choices": ["x in", " y", "\n"], "label": 1})
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs), encoding="utf-8")
    for name, task in OWN.items():
        where = dict(dataset_path="json", test_split="test", dataset_kwargs={
            "data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")})
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **where, **task}), encoding="utf-8")
    return folder


def hf(run: Run, folder: Path):
    """The same model through save_hf, transformers and the harness's own `hf`."""
    from lm_eval.models.huggingface import HFLM

    save_hf(run.model, folder, run.tokenizer)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=5)


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "tokenizer_adds_a_beginning"])
def test_scores_are_those_of_transformers(tiny, own_tasks, tmp_path, begins, record_property):
    from tokenizers.processors import TemplateProcessing

    if begins:
        tokenizer = Tokenizer.from_text(tiny.tokenizer.inner.to_str())
        end = tokenizer.inner.id_to_token(tokenizer.end_of_text)
        tokenizer.inner.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, tokenizer.end_of_text)])
        tiny = replace(tiny, tokenizer=tokenizer)
    manager, found = TaskManager(include_path=str(own_tasks), include_defaults=False), []
    for model in (RunModel(tiny, batch_size=3), hf(tiny, tmp_path / "hf")):
        loaded = manager.load([*OWN])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)
        found.append(evaluate(lm=model, task_dict=loaded, bootstrap_iters=0))
    ours, theirs = found
    apart = 0.0
    for name in OWN:
        for a, b in zip(ours["samples"][name], theirs["samples"][name]):
            assert a["doc_id"] == b["doc_id"] and a["arguments"] == b["arguments"]
            for (x,), (y,) in zip(a["resps"], b["resps"]):
                if name == "write":
                    assert x == y
                elif name == "choice":
                    assert x[1] == y[1]
                if name != "write":
                    apart = max(apart, abs((x[0] if name == "choice" else x) - (y[0] if name == "choice" else y)))
    assert apart < 1e-3
    record_property("largest difference of a log-likelihood", f"{apart:.1e}")
    assert len({text for s in ours["samples"]["write"] for (text,) in s["resps"]}) > 3       # it wrote something
    assert ours["results"]["choice"]["acc,none"] == theirs["results"]["choice"]["acc,none"]
    assert ours["results"]["text"]["bits_per_byte,none"] == pytest.approx(theirs["results"]["text"]["bits_per_byte,none"], abs=1e-5)


def test_arc_through_both_ways(data, tiny, tmp_path):
    ours = run_harness(tiny, ["arc_easy", "winogrande"], local=data[0])
    theirs = run_harness(hf(tiny, tmp_path / "hf"), ["arc_easy", "winogrande"], local=data[0])
    assert ours == theirs and len(ours) == 3


def test_conversations_are_asked_in_their_template(data, tiny, tmp_path):
    run = replace(tiny, config=replace(tiny.config, data=DataConfig(supervised=True)))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "one <|end_of_text|>"},
                {"role": "assistant", "content": "two "}, {"role": "user", "content": "three"}]
    model = RunModel(run)
    assert model.tok_encode(model.apply_chat_template(messages)) == run.tokenizer.chat(messages, reply=True)[0]
    open_end = model.apply_chat_template(messages[:3], add_generation_prompt=False)
    assert model.tok_encode(open_end) == run.tokenizer.chat(messages[:3])[0][:-1]
    asked, tokens = [], model._loglikelihood_tokens
    model._loglikelihood_tokens = lambda requests, **k: asked.extend(requests) or tokens(requests, **k)
    ours = run_harness(model, ["arc_easy"], local=data[0], limit=12)
    marks = [run.tokenizer.inner.token_to_id(mark) for mark in ("<|user|>", "<|end|>", "<|assistant|>")]
    assert all(ids[0] == marks[0] and ids[-2:] == marks[1:] for _, ids, _ in asked)
    # and as transformers does it, given the same template
    other = hf(tiny, tmp_path / "hf")
    other.tokenizer.chat_template, other.chats = JINJA, True
    assert run_harness(other, ["arc_easy"], local=data[0], limit=12) == ours


def test_a_task_named_twice_is_asked_once(data):
    assert len(run_harness(guesses(), ["mmlu_virology", "mmlu_virology", "mmlu_stem"], local=data[0])) == 2


def test_contexts_of_which_the_harness_leaves_no_token(tiny):
    """Where nothing but space stands before, or one token holds both: harness and `hf` fail there."""
    from lm_eval.api.instance import Instance

    word = max((tiny.tokenizer.decode([i]) for i in range(400)), key=len)
    ask = [Instance("loglikelihood", {}, texts, 0) for texts in ((" \n", "x"), ("", " \nx"), (word[:3], word[3:]), ("", word))]
    (space, _), (whole, _), (halves, _), (one, _) = RunModel(tiny).loglikelihood(ask)
    assert len(tiny.tokenizer.encode(word)) == 1 and space == pytest.approx(whole) and halves == pytest.approx(one)


def test_writing_stops_and_goes_past_the_window(tiny):
    from lm_eval.api.instance import Instance

    endless = Tokenizer.from_text(tiny.tokenizer.inner.to_str())
    endless.end_of_text = None

    def write(context, tokenizer=endless, **options):
        ask = Instance("generate_until", {}, (context, options), 0)
        return RunModel(replace(tiny, tokenizer=tokenizer)).generate_until([ask])[0]

    text = write(TEXT, max_gen_toks=150, until=[])
    assert len(endless.encode(text)) > 96                       # longer than what it reads at once
    stop = text[10:14]
    assert write(TEXT, max_gen_toks=150, until=["", stop]) == text[:text.index(stop)]
    assert write("", tokenizer=tiny.tokenizer, max_gen_toks=3, until=[])
    assert write(TEXT, max_gen_toks=30, do_sample=True, temperature=1.0, until=[]) != write(TEXT, max_gen_toks=30, until=[])
