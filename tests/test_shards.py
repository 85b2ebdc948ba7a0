"""Token shards: the same tokens as from the text, every fault named, merged in tokens, and trained on from the command line."""
import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
import torch

from minimoe.checkpoint import load
from minimoe.cli import main
from minimoe.config import Config, DataConfig, ModelConfig, Source, TrainConfig
from minimoe.data import shards as module
from minimoe.data.corpora import load_corpus
from minimoe.data.held_out import Overlap, hash_of
from minimoe.data.loader import join, load_data
from minimoe.data.shards import Shards, merge, prepare
from minimoe.data.tokenizer import Tokenizer
from minimoe.data.verify import verify
from minimoe.settings import ConfigError
from minimoe.start import train_from_config


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "worlds"
    prepare(["worlds"], folder, "bpe", 400, shard_tokens=50_000)
    return folder


def paragraphs(documents) -> set[str]:
    return {p.strip() for d in documents for p in d.text.split("\n\n") if len(p.strip()) >= 40}


def everything(folder) -> np.ndarray:
    shards = Shards(folder)
    return shards.take(range(len(shards)))


def test_the_tokens_are_those_of_the_text(worlds):
    corpus, tokenizer, shards = load_corpus("worlds"), Tokenizer.load(worlds), Shards(worlds)
    assert (everything(worlds) == join(corpus.train, tokenizer)).all()
    assert [(d.name, d.text, d.domain) for d in shards.held_out(tokenizer)] == [
        (d.name, d.text, d.domain) for d in corpus.held_out]
    index = shards.index
    assert [s["tokens"] for s in index["shards"]] == [50_000] * 3 + [len(shards) - 150_000]
    assert index["documents"] == len(corpus.train) and sum(index["domains"].values()) == index["tokens"] == len(shards)
    sums = tuple(d for d in corpus.train if d.domain == "arithmetic")
    assert index["domains"]["arithmetic"] == len(join(sums, tokenizer))
    assert index["dtype"] == "<u2" and (worlds / "shard-00000.bin").stat().st_size == 100_000
    assert verify(worlds)[0] == [] and not list(worlds.glob(".*"))


def test_windows_are_those_of_the_text_and_read_nothing_else(worlds):
    """Across files and around the ring; the same batches as from memory."""
    shards, tokens = Shards(worlds), everything(worlds)
    for start, n in ((49_990, 20), (len(tokens) - 3, 10), (149_999, 50_200), (0, 1), (7, len(tokens) * 2)):
        assert (shards.take(range(start, start + n)) == np.take(tokens, range(start, start + n), mode="wrap")).all()
    assert (shards[49_990:50_010] == tokens[49_990:50_010]).all() and (shards[-3:] == tokens[-3:]).all()
    assert (np.take(shards, range(5), mode="wrap") == tokens[:5]).all()
    config = DataConfig(mixture=(Source(corpus=str(worlds), ratio=3), Source(corpus="pydocs")))
    data = load_data(config)
    shards = data.mixture.streams[0].tokens
    in_memory = dataclasses.replace(data.mixture.streams[0], tokens=tokens)
    other = dataclasses.replace(data.mixture, streams=(in_memory, data.mixture.streams[1]))
    read = []

    class Map(np.memmap):
        def __getitem__(self, part):
            read.append(len(piece := np.asarray(self)[part]))
            return piece

    shards.maps = [m.view(Map) for m in shards.maps]
    for step in (0, 900, 10_007):
        for a, b in zip(data.mixture.batch(step, 4, 64, seed=1), other.batch(step, 4, 64, seed=1)):
            assert torch.equal(a, b)
    assert 0 < sum(read) <= 3 * 4 * 65
    assert (pickle.loads(pickle.dumps(shards)).take(range(9)) == tokens[:9]).all() and len(pickle.dumps(shards)) < 500


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    Tokenizer.characters(["\n"] + [chr(i) for i in range(32, 0xD800)] + [chr(i) for i in range(0xE000, 0x14000)]).save(tmp_path / "t.json")
    (tmp_path / "mine.txt").write_text("\U00013000" * 30 + "漢字 and more, a line of it\n\n" * 200, encoding="utf-8")
    index = prepare([str(tmp_path / "mine.txt")], tmp_path / "out", str(tmp_path / "t.json"))
    assert index["dtype"] == "<u4" and index["vocab_size"] > 65_536 < everything(tmp_path / "out").max()
    assert verify(tmp_path / "out")[0] == []


