"""Whether token shards are what their index says: every fault by name, and what the tokens look like."""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from minimoe.data.shards import read_index
from minimoe.data.tokenizer import Tokenizer
from minimoe.settings import ConfigError

CHUNK = 1 << 22         # bytes read at once; a multiple of every token's size


def verify(folder: str | Path) -> tuple[list[str], list[str]]:
    """All faults of a shard folder (none, if it is sound) and a report of its tokens, each a list of lines. Reads every
    byte once, in bounded memory."""
    folder = Path(folder)
    try:
        index = read_index(folder)
    except ConfigError as error:
        return [str(error)], []
    faults, mark = _tokenizer_faults(folder, index)
    counts = np.zeros(index["vocab_size"], np.int64)
    for part in ("shards", "held_out"):
        for entry in index[part]:
            found, seen = _look(folder / entry["file"], entry, index, mark)
            faults += found
            if part == "shards":
                counts += seen
    for name in ("tokens", "documents"):
        total = sum(s[name] for s in index["shards"])
        if total != index[name]:
            faults.append(f"index.json: wrong number of {name}, {index[name]:,} in all, but the shards have {total:,}")
    if sum(index["domains"].values()) != index["tokens"]:
        faults.append(f"index.json: the domains have {sum(index['domains'].values()):,} tokens, not {index['tokens']:,}")
    if sum(d["tokens"] for d in index["held_out_documents"]) != sum(e["tokens"] for e in index["held_out"]):
        faults.append("index.json: the held-out documents are not as long as their files")
    known = {e["file"] for e in (*index["shards"], *index["held_out"])}
    faults += [f"{p.name}: not in index.json" for p in sorted([*folder.glob("*.bin"), *folder.glob(".*.part")])
               if p.name not in known]
    return faults, _statistics(index, counts)


def _tokenizer_faults(folder: Path, index: dict) -> tuple[list[str], int | None]:
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    except ConfigError as error:
        return [str(error)], None
    if hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() != index["tokenizer"]:
        return ["tokenizer.json: wrong tokenizer, not the one that made these tokens (its SHA-256 differs from index.json)"], None
    if tokenizer.vocab_size != index["vocab_size"]:
        return [f"index.json: vocab_size is {index['vocab_size']}, and tokenizer.json has {tokenizer.vocab_size} tokens"], None
    return [], tokenizer.end_of_text


def _look(file: Path, entry: dict, index: dict, mark: int | None) -> tuple[list[str], np.ndarray]:
    """Faults of one file, and how often each token stands in it."""
    name, dtype, vocab_size = file.name, np.dtype(index["dtype"]), index["vocab_size"]
    counts, sha, n, faults = np.zeros(vocab_size, np.int64), hashlib.sha256(), 0, []
    if not file.is_file():
        return [f"{name}: missing"], counts
    with open(file, "rb") as stream:
        while raw := stream.read(CHUNK):
            sha.update(raw)
            tokens = np.frombuffer(raw[:len(raw) // dtype.itemsize * dtype.itemsize], dtype)
            if (tokens >= vocab_size).any() and not any("vocabulary" in f for f in faults):
                at = int((tokens >= vocab_size).argmax())
                faults.append(f"{name}: token {tokens[at]} at place {n + at:,} is out of the vocabulary of {vocab_size}")
            counts += np.bincount(tokens[tokens < vocab_size], minlength=vocab_size)
            n += len(tokens)
    size, same = file.stat().st_size, sha.hexdigest() == entry["sha256"]
    if not same and size < entry["tokens"] * dtype.itemsize:
        faults.append(f"{name}: truncated, {size:,} bytes of {entry['tokens'] * dtype.itemsize:,}")
    elif n != entry["tokens"]:
        faults.append(f"{name}: wrong token count, index.json says {entry['tokens']:,}, the file holds {n:,}")
    elif not same:
        faults.append(f"{name}: changed, its SHA-256 is not the one in index.json")
    if same and mark is not None and counts[mark] != entry["documents"]:
        faults.append(f"{name}: index.json says {entry['documents']:,} documents, the file begins {counts[mark]:,}")
    return faults, counts


def _statistics(index: dict, counts: np.ndarray) -> list[str]:
    used, shares = int((counts > 0).sum()), counts[counts > 0] / max(1, counts.sum())
    lines = [f"{used:,} of {index['vocab_size']:,} tokens of the vocabulary occur, the most frequent "
             f"{shares.max(initial=0):.1%} of the time",
             f"entropy of single tokens {-(shares * np.log2(shares)).sum():.3f} bits"]
    if index["documents"]:
        lines.append(f"{index['tokens'] / index['documents']:,.1f} tokens a document")
    return lines


def describe(folder: str | Path) -> list[str]:
    """Tokens, documents, files, domains and tokenizer of a shard folder, from its index alone."""
    index = read_index(folder)
    held = index["held_out_documents"]
    size = sum(e["tokens"] for e in (*index["shards"], *index["held_out"])) * np.dtype(index["dtype"]).itemsize
    lines = [f"{index['tokens']:>14,} tokens to learn from", f"{index['documents']:>14,} documents",
             f"{sum(d['tokens'] for d in held):>14,} tokens held out, in {len(held):,} documents",
             f"{len(index['shards']):>14,} shards, {size:,} bytes with what is held out, {index['dtype'][1:]}",
             f"{index['vocab_size']:>14,} tokens of vocabulary, tokenizer {index['tokenizer'][:12]}",
             f"made from {', '.join(index['sources'])}"]
    return lines + [f"  {domain:<18} {n / index['tokens']:6.1%}  {n:>14,} tokens"
                    for domain, n in sorted(index["domains"].items(), key=lambda item: -item[1])]
