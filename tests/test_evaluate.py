"""A score means nothing without chance level and interval: who knows the answers scores 1, who knows nothing scores chance."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minimoe.checkpoint import SHIPPED, load
from minimoe.cli import main
from minimoe.config import Config, DataConfig, EvaluateConfig, TrainConfig, from_dict, load_config
from minimoe.data.held_out import Corpus, Document
from minimoe.evaluate import Result, benchmark, choices, evaluate, interval, tasks, written
from minimoe.evaluate.choices import GROUP, choice_scores, group
from minimoe.evaluate.likelihood import encode_pair
from minimoe.evaluate.tasks import OWN, during_training, find
from minimoe.evaluate.text import text_scores, with_text
from minimoe.settings import ConfigError, to_dict
from minimoe.start import train_from_config
from minimoe.track import flat
from tests.evaluate_runs import knowing, saying, tiny, tiny_run, uninformed

CHOICES = ("continuation", "next_word", "arithmetic_choice", "letters_choice")


@pytest.fixture(scope="module")
def run():
    return tiny_run()


def asked(monkeypatch, task: str, n: int, run=None) -> list:
    """The questions of a task, without a model."""
    found = []
    monkeypatch.setattr(choices, "choice_scores", lambda run, questions, note="": found.extend(questions))
    monkeypatch.setattr(written, "choice_scores", lambda run, questions, note="": found.extend(questions))
    find(task).function(run or tiny_run(), random.Random(0), n)
    monkeypatch.undo()
    return found


# --- intervals -------------------------------------------------------------------------------------------------------
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, hits, ratios = np.random.default_rng(0), 0, 0
    for i in range(300):
        low, high = interval(rng.random(100) < 0.3, seed=i, draws=300)
        hits += low <= 0.3 <= high
        tokens = rng.integers(1, 50, 60)                # a ratio of sums, as perplexity is: items of different size
        low, high = interval(np.stack([tokens * rng.normal(2, 0.5, 60), tokens], 1), seed=i, draws=300)
        ratios += low <= 2 <= high
    assert 0.91 <= hits / 300 <= 0.985 and 0.90 <= ratios / 300 <= 0.985


def test_intervals_are_seeded_and_know_their_limits():
    scores = [0.0, 1.0, 1.0, 0.0, 1.0] * 20
    assert interval(scores, seed=1) == interval(scores, seed=1) != interval(scores, seed=2)
    assert interval([1.0]) is None
    assert interval([0.0] * 100) == (0.0, pytest.approx(0.0295, abs=1e-3)), "a hundred wrong of a hundred: at most 3 %"
    assert interval([3.0, 3.0]) == (3.0, 3.0), "no share, so nothing is known of a bound"


@pytest.mark.parametrize("better, low, high, verdict", [
    ("higher", 0.3, 0.4, "better"), ("higher", 0.1, 0.2, "worse"), ("higher", 0.2, 0.3, "not told apart"),
    ("lower", 0.1, 0.2, "better"), ("lower", 0.3, 0.4, "worse"), ("higher", None, None, "")])
def test_verdicts(better, low, high, verdict):
    r = Result(task="t", metric="m", value=0.3, low=low, high=high, n=9, chance=0.25, better=better)
    assert r.verdict == verdict and replace(r, chance=None).verdict == ""


# --- multiple choice -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", CHOICES)
def test_places_lengths_and_words_are_balanced_by_construction(monkeypatch, task):
    questions = asked(monkeypatch, task, 80)
    assert len(questions) == 80
    assert np.bincount([q.right for q in questions]).tolist() == [20] * 4
    for i in range(0, 80, GROUP):
        some = questions[i:i + GROUP]
        assert len({q.answers for q in some}) == 1, "the same answers in the same order"
        assert {q.answers[q.right] for q in some} == set(some[0].answers), "each right once: so lengths and words are balanced"
        assert len({q.context for q in some}) == GROUP


def test_sums_and_counts_are_right(monkeypatch):
    for q in asked(monkeypatch, "arithmetic_choice", 40):
        for a, b, result in re.findall(r"(\d+) \+ (\d+) =(?: (\d+)\n)?", q.context):
            assert int(a) > 49, "no sum of worlds"
            assert int(a) + int(b) == int(result or q.answers[q.right])
    for q in asked(monkeypatch, "letters_choice", 40):
        for word, letter, times in re.findall(r"in (\w+) the letter (\w) stands(?: (\d) times\n)?", q.context):
            assert word.count(letter) == int(times or q.answers[q.right].split()[0])


def test_questions_of_text_are_its_own(monkeypatch, run):
    texts = [d.text for d in run.corpora[0].held_out]
    for task in ("continuation", "next_word"):
        for q in asked(monkeypatch, task, 60, run):
            assert any(q.context + q.answers[q.right] in text for text in texts)
            words = re.findall(r"\w+|[^\w\s]", q.context)
            assert all(re.match(r"\w+|[^\w\s]", a)[0] != words[-1] for a in q.answers), "an echo of the last word is no answer"
    assert all(len({*map(len, q.answers)}) == 1 for q in asked(monkeypatch, "next_word", 60, run))


@pytest.mark.parametrize("task", CHOICES)
def test_who_knows_the_answers_scores_one(monkeypatch, task):
    questions = asked(monkeypatch, task, 8)
    t = tiny_run().tokenizer
    for score in choice_scores(knowing([encode_pair(t, q.context, q.answers[q.right]) for q in questions]), questions).scores:
        assert score.result(task).value == 1.0
    wrong = knowing([encode_pair(t, q.context, q.answers[q.right - 1]) for q in questions])
    assert [s.result(task).value for s in choice_scores(wrong, questions).scores] == [0.0, 0.0]


def test_who_knows_nothing_scores_chance():
    for r in evaluate(uninformed(), CHOICES, questions=40):
        assert r.value == pytest.approx(0.25) == r.chance, (r.task, r.metric)


def test_who_likes_some_words_scores_chance():
    """A model that does not read the question, but finds some tokens likelier than others."""
    g = torch.Generator().manual_seed(0)
    likes = (5 * torch.randn(260, generator=g)).tolist()
    likes[3 + ord("e")] = 30.0
    for r in evaluate(saying(lambda tokens: likes), CHOICES[2:], questions=40):
        assert r.value == pytest.approx(0.25), (r.task, r.metric)


def test_short_answers_win_by_sum_and_not_by_mean():
    questions = group(["one:", "two:"], [" aaaa", " a"])
    summed, mean = choice_scores(uninformed(), questions).scores
    assert summed.values == [0.0, 1.0], "by sum the short one, whatever was asked"
    assert mean.values == [0.5, 0.5], "by character all alike: each answer its share"


def test_too_short_a_text_says_so():
    run = with_text(tiny_run(), "too short for four passages, " * 3)
    with pytest.raises(ConfigError, match="too short for questions about it: give a longer one"):
        evaluate(run, ["continuation"])
    run = with_text(run, "the same words again and again. " * 400)
    with pytest.raises(ConfigError, match="repeats itself too much"):
        evaluate(run, ["next_word"], questions=8)


# --- perplexity ------------------------------------------------------------------------------------------------------
def test_the_held_out_text_scores_what_training_says():
    """`val_bpb` of the shipped run's rows, and the same of each corpus."""
    run = load("shipped")
    row = min((r for r in run.metrics() if "val_ce" in r), key=lambda r: r["val_ce"])
    found = {r.metric: r for r in evaluate(run, ["perplexity"])}
    assert found["bits per byte"].value == pytest.approx(row["val_bpb"], abs=0.02)
    assert np.log(found["perplexity"].value) == pytest.approx(row["val_ce"], abs=0.03)
    for name, bpb in row["val"].items():
        assert found[f"bits per byte, {name}"].value == pytest.approx(bpb, abs=0.02)
    assert all(r.low < r.value < r.high and r.verdict == "better" for r in found.values())