def test_held_out_text_of_one_source_does_not_stand_in_another(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 50)           # less than a paragraph: each stands at a seam
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(80):
            both = f"paragraph {i} stands in the files of both folders, and is long enough to count"
            (tmp_path / name / f"{name}{i}.txt").write_text(f"{both}\n\nand {name} {i} says something of its own here, long enough\n",
                                                           encoding="utf-8")
    prepare([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "ab", "bytes")
    for name in "ab":
        prepare([str(tmp_path / name)], tmp_path / f"of {name}", "bytes")
    merge([tmp_path / "of a", tmp_path / "of b"], tmp_path / "merged")
    for folder in (tmp_path / "ab", tmp_path / "merged"):
        tokenizer = Tokenizer.load(folder)
        text, held = tokenizer.decode(everything(folder).tolist()), Shards(folder).held_out(tokenizer)
        assert len(paragraphs(held)) > 2 and not [p for p in paragraphs(held) if p in text]
        assert verify(folder)[0] == []


def test_a_large_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1000)
    monkeypatch.setattr("minimoe.data.sources.PIECE", 700)
    lines = [f"line {i} of a text of one's own, with é and 漢字 in it" + "\n" * (1 + (i % 5 == 0)) for i in range(2000)]
    file = tmp_path / "large.txt"
    file.write_text("".join(lines), encoding="utf-8")
    index = prepare([str(file)], tmp_path / "out", "bytes", shard_tokens=10_000)
    tokens, tokenizer = everything(tmp_path / "out"), Tokenizer.bytes()
    held = Shards(tmp_path / "out").held_out(tokenizer)
    read = tokenizer.decode(tokens.tolist())
    assert sorted((read + "".join(d.text for d in held)).split("\n")) == sorted("".join(lines).split("\n"))
    assert 5 < len(held) and sum(len(d.text) for d in held) <= 65_536 and not [p for p in paragraphs(held) if p in read]
    marks = int((tokens == tokenizer.end_of_text).sum())            # the beginning, and where something was taken out
    assert marks == index["documents"] and 2 <= marks <= 1 + len(held) and tokens[0] == tokenizer.end_of_text
    assert verify(tmp_path / "out")[0] == []
    raw = file.read_bytes()
    at = raw.index("é".encode(), 40_000)
    file.write_bytes(raw[:at + 1] + raw[at + 2:])
    with pytest.raises(ConfigError, match=f"not UTF-8 at byte {at};"):
        prepare([str(file)], tmp_path / "bad", "bytes")
    assert not (tmp_path / "bad").exists()


