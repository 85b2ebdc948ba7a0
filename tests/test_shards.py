"""Token shards: the same tokens as from the text, every fault named, merged in tokens, and trained on from the command line."""
import dataclasses
import hashlib
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

from minimoe.checkpoint import load
from minimoe.cli import main
from minimoe.config import DataConfig, Source
from minimoe.data import shards as module
from minimoe.data.corpora import load_corpus
from minimoe.data.loader import join, load_data
from minimoe.data.shards import Shards, merge, prepare
from minimoe.data.tokenizer import Tokenizer
from minimoe.data.verify import verify
from minimoe.settings import ConfigError


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "worlds"
    prepare(["worlds"], folder, "bpe", 400, shard_tokens=50_000)
    return folder


@pytest.fixture
def copy(worlds, tmp_path):
    return shutil.copytree(worlds, tmp_path / "copy")


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


def test_held_out_text_of_one_source_does_not_stand_in_another(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
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
        assert len(paragraphs(held)) >= 2 and not [p for p in paragraphs(held) if p in text]
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
    assert not (tmp_path / "bad" / "index.json").exists()


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


def edit(folder, change):
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    change(index)
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def sign(folder, name):
    """Writes the checksum of the file as it is now into the index."""
    entry = lambda index: next(e for e in (*index["shards"], *index["held_out"]) if e["file"] == name)
    edit(folder, lambda index: entry(index).update(sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest()))


def flip(file, at=1000, value=None):
    raw = bytearray(file.read_bytes())
    raw[at] = raw[at] ^ 1 if value is None else value
    file.write_bytes(raw)


def beyond_the_vocabulary(folder):
    flip(folder / "shard-00002.bin", at=2 * 777 + 1, value=0x7F)
    sign(folder, "shard-00002.bin")


def without_a_document(folder):
    tokens = np.fromfile(folder / "shard-00001.bin", "<u2")
    tokens[np.flatnonzero(tokens == Tokenizer.load(folder).end_of_text)[0]] = 70
    tokens.tofile(folder / "shard-00001.bin")
    sign(folder, "shard-00001.bin")


FAULTS = {
    "truncated": (lambda f: (f / "shard-00001.bin").write_bytes((f / "shard-00001.bin").read_bytes()[:-7]),
                  ["shard-00001.bin: truncated, 99,993 bytes of 100,000"]),
    "flipped byte": (lambda f: flip(f / "shard-00002.bin"), ["shard-00002.bin: changed, its SHA-256 is not the one in index.json"]),
    "flipped, held out": (lambda f: flip(f / "held_out-00000.bin"), ["held_out-00000.bin: changed, its SHA-256"]),
    "token count": (lambda f: edit(f, lambda i: i["shards"][1].update(tokens=49_999)),
                    ["shard-00001.bin: wrong token count, index.json says 49,999, the file holds 50,000",
                     "index.json: wrong number of tokens, 190,159 in all, but the shards have 190,158"]),
    "vocabulary": (beyond_the_vocabulary, ["shard-00002.bin: token 32", " at place 777 is out of the vocabulary of 400"]),
    "missing": (lambda f: (f / "shard-00000.bin").unlink(), ["shard-00000.bin: missing"]),
    "tokenizer": (lambda f: Tokenizer.bpe(["another text " * 99], 400).save(f / "tokenizer.json"), ["tokenizer.json: wrong tokenizer"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json: no such tokenizer"]),
    "documents": (without_a_document, ["shard-00001.bin: index.json says ", " documents, the file begins "]),
    "left over": (lambda f: (f / "shard-00009.bin").write_bytes(b"xx"), ["shard-00009.bin: not in index.json"]),
    "longer": (lambda f: (f / "shard-00003.bin").write_bytes((f / "shard-00003.bin").read_bytes() + b"xx"), ["shard-00003.bin: wrong token count"]),
    "domains": (lambda f: edit(f, lambda i: i["domains"].update(stories=1)), ["index.json: the domains have"]),
    "held-out documents": (lambda f: edit(f, lambda i: i["held_out_documents"].pop()), ["index.json: the held-out documents"]),
    "vocabulary size": (lambda f: edit(f, lambda i: i.update(vocab_size=401)), ["index.json: vocab_size is 401, and tokenizer.json has 400"]),
    "no index": (lambda f: (f / "index.json").unlink(), ["not finished, index.json is missing"]),
    "damaged index": (lambda f: (f / "index.json").write_text('{"format": 1, "dty', encoding="utf-8"), ["index.json: damaged"]),
    "index with a part missing": (lambda f: edit(f, lambda i: i.pop("domains")), ["index.json: domains missing"]),
    "later format": (lambda f: edit(f, lambda i: i.update(format=2)), ["index.json: format 2, and this minimoe reads 1"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_verify_finds_each_fault_and_names_it(name, copy, capsys):
    break_it, messages = FAULTS[name]
    break_it(copy)
    faults, _ = verify(copy)
    assert all(any(m in f for f in faults) for m in messages), faults
    assert len(faults) <= 2                     # one fault is not told as many
    assert main(["data", "verify", str(copy)]) == 2
    captured = capsys.readouterr()
    assert all(f in captured.out for f in faults) and "fault" in captured.err


def test_several_faults_are_all_told(copy):
    for name in ("truncated", "vocabulary", "missing", "tokenizer"):
        FAULTS[name][0](copy)
    assert sorted(f.split(":")[0] for f in verify(copy)[0]) == ["shard-00000.bin", "shard-00001.bin", "shard-00002.bin", "tokenizer.json"]


@pytest.mark.parametrize("name", ["truncated", "missing", "later format"])
def test_training_on_what_is_not_whole_is_refused_at_the_start(name, copy):
    FAULTS[name][0](copy)
    with pytest.raises(ConfigError, match="shard-0000|format 2"):
        load_data(DataConfig(mixture=str(copy)))


def test_info_and_verify_report(worlds, capsys):
    assert main(["data", "info", str(worlds)]) == 0
    said = capsys.readouterr().out
    for words in ("190,159 tokens to learn from", "1,080 documents", "21,218 tokens held out, in 120 documents", "4 shards, 422,754 bytes",
                  "400 tokens of vocabulary", "made from worlds", "arithmetic          31.3%"):
        assert words in said
    assert main(["data", "verify", str(worlds)]) == 0
    counts = np.bincount(everything(worlds))
    shares = counts[counts > 0] / counts.sum()
    said = capsys.readouterr().out
    assert f"{(counts > 0).sum()} of 400 tokens" in said and "no fault" in said
    assert f"entropy of single tokens {-(shares * np.log2(shares)).sum():.3f} bits" in said


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
    own = [d.text for f in two for d in Shards(f).held_out(Tokenizer.load(f))]
    assert {d.text for d in Shards(tmp_path / "m").held_out(Tokenizer.load(two[0]))} <= set(own)


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
    assert main(["data", "prepare", "nothing_of_that_name", "--out", str(tmp_path / "m")]) == 2
    assert main(["data", "prepare", "--out", str(tmp_path / "m")]) == 2 and not (tmp_path / "m").exists()
    assert main(["data", "polish"]) == 2 and "prepare, merge, verify, info" in capsys.readouterr().err


def test_help_says_everything(capsys):
    for action, flags in (("prepare", ("--out", "--tokenizer", "--tokenizer-vocab", "--shard-tokens")), ("verify", ()), ("info", ()),
                          ("merge", ("--out", "--strategy", "--ratios", "--shard-tokens"))):
        with pytest.raises(SystemExit) as done:
            main(["data", action, "--help"])
        said = capsys.readouterr().out
        assert done.value.code == 0 and all(flag in said for flag in flags)
    assert main(["data", "--help"]) == 0 and "  merge " in (said := capsys.readouterr().out) and "  info " in said


def test_train_on_shards_and_resume_from_the_command_line(two, tmp_path, capsys):
    """Beside a corpus that is encoded with the shards' own tokenizer; stopped and gone on, it is the unbroken run."""
    common = ["train", "--mixture", f"{two[0]}:2", "worlds", "--dim", "16", "--n-layers", "1", "--n-heads", "2", "--expert-hidden",
              "16", "--max-seq-len", "64", "--steps", "4", "--batch-size", "2", "--log-every", "1", "--eval-every", "2", "--dtype", "float32"]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "190,159 tokens" in said and "held-out worlds" in said and "xz -9e" not in said
    assert main([*common, "--out", str(tmp_path / "run"), "--stop-after", "3"]) == 0
    assert main([*common, "--out", str(tmp_path / "run"), "--resume"]) == 0
    whole, run = (load(tmp_path / name) for name in ("whole", "run"))
    drop = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert drop(whole.metrics()) == drop(run.metrics()) and len(run.metrics()) == 4
    a, b = whole.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert run.tokenizer.fingerprint() == Tokenizer.load(two[0]).fingerprint()
    capsys.readouterr()
    for kind in ("bytes", "characters", "shipped"):
        assert main([*common, "--tokenizer", kind, "--out", str(tmp_path / "no")]) == 2
        assert "made with another tokenizer; train with --tokenizer" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main([*common, "--vocab-size", "300", "--out", str(tmp_path / "no")]) == 2 and "vocab_size" in capsys.readouterr().err


def test_characters_train_on_shards_too(tmp_path, capsys):
    """The sample prompts have letters that this text has not, so a text of its own is taken."""
    (tmp_path / "mine.txt").write_text("".join(f"{i} + {i} = {2 * i}\n" for i in range(900)), encoding="utf-8")
    assert main(["data", "prepare", str(tmp_path / "mine.txt"), "--tokenizer", "characters", "--out", str(tmp_path / "s")]) == 0
    assert main(["train", "--mixture", str(tmp_path / "s"), "--tokenizer", "characters", "--dim", "16", "--n-layers", "1", "--n-heads",
                 "2", "--expert-hidden", "16", "--max-seq-len", "32", "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert re.search(r"--- '\d+ \+ \d+ = ", capsys.readouterr().out)
