"""Corpora, tokenizers, and the order in which tokens are read."""
import random

import numpy as np
import pytest

from minimoe.config import DataConfig, Source
from minimoe.data.corpora import load_corpus, worlds
from minimoe.data.loader import load_data, xz_bits_per_byte
from minimoe.data.mixture import BLOCK, Mixture, Stream
from minimoe.data.tokenizer import SPECIALS, Tokenizer
from minimoe.settings import ConfigError


@pytest.mark.parametrize("name", ["pydocs", "stdlib", "worlds"])
def test_no_held_out_paragraph_stands_in_the_training_text(name):
    corpus = load_corpus(name)
    train = "\0".join(d.text for d in corpus.train)
    paragraphs = [p.strip() for d in corpus.held_out for p in d.text.split("\n\n") if len(p.strip()) >= 40]
    assert len(paragraphs) > 50
    assert [p for p in paragraphs if p in train] == []
    assert 0.01 < sum(len(d.text) for d in corpus.held_out) / len(train) < 0.25


def test_worlds_is_the_same_everywhere():
    import hashlib

    text = "".join(d.text for d in (*worlds(40).train, *worlds(40).held_out))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "550184e5fd69ed66"
    sums = next(d for d in worlds(8).train if d.domain == "arithmetic").text.splitlines()
    assert all(eval(line.split(" = ")[0]) == int(line.split(" = ")[1]) for line in sums)


ALPHABET = "ab <|end_of_text|>\n\té漢字🙂\u200b\u0301\x00🏳️‍🌈"


@pytest.mark.parametrize("make", [lambda: Tokenizer.bpe(["the for statement " * 50, "é漢"], 300), Tokenizer.bytes,
                                  lambda: Tokenizer.characters(ALPHABET)], ids=["bpe", "bytes", "characters"])
def test_any_text_comes_back_exactly(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    r = random.Random(0)
    for _ in range(100):
        text = "".join(r.choice(ALPHABET) for _ in range(r.randrange(40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and again.encode(text) == ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_special_spelled_in_a_text_is_text():
    for tokenizer in (Tokenizer.bytes(), Tokenizer.characters(ALPHABET)):
        specials = {tokenizer.inner.token_to_id(s) for s in SPECIALS}
        assert not specials & set(tokenizer.encode("a<|end_of_text|>b"))
    assert Tokenizer.bytes().vocab_size == 256 + len(SPECIALS)


def test_a_character_that_was_never_seen_is_named():
    with pytest.raises(ValueError, match="'ß'"):
        Tokenizer.characters("abc").encode("abß")


@pytest.mark.parametrize("n, t", [(100, 7), (96, 8), (5, 8), (1, 4), (33, 32)])
def test_every_token_is_read_once_an_epoch(n, t):
    s = Stream("s", np.arange(n))
    windows = [s.window(i, t, seed=3) for i in range(n)]           # n windows of t targets = t epochs
    counts = np.bincount(np.concatenate([w[1:] for w in windows]), minlength=n)
    assert (counts == t).all()
    assert all(((w[1:] - w[:-1]) % n == 1 % n).all() for w in windows)      # consecutive text, around the ring


def test_epochs_are_shuffled_differently_and_windows_move():
    s = Stream("s", np.arange(1003))
    first, second = ([int(s.window(i, 10, 0)[0]) for i in block] for block in (range(100), range(101, 201)))
    assert first != sorted(first) and first != second
    assert {x % 10 for x in first} != {x % 10 for x in second}


def test_mixture_holds_its_ratios_and_drops_nothing():
    ratios = (0.6, 0.3, 0.1)
    m = Mixture(tuple(Stream(str(i), np.full(50 + i, i)) for i in range(3)), ratios)
    sources = np.array([m.window(i, 4, 0)[0] for i in range(5 * BLOCK)])
    for end in (BLOCK, 5 * BLOCK):
        shares = np.bincount(sources[:end], minlength=3) / end
        assert np.abs(shares - ratios).max() < 0.002
    # each source's own windows come in its own order, none left out
    a = Stream("a", np.arange(97))
    m = Mixture((a, Stream("b", np.full(9, -1))), (0.7, 0.3))
    own = [tuple(w) for w in (m.window(i, 5, 1) for i in range(2 * BLOCK)) if w[0] >= 0]
    assert own == [tuple(a.window(i, 5, 1)) for i in range(len(own))]


def test_a_batch_is_a_function_of_its_step_alone():
    m = load_data(DataConfig(mixture="worlds", tokenizer="bytes")).mixture
    x, y = m.batch(37, 4, 16, seed=5)
    x2, _ = m.batch(37, 4, 16, seed=5)
    assert (x == x2).all() and (x[:, 1:] == y[:, :-1]).all()
    # two micro-batches of two are the batch of four
    halves = [m.batch(74 + i, 2, 16, seed=5)[0] for i in range(2)]
    assert (np.concatenate(halves) == x.numpy()).all()
    assert not (m.batch(37, 4, 16, seed=6)[0] == x).all()


def test_the_mixture_shows_itself_as_a_tree():
    data = load_data(DataConfig(mixture=(Source(corpus="worlds", ratio=3), Source(corpus="pydocs", ratio=1)),
                                tokenizer="bytes"))
    tree = data.mixture.describe(1_000_000)
    assert "75.0%" in tree and "└─ pydocs" in tree and "epochs" in tree


def test_xz_yardstick_is_lower_when_the_text_was_seen():
    data = load_data(DataConfig(mixture="worlds", tokenizer="bytes"))
    assert 0.3 < xz_bits_per_byte(data, data.corpora[0]) < 3


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"  \n", "is empty"), (b"good text \xff and more", "not UTF-8 at byte 10")])
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"mine.txt: .*{message}"):
        load_corpus(str(file))


def test_unknown_corpora_and_missing_texts_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="pydocs, stdlib, docstrings, worlds"):
        load_corpus("pydoc")
    monkeypatch.setenv("MINIMOE_DATA", str(tmp_path))
    monkeypatch.setattr("minimoe.data.corpora.SHAKESPEARE", ("http://127.0.0.1:9/input.txt", ""))      # nobody answers there
    with pytest.raises(ConfigError, match="MINIMOE_DATA"):
        load_corpus("tiny_shakespeare")
    (tmp_path / "tinyshakespeare.txt").write_text("line of the play\n" * 100, encoding="utf-8")
    assert load_corpus("tiny_shakespeare").train[0].text.startswith("line")
    with pytest.raises(ConfigError, match="no .txt"):
        (tmp_path / "empty").mkdir()
        load_corpus(str(tmp_path / "empty"))


def test_a_file_of_ones_own_is_split_without_overlap(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n\n".join(f"paragraph {i} with its own words, long enough to count" for i in range(200)),
                    encoding="utf-8")
    corpus = load_corpus(str(file))
    assert 0.05 < len(corpus.held_out[0].text) / file.stat().st_size < 0.12
    assert corpus.held_out[0].text not in corpus.train[0].text
