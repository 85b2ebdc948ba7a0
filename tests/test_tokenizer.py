"""Tokenizers: any text comes back, streams and long texts give the same tokens, published ranks, and the chat template."""
import base64
import io
import json
import random
import sys

import numpy as np
import pytest
import tokenizers

from minimoe.config import DataConfig, GenerateConfig
from minimoe.data import tokenizer as module
from minimoe.data.corpora import load_corpus
from minimoe.data.loader import join, load_data
from minimoe.data.tokenizer import ASSISTANT, END, SPECIALS, USER, Tokenizer, make_tokenizer
from minimoe.settings import ConfigError

TEXT = "".join(d.text for d in load_corpus("worlds").train[:300])


def any_text(r: random.Random) -> str:
    """Code points of all planes but surrogates: controls, line breaks, private use, unassigned; often a few again and again."""
    some = [r.choice((r.randrange(32), r.randrange(128), r.randrange(0x3000), r.randrange(0x110000))) for _ in range(12)]
    picks = (r.choice(some) if r.random() < 0.5 else r.randrange(0x110000) for _ in range(r.randrange(60)))
    return "".join(chr(c) for c in picks if not 0xD800 <= c < 0xE000) + r.choice(("", "\r\n", " \n\n ", r.choice(SPECIALS)))


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.bpe([TEXT], 600)


@pytest.fixture
def ranks(bpe, tmp_path, monkeypatch):
    """Rank files of the two published names, made from a vocabulary of our own."""
    of = {letter: b for b, letter in module._byte_letters().items()}
    pairs = json.loads(bpe.inner.to_str())["model"]["merges"]
    tokens = [bytes([b]) for b in module._byte_letters()] + [bytes(of[c] for c in a + b) for a, b in pairs]
    of_name = {"gpt2": tokens, "o200k": [*tokens, b" zqxj"]}          # the last is a word that no merges lead to
    for name, file in (("gpt2", "gpt2.tiktoken"), ("o200k", "o200k_base.tiktoken")):
        lines = [base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(of_name[name])]
        (tmp_path / file).write_bytes(b"".join(lines))
    monkeypatch.setenv("MINIMOE_DATA", str(tmp_path))
    return of_name, pairs


@pytest.mark.parametrize("kind", ["bpe", "bytes", "gpt2", "o200k"])
def test_any_unicode_comes_back(kind, bpe, ranks):
    tokenizer, r = {"bpe": bpe}.get(kind) or make_tokenizer(kind, [], 0), random.Random(0)
    specials = {tokenizer.inner.token_to_id(s) for s in SPECIALS}
    for _ in range(500):
        text = any_text(r)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not specials & set(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_stream_trains_the_same_vocabulary_and_is_read_once(bpe):
    read = []
    lines = TEXT.splitlines(keepends=True)
    stream = (read.append(i) or line for i, line in enumerate(lines))
    assert Tokenizer.bpe(stream, 600).fingerprint() == bpe.fingerprint() != Tokenizer.bpe(lines, 500).fingerprint()
    assert read == list(range(len(lines)))
    assert Tokenizer.characters(iter(lines)).fingerprint() == Tokenizer.characters(TEXT).fingerprint()


def test_the_progress_bar_is_for_terminals(monkeypatch, capsys):
    Tokenizer.bpe([TEXT], 300)
    assert capsys.readouterr().err == ""

    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    Tokenizer.bpe([TEXT], 300)
    assert "tokenizer" in shown.getvalue() and "char" in shown.getvalue()


@pytest.mark.parametrize("make", [lambda text: Tokenizer.bpe([text], 900), lambda text: Tokenizer.bytes(), Tokenizer.characters],
                         ids=["bpe", "bytes", "characters"])
def test_a_long_text_in_pieces_gives_the_tokens_of_the_whole(make, monkeypatch):
    r, bits = random.Random(0), [*sorted(set(TEXT)), "\n", "\n\n", " \n", "1\n", "_\n", "a\n  ", ".\n"]
    text = "".join(r.choice(bits) if r.random() < 0.5
                   else TEXT[(at := r.randrange(len(TEXT))):at + 9] for _ in range(8000))
    tokenizer = make(text)                      # so that it joins what stands around line breaks
    whole = tokenizer.inner.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(module, "PIECE", 20)
    pieces = [piece for piece, _ in tokenizer._split(text)]
    assert "".join(pieces) == text and len(pieces) > 500
    assert tokenizer.encode(text) == whole
    several = list(tokenizer.arrays(["", text, "1", text[:50]]))
    assert [a.tolist() for a in several] == [[], whole, tokenizer.encode("1"), tokenizer.encode(text[:50])]
    assert all(a.dtype == np.int32 for a in several)


def test_end_of_text_stands_only_between_documents(bpe):
    docs = load_corpus("worlds").train[:5]
    ids = join(docs, bpe)
    at = np.flatnonzero(ids == bpe.end_of_text)
    assert at.tolist() == np.cumsum([0] + [1 + len(bpe.encode(d.text)) for d in docs[:-1]]).tolist()


@pytest.mark.parametrize("name", ["gpt2", "o200k"])
def test_published_ranks_give_the_tokens_of_tiktoken(name, ranks):
    tiktoken = pytest.importorskip("tiktoken")
    tokens = ranks[0][name]
    openai = pytest.importorskip("tiktoken_ext.openai_public")
    pattern = openai.r50k_pat_str if name == "gpt2" else module.O200K
    theirs = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})
    ours, r = Tokenizer.published(name), random.Random(1)
    for _ in range(1000):
        at = r.randrange(len(TEXT))
        text = r.choice((any_text(r), TEXT[at:at + 200], "".join(r.choices("aeb '\n.", k=40)), "a zqxj b zqxjk"))
        assert ours.encode(text) == theirs.encode_ordinary(text)
    n = len(tokens)
    assert ours.end_of_text == n + (name == "o200k") == ours.inner.token_to_id("<|endoftext|>")
    assert ours.vocab_size == n + (1 if name == "gpt2" else 21)      # 50,257 of 50,256 ranks; 200,019 of 199,998


