"""From a data config to what the trainer reads: a mixture of training windows, and held-out documents."""
from __future__ import annotations

import lzma
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from minimoe.config import DataConfig, Source, TrainConfig
from minimoe.data.chat import load_conversations, make_rows
from minimoe.data.corpora import held_apart, label, load_corpus
from minimoe.data.held_out import HELD_OUT_LIMIT, Corpus, Document, Overlap, hash_of, less
from minimoe.data.mixture import Mixture, Stream
from minimoe.data.shards import Shards, fitting_tokenizer, is_shards
from minimoe.data.sources import kind
from minimoe.data.stream import RawStream, encoder
from minimoe.data.tokenizer import Tokenizer, make_tokenizer
from minimoe.settings import ConfigError, need

XZ_LIMIT = 20_000_000   # characters: above it the yardstick takes longer than it tells, and of a stream it cannot be had
SAMPLE = 2_000_000      # characters of a stream that a tokenizer learns from


@dataclass(frozen=True)
class TextData:
    """What `Trainer` takes: the `mixture` to learn from, the `corpora` whose held-out text is measured on, and the
    `tokenizer` of both; with the `config` that it was made from, and by their hashes the held-out paragraphs that were left
    `out` because some source trains on them.

    Of conversations there are no corpora, but `rows` to measure, by name with the bytes of their answers; `seq_len`, the
    length of all rows; and `notes` to be said at the start.
    """

    mixture: Mixture
    corpora: tuple[Corpus, ...]
    tokenizer: Tokenizer
    config: DataConfig | None = None
    out: tuple[str, ...] = ()
    rows: dict[str, tuple[np.ndarray, int]] | None = None
    seq_len: int | None = None
    notes: tuple[str, ...] = ()

    def held_out(self) -> dict[str, tuple[np.ndarray, int]]:
        """What is only measured: by name the tokens, (n,) of text and (N, T + 1) of conversations, and the bytes."""
        if self.rows is not None:
            return self.rows
        return {c.name: (join(c.held_out, self.tokenizer), sum(len(d.text.encode()) for d in c.held_out))
                for c in self.corpora if c.held_out}


def join(documents: tuple[Document, ...], tokenizer: Tokenizer) -> np.ndarray:
    """The documents' tokens, one after the other, with end-of-text before each (where the vocabulary has one)."""
    mark, encode = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text], encoder(tokenizer)
    return np.concatenate([part for d in documents for part in (np.array(mark, np.int32), encode(d.text))])


def load_data(cfg: DataConfig, tokenizer: Tokenizer | None = None, seq_len: int | None = None,
              out: Iterable[str] | None = None) -> TextData:
    """Reads or opens the sources, trains or loads the tokenizer, and packs the tokens; of conversations, which are not
    packed, at most `seq_len` tokens each. `out` is what an earlier call found: with it, token ids that lie on disk are not
    read through again.

    >>> data = load_data(DataConfig(mixture="worlds", tokenizer="characters"))
    >>> inputs, targets = data.mixture.batch(0, batch_size=2, seq_len=8, seed=0)
    >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
    (torch.Size([2, 8]), True)
    """
    need(not cfg.pin_memory or torch.cuda.is_available(), "pin_memory: there is no CUDA device to copy to; leave it out")
    if cfg.supervised:
        return _load_conversations(cfg, tokenizer, seq_len)
    opened = [_open(source) for source in cfg.mixture]
    tokenizer = fitting_tokenizer([o for o in opened if isinstance(o, Shards)], tokenizer, cfg.tokenizer)
    if tokenizer is None:
        tokenizer = _make_tokenizer(cfg, opened)
    opened = [_with_text(o, tokenizer, out is None) if isinstance(o, Tokens | Shards) else o for o in opened]
    names = _unique([o.name for o in opened])
    overlap = Overlap(d for o in opened for d in o.held_out)
    found = _found(opened, tokenizer, overlap) if out is None else overlap.of_hashes(out)
    held = [less(o.held_out, found) for o in opened]
    corpora = [Corpus(name, o.train if isinstance(o, Corpus) else (), h) for name, o, h in zip(names, opened, held)]
    avoid, streams = Overlap(d for h in held for d in h), []
    for name, o in zip(names, opened):
        if isinstance(o, RawStream):
            o.name = name
            o.prepare(tokenizer, avoid)
        streams.append(o if isinstance(o, RawStream) else
                       Stream(name, o.train if isinstance(o, Tokens) else join(o.train, tokenizer)))
    sizes = [s.size for s in streams]
    need(cfg.strategy != "proportional" or None not in sizes,
         f"strategy=proportional: how long {', '.join(s.name for s in streams if s.size is None)} is shows only when it has "
         "been read; write weighted and give ratios")
    return TextData(_mixed(streams, cfg), tuple(corpora), tokenizer, cfg, tuple(sorted(map(hash_of, found))))


