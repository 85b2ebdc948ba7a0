"""The text that a run is measured on, and what is measured there: perplexity, bits per byte, token accuracy (chapter 11).

Shapes: T tokens of a text.
"""
from __future__ import annotations

import dataclasses
import json
import lzma
import math
import random
from typing import TYPE_CHECKING

import numpy as np

from minimoe.data.held_out import Corpus, Document
from minimoe.data.loader import join, load_data
from minimoe.evaluate.benchmark import Measured
from minimoe.evaluate.likelihood import rolling_windows, token_scores, tokenizer_of
from minimoe.evaluate.results import Scores
from minimoe.settings import need

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

FEW = 10        # documents: with fewer, pieces of them are the items of the bootstrap


def held_out(run: Run) -> tuple[Corpus, ...]:
    """The held-out documents of a run: those it was trained beside, those that lie in its folder, or else read again from the
    sources in its config. ConfigError where there are none."""
    need(run.corpora or not run.config.data.supervised, f"{run.folder or 'this run'}: learned conversations, of which no text is held "
         "out to be read on: give one with --text-file, or text=")
    if run.corpora is not None:
        corpora = run.corpora
    elif run.folder and (run.folder / "text.jsonl.xz").is_file():
        rows = [json.loads(line) for line in lzma.decompress((run.folder / "text.jsonl.xz").read_bytes()).decode().splitlines()]
        names = dict.fromkeys(row["corpus"] for row in rows)
        corpora = tuple(Corpus(name, (), tuple(Document(r["name"], r["text"], r["domain"]) for r in rows
                                               if r["held_out"] and r["corpus"] == name)) for name in names)
    else:
        corpora = load_data(run.config.data, tokenizer_of(run)).corpora
    run.corpora = corpora = tuple(Corpus(c.name, (), c.held_out) for c in corpora if c.held_out)      # read once
    need(corpora, f"{run.folder or 'this run'}: no held-out text: give one with --text-file, or text=")
    return corpora


def with_text(run: Run, text: str, name: str = "the given text") -> Run:
    """The same run, to be measured on this text."""
    need(text.strip(), f"{name} is empty: give some words to measure on")
    return dataclasses.replace(run, corpora=(Corpus(name, (), (Document(name, text, "text"),)),))


def text_scores(run: Run, rng: random.Random, n: int) -> Measured:
    """Perplexity, bits per byte (of each corpus, and of all) and token accuracy. Documents follow one another with end-of-text between, as
    in training, and each token is predicted from at least half a sequence of what stands before it (`val_bpb` of a
    run's rows is this number). The bootstrap draws documents, or of few long ones pieces of half a sequence."""
    tokenizer, vocab = tokenizer_of(run), run.model.cfg.vocab_size
    per_corpus = {c.name: _items(run, c) for c in held_out(run)}
    items_N4 = np.concatenate([*per_corpus.values()])
    nats, hits, tokens, n_bytes = items_N4.T
    pair = lambda a, b: np.stack([a, b], axis=1)
    # what needs no model: every token equally likely, or always the commonest one
    ids = np.concatenate([join(c.held_out, tokenizer) for c in held_out(run)])
    common = np.bincount(ids).max() / len(ids)
    bits = lambda items: Scores(metric="bits per byte", values=pair(items[:, 0] / math.log(2), items[:, 3]), better="lower",
                                chance=math.log2(vocab) * items[:, 2].sum() / items[:, 3].sum())
    scores = [Scores(metric="perplexity", values=pair(nats, tokens), chance=float(vocab), better="lower", transform=np.exp),
              Scores(metric="token accuracy", values=pair(hits, tokens), chance=float(common)), bits(items_N4)]
    if len(per_corpus) > 1:
        scores += [dataclasses.replace(bits(items), metric=f"bits per byte, {name}") for name, items in per_corpus.items()]
    items = "documents" if any(len(c.held_out) >= FEW for c in held_out(run)) else "pieces of half a sequence"
    return Measured(scores=scores, note=f"items are {items}; chance is every token equally likely, for token accuracy the "
                                        "commonest token always")


def _items(run: Run, corpus: Corpus) -> np.ndarray:
    """(N, 4) nats, hits, tokens and bytes of each document, or of pieces of half a sequence where documents are few."""
    tokenizer, limit = run.tokenizer, run.model.cfg.max_seq_len
    joined = join(corpus.held_out, tokenizer)
    need(len(joined) > 1, f"{corpus.name}: a text of one token cannot be measured: give more")
    windows = rolling_windows(joined.tolist(), [], limit, context=limit // 2 + 1)
    scored = token_scores(run.model, windows)
    nats_T, hits_T = (np.concatenate([s[i].double().numpy() for s in scored]) for i in (0, 1))
    per_token = np.stack([-nats_T, hits_T, np.ones_like(nats_T)], axis=1)
    if len(corpus.held_out) >= FEW:
        # the first token of all is not predicted
        ends = np.cumsum([len(join((d,), tokenizer)) for d in corpus.held_out]) - 1
        sizes = [len(d.text.encode()) for d in corpus.held_out]
    else:
        ends = np.append(np.arange(limit // 2, len(per_token) - limit // 4, limit // 2), len(per_token))
        sizes = [len(tokenizer.decode(part.tolist()).encode()) for part in np.split(joined[1:], ends[:-1])]
    total, sizes = sum(len(d.text.encode()) for d in corpus.held_out), np.array(sizes, float)
    sums = [part.sum(0) for part in np.split(per_token, ends[:-1])]
    return np.column_stack([np.array(sums), sizes * total / max(sizes.sum(), 1)])
