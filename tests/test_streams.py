"""Streams and mixtures: the order, nothing lost or repeated, going on from a saved place, held-out text, bounded memory."""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minimoe.config import DataConfig, ModelConfig, Source, TrainConfig
from minimoe.data.held_out import Document, Overlap
from minimoe.data.loader import Ahead, load_data
from minimoe.data.mixture import BLOCK, Mixture, Stream, permutation
from minimoe.data.stream import RawStream
from minimoe.data.tokenizer import Tokenizer
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError
from minimoe.trainer import Trainer

BYTES = Tokenizer.bytes()
HELD = "This paragraph stands in the held-out text and must not be learned from."


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three text files of several pieces, rows of very different length, and a text that is only measured on."""
    home = tmp_path_factory.mktemp("texts")
    (home / "files").mkdir()
    for name, n in (("a", 900), ("b", 1500), ("c", 40)):
        paragraphs = [f"{name}{i}: sentence {i * i} of a paragraph that is not short at all.\nIt has é lines.\n" for i in range(n)]
        (home / "files" / f"{name}.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    rows = [{"text": f"row {i} " + "z" * (i % 7) ** 5, "domain": "few" if i % 10 == 3 else "many"} for i in range(300)]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    (home / "held.txt").write_text(HELD, encoding="utf-8")
    return home


def source(texts, name="files", **options):
    return Source(**{"corpus": str(texts / name), "streaming": True, "held_out": str(texts / "held.txt")} | options)


def opened(texts, *args, **options):
    s = RawStream(source(texts, *args, **options))
    s.prepare(BYTES, Overlap(s.held_out))
    return s


def tokens(s, n, seed=0, size=64):
    """The first n tokens of a stream, in windows of `size`."""
    count = -(-n // size)
    return np.concatenate([s.windows(np.arange(i, min(i + 9, count)), size, seed)[:, :-1].ravel()
                           for i in range(0, count, 9)])[:n]


def test_a_stream_is_its_files_one_after_the_other_nothing_lost_or_repeated(texts):
    s, files = opened(texts), sorted((texts / "files").iterdir())
    epoch = sum(f.stat().st_size + 1 for f in files)
    begun, begin = [], s._begin
    s._begin = lambda seed: begun.append(seed) or begin(seed)
    got, orders = tokens(s, 4 * epoch, seed=3), set()
    assert begun == [3]                                              # read in order, it never goes back to the start
    for e in range(4):
        order = permutation(3, (3, e, *s.name.encode()))
        want = [i for f in order for i in [BYTES.end_of_text, *BYTES.encode(files[f].read_text(encoding="utf-8"))]]
        assert got[e * epoch:(e + 1) * epoch].tolist() == want
        orders.add(tuple(order))
    assert len(orders) > 1


@pytest.mark.parametrize("name", ["files", "rows.jsonl"])
def test_a_window_depends_on_its_number_alone(texts, name):
    s = opened(texts, name)
    whole = s.windows(np.arange(700), 50, 1)
    for numbers in (range(700), range(0, 700, 3), [5], [699], range(10, 20), [0], [4, 5, 300]):      # also backwards
        assert (opened(texts, name).windows(np.array(numbers), 50, 1) == whole[list(numbers)]).all()
        assert (s.windows(np.array(numbers), 50, 1) == whole[list(numbers)]).all()
    assert not (s.windows(np.arange(700), 50, 2) == whole).all() or name == "rows.jsonl"            # one file: one order


@pytest.mark.parametrize("name", ["files", "rows.jsonl", "dataset", "worlds"])
def test_going_on_from_a_saved_place_reads_nothing_twice(texts, name):
    options = {}
    if name == "dataset":
        pytest.importorskip("datasets")
        (texts / "folder").mkdir(exist_ok=True)
        (texts / "folder" / "train.jsonl").write_bytes((texts / "rows.jsonl").read_bytes())
        options = {"corpus": str(texts / "folder"), "split": "train"}
    elif name == "worlds":
        options = {"corpus": "worlds", "held_out": None}
    whole = opened(texts, name, **options).windows(np.arange(6000), 50, 1)
    first, at = opened(texts, name, **options), 0
    for stop in (1, 2, 300, 301, 1500, 5000):
        assert (first.windows(np.arange(at, stop), 50, 1) == whole[at:stop]).all()
        state, at = json.loads(json.dumps(first.state())), stop
        again, read = opened(texts, name, **options), []
        again.encode = lambda text, encode=again.encode, read=read: read.append(text) or encode(text)
        again.restore(state)
        assert (again.windows(np.arange(stop, stop + 9), 50, 1) == whole[stop:stop + 9]).all()
        assert sum(len(t.encode()) for t in read) <= 9 * 50 + 1 + max(map(len, read), default=0) * 4    # at most a piece ahead
        assert again.position == (stop + 9) * 50


def test_other_files_than_before_are_refused(texts, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 20_000, encoding="utf-8")
    make = lambda: opened(texts, corpus=str(tmp_path))
    s = make()
    s.windows(np.arange(3), 50, 0)
    (tmp_path / "b.txt").rename(tmp_path / "0.txt")
    with pytest.raises(ConfigError, match="files are not those of the run that was stopped .*; put them back"):
        make().restore(s.state())


def test_percentage_and_domains_hold_in_a_stream(texts):
    s = opened(texts, "rows.jsonl", domains=("few",))
    want = [json.loads(line)["text"] for line in (texts / "rows.jsonl").read_text(encoding="utf-8").splitlines()][3::10]
    n = sum(len(t) + 1 for t in want)
    assert BYTES.decode(tokens(s, n).tolist()) == "".join(want)
    assert (tokens(s, n) == tokens(s, 2 * n)[n:]).all()
    some, every = opened(texts, percentage=40.0), opened(texts)
    kept = [sum(len(p.text) for _, read in s.parts for p in read(None) if s._training_text(p)) for s in (some, every)]
    assert 0.1 < kept[0] / kept[1] < 0.8
    with pytest.raises(ConfigError, match="no text to learn from is left by percentage=100, domains=\\['none'\\]"):
        tokens(opened(texts, "rows.jsonl", domains=("none",)), 10)
    with pytest.raises(ConfigError, match="too little text to be streamed"):
        opened(texts, "held.txt", held_out=None)
    (texts / "rows.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="rows.json: a .json file can only be read whole"):
        opened(texts, "rows.json")


def test_no_held_out_paragraph_stands_in_any_training_text_of_a_mixture(texts, tmp_path):
    """Two streams and a text in memory that repeat each other's paragraphs, indented and in the middle of others too."""
    ours = [f"Paragraph {i} is written so that it is long enough to be noticed.\nIt ends here." for i in range(3000)]
    (tmp_path / "one.txt").write_text("\n\n".join(ours), encoding="utf-8")
    (tmp_path / "two.txt").write_text("\n\n".join(f"> {p} <\nand more" if i % 2 else f"Other {p}" for i, p in enumerate(ours)),
                                      encoding="utf-8")
    (tmp_path / "memory.txt").write_text("\n\n".join(ours[::5] + [f"{p} Only here." for p in ours[1::30]]), encoding="utf-8")
    data = load_data(DataConfig(tokenizer="bytes", mixture=(
        Source(corpus=str(tmp_path / "one.txt"), streaming=True), Source(corpus=str(tmp_path / "two.txt"), streaming=True),
        Source(corpus=str(tmp_path / "memory.txt")))))
    read = [data.tokenizer.decode(tokens(s, 600_000 if s.size is None else s.size).tolist()) for s in data.mixture.streams]
    assert [len(c.held_out) > 0 for c in data.corpora] == [True, True, True]
    paragraphs = [p.strip() for c in data.corpora for d in c.held_out for p in d.text.split("\n\n") if len(p.strip()) >= 40]
    assert len(paragraphs) > 300 and [p for p in paragraphs if any(p in text for text in read)] == []
    sizes = [sum(len(d.text) for d in c.held_out) for c in data.corpora]
    assert 20_000 < sizes[0] <= 65_536
    apart = "\n\n".join([*paragraphs, *(d.text for d in data.mixture.streams[0].held_out)])
    assert [p for p in ours if p not in read[0] and p not in apart and not any(h in p for h in paragraphs)] == []