def _load_conversations(cfg: DataConfig, tokenizer: Tokenizer | None, seq_len: int | None) -> TextData:
    sources = [load_conversations(source) for source in cfg.mixture]
    sources = [replace(s, name=name) for s, name in zip(sources, _unique([s.name for s in sources]))]
    if tokenizer is None:
        texts = [Corpus(s.name, tuple(Document(s.name, c.text, c.domain) for c in s.train), ()) for s in sources]
        tokenizer = _make_tokenizer(cfg, texts)
    streams, rows, notes = make_rows(sources, tokenizer, seq_len)
    return TextData(_mixed(streams, cfg), (), tokenizer, cfg, rows=rows, seq_len=streams[0].seq_len, notes=notes)


def _mixed(streams: list, cfg: DataConfig) -> Ahead:
    ratios = {"weighted": [s.ratio for s in cfg.mixture], "equal": [1.0] * len(streams), "proportional": [s.size for s in streams]}
    return Ahead(tuple(streams), tuple(ratios[cfg.strategy]), cfg.workers, cfg.pin_memory)


def _open(source: Source) -> Corpus | Tokens | Shards | RawStream:
    """The one place that asks what kind a source is: text read whole, text read while training, or tokens."""
    if is_shards(source.corpus) or kind(source) == "tokens":
        need(not source.domains and source.percentage == 100 and not source.streaming, f"{source.corpus}: token ids have "
             "neither domains nor a percentage, and are read where they lie without streaming; leave these out")
        need(not (source.field or source.subset or source.split or is_shards(source.corpus) and source.held_out),
             f"{source.corpus}: token ids have no field, subset or split, and shards have their own held-out part; leave these out")
        return Shards(source.corpus) if is_shards(source.corpus) else Tokens.open(source)
    return RawStream(source) if source.streaming else load_corpus(source)


