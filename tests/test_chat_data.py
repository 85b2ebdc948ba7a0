"""Conversations: which words are learned, in which order, in which wordings; the bundled ones, and those of files."""
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minimoe.config import DataConfig, ModelConfig, Source, TrainConfig
from minimoe.data import docstrings
from minimoe.data.chat import (
    Conversations,
    ask,
    docstring_questions,
    encode,
    load_conversations,
    make_rows,
    world_questions,
)
from minimoe.data.corpora import load_corpus
from minimoe.data.loader import load_data
from minimoe.data.tokenizer import Tokenizer
from minimoe.evaluate import recall
from minimoe.measure import held_out_loss
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError
from minimoe.trainer import Trainer
from tests.test_resume import assert_same_run

MODEL = ModelConfig(vocab_size=260, dim=16, n_layers=1, n_heads=2, max_seq_len=64, n_experts=4, top_k=2, expert_hidden=16)
TRAIN = TrainConfig(steps=6, batch_size=4, lr=3e-3, warmup=1, device="cpu", dtype="float32", eval_every=2, log_every=1, save_every=0)
CHATS = [[{"role": "user", "content": f"How many are {i}?"}, {"role": "assistant", "content": f"There are {i}, no more."}]
         for i in range(30)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in CHATS), encoding="utf-8")
    return path


def supervised(mixture, **options) -> DataConfig:
    return DataConfig(mixture=mixture if isinstance(mixture, tuple) else str(mixture), supervised=True, tokenizer="bytes", **options)


def said(inputs, targets, tokenizer) -> tuple[str, str]:
    """What a row asks for to be learned, and the rest of it."""
    learned = targets != -100
    return tokenizer.decode(targets[learned].tolist()), tokenizer.decode(inputs[1:][~learned[:-1]].tolist())


# --- rows ---
def test_only_what_the_assistant_says_is_learned_and_the_end_of_its_turn():
    t = Tokenizer.bytes()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "Four!"}]
    conversation = replace(ask("", "", "text"), wordings=(tuple(chat),))
    (row,) = encode(conversation, t)
    learned = row[row >= 0].tolist()
    end = t.inner.token_to_id("<|end|>")
    assert t.decode(learned) == "Two.Four!" and learned.count(end) == 2
    assert t.decode((~row[row < 0]).tolist()) == "Be brief.\n\nOne?Three?"


def test_a_batch_has_padding_and_questions_as_no_target(file):
    data = load_data(supervised(file))
    t = data.tokenizer
    inputs, targets = data.mixture.batch(0, 8, data.seq_len, seed=3)
    assert inputs.shape == targets.shape == (8, data.seq_len) and data.seq_len % 8 == 0 and (inputs >= 0).all()
    for row_inputs, row_targets in zip(inputs, targets):
        learned, rest = said(row_inputs, row_targets, t)
        number = re.search(r"\d+", learned).group()
        assert learned == f"There are {number}, no more." and f"How many are {number}?" in rest
        keep = row_targets != -100
        assert (row_inputs[1:][keep[:-1]] == row_targets[:-1][keep[:-1]]).all()         # targets are the inputs, one later


def test_the_loss_is_that_of_the_answers_alone(file):
    """Counted by hand, conversation by conversation, from the texts: the mean over answers and ends of turns, no other word."""
    data = load_data(supervised(file))
    torch.manual_seed(0)
    trainer = Trainer(MoETransformer(MODEL), TRAIN, data, progress=False)
    nats, count, t = 0.0, 0, data.tokenizer
    inputs, _ = data.mixture.batch(0, TRAIN.batch_size, data.seq_len, TRAIN.seed)
    with torch.no_grad():
        for row in inputs:
            number = re.search(r"How many are (\d+)", t.decode(row.tolist())).group(1)
            question, answer = t.encode(f"How many are {number}?"), t.encode(f"There are {number}, no more.")
            ids = [1, *question, 3, 2, *answer, 3]                          # <|user|> … <|end|> <|assistant|> … <|end|>
            log_p = trainer.model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
            for place in range(len(question) + 3, len(ids)):
                nats, count = nats - log_p[place - 1, ids[place]].item(), count + 1
    losses, _ = trainer.train_step()
    assert losses["ce"] == pytest.approx(nats / count, rel=1e-5)


