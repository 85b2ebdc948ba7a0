"""minimoe data verify and info: every fault of a folder of token shards is found and named, and a sound one described."""
import hashlib
import json
import shutil

import numpy as np
import pytest

from minimoe.cli import main
from minimoe.config import DataConfig
from minimoe.data.loader import load_data
from minimoe.data.shards import Shards, prepare
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


def edit(folder, change):
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    change(index)
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def sign(folder, number):
    """Writes the checksum of the file as it is now into the index."""
    sha256 = hashlib.sha256((folder / f"shard-{number:05d}.bin").read_bytes()).hexdigest()
    edit(folder, lambda index: index["shards"][number].update(sha256=sha256))


def flip(file, at=1000, value=None):
    raw = bytearray(file.read_bytes())
    raw[at] = raw[at] ^ 1 if value is None else value
    file.write_bytes(raw)


def beyond_the_vocabulary(folder):
    flip(folder / "shard-00002.bin", at=2 * 777 + 1, value=0x7F)
    sign(folder, 2)


def without_a_document(folder):
    tokens = np.fromfile(folder / "shard-00001.bin", "<u2")
    tokens[np.flatnonzero(tokens == Tokenizer.load(folder).end_of_text)[0]] = 70
    tokens.tofile(folder / "shard-00001.bin")
    sign(folder, 1)


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
    shards = Shards(worlds)
    counts = np.bincount(shards.take(range(len(shards))))
    shares = counts[counts > 0] / counts.sum()
    said = capsys.readouterr().out
    assert f"{(counts > 0).sum()} of 400 tokens" in said and "no fault" in said
    assert f"entropy of single tokens {-(shares * np.log2(shares)).sum():.3f} bits" in said