def test_an_interrupted_prepare_is_recognised_and_begun_anew(worlds, tmp_path, monkeypatch, capsys):
    out, command = tmp_path / "out", ["data", "prepare", "worlds", "--tokenizer-vocab", "400", "--shard-tokens", "50000", "--out"]
    add, calls = module.Writer.add, []

    def stopping(self, tokens):
        calls.append(add(self, tokens))
        if len(calls) == 600:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Writer, "add", stopping)
    assert main([*command, str(out)]) == 130
    left = sorted(p.name for p in out.iterdir())
    assert left == [".index.json.part", ".shard-00002.bin.part", "shard-00000.bin", "shard-00001.bin"]
    capsys.readouterr()
    for words in (["data", "info"], ["data", "verify"], ["train", "--out", str(tmp_path / "run"), "--mixture"]):
        assert main([*words, str(out)]) == 2
        assert "not finished" in "".join(capsys.readouterr()) and not (tmp_path / "run").exists()
    assert main([*command, str(out)]) == 0
    same = sorted(p.name for p in worlds.iterdir())
    assert sorted(p.name for p in out.iterdir()) == same and all((out / n).read_bytes() == (worlds / n).read_bytes() for n in same)
    before = [p.stat().st_mtime_ns for p in out.iterdir()]
    assert main([*command, str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert [p.stat().st_mtime_ns for p in out.iterdir()] == before
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "shard-00000.bin").write_bytes(b"of another program")
    assert main([*command, str(tmp_path / "else")]) == 2 and (tmp_path / "else" / "shard-00000.bin").exists()


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(module.os, "fsync", full)
        assert main(["data", "prepare", "worlds", "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 2
    assert "No space left" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert main(["data", "prepare", "worlds", "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 0


@pytest.fixture(scope="module")
def two(worlds, tmp_path_factory):
    other = tmp_path_factory.mktemp("shards") / "pydocs"
    prepare(["pydocs"], other, str(worlds), shard_tokens=30_000)
    return worlds, other


@pytest.mark.parametrize("strategy, ratios", [("proportional", []), ("equal", []), ("weighted", [3, 1]), ("weighted", [0.1, 0.9])])
def test_merge_holds_its_shares_in_tokens(strategy, ratios, two, tmp_path, capsys):
    argv = ["data", "merge", *map(str, two), "--out", str(tmp_path / "m"), "--strategy", strategy, "--shard-tokens", "40000"]
    assert main([*argv, *(["--ratios", *map(str, ratios)] if ratios else [])]) == 0
    assert verify(tmp_path / "m")[0] == []
    a, b = (everything(f) for f in two)
    merged = everything(tmp_path / "m")
    counts = {"proportional": (len(a), len(b)), "equal": (min(len(a), len(b)),) * 2}.get(strategy)
    if counts is None:
        of_a = ratios[0] / sum(ratios)
        total = min(len(a) / of_a, len(b) / (1 - of_a))
        counts = round(total * of_a), round(total * (1 - of_a))
    assert len(merged) == sum(counts) and (merged[:counts[0]] == a[:counts[0]]).all() and (merged[counts[0]:] == b[:counts[1]]).all()
    assert counts[0] == len(a) or counts[1] == len(b)
    domains, index = Shards(two[0]).index["domains"], Shards(tmp_path / "m").index
    assert abs(index["domains"]["prose"] - counts[1]) <= 1 and index["sources"] == ["worlds", "pydocs"]
    assert abs(index["domains"]["stories"] - domains["stories"] * counts[0] / len(a)) <= 1
    held = [{d.text for d in Shards(f).held_out(Tokenizer.load(two[0]))} for f in (tmp_path / "m", *two)]
    assert held[0] == held[1] | held[2]


def test_merge_refuses_what_does_not_go_together(two, tmp_path, capsys):
    prepare(["worlds"], tmp_path / "bytes", "bytes")
    for words, message in (([two[0], tmp_path / "bytes"], "bytes: made with another tokenizer than"), ([two[0]], "at least two"),
                           ([*two, "--strategy", "weighted"], "one above 0 for each of the 2"),
                           ([*two, "--strategy", "weighted", "--ratios", "1", "0"], "one above 0"),
                           ([*two, "--ratios", "1", "2"], "ratios belong to strategy=weighted"),
                           ([*two, "--strategy", "weighted", "--ratios", "1", "1e-9"], "nothing would be taken of"),
                           ([two[0], tmp_path / "none"], "no token shards here")):
        assert main(["data", "merge", *map(str, words), "--out", str(tmp_path / "m")]) == 2
        assert message in (said := capsys.readouterr().err) and said.count("\n") == 1 and not (tmp_path / "m").exists()
    for words in (["nothing_of_that_name"], []):
        assert main(["data", "prepare", *words, "--out", str(tmp_path / "m")]) == 2 and not (tmp_path / "m").exists()
    assert main(["data", "polish"]) == 2 and "prepare, merge, verify, info" in capsys.readouterr().err


def test_help_says_everything(capsys):
    for action, flags in (("prepare", "--out --tokenizer --tokenizer-vocab --shard-tokens"), ("verify", "Folder that"), ("info", "Folder that"),
                          ("merge", "--out --strategy --ratios --shard-tokens")):
        with pytest.raises(SystemExit) as done:
            main(["data", action, "--help"])
        said = capsys.readouterr().out
        assert done.value.code == 0 and all(flag in said for flag in flags.split())
    assert main(["data", "--help"]) == 0 and "  merge " in (said := capsys.readouterr().out) and "  info " in said


@pytest.fixture
def sums(tmp_path):
    (tmp_path / "mine.txt").write_text("".join(f"{i} + {i} = {2 * i}\n" for i in range(900)), encoding="utf-8")
    return tmp_path / "mine.txt"


def test_train_on_shards_and_resume_from_the_command_line(sums, tmp_path, capsys):
    """Beside a text that is encoded with the shards' own tokenizer; stopped and gone on, it is the unbroken run."""
    folder = tmp_path / "shards"
    assert main(["data", "prepare", str(sums), "--tokenizer-vocab", "300", "--shard-tokens", "999", "--out", str(folder)]) == 0
    common = ["train", "--mixture", f"{folder}:2", str(sums), "--dim", "16", "--n-layers", "1", "--n-heads", "2", "--expert-hidden",
              "16", "--max-seq-len", "64", "--steps", "4", "--batch-size", "2", "--log-every", "1", "--eval-every", "2", "--dtype", "float32"]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    tokens = f"{len(everything(folder)):,} tokens"
    assert tokens in said and f"held-out {folder.name}" in said and "held-out mine" in said and "xz -9e" not in said
    assert main([*common, "--out", str(tmp_path / "run"), "--stop-after", "3"]) == 0
    assert main([*common, "--out", str(tmp_path / "run"), "--resume"]) == 0
    whole, run = (load(tmp_path / name) for name in ("whole", "run"))
    drop = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert drop(whole.metrics()) == drop(run.metrics()) and len(run.metrics()) == 4
    a, b = whole.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert run.tokenizer.fingerprint() == Tokenizer.load(folder).fingerprint()
    capsys.readouterr()
    for kind in ("bytes", "characters", "shipped"):
        assert main([*common, "--tokenizer", kind, "--out", str(tmp_path / "no")]) == 2
        assert "made with another tokenizer; train with --tokenizer" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main([*common, "--vocab-size", "299", "--out", str(tmp_path / "no")]) == 2 and "vocab_size" in capsys.readouterr().err


def test_characters_train_on_shards_too(sums, tmp_path, capsys):
    """The sample prompts have letters that this text has not, so a text of its own is taken."""
    assert main(["data", "prepare", str(sums), "--tokenizer", "characters", "--out", str(tmp_path / "s")]) == 0
    assert main(["train", "--mixture", str(tmp_path / "s"), "--tokenizer", "characters", "--dim", "16", "--n-layers", "1", "--n-heads",
                 "2", "--expert-hidden", "16", "--max-seq-len", "32", "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert re.search(r"--- '\d+ \+ \d+ = ", capsys.readouterr().out)


def test_a_restart_reads_only_what_the_next_steps_take(tmp_path, monkeypatch):
    """Shards and a file of ids beside a text that shares a paragraph with their held-out part: the first start looks through
    all of them, going on does not, and measures on the same held-out text."""
    shared = "A paragraph that stands in the held-out part of one and in what the other one trains on."
    parts = [f"Document {i} says that {i} and {i} is {2 * i}, and then it says no more than that." for i in range(3000)]
    (tmp_path / "big.txt").write_text("\n\n".join([*parts, shared]) + "\n", encoding="utf-8")
    (tmp_path / "small.txt").write_text("\n\n".join([shared, *(f"Another line, the number {i}, of the small text." for i in range(40))]),
                                        encoding="utf-8")
    prepare([str(tmp_path / "big.txt")], tmp_path / "shards", "bytes", shard_tokens=60_000)
    ids = Tokenizer.bytes().encode("\n\n".join(parts[:2000]))
    np.save(tmp_path / "ids.npy", np.array(ids, np.uint16))
    config = Config(model=ModelConfig(vocab_size=None, dim=16, n_layers=1, n_heads=2, expert_hidden=16, max_seq_len=32),
                    train=TrainConfig(steps=4, batch_size=2, eval_every=0, dtype="float32", threads=1),
                    data=DataConfig(mixture=tuple(str(tmp_path / n) for n in ("shards", "small.txt", "ids.npy")), tokenizer="bytes"))
    taken, looked_at = [], []
    take, found = Shards.take, Overlap.found
    monkeypatch.setattr(Shards, "take", lambda self, indices, **kw: taken.append(len(indices)) or take(self, indices, **kw))
    monkeypatch.setattr(Overlap, "found", lambda self, text: looked_at.append(len(text)) or found(self, text))
    whole = train_from_config(config, tmp_path / "whole", progress=False)
    assert sum(taken) > 100_000 and sum(looked_at) > 200_000
    train_from_config(config, tmp_path / "run", progress=False, stop_after=2)
    taken.clear(), looked_at.clear()
    run = train_from_config(config, tmp_path / "run", progress=False, resume=True)
    # two steps of two windows, and for the checksum of each start three places of 64 k tokens at most
    assert sum(taken) <= 4 * 33 + 2 * 3 * (1 << 16) and max(taken) <= 1 << 16
    assert sum(looked_at) <= (tmp_path / "small.txt").stat().st_size            # which is read whole, as all texts are
    assert [r.get("val") for r in run.metrics()] == [r.get("val") for r in whole.metrics()] and run.metrics()[-1]["val"]
    apart = json.loads((tmp_path / "run" / "checkpoints" / "00000004" / "state" / "progress.json").read_text(encoding="utf-8"))["out"]
    assert hash_of(shared) in apart