def test_an_uninformed_model_is_as_perplexed_as_the_vocabulary_is_large():
    found = {r.metric: r for r in evaluate(uninformed(), ["perplexity"])}
    assert found["perplexity"].value == pytest.approx(260, rel=1e-4) == found["perplexity"].chance
    assert found["bits per byte"].value == pytest.approx(found["bits per byte"].chance, rel=0.01)
    assert found["token accuracy"].value < 0.01 and 0.05 < found["token accuracy"].chance < 0.3


@pytest.mark.parametrize("documents", [3, 20])
def test_items_hold_every_byte_and_token_once(documents):
    """Whether they are documents or pieces of few long ones."""
    text = "Words of a document, naïve ones. " * 40
    run = tiny_run(tiny(max_seq_len=64), corpora=(Corpus("c", (), tuple(Document(str(i), text, "d") for i in range(documents))),))
    nats, hits, bits = text_scores(run, random.Random(0), 1).scores[:3]
    size, tokens = documents * len(text.encode()), documents * (len(text.encode()) + 1) - 1
    assert np.sum(bits.values, 0)[1] == pytest.approx(size) and np.sum(nats.values, 0)[1] == tokens == np.sum(hits.values, 0)[1]
    assert len(nats.values) == (documents if documents == 20 else -(-tokens // 32))


def test_a_given_text_is_measured_instead(run):
    text = "Some other text, of which nothing is held out anywhere. " * 30
    found = evaluate(run, ["perplexity"], text=text)
    assert found[0].n < 20 and run.corpora[0].name == "worlds", "the run itself stays as it was"
    with pytest.raises(ConfigError, match="the given text is empty"):
        evaluate(run, ["perplexity"], text="  \n")


# --- what is written -------------------------------------------------------------------------------------------------
def answers(run, right: bool):
    """A writer that reads the last line of the prompt, and answers it rightly or not."""
    def write(model, prompts, most, **options):
        texts = []
        for ids in prompts:
            line = run.tokenizer.decode(ids).splitlines()[-1]
            if found := re.search(r"(\d+) \+ (\d+)", line):
                number = int(found[1]) + int(found[2])
            else:
                letter, word = re.search(r"letter (\w)", line)[1], re.search(r"\b\w{8}\b", line)[0]
                number = word.count(letter)
            texts.append(run.tokenizer.encode(f" {number + (not right)} times\n7"))
        return texts
    return write


@pytest.mark.parametrize("task, chance", [("arithmetic", 1 / 40), ("letters", 1 / 4)])
def test_written_answers_are_compared_whole(monkeypatch, run, task, chance):
    for right in (True, False):
        monkeypatch.setattr(written, "generate", answers(run, right))
        (r,) = evaluate(run, [task], questions=30)
        assert r.value == float(right) and r.chance == chance and r.n == 30
        assert "after 3 solved examples" in r.details["note"]


def test_a_model_of_conversations_is_asked_as_a_chat(monkeypatch, run):
    chat = replace(run, config=replace(run.config, data=DataConfig(supervised=True)))
    prompts = []
    monkeypatch.setattr(written, "generate", lambda model, ids, most, **o: prompts.extend(ids) or [
        chat.tokenizer.encode("50 + 3 is 53" if i else "not 53 but 54") for i, _ in enumerate(ids)])
    monkeypatch.setattr(written, "sum_of", lambda rng: ("50 + 3 =", " 53", "What is 50 + 3?"))
    measured = written.arithmetic(chat, random.Random(0), 4)
    assert prompts[0] == chat.tokenizer.chat([{"role": "user", "content": "What is 50 + 3?"}], reply=True)[0]
    assert list(measured.scores[0].values) == [0.0, 1.0, 1.0, 1.0], "the last number of the reply counts"
    assert "asked as a chat" in measured.note


def test_samples_of_a_model_in_circles(monkeypatch, run):
    monkeypatch.setattr(written, "generate", lambda model, ids, most, **o: [run.tokenizer.encode("ababababab")] * len(ids))
    (r,) = evaluate(run, ["samples"])
    assert r.value == pytest.approx(2 / 9) and r.chance is None and len(r.details["samples"]) == 8
    named = replace(run, config=replace(run.config, evaluate=EvaluateConfig(sample_prompts="Once")))
    assert evaluate(named, ["samples"])[0].details["samples"] == [{"prompt": "Once", "written": "ababababab"}]


# --- evaluate --------------------------------------------------------------------------------------------------------
def test_the_same_seed_asks_the_same(run):
    first, again, other = (evaluate(run, ["continuation", "arithmetic_choice"], questions=20, seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_tasks_and_numbers_of_questions(run):
    assert [b.name for b in OWN][:2] == ["perplexity", "continuation"]
    assert {r.n for r in evaluate(run, ["arithmetic_choice"], quick=True)} == {60}
    set_ = replace(run, config=replace(run.config, evaluate=EvaluateConfig(tasks=("arithmetic_choice",), questions=8)))
    assert [(r.task, r.n) for r in evaluate(set_)] == [("arithmetic_choice", 8)] * 2, "those of the run's config"
    with pytest.raises(ConfigError, match="unknown task 'aritmetic'; did you mean 'arithmetic'\\? known are perplexity, "):
        evaluate(run, ["aritmetic"])
    with pytest.raises(ConfigError, match="questions=0: must be at least 1"):
        evaluate(run, questions=0)


def test_what_a_run_cannot_be_asked_is_left_out_aloud_or_is_an_error():
    said, run = [], tiny_run(corpora=())
    found = evaluate(run, questions=4, say=said.append)
    assert {r.task for r in found} == {"arithmetic", "arithmetic_choice", "letters", "letters_choice"}
    with pytest.raises(ConfigError, match="no task could be asked of it"):
        evaluate(replace(run, tokenizer=None))
    assert [line.partition(":")[0] for line in said] == ["perplexity", "continuation", "next_word", "docstrings", "samples"]
    assert all("left out (this run: no held-out text: give one with --text-file" in line for line in said if "docstrings" not in line)
    assert "has not learned questions about docstrings" in said[3]
    with pytest.raises(ConfigError, match="no held-out text"):
        evaluate(run, ["continuation"])
    with pytest.raises(ConfigError, match="no tokenizer.json, so texts cannot be scored"):
        evaluate(replace(tiny_run(), tokenizer=None), ["arithmetic_choice"])


def test_a_benchmark_of_ones_own(run):
    @benchmark("even", metric="share", chance=0.5, questions=10)
    def even(run, rng, n):
        return [rng.randrange(2) for _ in range(n)]

    (r, *_) = evaluate(run, [even, "arithmetic_choice"], questions=200, seed=3)
    assert (r.task, r.metric, r.n, r.chance) == ("even", "share", 200, 0.5) and r.low < 0.5 < r.high


# --- during training -------------------------------------------------------------------------------------------------
def config_of(**evaluate_options) -> Config:
    return Config(model=tiny(vocab_size=None, dim=8, n_layers=1, max_seq_len=64, expert_hidden=8),
                  train=TrainConfig(steps=4, batch_size=2, eval_every=2, log_every=1, threads=1, dtype="float32", device="cpu"),
                  data=DataConfig(mixture="worlds", tokenizer="bytes"), evaluate=EvaluateConfig(**evaluate_options))


def test_quick_evaluation_during_training(tmp_path):
    """Its numbers stand in the rows that have a look at the held-out text, under names for the trackers; training is the same."""
    config = config_of(during=("continuation", "letters"), during_questions=8)
    measured = train_from_config(config, tmp_path / "a", evaluate_with=during_training(config.evaluate), progress=False)
    plain = train_from_config(config_of(), tmp_path / "b", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["eval" in r for r in rows] == [False, True, False, True] == ["val_ce" in r for r in rows]
    assert rows[1]["eval"]["continuation"]["accuracy"]["chance"] == 0.25
    assert 0 <= flat(rows[1])["eval/letters/exact match/value"] <= 1
    assert all(torch.equal(a, b) for a, b in zip(measured.model.parameters(), plain.model.parameters()))
    assert load_config(tmp_path / "a" / "config.yaml").evaluate == config.evaluate


def test_training_ends_with_the_whole_table(tmp_path, capsys):
    flags = ("--mixture worlds --tokenizer bytes --dim 8 --n-layers 1 --n-heads 2 --n-experts 2 --top-k 1 --expert-hidden 8 --max-seq-len 64 "
             "--steps 2 --batch-size 2 --device cpu --during letters_choice --tasks letters_choice --questions 8 --during-questions 4")
    assert main(["train", "--out", str(tmp_path / "r"), *flags.split()]) == 0
    assert re.search(r"\| letters_choice \| accuracy \| +[\d.]+ \| .+ \| +0.250 \| +8 \|", capsys.readouterr().out)
    row = json.loads((tmp_path / "r" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert row["step"] == 2 and list(row["eval"]) == ["letters_choice"]


def test_during_training_nothing_is_fetched_and_errors_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "OWN", (replace(find("letters"), name="far", local=False),))
    with pytest.raises(ConfigError, match="far may need data from elsewhere"):
        during_training(EvaluateConfig(during="far"))
    monkeypatch.undo()
    assert main(["train", "--out", str(tmp_path / "r"), "--during", "leters"]) == 2
    assert not (tmp_path / "r").exists()


def test_folders_from_before_the_section_still_load():
    assert "evaluate:" not in (SHIPPED / "config.yaml").read_text(encoding="utf-8")
    assert load("shipped").config.evaluate == EvaluateConfig()
    assert from_dict(Config, to_dict(config_of(tasks="perplexity"))).evaluate.tasks == ("perplexity",)
    with pytest.raises(ConfigError, match="during_questions=0: must be at least 1"):
        EvaluateConfig(during_questions=0)


# --- the shipped model beside itself with shuffled weights -------------------------------------------------------------
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_what_was_recorded_of_shuffled_weights():
    """Trained excludes chance on two tasks at least; shuffled, pooled over ten, contains it on every one."""
    rows = json.loads((BENCHMARKS / "results" / "evaluate.json").read_text(encoding="utf-8"))["parts"]["shuffled"]["rows"]
    assert {r["task"] for r in rows} == set(CHOICES)
    assert len({r["task"] for r in rows if r["model"] == "trained" and r["low"] > 0.25}) >= 2
    shuffled = [r for r in rows if r["model"] == "shuffled"]
    assert len(shuffled) == 8 and all(r["low"] <= 0.25 <= r["high"] and len(r["each"]) == 10 for r in shuffled)
    assert all(r["n"] >= 400 and r["half_width"] <= 0.05 for r in rows)
    assert set(re.findall(r"\((shipped-.*?)\)", (BENCHMARKS / "reports" / "shipped.md").read_text(encoding="utf-8"))) == {
        p.name for p in (BENCHMARKS / "reports").glob("*.svg")}


def test_shuffling_keeps_values_and_loses_places(monkeypatch, run):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("transformers", reason="the benchmarks record its version; install minimoe[hub]")
    spec = importlib.util.spec_from_file_location("evaluate_benchmark", BENCHMARKS / "evaluate.py")
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    other, again = script.shuffled(run, 3), script.shuffled(run, 3)
    for a, b, c in zip(*(r.model.parameters() for r in (run, other, again))):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values) and torch.equal(b, c)
        assert a.dim() == 1 or not torch.equal(a, b)
    row = script.row("m", ("t", "accuracy"), [[1.0, 0.0, 0.0, 0.0] * 10, [0.0, 1.0, 0.0, 0.0] * 10])
    assert (row["value"], row["n"], row["over_groups"], row["contains_chance"], row["each"]) == (0.25, 80, [0.25, 0.25], True, [0.25, 0.25])
