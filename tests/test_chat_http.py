"""The chat server for programs: what its page shows runs as it stands there, and a hundred bad requests leave it serving."""

from __future__ import annotations

import contextlib
import html
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from minimoe.checkpoint import load
from tests.chat_runs import ROOT, chat_server, environment, make_talker

pytest.importorskip("gradio", reason="the page needs gradio: pip install minimoe[chat]")
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("http")
    make_talker(top / "runs" / "talker")
    return top


@pytest.fixture(scope="module")
def server(folder):
    with chat_server(folder, "runs/talker", "--max-prompt", 2000, "--max-tokens", 100_000) as (base, process, log):
        yield base, process, log


def ask(base, body, headers=JSON, path="/generate"):
    """(status, text) of a POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(base + path, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def events(text):
    assert text.endswith("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-1]]


def written(text):
    return "".join(e.get("text", "") for e in events(text))


def test_what_the_page_for_programs_shows_runs_as_it_stands(server, folder):
    base, _, _ = server
    with urllib.request.urlopen(base + "/programs") as page:
        shown = [html.unescape(text) for text in re.findall("<pre>(.*?)</pre>", page.read().decode(), re.S)]
    health, models, curl, python = shown
    run_it = lambda *words: subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=environment(), timeout=120)
    assert json.loads(run_it("bash", "-c", health).stdout) == {"status": "ok", "writing": 0, "waiting": 0}
    listed = json.loads(run_it("bash", "-c", models).stdout)["models"]
    assert [m["run"] for m in listed] == ["runs/talker", "shipped"]
    assert listed[0]["chat"] and listed[0]["params"] > listed[0]["active_params"] > 0 and listed[1]["steps"] == []
    run = load(folder / "runs" / "talker")
    got = events(run_it("bash", "-c", curl).stdout)
    assert "".join(e.get("text", "") for e in got) == run.generate("The for statement", 40) and got[-1] == {"done": True}
    answer = "".join(run.chat([{"role": "user", "content": "What does math.sqrt do?"}], 40))
    assert run_it(sys.executable, "-c", python).stdout == answer + "\n"


def test_pieces_come_while_the_answer_is_being_written(server):
    base, _, _ = server
    question = {"prompt": "hi", "max_new_tokens": 100_000}
    with urllib.request.urlopen(urllib.request.Request(base + "/generate", json.dumps(question).encode(), JSON)) as answer:
        first = json.loads(answer.readline().removeprefix(b"data: "))
        with urllib.request.urlopen(base + "/health") as health:
            assert json.load(health)["writing"] == 1
        assert 0 < len(first["text"]) < 100
    for _ in range(100):                                # the reader has gone: so is the computation
        with urllib.request.urlopen(base + "/health") as health:
            if json.load(health)["writing"] == 0:
                break
        time.sleep(0.02)
    else:
        pytest.fail("an answer that nobody reads is still being written")


def bad_requests():
    good = {"prompt": "hi", "max_new_tokens": 5}
    yield from [({**good, **change}, (400,)) for change in (
        {"temperature": -1}, {"temperature": 6}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "hot"},
        {"temperature": True}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.01}, {"top_p": float("nan")},
        {"max_new_tokens": 0}, {"max_new_tokens": -5}, {"max_new_tokens": 10**9}, {"max_new_tokens": 2.5}, {"max_new_tokens": "many"},
        {"seed": -1}, {"seed": 2**63}, {"seed": 10**400}, {"seed": 0.5}, {"stop": "x"}, {"stop": [""]}, {"stop": [1]},
        {"stop": ["a"] * 9}, {"stop": ["a" * 101]}, {"prompt": ""}, {"prompt": None}, {"prompt": 7}, {"prompt": ["hi"]},
        {"prompt": "x" * 2001}, {"prompt": "\u00e9"}, {"prompt": "\ud800"}, {"prompt": "\x00"}, {"prompts": "hi"}, {"Temperature": 1},
        {"messages": []}, {"messages": [{"role": "user", "content": "hi"}]}, {"step": "x"}, {"run": 5}, {"run": ["shipped"]})]
    yield from [({"messages": messages}, (400,)) for messages in (
        [], "hi", [1], ["hi"], [{}], [{"role": "user"}], [{"content": "hi"}], [{"role": "king", "content": "hi"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": ["hi"]}], [{"role": "assistant", "content": "hi"}],
        [{"role": "system", "content": "hi"}], [{"role": "user", "content": "x" * 1999}], {"role": "user", "content": "hi"}, None)]
    yield from [({**good, "run": name}, (404,)) for name in (
        "nowhere", "../..", "..", "/", "/etc", "runs", "runs/../runs/talker", "runs/talker/", "runs/talker/checkpoints", "\x00", "a" * 1900)]
    yield from [({**good, "step": step}, (404,)) for step in (0, 7, -1, 10**30)]
    yield from [(body, (400,)) for body in (
        b"", b"{", b"nonsense", b"[]", b"5", b"null", b'"hi"', b"\xff\xfe\x00", b"\x80" * 50, b"[" * 20_000, b"{" * 20_000,
        b'{"prompt": "hi"', b'{"prompt": "hi"}}', b'{"prompt": hi}', b"{'prompt': 'hi'}", b'{"a":' * 5000)]
    yield from [(b'{"prompt": "' + b"x" * (1 << 20) + b'"}', (413,)), (b"\x00" * (1 << 20), (413,))]


def test_a_hundred_bad_requests_leave_it_serving(server, folder):
    base, process, log = server
    sent = 0
    for body, statuses in bad_requests():
        status, text = ask(base, body)
        assert status in statuses, (status, str(body)[:80], text)
        assert list(json.loads(text)) == ["error"] and "\n" not in text and "Traceback" not in text, (str(body)[:80], text)
        sent += 1
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data; boundary=x"}):
        assert ask(base, {"prompt": "hi"}, headers)[0] == 415
        sent += 1
    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/call/chat", "/gradio_api/nowhere",
                 "/health", "/models", "/", "/gradio_api/file=/etc/passwd"):
        for body in (b"", b"\xff", b"[]", b"5", {"data": "x"}, {"data": [], "fn_index": 10**6, "session_hash": "x"}):
            status, text = ask(base, body, path=path)
            assert 400 <= status < 500 and "Traceback" not in text, (path, body, status, text)
            sent += 1
    host, port = base.removeprefix("http://").split(":")
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    body = json.dumps({"prompt": "hi", "max_new_tokens": 100_000})
    for text in (head, head + "Content-Length: 500\r\n\r\n{", head + "Transfer-Encoding: chunked\r\n\r\n5\r\n{\"pr",
                 head + "Content-Length: x\r\n\r\n", head + "Content-Length: -1\r\n\r\n", "nonsense\r\n\r\n", "\x00\x01\x02",
                 head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", head + f"Content-Length: {len(body)}\r\n\r\n{body}"):
        with socket.create_connection((host, int(port)), timeout=10) as wire:       # cut off in the middle of it
            wire.sendall(text.encode("latin-1"))
            if text.endswith(body):
                assert b"200 OK" in wire.recv(100)      # cut off in the middle of the answer
        sent += 1
    with socket.create_connection((host, int(port)), timeout=60) as wire:           # a megabyte without saying so before
        wire.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        try:
            for _ in range(16):
                wire.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:                                 # it has answered, and reads no more
            pass
        with contextlib.suppress(ConnectionResetError):         # which may come before the answer has been read here
            assert b" 413 " in wire.recv(100)
    assert sent >= 100
    run = load(folder / "runs" / "talker")
    for _ in range(2):
        status, text = ask(base, {"prompt": "hi", "max_new_tokens": 30})
        assert (status, written(text)) == (200, run.generate("hi", 30))
    assert process.poll() is None
    assert "Traceback" not in log.read_text(encoding="utf-8"), log.read_text(encoding="utf-8")[-3000:]
    for data in ([float("nan")] * 3, [None, None, "nowhere@", "hot", -1, 7, 10**9], ["x", [], "shipped@", 9e9, 1, 1, 1]):
        # gradio takes them into its queue, and says there what is wrong
        assert ask(base, {"data": data, "fn_index": 3, "session_hash": "x"}, path="/gradio_api/queue/join")[0] == 200
    assert written(ask(base, {"prompt": "hi", "max_new_tokens": 30})[1]) == run.generate("hi", 30)


def test_two_questions_at_once_both_stream(server):
    base, _, _ = server
    both = [urllib.request.urlopen(urllib.request.Request(
        base + "/generate", json.dumps({"prompt": p, "max_new_tokens": 100_000}).encode(), JSON)) for p in ("a", "b")]
    for _ in range(3):
        assert all(answer.readline() and answer.readline() for answer in both)
    for answer in both:
        answer.close()


@pytest.mark.slow
def test_the_benchmark_runs_and_compares_the_same_text(tmp_path):
    pytest.importorskip("transformers", reason="its version is part of the record")
    out = tmp_path / "chat.json"
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "chat.py", "--quick", "--out", out], capture_output=True, text=True,
                          encoding="utf-8", env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["parts"]["chat"]["rows"]
    assert [row["what"] for row in rows][:3] == ["generate", "page, 1 chat", "page, 4 chats"] and rows[1]["target"] == 0.8
    assert all(row["first_ms"] > 0 and row["low"] <= row["ratio"] <= row["high"] and row["met"] is None for row in rows)
