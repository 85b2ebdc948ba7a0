"""How fast is the chat page, next to `generate` without it?

    python benchmarks/chat.py                    writes benchmarks/results/chat.json
    python benchmarks/chat.py --quick            one round, few tokens: whether it runs; writes only where --out says

The same greedy text of the shipped model, in each round by turns: `run.stream` in this process; the page with 1 and 4 chats
at once, as the browser asks for it (gradio's queue and its stream of events; nothing is drawn); and /generate for programs
with 1 and 4. Time to the first token and tokens per second from the request to the last token, of 4 chats all together; a
ratio is taken within its round. Both processes have the same number of threads. The server waits while this process writes.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from engine import store

from minimoe.checkpoint import Run, load
from minimoe.device import tune_cpu

RESULT = Path(__file__).parent / "results" / "chat.json"
PROMPT, TARGET = "The for statement", 0.8
SIDES = ("generate", "page, 1 chat", "page, 4 chats", "programs, 1 at once", "programs, 4 at once")


@contextmanager
def server(tokens: int, threads: int) -> Iterator[str]:
    command = [sys.executable, "-m", "minimoe", "chat", "shipped", "--web", "--port", "0", "--max-tokens", str(tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                               env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait(20)


def post(address: str, body: dict):
    return urlopen(Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"}))


def events(answer) -> Iterator[dict]:
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def generate(run: Run, tokens: int) -> tuple[float, float, str]:
    """Seconds to the first token and to the last, and the text."""
    started, first, pieces = time.perf_counter(), 0.0, []
    for piece in run.stream(PROMPT, tokens, temperature=0):
        first = first or time.perf_counter() - started
        pieces.append(piece)
    return first, time.perf_counter() - started, "".join(pieces)


def programs(base: str, tokens: int) -> tuple[float, float, str]:
    started, first, text = time.perf_counter(), 0.0, ""
    with post(f"{base}/generate", {"prompt": PROMPT, "max_new_tokens": tokens, "temperature": 0}) as answer:
        for event in events(answer):
            first = first or time.perf_counter() - started
            text += event.get("text", "")
    return first, time.perf_counter() - started, text


def page(base: str, tokens: int) -> tuple[float, float, str]:
    """What the browser sends when somebody asks: the text is put aside, then the answer is queued, and its events read."""
    with urlopen(f"{base}/config") as answer:
        number = {d["api_name"]: d["id"] for d in json.load(answer)["dependencies"]}
    session, started, first = uuid.uuid4().hex, time.perf_counter(), 0.0
    post(f"{base}/gradio_api/run/predict", {"data": [PROMPT], "fn_index": number["_clear_and_save_textbox"],
                                            "session_hash": session}).close()
    post(f"{base}/gradio_api/queue/join", {"data": [None, None, "shipped@", 0, 0, 1, tokens], "fn_index": number["_submit_fn"],
                                           "session_hash": session}).close()
    with urlopen(f"{base}/gradio_api/queue/data?session_hash={session}") as answer:
        for event in events(answer):
            if event["msg"] == "process_generating":
                first = first or time.perf_counter() - started
            if event["msg"] == "process_completed":
                if not event["success"]:
                    raise SystemExit(f"the page failed: {event['output']}")
                break
    content = event["output"]["data"][1][-1]["content"]
    return first, time.perf_counter() - started, content if isinstance(content, str) else content[0]["text"]


def at_once(ask: Callable[[], tuple[float, float, str]], chats: int) -> list[tuple[float, float, str]]:
    found = []
    threads = [threading.Thread(target=lambda: found.append(ask())) for _ in range(chats)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) < chats:
        raise SystemExit("a chat failed")
    return found


def measure(base: str, run: Run, tokens: int, rounds: int) -> dict[str, list[dict]]:
    asks = {"generate": lambda: [generate(run, tokens)]} | {side: (lambda ask=ask, n=n: at_once(lambda: ask(base, tokens), n))
            for side, ask, n in zip(SIDES[1:], (page, page, programs, programs), (1, 4, 1, 4))}
    found, text = {side: [] for side in SIDES}, asks["generate"]()[0][2]
    for side in SIDES[1:]:              # once before it counts
        asks[side]()
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            started = time.perf_counter()
            answers = asks[side]()
            seconds = max(a[1] for a in answers) if len(answers) == 1 else time.perf_counter() - started
            if any(a[2].strip() != text.strip() for a in answers):
                raise SystemExit(f"{side}: another text than generate's: the speeds compare different work")
            found[side].append({"first_s": statistics.median(a[0] for a in answers), "tokens_per_s": tokens * len(answers) / seconds})
    return found


def rows(found: dict[str, list[dict]], quick: bool) -> list[dict]:
    result = []
    for side in SIDES:
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(found[side], found["generate"])]
        target = TARGET if side == "page, 1 chat" else None
        ratio = round(statistics.median(ratios), 3)
        result.append({"what": side, "first_ms": round(1e3 * statistics.median(x["first_s"] for x in found[side]), 1),
                       "tokens_per_s": round(statistics.median(x["tokens_per_s"] for x in found[side])), "ratio": ratio,
                       "low": round(min(ratios), 3), "high": round(max(ratios), 3), "target": target,
                       "met": None if target is None or quick else ratio >= target, "raw": found[side]})
    return result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of each answer")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of an answer, on both sides")
    parser.add_argument("--quick", action="store_true", help="one round of 60 tokens")
    parser.add_argument("--out", type=Path, help=f"default: {RESULT.name} in results/, with --quick nowhere")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.tokens = 1, 60
    tune_cpu(args.threads)
    with server(args.tokens, args.threads) as base:
        lines = rows(measure(base, load("shipped"), args.tokens, args.rounds), args.quick)
    print("| | first token, ms | tokens/s | ratio to generate (lowest to highest) | to reach | met |\n|---|---|---|---|---|---|")
    for x in lines:
        print(f"| {x['what']} | {x['first_ms']:.1f} | {x['tokens_per_s']:,} | {x['ratio']:.2f} ({x['low']:.2f} to {x['high']:.2f}) "
              f"| {'reported' if x['target'] is None else f'at least {TARGET}'} | {'' if x['met'] is None else 'yes' if x['met'] else 'no'} |")
    if out := args.out or (None if args.quick else RESULT):
        store(out, "cpu", "chat", {"date": datetime.date.today().isoformat(), "command": shlex.join(["python", "benchmarks/chat.py", *argv]),
              "threads": torch.get_num_threads(), "tokens": args.tokens, "rounds": args.rounds, "rows": lines}, __doc__.split("\n")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