def test_gpt2_from_its_list_of_merges(ranks, tmp_path):
    want = Tokenizer.published("gpt2")
    (tmp_path / "gpt2.tiktoken").unlink()
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in ranks[1])]
    (tmp_path / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")
    got = Tokenizer.published("gpt2")
    assert got.encode(TEXT) == want.encode(TEXT) and got.vocab_size == want.vocab_size
    assert got.inner.get_vocab() == want.inner.get_vocab()


def test_missing_or_damaged_ranks_are_one_clear_line(ranks, tmp_path):
    for name in ("gpt2", "o200k"):
        file = next(tmp_path.glob("gpt2*" if name == "gpt2" else "o200k*"))
        good = file.read_bytes()
        file.write_bytes(good.replace(b" 7\n", b" seven\n"))
        with pytest.raises(ConfigError, match=f"{file.name}: line 8 "):
            make_tokenizer(name, [], 0)
        file.write_bytes(b"".join(good.splitlines(keepends=True)[1:]))
        with pytest.raises(ConfigError, match="ranks are missing"):
            make_tokenizer(name, [], 0)
        file.unlink()
        with pytest.raises(ConfigError, match="MINIMOE_DATA, or take --tokenizer bytes, while vocab_size stays"):
            load_data(DataConfig(mixture="worlds", tokenizer=name))


def test_a_tokenizer_of_ones_own_that_merges_over_whole_texts_is_not_one_of_characters(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    inner.add_special_tokens(["</s>"])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    t = Tokenizer.load(tmp_path)
    assert t.encode("abaab") == [2, 0, 2] and t.end_of_text == 3 and t.vocab_size == 4


def test_a_tokenizer_is_reused_from_a_file_a_run_and_the_package(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    for kind in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        assert load_data(DataConfig(mixture="worlds", tokenizer=kind)).tokenizer.fingerprint() == bpe.fingerprint()
    assert make_tokenizer("shipped", [], 0).vocab_size == 1024


def test_the_chat_template_marks_turns_and_what_is_learned(bpe):
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"2 + 2 {END}?"},
            {"role": "assistant", "content": "4"}, {"role": "user", "content": "3?"}]
    ids, mask = bpe.chat(said, reply=True)
    u, a, e = (bpe.inner.token_to_id(t) for t in (USER, ASSISTANT, END))
    assert ids == [u, *bpe.encode(f"Be short.\n\n2 + 2 {END}?"), e, a, *bpe.encode("4"), e, u, *bpe.encode("3?"), e, a]
    assert [i for i, learn in zip(ids, mask) if learn] == [*bpe.encode("4"), e]
    assert bpe.chat(said)[0] == ids[:-1]
    for bad, message in (([{"role": "robot", "content": "x"}], "robot"), ([{"role": "user"}], "content"), (said[:1], "after it")):
        with pytest.raises(ConfigError, match=message):
            bpe.chat(bad)
    with pytest.raises(ConfigError, match="chat_template"):
        GenerateConfig(chat_template="other")


def test_a_vocabulary_without_marks_of_turns_says_so(ranks):
    with pytest.raises(ConfigError, match="has no <|user|>".replace("|", r"\|")):
        Tokenizer.published("gpt2").chat([{"role": "user", "content": "x"}])
    assert Tokenizer.published("o200k").chat([{"role": "user", "content": "x"}])[0][0] == len(ranks[0]["o200k"]) + 2


def test_the_alphabet_of_bytes_is_the_library_s():
    assert set(module._byte_letters().values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert tokenizers.decoders.ByteLevel().decode([module._byte_letters()[0x41]]) == "A"