def test_ratios_hold_in_tokens_for_documents_of_very_different_length(texts, tmp_path):
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps({"text": "a" * (1 + i % 5)}) for i in range(4000)), encoding="utf-8")
    (tmp_path / "long.txt").write_text("b" * 300_000, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "c" * (i % 9) ** 5}) for i in range(100)), encoding="utf-8")
    mixture = [Source(corpus=str(tmp_path / name), ratio=ratio, streaming=streaming, held_out=str(texts / "held.txt"))
               for name, ratio, streaming in (("short.jsonl", 2.0, True), ("long.txt", 1.0, False), ("rows.jsonl", 7.0, True))]
    data = load_data(DataConfig(mixture=tuple(mixture), tokenizer="bytes"))
    steps = 300
    all_windows = np.concatenate([data.mixture.batch(s, 16, 64, 0)[0].numpy() for s in range(steps)])
    sources = [next(i for i, c in enumerate("abc") if data.tokenizer.encode(c)[0] in row) for row in all_windows]
    assert np.abs(np.bincount(sources) / len(sources) - [0.2, 0.1, 0.7]).max() < 0.01
    tree = data.mixture.describe(steps * 16 * 64)
    assert "20.0%  streamed" in tree and "10.0%     300,001 tokens  0.10 epochs" in tree