def test_the_held_out_loss_is_that_of_the_answers_alone(file):
    data = load_data(supervised(file))
    (rows, n_bytes), model = data.held_out()["chats"], MoETransformer(MODEL).eval()
    assert n_bytes == sum(len(data.tokenizer.decode(row[row >= 0].tolist()).encode()) for row in rows)
    other = rows.copy()
    nats, count = held_out_loss(model, rows, data.seq_len, batch_size=2)
    assert count == (rows[:, 1:] >= 0).sum() and nats > 0
    last = [np.flatnonzero(row >= 0)[-1] + 1 for row in rows]
    for row, end in zip(other, last):
        row[end:] = ~9                                                      # padding of another kind
    assert held_out_loss(model, other, data.seq_len, batch_size=2)[0] == pytest.approx(nats, rel=1e-6)
    other[0, last[0] - 1] = 7                                               # another end of turn
    assert held_out_loss(model, other, data.seq_len, batch_size=2)[0] != pytest.approx(nats, rel=1e-6)


def test_every_conversation_once_an_epoch_in_an_order_of_seed_and_step():
    t = Tokenizer.bytes()
    group = tuple(ask((f"{i}?", f"{i}, what?", f"and {i}?"), f"{i}!", "text") for i in range(11))
    (rows,), _, _ = make_rows([Conversations("some", group, ())], t)
    read = lambda start, seed=0: [t.decode([x for x in row.tolist() if x >= 0]) for row in
                                  rows.windows(np.arange(start, start + 11), rows.seq_len, seed)]
    epochs = [read(11 * e) for e in range(4)]
    assert all(sorted(e) == sorted(f"{i}!" for i in range(11)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4 and read(0, seed=1) != epochs[0] and read(3)[:8] == epochs[0][3:]
    for i in range(11):         # three wordings in three epochs, and then again
        asked = [tuple(row) for e in range(4) for row in rows.windows(np.arange(11 * e, 11 * e + 11), rows.seq_len, 0).tolist()
                 if t.decode([x for x in row if x >= 0]) == f"{i}!"]
        assert len(set(asked)) == 3 and asked[0] == asked[3]


def test_shares_of_a_mixture_are_rows():
    data = load_data(supervised((Source(corpus="docstrings", ratio=3.0), Source(corpus="worlds", ratio=1.0, domains="arithmetic"))))
    inputs, targets = data.mixture.batch(0, 1024, data.seq_len, seed=0)
    sums = sum(bool(re.match(r"\d+ \+ \d+ = \d+", said(i, x, data.tokenizer)[0])) for i, x in zip(inputs, targets))
    assert sums == 256
    assert "shares of a mixture are counted in rows" in data.notes[0]


def test_what_is_too_long_is_cut_and_said(file, tmp_path):
    long = tmp_path / "long.jsonl"
    rows = [*CHATS[:20], [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "Too late."}],
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 200}]]
    long.write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows), encoding="utf-8")
    data = load_data(supervised(long), seq_len=64)
    assert data.seq_len == 64
    assert data.notes[1] == "2 of 22 conversations are longer than 64 tokens and are cut there; 1, of which no answer is left, are left out"
    with pytest.raises(ConfigError, match="no answer begins within 8 tokens; raise seq_len"):
        load_data(supervised(file), seq_len=8)


