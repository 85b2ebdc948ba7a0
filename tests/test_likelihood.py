"""The likelihood of an answer: what scores of multiple choice and perplexity are made of."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from minimoe.checkpoint import Run, load
from minimoe.config import Config, ModelConfig
from minimoe.data.tokenizer import Tokenizer
from minimoe.evaluate import likelihood
from minimoe.evaluate.likelihood import (
    encode_pair,
    loglikelihoods,
    rolling_loglikelihoods,
    rolling_windows,
    token_scores,
)
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=260, dim=16, n_layers=2, n_heads=2, max_seq_len=24, n_experts=4, top_k=2, expert_hidden=16,
                      init_std=0.3)
    return Run(MoETransformer(cfg).eval(), Tokenizer.bytes(), Config(model=cfg))


def by_hand(model, context, answer):
    """One row, the plain forward, as the definition says."""
    logits_TV = model(torch.tensor([[*context, *answer]])).logits[0]
    logprob_TV = logits_TV.log_softmax(-1)
    return [logprob_TV[len(context) + i - 1, token].item() for i, token in enumerate(answer)]


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_it_is_the_sum_of_log_softmax_at_any_batching(run, monkeypatch, at_once):
    monkeypatch.setattr(likelihood, "LOGITS", at_once * 24 * 260)
    pairs = [("a" * n, "bcd"[:1 + n % 3]) for n in (1, 9, 4, 17, 2, 20)]
    found = loglikelihoods(run, pairs)
    for (context, answer), (nats, tokens, _) in zip(pairs, found):
        expected = by_hand(run.model, *encode_pair(run.tokenizer, context, answer))
        assert nats == pytest.approx(sum(expected), abs=1e-4) and tokens == len(answer)
    assert len({round(nats, 3) for nats, *_ in found}) == len(pairs), "each row has its own value, so the order was kept"


def test_greedy_says_whether_the_model_would_write_it(run):
    with torch.no_grad():
        best = run.model(torch.tensor([[10, 11]])).logits[0, -1].argmax().item()
        then = run.model(torch.tensor([[10, 11, best]])).logits[0, -1].argmax().item()
    hits = [bool(hit.all()) for _, hit in token_scores(run.model, [([10, 11], [best, then]), ([10, 11], [best, then ^ 1]),
                                                                  ([10, 11], [best ^ 1, then])])]
    assert hits == [True, False, False]


def test_a_context_too_long_loses_its_beginning(run):
    """The newest max_seq_len tokens are read, and the last one of them predicts the answer's last."""
    long = "the beginning of this is lost, the end is not"
    (nats, tokens, _), = loglikelihoods(run, [(long, "xyz")])
    ids = run.tokenizer.encode(long + "xyz")[-25:]
    assert nats == pytest.approx(sum(by_hand_long(run.model, ids, 3)), abs=1e-4) and tokens == 3
    assert loglikelihoods(run, [("?" + long[1:], "xyz")])[0][0] == pytest.approx(nats, abs=1e-6)
    with pytest.raises(ConfigError, match="an answer of 25 tokens does not fit into max_seq_len=24"):
        loglikelihoods(run, [("a", "b" * 25)])


def by_hand_long(model, ids, n):
    logprob_TV = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    return [logprob_TV[i, ids[i + 1]].item() for i in range(len(ids) - 1 - n, len(ids) - 1)]


def test_where_context_and_answer_meet():
    """They are encoded together; what the context loses at its end the answer gains, and nothing is lost."""
    t = load("shipped").tokenizer
    for context, answer in (("The for ", "statement"), ("The for", " statement"), ("The for state", "ment"), ("", "The"),
                            ("  ", "The"), ("x = (", "1, 2)")):
        context_ids, answer_ids = encode_pair(t, context, answer)
        assert t.decode(context_ids + answer_ids) == context + answer and answer_ids and context_ids
    assert encode_pair(t, "The for ", "statement") == encode_pair(t, "The for", " statement")
    assert encode_pair(t, "", "The")[0] == [t.end_of_text]
    with pytest.raises(ConfigError, match="is empty: give at least one character"):
        encode_pair(t, "The", "")


def test_rolling_counts_every_token_once(run):
    text = "fifty bytes of a text that is longer than a window"
    ids = run.tokenizer.encode(text)
    for context in (1, 12, 24):
        windows = rolling_windows(ids, [0], 24, context)
        assert [i for _, answer in windows for i in answer] == ids
        assert all(len(before) + len(answer) <= 25 for before, answer in windows)
        assert all(len(before) >= context for before, _ in windows[1:])
        (nats, n), = rolling_loglikelihoods(run, [text], context)
        assert n == len(ids)
        assert nats == pytest.approx(sum(sum(by_hand_long(run.model, [*b, *a], len(a))) for b, a in windows), abs=1e-3)
    short, = rolling_loglikelihoods(run, ["short"])
    assert short[0] == pytest.approx(loglikelihoods(run, [("", "short")])[0][0], abs=1e-5)


def test_the_windows_are_the_harness_own(run):
    utils = pytest.importorskip("lm_eval.utils", reason="compares with lm-eval; install minimoe[eval]")
    for n, limit, context in ((5, 3, 2), (50, 24, 1), (50, 24, 12), (24, 24, 1), (3, 24, 1)):
        ids = list(range(1, n + 1))
        theirs = [utils.make_disjoint_window(w) for w in utils.get_rolling_token_windows(ids, 0, limit, context)]
        assert [(list(a), list(b)) for a, b in theirs] == rolling_windows(ids, [0], limit, context)


def test_an_uninformed_model_finds_every_token_equally_likely(run):
    torch.nn.init.zeros_((model := MoETransformer(run.model.cfg)).head.weight)
    nats, tokens, _ = loglikelihoods(Run(model, run.tokenizer, run.config), [("a", "bcd")])[0]
    assert nats == pytest.approx(-3 * math.log(260), abs=1e-4)


def test_training_goes_on_as_it_was(run):
    run.model.train()
    try:
        loglikelihoods(run, [("a", "b")])
        assert run.model.training
    finally:
        run.model.eval()


def test_a_run_without_a_tokenizer_says_so():
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        loglikelihoods(SimpleNamespace(tokenizer=None, folder=None), [("a", "b")])
