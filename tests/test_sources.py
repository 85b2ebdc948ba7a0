"""Sources: every format gives the same texts, from any place on; bad input is named with its place; downloads are whole."""
import csv
import http.server
import json
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from minimoe.cli import main
from minimoe.config import DataConfig, Source
from minimoe.data import corpora
from minimoe.data.corpora import documents_of, load_corpus, wanted
from minimoe.data.loader import load_data
from minimoe.data.sources import PIECE, kind, read_dataset, read_file
from minimoe.data.tokenizer import Tokenizer
from minimoe.settings import ConfigError

TEXTS = [f"document {i}: é漢🙂 has \"quotes\", commas\nand two lines of its own, number {i * i}" for i in range(150)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same rows in every format, and as datasets."""
    datasets = pytest.importorskip("datasets")
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    home = tmp_path_factory.mktemp("sources")
    datasets.config.HF_DATASETS_CACHE = home / "cache"
    rows = [{"text": t, "domain": "even" if i % 2 == 0 else "odd", "number": i} for i, t in enumerate(TEXTS)]
    (home / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    (home / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with open(home / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, home / "a.parquet", row_group_size=40)
    (home / "named" / "data").mkdir(parents=True)
    pq.write_table(table, home / "named" / "data" / "train-00000.parquet", row_group_size=40)
    (home / "lines").mkdir()
    (home / "lines" / "test.jsonl").write_text((home / "a.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(home / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(home / "splits")
    return home


KINDS = {"jsonl": {"corpus": "a.jsonl"}, "json": {"corpus": "a.json"}, "csv": {"corpus": "a.csv"},
         "parquet": {"corpus": "a.parquet"}, "pattern": {"corpus": "*.jsonl"}, "saved dataset": {"corpus": "saved"},
         "saved splits": {"corpus": "splits"}, "dataset of parquet": {"corpus": "named", "split": "train"},
         "dataset of jsonl, streaming": {"corpus": "lines", "split": "test", "streaming": True}}


@pytest.mark.parametrize("name", KINDS)
def test_every_format_gives_the_same_texts(name, folder):
    options = KINDS[name] | {"corpus": str(folder / KINDS[name]["corpus"])}
    source = Source(**options)
    documents = documents_of(source)
    assert [d.text for d in documents] == TEXTS
    assert [d.domain for d in documents[:2]] == ["even", "odd"]
    assert [d.text for d in documents_of(replace(source, domains=("odd",)))] == TEXTS[1::2]
    some = [d.text for d in documents_of(replace(source, percentage=30.0))]
    assert 20 < len(some) < 70 and some == [t for t in TEXTS if wanted(t, "", Source(percentage=30.0))]
    corpus = load_corpus(source)
    assert corpus.held_out and len(corpus.train) + len(corpus.held_out) == len(TEXTS)


@pytest.mark.parametrize("name", [k for k in KINDS if k != "pattern"])
def test_reading_goes_on_from_any_place(name, folder):
    source = Source(**KINDS[name] | {"corpus": str(folder / KINDS[name]["corpus"])})
    if kind(source) == "dataset":
        read = lambda at: read_dataset(source, at)
    else:
        read = lambda at: read_file(folder / KINDS[name]["corpus"], source, start=at or 0)
    whole = list(read(None))
    for i in (0, 1, 38, 39, 40, 100, 148):
        place = json.loads(json.dumps(whole[i].after))
        assert [p.text for p in read(place)] == [p.text for p in whole[i + 1:]], i


def test_a_text_file_in_pieces_is_the_text_and_its_tokens(tmp_path):
    r = np.random.default_rng(0)
    words = ["the", "Füße", "for", "x = 1", "漢字", "\n    y", "line\nend", "last.\n\nNext", "a\n\n\nb", "🙂"]
    text = " ".join(r.choice(words, 60_000).tolist())
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8", newline="")
    whole = list(read_file(file, Source()))
    assert len(whole) > 10 and "".join(p.text for p in whole) == text
    assert [p.begins for p in whole] == [True] + [False] * (len(whole) - 1)
    assert [p.text for p in read_file(file, Source(), start=whole[4].after)] == [p.text for p in whole[5:]]
    bpe = Tokenizer.bpe([text], 600)
    assert [i for p in whole for i in bpe.encode(p.text)] == bpe.encode(text)
    file.write_text("漢" * PIECE, encoding="utf-8")                  # not one line end in it
    assert "".join(p.text for p in read_file(file, Source())) == "漢" * PIECE


def test_chat_messages_become_text(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n"
                    + json.dumps({"messages": [{"from": "user", "value": "why"}]}), encoding="utf-8")
    assert [d.text for d in documents_of(Source(corpus=str(file)))] == ["user: hi\nassistant: ho\n", "user: why\n"]


def test_subfolders_are_domains_and_held_out_text_may_lie_apart(tmp_path):
    for i, place in enumerate(("code/a.txt", "code/b.txt", "prose/c.txt")):
        (tmp_path / "texts" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / place).write_text(f"file {i} with some words that are long enough to count\n" * 20, encoding="utf-8")
    (tmp_path / "apart.txt").write_text("file 1 with some words that are long enough to count\n\nand this here is measured "
                                        "on, as nobody has read it", encoding="utf-8")
    source = Source(corpus=str(tmp_path / "texts"), domains="code", held_out=str(tmp_path / "apart.txt"))
    corpus = load_corpus(source)
    assert [(d.name, d.domain) for d in corpus.train] == [("a", "code"), ("b 1", "code")]
    assert [d.text for d in corpus.held_out] == ["and this here is measured on, as nobody has read it"]
    assert len(load_corpus(str(tmp_path / "texts" / "*" / "*.txt")).train) == 2     # of three the last is held out


def test_bundled_corpora_by_domain_and_percentage():
    every = load_corpus("worlds")
    stories = load_corpus(Source(corpus="worlds", domains=("stories",), percentage=50.0))
    assert {d.domain for d in (*stories.train, *stories.held_out)} == {"stories"}
    assert 0.4 < len(stories.train) / sum(d.domain == "stories" for d in every.train) < 0.6
    assert set(stories.train) <= set(every.train) and set(stories.held_out) <= set(every.held_out)
    with pytest.raises(ConfigError, match="arithmetic, brackets, letters, stories"):
        load_corpus(Source(corpus="worlds", domains=("poems",)))


BAD = {"a.jsonl": (b'{"text": "good"}\n\n{"text": bad}\n', r"a.jsonl, line 3: not JSON .*column 10"),
       "b.jsonl": (b'{"text": "good"}\n{"txt": "b", "id": 1}\n', r"b.jsonl, line 2: no field 'text'; there are txt, id"),
       "c.jsonl": (b'{"text": 7}\n', r"c.jsonl, line 1: field is neither a text nor chat messages"),
       "d.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"d.jsonl: not UTF-8 at byte 24"),
       "e.jsonl": (b'{"text": "\\ud83d"}\n', r"e.jsonl, line 1: half a surrogate"),
       "f.csv": (b"id,body\n1,x\n", r"f.csv: no column 'text'; there are id, body"),
       "g.csv": (b"id,text\n1,x\n2\n", r"g.csv, line 3: 1 columns, not 2"),
       "h.json": (b'[{"text": "a"},\n {"text" "b"}]', r"h.json, line 2: not JSON"),
       "i.txt": (b"x" * 40_000 + b"\n" + b"\xc3(", r"i.txt: not UTF-8 at byte 40001"),
       "j.parquet": (b"PAR1 and no more", r"j.parquet: not a parquet file"),
       "k.csv": (b"", r"k.csv: the file is empty"),
       "l.doc": (b"text", None),
       "m.npy": (b"\x93NUMPY", r"m.npy: not a .npy file")}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_the_place(name, tmp_path, capsys):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    if message is None:                                              # any file is text when it is named itself
        assert documents_of(Source(corpus=str(tmp_path / name)))[0].text == "text"
        return
    config = tmp_path / "c.yaml"
    config.write_text(f"data:\n  mixture: {tmp_path / name}\n  tokenizer: bytes\n", encoding="utf-8")
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=message):
        load_data(DataConfig(mixture=str(tmp_path / name), tokenizer="bytes"))


@pytest.mark.parametrize("entry, message", [
    ({"ratio": -1.0}, r"ratio=-1.0 of 'pydocs' must be above 0"), ({"ratio": 0.0}, "above 0"),
    ({"percentage": 0.0}, "percentage=0.0 of 'pydocs': above 0, at most 100"), ({"percentage": 101.0}, "at most 100"),
    ({"streaming": 1}, "streaming=1: must be true or false")])
def test_bad_entries_of_a_mixture(entry, message):
    with pytest.raises(ConfigError, match=message):
        Source(**entry)


@pytest.mark.parametrize("name, message", [
    ("pydoc", "neither a known name .*pydocs, stdlib, docstrings, worlds"), ("no/such.txt", "neither a known name"),
    ("nobody/nothing-of-that-name", "nor a dataset that can be read")])
def test_an_unknown_corpus(name, message):
    if "nothing" in name:
        pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match=message):
        load_corpus(name)


def test_a_split_that_is_not_there(folder):
    for name in ("named", "splits"):
        with pytest.raises(ConfigError, match="(?s)dev.*train"):
            load_corpus(Source(corpus=str(folder / name), split="dev"))


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, folder):
    for module in ("datasets", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.parquet", "saved", "owner/name"):
        with pytest.raises(ConfigError, match=r"pip install minimoe\[data\]"):
            load_corpus(name if "/" in name else str(folder / name))


def test_token_ids_from_a_file(tmp_path):
    tokenizer = Tokenizer.bytes()
    tokenizer.save(tmp_path / "tokenizer.json")
    text = "".join(f"paragraph number {i % 190} of those that were encoded before\n\n" for i in range(200))
    np.save(tmp_path / "ids.npy", np.array(tokenizer.encode(text), np.uint16))
    data = load_data(DataConfig(mixture=str(tmp_path / "ids.npy"), tokenizer=str(tmp_path / "tokenizer.json")))
    ids = data.mixture.streams[0].tokens
    assert len(ids) == len(text) - len(text) // 10 and data.mixture.batch(0, 2, 8, 0)[0].shape == (2, 8)
    train, held = tokenizer.decode(ids.tolist()), data.corpora[0].held_out[0].text
    assert [p for p in held.split("\n\n") if len(p.strip()) >= 40 and p.strip() in train] == [] and "number 189" in held
    with pytest.raises(ConfigError, match="name the tokenizer.json that they were made with"):
        load_data(DataConfig(mixture=str(tmp_path / "ids.npy")))
    np.save(tmp_path / "ids.npy", np.array([1, 2, 999] * 9))
    with pytest.raises(ConfigError, match="token 999 is not in this tokenizer's vocabulary of 260"):
        load_data(DataConfig(mixture=str(tmp_path / "ids.npy"), tokenizer="bytes"))


@pytest.fixture
def server():
    """A server on this machine that gives one text."""
    class Handler(http.server.BaseHTTPRequestHandler):
        body = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50

        def do_GET(self):
            self.send_response(200 if self.path == "/input.txt" else 404)
            self.send_header("Content-Length", str(len(self.body) + 100 * (self.path == "/short")))
            self.end_headers()
            self.wfile.write(self.body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler.body
    server.shutdown()
    server.server_close()


def test_tiny_shakespeare_is_downloaded_whole_or_not_at_all(server, tmp_path, monkeypatch):
    import hashlib

    url, body = server
    monkeypatch.setenv("MINIMOE_DATA", str(tmp_path / "dataset"))
    monkeypatch.setattr(corpora, "SHAKESPEARE", (f"{url}/input.txt", "0" * 64))
    with pytest.raises(ConfigError, match=rf"tiny_shakespeare: .* cannot be had \({len(body)} bytes with SHA-256 .*MINIMOE_DATA"):
        load_corpus("tiny_shakespeare")
    monkeypatch.setattr(corpora, "SHAKESPEARE", (f"{url}/gone.txt", "0" * 64))
    with pytest.raises(ConfigError, match="404"):
        load_corpus("tiny_shakespeare")
    assert not list(tmp_path.rglob("*.*"))
    monkeypatch.setattr(corpora, "SHAKESPEARE", (f"{url}/input.txt", hashlib.sha256(body).hexdigest()))
    corpus = load_corpus("tiny_shakespeare")
    assert corpus.name == "tiny_shakespeare" and corpus.train[0].text.startswith("First Citizen")
    assert [p.name for p in (tmp_path / "dataset").iterdir()] == ["tinyshakespeare.txt"]
    monkeypatch.setattr(corpora, "SHAKESPEARE", ("http://127.0.0.1:9/", ""))
    assert load_corpus("tiny_shakespeare") == corpus                # the file is there now
