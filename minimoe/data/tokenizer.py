"""Text to token ids and back: characters, bytes or byte-level BPE, all one `tokenizer.json` (chapter 9).

Every vocabulary reserves the same special tokens. They mark documents and turns, and are never found inside a text:
a text that spells `<|end_of_text|>` is encoded as those characters.
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minimoe.settings import ConfigError

END_OF_TEXT = "<|end_of_text|>"
SPECIALS = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|end|>")


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`; byte-level kinds give any text back exactly.

    >>> t = Tokenizer.characters("banana")
    >>> t.encode("nab"), t.decode(t.encode("nab")), t.vocab_size
    ([6, 4, 5], 'nab', 7)
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        self.inner.encode_special_tokens = True         # specials in a text are text
        self.vocab_size: int = inner.get_vocab_size()
        self.end_of_text: int = self._special(END_OF_TEXT)

    @classmethod
    def bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE trained on the texts (Sennrich et al. 2016; bytes as in GPT-2)."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token a byte: 256 and the specials."""
        return cls.bpe([], 256 + len(SPECIALS))

    @classmethod
    def characters(cls, text: str) -> Tokenizer:
        """One token a character of `text`; others cannot be encoded, and say so."""
        vocab = {token: i for i, token in enumerate((*SPECIALS, *sorted(set(text))))}
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], fuse_unk=False))
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens(list(SPECIALS))
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one of a run folder."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{file}: no such tokenizer; name a tokenizer.json or a run folder")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:              # the library raises a bare Exception
            raise ConfigError(f"{file}: not a tokenizer.json ({str(error)[:80]})") from None

    @classmethod
    def from_text(cls, text: str) -> Tokenizer:
        """Of what stands in a tokenizer.json."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def save(self, path: str | Path) -> None:
        self.inner.save(str(path))

    def encode(self, text: str) -> list[int]:
        ids = self.inner.encode(text, add_special_tokens=False).ids
        if self.inner.pre_tokenizer is None and len(ids) != len(text):
            known = self.inner.get_vocab()
            missing = next(c for c in text if c not in known)
            raise ValueError(f"character {missing!r} is not in this tokenizer's vocabulary; "
                             "use only characters of the training text, or a model with a byte-level tokenizer")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens left out; bytes that are not whole characters become the replacement character."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def _special(self, token: str) -> int | None:
        return self.inner.token_to_id(token)


def make_tokenizer(kind: str, texts: list[str], vocab_size: int) -> Tokenizer:
    """`bpe` and `characters` learn from the texts; `bytes` needs none; anything else is a path."""
    if kind == "bpe":
        return Tokenizer.bpe(texts, vocab_size)
    if kind == "characters":
        return Tokenizer.characters("".join(texts))
    return Tokenizer.bytes() if kind == "bytes" else Tokenizer.load(kind)