@dataclass(frozen=True)
class Tokens:
    """Token ids from a .npy file, read where they lie on disk, its end held out; or those of a folder of token shards."""

    name: str
    train: np.ndarray | Shards
    end: np.ndarray
    held_out: tuple[Document, ...] = ()

    @classmethod
    def open(cls, source: Source) -> Tokens:
        try:
            ids = np.load(source.corpus, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source.corpus}: not a .npy file of token ids ({str(error)[:80]})") from None
        need(ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids) > 1,
             f"{source.corpus}: {ids.dtype} of shape {ids.shape}; token ids are one row of whole numbers")
        if source.held_out:
            return cls(label(source), ids, ids[:0], tuple(held_apart(source)))
        cut = len(ids) - min(HELD_OUT_LIMIT, len(ids) // 10)
        return cls(label(source), ids[:cut], ids[cut:])


def _with_text(t: Tokens | Shards, tokenizer: Tokenizer, check: bool) -> Tokens:
    """With the held-out part as text, and where wanted, all ids looked at."""
    if isinstance(t, Shards):
        return Tokens(t.folder.name, t, np.empty(0, int), t.held_out(tokenizer))
    top = int(max(t.train.max() if check else 0, t.end.max(initial=0)))
    need(top < tokenizer.vocab_size, f"{t.name}: token {top} is not in this tokenizer's vocabulary of {tokenizer.vocab_size}; "
                                     "name the tokenizer that the file was made with")
    text = tokenizer.decode(t.end.tolist())
    return replace(t, held_out=t.held_out or (Document(f"{t.name}, end", text, "text"),))


def _make_tokenizer(cfg: DataConfig, opened: list[Corpus | Tokens | RawStream]) -> Tokenizer:
    ids = next((o.name for o in opened if isinstance(o, Tokens)), None)
    need(ids is None or cfg.tokenizer not in ("bpe", "characters"),
         f"tokenizer={cfg.tokenizer}: {ids} holds token ids already; name the tokenizer.json that they were made with")
    if cfg.tokenizer not in ("bpe", "characters"):
        return make_tokenizer(cfg.tokenizer, [], cfg.tokenizer_vocab)
    need(cfg.tokenizer == "bpe" or not any(isinstance(o, RawStream) for o in opened),
         "tokenizer=characters: which characters a stream has shows only when it has been read; take bpe or bytes")
    read = [Corpus(o.name, o.sample(SAMPLE), ()) if isinstance(o, RawStream) else o for o in opened]
    texts = in_shares(read, [s.ratio for s in cfg.mixture]) if cfg.tokenizer == "bpe" else [
        d.text for c in read for d in c.train]
    return make_tokenizer(cfg.tokenizer, texts, cfg.tokenizer_vocab)


def _found(opened: list[Corpus | Tokens | RawStream], tokenizer: Tokenizer, overlap: Overlap) -> set[str]:
    """The held-out paragraphs that stand in what any source trains on; what stands in a stream is left out there, while it
    is read."""
    reach = max((len(p.encode()) for group in overlap.of_gram.values() for p in group), default=0)
    found: set[str] = set()
    for o in opened:
        if isinstance(o, Corpus) and len(opened) > 1:               # alone it has done so itself
            found = found.union(*(overlap.found(d.text) for d in o.train))
        elif isinstance(o, Tokens) and (len(opened) > 1 or not isinstance(o.train, Shards)):
            for start in range(0, len(o.train), 1 << 18):
                found |= overlap.found(tokenizer.decode(o.train[start:start + (1 << 18) + reach].tolist()))
    return found


def _unique(names: list[str]) -> list[str]:
    """The same names, but "a (2)" for the second a."""
    return [n if names[:i].count(n) == 0 else f"{n} ({names[:i].count(n) + 1})" for i, n in enumerate(names)]


@dataclass(frozen=True)
class Ahead(Mixture):
    """A mixture whose next batches a thread prepares while the model computes; the batches are the same."""

    workers: int = 0
    pin_memory: bool = False

    @cached_property
    def _ahead(self) -> dict:
        return {"thread": ThreadPoolExecutor(1), "made": {}, "last": None, "state": None}       # one: streams are read in order

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (B, T) of one step; the steps after it, at the same distance as from the last, are begun."""
        rest = (batch_size, seq_len, seed)
        if not self.workers:
            return self._make((step, *rest))[0]
        ahead, made = self._ahead, self._ahead["made"]
        stride = max(1, step - ahead["last"]) if ahead["last"] is not None else 1
        if (step, *rest) not in made:
            self._forget()
        for s in range(step, step + (self.workers + 1) * stride, stride):
            if (s, *rest) not in made:
                made[(s, *rest)] = ahead["thread"].submit(self._make, (s, *rest))
        batch, ahead["state"] = made.pop((step, *rest)).result()
        ahead["last"] = step
        return batch

    def _make(self, key: tuple[int, int, int, int]) -> tuple[tuple[torch.Tensor, torch.Tensor], dict]:
        batch = super().batch(*key)
        return tuple(t.pin_memory() for t in batch) if self.pin_memory else batch, super().state() if self.workers else {}

    def _forget(self) -> None:
        while self._ahead["made"]:
            _, future = self._ahead["made"].popitem()
            if not future.cancel():
                future.exception()              # waits: nothing may read on behind our back

    def state(self) -> dict[str, dict]:
        """Where the streams stood after the batch that was given last."""
        return self._ahead["state"] or super().state()

    def restore(self, state: dict[str, dict]) -> None:
        self._forget()
        self._ahead.update(state=None, last=None)
        super().restore(state)


def shortened(train: TrainConfig, data: object, seq_len: int) -> TrainConfig:
    """The same settings with the number of steps that `until` leaves: all, or those until the first source is read."""
    if getattr(getattr(data, "config", None), "until", "") != "first_exhausted":
        return train
    return replace(train, steps=min(train.steps, data.mixture.steps_until(train.batch_size * train.accumulate, seq_len,
                                                                         train.seed)))


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


def held_out_lines(rows: list[dict], data: TextData) -> list[str]:
    """The bits per byte of each corpus where the whole was best, beside the yardstick for what can be read through."""
    best = min((r for r in rows if "val_bpb" in r), key=lambda r: r["val_ce"], default={"val": {}})
    read, corpora = sum(len(d.text) for c in data.corpora for d in c.train), {c.name: c for c in data.corpora}
    small = all(c.train for c in data.corpora) and read < XZ_LIMIT          # and conversations are no text
    return [f"held-out {name}: {bits:.3f} bits per byte at step {best['step']}" + (
        f"; xz -9e, given all training text, {xz_bits_per_byte(data, corpora[name]):.3f}" if small and name in corpora else "")
        for name, bits in best["val"].items()]


def xz_bits_per_byte(data: TextData, corpus: Corpus) -> float:
    """What `xz -9e` needs for a byte of the corpus's held-out text when it has seen all training text first: the
    yardstick for a language model's bits per byte."""
    seen = "\0".join(d.text for c in data.corpora for d in c.train).encode()
    new = "\0".join(d.text for d in corpus.held_out).encode()
    with_new, alone = (len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in (seen + new, seen))
    return (with_new - alone) * 8 / len(new)
