"""The model in the package is what its README says, on any machine."""
import json
import lzma
import math
import re

import pytest

from minimoe import load
from minimoe.checkpoint import SHIPPED
from minimoe.data.corpora import Document
from minimoe.data.loader import join
from minimoe.trainer import held_out_loss


@pytest.fixture(scope="module")
def documents():
    lines = lzma.decompress((SHIPPED / "text.jsonl.xz").read_bytes()).decode("utf-8").split("\n")
    return [json.loads(line) for line in lines]


def test_held_out_loss_is_the_recorded_one(documents):
    run = load("shipped")
    best = min((r for r in run.metrics() if "val_ce" in r), key=lambda r: r["val_ce"])
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for corpus, recorded in best["val"].items():
        held = tuple(Document(d["name"], d["text"], d["domain"]) for d in documents
                     if d["held_out"] and d["corpus"] == corpus)
        length = run.config.model.max_seq_len
        nats, _ = held_out_loss(run.model, join(held, run.tokenizer), length, stride=length // 2)
        bpb = nats / math.log(2) / sum(len(d.text.encode()) for d in held)
        assert bpb == pytest.approx(recorded, abs=0.01), corpus          # recorded under the training run's own dtype
        assert f"| {corpus} | {recorded:.3f} |" in readme
    assert best["val"]["pydocs"] <= 1.85


def test_held_out_text_was_not_trained_on(documents):
    train = "\0".join(d["text"] for d in documents if not d["held_out"])
    held = [p.strip() for d in documents if d["held_out"] and d["corpus"] != "worlds" for p in d["text"].split("\n\n")]
    long = [p for p in held if len(p) >= 40]
    assert len(long) > 100 and not [p for p in long if p in train]


def test_it_writes_text_that_looks_like_its_own(documents):
    run = load("shipped")
    text = " ".join(run.generate("The for statement", max_new_tokens=60, seed=seed) for seed in range(3))
    words = re.findall(r"[a-z]+", text.lower())
    known = set(re.findall(r"[a-z]+", " ".join(d["text"] for d in documents if d["corpus"] == "pydocs").lower()))
    assert len(words) > 15 and sum(w in known for w in words) / len(words) > 0.8
    assert run.generate("The for statement", 20, seed=1) == run.generate("The for statement", 20, seed=1)


def test_its_experts_are_all_used():
    run = load("shipped")
    for row in run.metrics()[-1]["routing"]:
        assert min(row["load"]) > 0.25 / run.config.model.n_experts and row["max_vio"] < 1.5