def test_going_on_is_exact_and_another_text_is_noticed(file, tmp_path):
    mine = tmp_path / "chats.jsonl"
    mine.write_bytes(file.read_bytes())

    def trainer(out):
        torch.manual_seed(0)
        return Trainer(MoETransformer(MODEL), TRAIN, load_data(supervised(mine)), out=out, progress=False)

    whole = trainer(tmp_path / "whole")
    whole.fit()
    trainer(tmp_path / "parts").fit(stop_after=4)
    again = trainer(tmp_path / "parts")
    again.fit(resume=True)
    assert_same_run(again, whole)
    assert {"val_ce", "val_bpb"} <= set(whole.rows[-1]) and list(whole.rows[-1]["val"]) == ["chats"]
    trainer(tmp_path / "other").fit(stop_after=2)
    mine.write_text(file.read_text(encoding="utf-8").replace("no more", "and more"), encoding="utf-8")
    with pytest.raises(ConfigError, match="chats: other conversations than when this run began"):
        trainer(tmp_path / "other").fit(resume=True)


# --- sources ---
def test_files_of_other_shapes(tmp_path):
    turns = lambda i: [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]
    path = tmp_path / "share.json"
    path.write_text(json.dumps([{"conversations": turns(i)} for i in range(12)]), encoding="utf-8")
    found = load_conversations(Source(corpus=str(path)))
    every = [c.wordings[0] for c in (*found.train, *found.held_out)]
    assert len(every) == 12 and found.held_out and ({"role": "user", "content": "q3"}, {"role": "assistant", "content": "a3"}) in every
    assert load_corpus(str(path)).train[0].text.startswith("human: q")           # as plain text: as it was
    pq = pytest.importorskip("pyarrow.parquet", reason="parquet needs minimoe[data]")
    from pyarrow import Table

    pq.write_table(Table.from_pylist([{"turns": turns(i), "text": "no"} for i in range(12)]), tmp_path / "share.parquet")
    again = load_conversations(Source(corpus=str(tmp_path / "share.parquet"), field="turns"))
    assert [c.wordings for c in (*again.train, *again.held_out)] == [c.wordings for c in (*found.train, *found.held_out)]


def test_what_is_no_conversation_is_refused(file, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words"}\n' * 3, encoding="utf-8")
    with pytest.raises(ConfigError, match="row 1, is a text and no conversation.*name the column of the messages in field"):
        load_conversations(Source(corpus=str(text)))
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"messages": [{"role": "user", "content": "hello?"}]}) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="row 1: nobody is the assistant; roles are user"):
        load_conversations(Source(corpus=str(alone)))
    with pytest.raises(ConfigError, match="pydocs: holds text and no conversations"):
        load_conversations(Source(corpus="pydocs"))
    with pytest.raises(ConfigError, match="leave streaming out"):
        load_conversations(Source(corpus=str(file), streaming=True))
    with pytest.raises(ConfigError, match="no conversation left by domains=\\['poems'\\]"):
        load_conversations(Source(corpus="worlds", domains="poems"))


def test_held_out_given_apart_is_not_learned(file, tmp_path):
    apart = tmp_path / "apart.jsonl"
    apart.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    found = load_conversations(Source(corpus=str(file), held_out=str(apart)))
    assert len(found.held_out) == 4 and len(found.train) == 26 and not {c.text for c in found.train} & {c.text for c in found.held_out}
    own = load_conversations(Source(corpus=str(file)))
    assert own.held_out and len(own.train) + len(own.held_out) == 30
    assert not {c.text for c in own.train} & {c.text for c in own.held_out}


# --- the bundled ones ---
def test_docstrings_are_plain_sentences_one_for_each_name():
    pairs = docstrings.pairs()
    names = [p.name for p in pairs]
    assert len(pairs) >= 1500 and names == sorted(set(names)) and docstrings.Pair("math.sqrt", "Return the square root of x.") in pairs
    assert 0.05 < sum(p.never_seen for p in pairs) / len(pairs) < 0.15
    for p in pairs:
        assert "\n" not in p.answer and p.answer.isascii() and p.answer.endswith(".") and 5 <= len(p.answer.split()) < 15
    assert sum(len(p.answer.split()) for p in pairs) / len(pairs) >= 5
    assert docstrings.first_sentence("Use a list, e.g. of numbers. And so on.") == "Use a list, e.g. of numbers."