def old_window(m, index, seq_len, seed):
    """The order as it was first written, window by window: what is read at a step must never change."""
    block, place = divmod(index, BLOCK)
    before, after = (np.diff(np.round(m.ends * BLOCK * b), prepend=0).astype(int) for b in (block, block + 1))
    order = np.repeat(np.arange(len(m.streams)), after - before)[permutation(BLOCK, (seed, block))]
    s, own = m.streams[order[place]], int(before[order[place]] + (order[:place] == order[place]).sum())
    n = len(s.tokens)
    epoch = own * seq_len // n
    first, end = -(-epoch * n // seq_len), -(-(epoch + 1) * n // seq_len)
    start = int(first + permutation(end - first, (seed, epoch, *s.name.encode()))[own - first]) * seq_len % n
    return np.take(s.tokens, range(start, start + seq_len + 1), mode="wrap")


def test_the_order_is_the_one_it_always_was():
    m = Mixture((Stream("a", np.arange(100_003)), Stream("bc", np.arange(977) + 10**6), Stream("c", np.arange(50) + 10**7)),
                (0.5, 0.2, 0.3))
    for seq_len, at in ((7, 900), (64, 0), (256, 5000)):
        assert (m.windows(np.arange(at, at + 300), seq_len, 5) == [old_window(m, i, seq_len, 5) for i in range(at, at + 300)]).all()


def test_batches_made_ahead_are_the_same_batches(texts):
    mixture = (source(texts, ratio=2.0), Source(corpus="worlds"))
    plain, ahead = (load_data(DataConfig(mixture=mixture, tokenizer="bytes", workers=w)).mixture for w in (0, 3))
    for steps in (range(6), (7, 9, 11, 13), (2, 3), (40,)):
        for step in steps:
            assert all(torch.equal(a, b) for a, b in zip(plain.batch(step, 4, 32, 0), ahead.batch(step, 4, 32, 0)))
            assert plain.state() == ahead.state()               # not where the thread is
    want = [plain.batch(step, 4, 32, 0)[0] for step in (41, 42)]
    fresh = load_data(DataConfig(mixture=mixture, tokenizer="bytes", workers=1)).mixture
    fresh.restore(ahead.state())
    assert all(torch.equal(fresh.batch(step, 4, 32, 0)[0], w) for step, w in zip((41, 42), want))


def test_strategies_and_where_the_first_source_ends():
    sources = (Source(corpus="worlds", ratio=1.0, domains=("brackets",)), Source(corpus="worlds", ratio=3.0, domains=("stories",)))
    made = {s: load_data(DataConfig(mixture=sources, strategy=s, tokenizer="bytes")).mixture
            for s in ("weighted", "equal", "proportional")}
    sizes = [s.size for s in made["equal"].streams]
    assert [m.ratios for m in made.values()] == [(1.0, 3.0), (1.0, 1.0), tuple(sizes)] and sizes[0] != sizes[1]
    assert [s.name for s in made["equal"].streams] == ["worlds/brackets", "worlds/stories"]
    for m in made.values():
        steps = m.steps_until(batch_size=4, seq_len=32, seed=2)
        _, own = np.array([[(s == 0), i] for s, i in _places(m, (steps + 1) * 4, 2)]).T
        counts = [[sum(1 for s, _ in _places(m, n * 4, 2) if s == k) * 32 for k in (0, 1)] for n in (steps, steps + 1)]
        assert all(c <= n + 31 for c, n in zip(counts[0], sizes)), "one source has begun anew"
        assert any(c + 32 > n for c, n in zip(counts[1], sizes)), "it could have gone on"


def _places(m, n, seed):
    from minimoe.data.mixture import _block

    return [tuple(_block(tuple(m.ends), i // BLOCK, seed)[:, i % BLOCK]) for i in range(n)]


def test_what_needs_a_length_says_so_for_streams(texts):
    with pytest.raises(ConfigError, match="strategy=proportional: how long files is shows only"):
        load_data(DataConfig(mixture=(source(texts), Source(corpus="worlds")), strategy="proportional", tokenizer="bytes"))
    data = load_data(DataConfig(mixture=source(texts), until="first_exhausted", tokenizer="bytes"))
    with pytest.raises(ConfigError, match="until=first_exhausted: how long files is"):
        trainer(data)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="pin_memory: there is no CUDA device"):
            load_data(DataConfig(mixture="worlds", tokenizer="bytes", pin_memory=True))


MODEL = ModelConfig(vocab_size=260, dim=16, n_layers=1, n_heads=2, max_seq_len=32, n_experts=2, top_k=1, expert_hidden=16)
TRAIN = TrainConfig(steps=6, batch_size=2, accumulate=2, warmup=2, device="cpu", dtype="float32", eval_every=0, log_every=1,
                    save_every=0)


def trainer(data, out=None, train=TRAIN):
    torch.manual_seed(0)
    return Trainer(MoETransformer(MODEL), train, data, out=out, progress=False)


def short_data(cfg):
    """Little held-out text, so that looking at it takes no time."""
    data = load_data(cfg)
    return dataclasses.replace(data, corpora=tuple(dataclasses.replace(c, held_out=(Document("h", HELD, ""),)) for c in data.corpora))


@pytest.mark.parametrize("workers, stops", [(0, (1, 2, 5)), (2, (3,))])
def test_a_run_on_streams_goes_on_bit_for_bit(texts, tmp_path, workers, stops):
    cfg = DataConfig(mixture=(source(texts), Source(corpus="worlds"), source(texts, "rows.jsonl")), tokenizer="bytes",
                     workers=workers)
    whole = trainer(short_data(cfg), tmp_path / "whole")
    whole.fit()
    for stop in stops:
        out = tmp_path / str(stop)
        trainer(short_data(cfg), out).fit(stop_after=stop)
        again = trainer(short_data(cfg), out)
        again.data.mixture.streams[0].encode = None                 # what was read before is enough: nothing is read again
        again.fit(resume=True)
        assert [r["ce"] for r in again.rows] == [r["ce"] for r in whole.rows]
        assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values()))


def test_another_mixture_is_refused_on_resume_with_the_difference(texts, tmp_path):
    cfg = DataConfig(mixture=(source(texts, ratio=2.0), Source(corpus="worlds")), tokenizer="bytes")
    trainer(short_data(cfg), tmp_path).fit(stop_after=1)
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    other = dataclasses.replace(cfg, mixture=(source(texts, ratio=1.5), Source(corpus="worlds", percentage=50.0)))
    with pytest.raises(ConfigError, match=r"mixture was .*files ratio=2.0 streaming=True .* \+ worlds, is "
                                          r".*files ratio=1.5 .* \+ worlds percentage=50.0"):
        trainer(short_data(other), tmp_path).fit(resume=True)
    with pytest.raises(ConfigError, match="strategy was weighted, is equal"):
        trainer(short_data(dataclasses.replace(cfg, strategy="equal")), tmp_path).fit(resume=True)
    assert sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) == before
    trainer(short_data(dataclasses.replace(cfg, workers=2)), tmp_path).fit(resume=True)     # changes no number


