"""Text to token ids and back: characters, bytes or byte-level BPE, all one `tokenizer.json` (chapter 9).

Every vocabulary made here reserves the same special tokens. They mark documents and turns, and are never found inside a
text: a text that spells `<|end_of_text|>` is encoded as those characters.
"""
from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from minimoe.settings import ConfigError, need

END_OF_TEXT, USER, ASSISTANT, END = SPECIALS = ("<|end_of_text|>", "<|user|>", "<|assistant|>", "<|end|>")
ENDS = (END_OF_TEXT, "<|endoftext|>", "</s>", "<eos>")         # what others call it
PIECE = 1 << 15         # characters encoded at once: the library holds some 200 bytes a character until it is done
# before a line break after a letter or digit no pattern of GPT-2 has anything to join, so two halves give the same tokens
CUT = re.compile(r"(?<=[^\W_])(?=\n)")
O200K = "|".join((
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))
# files that may hold the ranks, how texts are cut (None: as GPT-2), and where the specials stand after the last rank;
# GPT-2's 50,257 leave no room for turns, o200k's unused numbers do
PUBLISHED = {
    "gpt2": (("gpt2.tiktoken", "r50k_base.tiktoken", "vocab.bpe"), None, {"<|endoftext|>": 0}),
    "o200k": (("o200k_base.tiktoken",), O200K,
              {"<|endoftext|>": 1, USER: 2, ASSISTANT: 3, END: 9, "<|endofprompt|>": 20})}


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`; byte-level kinds give any text back exactly.

    >>> t = Tokenizer.characters("banana")
    >>> t.encode("nab"), t.decode(t.encode("nab")), t.vocab_size
    ([6, 4, 5], 'nab', 7)
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        inner.encode_special_tokens = True              # specials in a text are text
        inner.no_truncation(), inner.no_padding()       # a tokenizer.json may ask for both
        self.vocab_size: int = max(inner.get_vocab().values(), default=-1) + 1
        found = [i for name in ENDS if (i := inner.token_to_id(name)) is not None]
        self.end_of_text: int | None = found[0] if found else None
        self.end_of_turn: int | None = inner.token_to_id(END)
        before = inner.pre_tokenizer
        self.characters_only = before is None and inner.normalizer is None and not _merges(inner)
        self._cuts = self.characters_only or (inner.normalizer is None and isinstance(before, pre_tokenizers.ByteLevel)
                                              and before.use_regex and not before.add_prefix_space)

    @classmethod
    def bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE trained on a stream of texts, of which only the counts of words are kept (Sennrich et al. 2016;
        bytes as in GPT-2)."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        with tqdm(desc="tokenizer", unit="char", unit_scale=True, disable=None, leave=False) as bar:
            inner.train_from_iterator((t for t in texts if bar.update(len(t)) or True), trainer)
        return cls(inner)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token a byte: 256 and the specials."""
        return cls.bpe([], 256 + len(SPECIALS))

    @classmethod
    def characters(cls, texts: str | Iterable[str]) -> Tokenizer:
        """One token a character of the texts; others cannot be encoded, and say so."""
        known: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            known.update(text)
        vocab = {token: i for i, token in enumerate((*SPECIALS, *sorted(known)))}
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], fuse_unk=False))
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens(list(SPECIALS))
        return cls(inner)

    @classmethod
    def published(cls, name: str) -> Tokenizer:
        """`gpt2` or `o200k`, from the rank file in the data folder; the same tokens as tiktoken gives."""
        folder, (files, pattern, specials) = Path(os.environ.get("MINIMOE_DATA", "dataset")), PUBLISHED[name]
        file = next((folder / f for f in files if (folder / f).is_file()), None)
        need(file is not None, f"tokenizer {name}: no {' or '.join(files)} in {folder}; put one there or name its folder in "
                               "MINIMOE_DATA, or take --tokenizer bytes, while vocab_size stays as it is")
        vocab, merges = _from_merges(file) if file.suffix == ".bpe" else _from_ranks(file)
        specials = {token: len(vocab) + i for token, i in specials.items()}
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocab | specials, merges=merges, ignore_merges=True))
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if pattern:
            inner.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        inner.add_special_tokens(list(specials))
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one of a folder: a run, "shipped", or token shards."""
        path = Path(__file__).parents[1] / "assets" / "pydocs" if str(path) == "shipped" else Path(path)
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

    def fingerprint(self) -> str:
        """The same for tokenizers that give the same ids, whatever file they came from."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [i for piece, _ in self._split(text)
                for i in self._checked(piece, self.inner.encode(piece, add_special_tokens=False).ids)]

    def arrays(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens (n,) int32 of each text of a stream, encoded on all cores.

        >>> [a.tolist() for a in Tokenizer.characters("ab").arrays(["ab", "", "b"])]
        [[4, 5], [], [5]]
        """
        pieces, parts = (pair for text in texts for pair in self._split(text)), []
        while batch := list(itertools.islice(pieces, 32)):
            encoded = self.inner.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for (piece, is_last), encoding in zip(batch, encoded):
                parts.append(np.array(self._checked(piece, encoding.ids), dtype=np.int32))
                if is_last:
                    yield np.concatenate(parts)
                    parts = []

    def _split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Pieces that give the same tokens as the whole, and whether each is the last one."""
        start = 0
        while self._cuts and start + PIECE < len(text) and (cut := CUT.search(text, start + PIECE)):
            yield text[start:cut.start()], False
            start = cut.start()
        yield text[start:], True

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        if self.characters_only and len(ids) != len(text):
            known = self.inner.get_vocab()
            missing = next(c for c in text if c not in known)
            raise ValueError(f"character {missing!r} is not in this tokenizer's vocabulary; "
                             "use only characters of the training text, or a model with a byte-level tokenizer")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens left out; bytes that are not whole characters become the replacement character."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[dict[str, str]], reply: bool = False) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation in the template "turns", and for each whether an assistant is to learn it: its own
        words and the end of its turn. `reply` adds the mark that the next answer follows.

        Messages are {"role": "user", "assistant" or "system", "content": text}; what the system says goes before the
        first user's words. Texts that spell a mark stay text.

        >>> t = Tokenizer.characters("hi")
        >>> t.chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "i"}])
        ([1, 4, 5, 3, 2, 5, 3], [False, False, False, False, False, True, True])
        """
        marks = {role: self.inner.token_to_id(mark) for role, mark in (("user", USER), ("assistant", ASSISTANT), ("", END))}
        need(None not in marks.values(), f"this tokenizer has no {USER}, {ASSISTANT} and {END}: a conversation needs a model "
                                         "whose tokenizer minimoe made")
        ids, mask, system = [], [], ""
        for message in messages:
            role, text = message.get("role"), message.get("content")
            need(role in ("user", "assistant", "system") and isinstance(text, str),
                 f"message {message!r}: needs role (user, assistant or system) and content, a text")
            if role == "system":
                system += text + "\n\n"
                continue
            if role == "user":
                text, system = system + text, ""
            turn = self.encode(text) + [marks[""]]
            ids += [marks[role], *turn]
            mask += [False] + [role == "assistant"] * len(turn)
        need(not system, "a system message needs a user's message after it")
        return (ids + [marks["assistant"]], mask + [False]) if reply else (ids, mask)


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """`bpe` and `characters` learn from the texts; `bytes` needs none; `gpt2` and `o200k` take a published rank file;
    anything else is a path."""
    if kind == "bpe":
        return Tokenizer.bpe(texts, vocab_size)
    if kind == "characters":
        return Tokenizer.characters(texts)
    if kind in PUBLISHED:
        return Tokenizer.published(kind)
    return Tokenizer.bytes() if kind == "bytes" else Tokenizer.load(kind)


def _merges(inner: tokenizers.Tokenizer) -> bool:
    return bool(json.loads(inner.to_str())["model"].get("merges"))


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - {*printable}))}


def _from_ranks(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a .tiktoken file (base64 and rank a line). tiktoken joins the neighbors whose union has the
    lowest rank: so every way to cut a token in two known ones is a merge of that token's rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ConfigError(f"{file}: line {number} is not a token in base64 and its rank; copy the file again") from None
    need(sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([b]) in ranks for b in range(256)),
         f"{file}: ranks are missing; copy the file again")
    letters = _byte_letters()
    spell = lambda token: "".join(letters[b] for b in token)
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(spell(a), spell(b)) for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    return {spell(token): rank for token, rank in ranks.items()}, merges


def _from_merges(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of GPT-2's vocab.bpe: the 256 bytes, then one token a line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    need(merges and all(len(pair) == 2 for pair in merges), f"{file}: not a list of merges; copy the file again")
    tokens = [*_byte_letters().values(), *(a + b for a, b in merges)]
    return {token: i for i, token in enumerate(tokens)}, merges
