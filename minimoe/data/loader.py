"""From a data config to what the trainer reads: a mixture of training windows, and held-out documents."""
from __future__ import annotations

import lzma
from dataclasses import dataclass

import numpy as np

from minimoe.config import DataConfig
from minimoe.data.corpora import Corpus, Document, load_corpus
from minimoe.data.mixture import Mixture, Stream
from minimoe.data.shards import Shards, fitting_tokenizer, is_shards
from minimoe.data.tokenizer import Tokenizer, make_tokenizer


@dataclass(frozen=True)
class TextData:
    """What `Trainer` takes: the `mixture` to learn from, the `corpora` whose held-out text is measured on, and the
    `tokenizer` of both."""

    mixture: Mixture
    corpora: tuple[Corpus, ...]
    tokenizer: Tokenizer


def join(documents: tuple[Document, ...], tokenizer: Tokenizer) -> np.ndarray:
    """The documents' tokens, one after the other, with end-of-text before each (where the vocabulary has one)."""
    mark = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return np.concatenate([np.array(mark + tokenizer.encode(d.text), dtype=np.int32) for d in documents])


def load_data(cfg: DataConfig, tokenizer: Tokenizer | None = None) -> TextData:
    """Reads the corpora, trains or loads the tokenizer, and packs the tokens.

    >>> data = load_data(DataConfig(mixture="worlds", tokenizer="characters"))
    >>> inputs, targets = data.mixture.batch(0, batch_size=2, seq_len=8, seed=0)
    >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
    (torch.Size([2, 8]), True)
    """
    shards = {s.corpus: Shards(s.corpus) for s in cfg.mixture if is_shards(s.corpus)}
    if shards:
        tokenizer = fitting_tokenizer(shards.values(), tokenizer, cfg.tokenizer)
    corpora = [shards[s.corpus].corpus(tokenizer) if s.corpus in shards else load_corpus(s.corpus) for s in cfg.mixture]
    if tokenizer is None:
        texts = [d.text for c in corpora for d in c.train]
        if cfg.tokenizer == "bpe":
            texts = in_shares(corpora, [s.ratio for s in cfg.mixture])
        tokenizer = make_tokenizer(cfg.tokenizer, texts, cfg.tokenizer_vocab)
    streams = tuple(Stream(c.name, shards.get(s.corpus) or join(c.train, tokenizer)) for s, c in zip(cfg.mixture, corpora))
    return TextData(Mixture(streams, tuple(s.ratio for s in cfg.mixture)), tuple(corpora), tokenizer)


def in_shares(corpora: list[Corpus], ratios: list[float]) -> list[str]:
    """Training texts in the mixture's own shares, as many as there are: what a tokenizer should learn from, so that a
    large source does not take the vocabulary of a small one."""
    sizes = [sum(len(d.text) for d in c.train) for c in corpora]
    total = min(size / ratio for size, ratio in zip(sizes, ratios))
    texts = []
    for corpus, ratio in zip(corpora, ratios):
        left = int(total * ratio)
        for d in corpus.train:
            texts.append(d.text[:left])
            left -= len(texts[-1])
    return [t for t in texts if t]


def xz_bits_per_byte(data: TextData, corpus: Corpus) -> float:
    """What `xz -9e` needs for a byte of the corpus's held-out text when it has seen all training text first: the
    yardstick for a language model's bits per byte."""
    seen = "\0".join(d.text for c in data.corpora for d in c.train).encode()
    new = "\0".join(d.text for d in corpus.held_out).encode()
    with_new, alone = (len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in (seen + new, seen))
    return (with_new - alone) * 8 / len(new)
