"""Sampling, batches of mixed lengths, streaming, the window that moves on, and bad prompts."""
import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.generate import generate, sample, stream
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=23, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=12, n_experts=4, top_k=2,
                      expert_hidden=8, init_std=0.4)
    return MoETransformer(cfg)


def greedy_without_cache(model, prompt, n):
    ids, limit = list(prompt), model.cfg.max_seq_len
    model.eval()
    for _ in range(n):
        if len(ids) > limit or (len(ids) >= limit and len(ids) == len(prompt)):
            ids = ids[-(limit // 2):]
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_equals_the_loop_without_cache(model):
    assert generate(model, [3, 1, 4], 8, temperature=0) == greedy_without_cache(model, [3, 1, 4], 8)[3:]


def test_past_the_longest_sequence_the_newest_half_is_kept(model):
    ids = [3, 1, 4]
    out = generate(model, ids, 30, temperature=0)
    # by hand: at twelve tokens in the cache, the thirteenth is predicted from the newest six
    text = ids + out[:10]
    model.eval()
    assert out[10] == int(model(torch.tensor([text[-6:]])).logits[0, -1].argmax())
    assert len(out) == 30
    assert len(generate(model, list(range(20)), 3)) == 3        # a prompt longer than the model


@torch.no_grad()
def test_a_batch_of_mixed_lengths_equals_each_alone(model):
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7]]
    together = generate(model, prompts, 20, temperature=0)
    assert together == [generate(model, p, 20, temperature=0) for p in prompts]


def test_nesting_is_kept(model):
    assert isinstance(generate(model, [1], 2)[0], int)
    assert len(generate(model, [[1], [2]], 2)[1]) == 2
    assert generate(model, torch.tensor([[1, 2], [3, 4]]), 3).shape == (2, 3)


def test_seed_decides_and_streaming_gives_the_same(model):
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.9}
    a, b = generate(model, [1, 2], 12, seed=1, **options), generate(model, [1, 2], 12, seed=1, **options)
    assert a == b == [t for (t,) in stream(model, [[1, 2]], 12, seed=1, **options)]
    assert a != generate(model, [1, 2], 12, seed=2, **options)


def test_streaming_computes_one_token_at_a_time(model, monkeypatch):
    calls = []
    monkeypatch.setattr(MoETransformer, "forward", lambda self, *a, _f=MoETransformer.forward, **k: (
        calls.append(1), _f(self, *a, **k))[1])
    tokens = stream(model, [[1]], 10)
    next(tokens)
    assert len(calls) == 1


def test_a_stop_id_ends_a_row_without_being_shown(model):
    free = generate(model, [[3, 1, 4], [5]], 8, temperature=0)
    stop = free[0][3]
    cut = generate(model, [[3, 1, 4], [5]], 8, temperature=0, stop_ids=(stop,))
    assert cut[0] == free[0][:free[0].index(stop)]
    assert cut[1] == (free[1][:free[1].index(stop)] if stop in free[1] else free[1])


def test_sampling_filters():
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).repeat(400, 1)
    draw = lambda **k: set(sample(logits, generator=torch.Generator().manual_seed(0), **k).tolist())
    assert draw(top_k=2) == {1, 2}
    assert draw(top_p=0.5) == {1}                   # softmax: 0.034 0.692 0.255 0.013
    assert draw(top_p=0.9) == {1, 2}
    assert draw(temperature=0) == {1}
    assert draw(temperature=5.0) == {0, 1, 2, 3}


def test_the_model_is_left_in_the_mode_it_was_in(model):
    model.train()
    generate(model, [1], 2)
    assert model.training


@pytest.mark.parametrize("call", [
    {"prompt_ids": []}, {"prompt_ids": [[1], []]}, {"prompt_ids": [1], "temperature": -1},
    {"prompt_ids": [1], "top_p": 0.0}, {"prompt_ids": [1], "top_k": 0}, {"prompt_ids": [1], "max_new_tokens": 0}])
def test_bad_options_are_named(model, call):
    with pytest.raises(ConfigError):
        generate(model, **call)