def test_no_question_of_validation_or_test_is_in_training():
    """Nor a wording of theirs round another name, nor anything about a name that is never seen."""
    train = {m[0]["content"] for c in docstring_questions("train") for m in c.wordings}
    assert len(train) == len(docstrings.PHRASINGS["train"]) * len(docstring_questions("train"))
    wordings = [tuple(phrasing.split("{}")) for phrasing in docstrings.PHRASINGS["train"]]
    for group in ("validation", "test", "never seen"):
        asked = {m[0]["content"] for c in docstring_questions(group) for m in c.wordings}
        assert not asked & train and len(asked) > 100
        assert not [q for q in asked if any(q.startswith(a) and q.endswith(b) for a, b in wordings)]
    seen, never = ({p.name for p in docstrings.pairs() if p.never_seen == never} for never in (False, True))
    words = {word.strip("?.,") for question in train for word in question.split()}
    assert seen <= words and not never & words
    answers = lambda group: [c.wordings[0][1]["content"] for c in docstring_questions(group)]
    assert answers("train") == answers("validation") == answers("test")


def test_worlds_ask_about_what_was_held_out():
    train, held = world_questions("train", 2000), world_questions("test", 64)
    facts = lambda c: set(re.findall(r"(\w+)(?: found)? the (\w+)", c.wordings[0][0]["content"].split(".")[0])) or {
        tuple(re.findall(r"\d+", c.wordings[0][0]["content"]))}
    learned = set().union(*map(facts, train))
    for c in held:
        answer = c.wordings[0][1]["content"]
        about = tuple(re.match(r"(\w+) found the (\w+)\.|(\d+) \+ (\d+)", answer).groups())
        about = tuple(x for x in about if x)
        assert about in facts(c) and about not in learned
    sums = [c.wordings[0][1]["content"] for c in held if c.domain == "arithmetic"]
    assert sums and all(eval(s.replace("=", "==")) for s in sums)
    assert {c.text for c in world_questions("validation", 64)}.isdisjoint(c.text for c in (*train, *held))


def test_bundled_questions_come_after_others():
    """So that a chat's second question is answered too: every pair is the last one of a conversation, in all its wordings."""
    found, own = load_conversations(Source(corpus="docstrings")), docstring_questions("train")
    for c, alone in zip(found.train[:200], own):
        assert [m[-2:] for m in c.wordings] == list(alone.wordings) and all(len(m) == 4 for m in c.wordings)
        assert len({m[1]["content"] for m in c.wordings}) > 10
    assert all(len(c.wordings[0]) == 2 for c in found.held_out)
    sums = load_conversations(Source(corpus="worlds", domains="arithmetic")).train
    assert {len(c.wordings[0]) for c in sums} == {8}


def test_as_plain_text_it_is_question_and_answer():
    corpus = load_corpus("docstrings")
    text = next(d.text for d in corpus.train if d.name == "math.sqrt")
    assert text.endswith("?\nReturn the square root of x.\n") or text.endswith(".\nReturn the square root of x.\n")
    assert {d.name for d in corpus.held_out} == {p.name for p in docstrings.pairs() if p.never_seen}


def test_exact_match_compares_whole_answers(monkeypatch):
    t = Tokenizer.bytes()
    written = {"red?": "It is red.", "blue?": "It is blue. Or so.", "green?": "It is green.\nAnd more.", "grey?": "it is grey."}
    asked = []

    def generate(model, prompts, max_new_tokens, temperature, stop_ids):
        assert temperature == 0 and t.inner.token_to_id("<|end|>") in stop_ids
        asked.extend(prompts)
        return [t.encode(written[t.decode(p)]) for p in prompts]

    monkeypatch.setattr(recall, "generate", generate)
    conversations = [ask(q, f"It is {q[:-1]}.", "text") for q in written]
    outcomes, answers = recall.exact_match(SimpleNamespace(tokenizer=t, model=None), conversations, batch_size=3)
    assert outcomes == [1, 0, 1, 0] and answers == ["It is red.", "It is blue. Or so.", "It is green.", "it is grey."]
    assert asked[0] == t.chat([{"role": "user", "content": "red?"}], reply=True)[0]