def test_first_exhausted_ends_the_run(tmp_path):
    cfg = DataConfig(mixture=(Source(corpus="worlds", domains=("brackets",), percentage=3.0), Source(corpus="pydocs")),
                     tokenizer="bytes", until="first_exhausted")
    t = trainer(short_data(cfg), train=dataclasses.replace(TRAIN, steps=10_000))
    first = t.data.mixture.streams[0].size
    assert t.cfg.steps == t.data.mixture.steps_until(4, 32, 0) and abs(t.cfg.steps * 4 * 32 / 2 / first - 1) < 0.25
    assert trainer(short_data(cfg)).cfg.steps == 6


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path, record_property):
    pytest.importorskip("resource", reason="peak memory is asked of POSIX")
    script, out = Path(__file__).parents[1] / "benchmarks" / "streaming.py", tmp_path / "out.json"
    # by a process between, for a child's ru_maxrss begins with what its parent has
    done = subprocess.run([sys.executable, str(script), "--megabytes", "200", "20", "--out", str(out)], capture_output=True,
                          text=True, encoding="utf-8", env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    large, small = json.loads(out.read_text(encoding="utf-8"))["rows"]
    record_property("peak MB", f"{large['peak_mb']} of 200, {small['peak_mb']} of 20")
    assert large["tokens"] > 200e6 and abs(large["peak_mb"] - small["peak_mb"]) <= 30


def test_ahead_is_a_mixture():
    m = Ahead((Stream("a", np.arange(9)),), (1.0,), workers=1)
    assert m.batch(0, 2, 4, 0)[0].shape == (2, 4) and m.state()["a"]["size"] == 9


@pytest.mark.parametrize("newline, blank_every", [("\n", 10**9), ("\r\n", 3)])
def test_held_out_text_is_found_without_blank_lines_and_with_other_line_ends(tmp_path, newline, blank_every):
    """One source is read whole and another, with the same lines, streamed: what the first holds out the second leaves out."""
    lines = [f"line {i} says that {i} and {i} is {2 * i}, which is longer than forty characters" for i in range(3000)]
    text = "".join(line + newline * (2 if i % blank_every == 0 else 1) for i, line in enumerate(lines, 1))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    sources = (Source(corpus=str(tmp_path / "a.txt")), Source(corpus=str(tmp_path / "b.txt"), streaming=True))
    data = load_data(DataConfig(mixture=sources, tokenizer="bytes"))
    held = {line.strip() for c in data.corpora for d in c.held_out for line in d.text.splitlines() if len(line.strip()) >= 40}
    read = "".join(d.text for d, _ in data.mixture.streams[1].texts())
    assert len(held) > 100 and not [line for line in held if line in read]
