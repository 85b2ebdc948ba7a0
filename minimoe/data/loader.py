"""From a data config to what the trainer reads: a mixture of training windows, and held-out documents."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimoe.config import DataConfig
from minimoe.data.corpora import Document, load_corpus
from minimoe.data.mixture import Mixture, Stream
from minimoe.data.tokenizer import Tokenizer, make_tokenizer


@dataclass(frozen=True)
class TextData:
    """What `Trainer` takes: `mixture` to learn from, `held_out` documents to measure on, the `tokenizer` of both."""

    mixture: Mixture
    held_out: tuple[Document, ...]
    tokenizer: Tokenizer

    def held_out_tokens(self) -> np.ndarray:
        """All held-out documents as one stream, end-of-text before each."""
        return join(self.held_out, self.tokenizer)


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
    corpora = [load_corpus(s.corpus) for s in cfg.mixture]
    if tokenizer is None:
        tokenizer = make_tokenizer(cfg.tokenizer, [d.text for c in corpora for d in c.train], cfg.tokenizer_vocab)
    streams = tuple(Stream(c.name, join(c.train, tokenizer)) for c in corpora)
    return TextData(Mixture(streams, tuple(s.ratio for s in cfg.mixture)),
                    tuple(d for c in corpora for d in c.held_out), tokenizer)
