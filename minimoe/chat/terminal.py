"""A conversation in the terminal, or through a pipe: one question a line."""
from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import yaml

from minimoe.checkpoint import Run
from minimoe.config import GenerateConfig
from minimoe.settings import ConfigError, from_dict, need, to_dict

BASE = "this is a base model: it goes on from your text, and does not see what was said before"
HELP = """params               the parameters and their values
params NAME VALUE    set one, as params temperature 0.2; none switches top_k, top_p and stop off
clear                forget the conversation
help                 this text
exit, quit           leave (also Ctrl-D); Ctrl-C stops an answer
anything else        is a question"""


class Terminal:
    """A conversation with `run`. `ask(line)` answers on standard output, or obeys a command; what is not the answer goes to
    standard error. The parameters are the run's `generate:` section, and `seed`, to which each answer adds one.

    >>> from minimoe.checkpoint import load
    >>> terminal = Terminal(load("shipped"))
    >>> terminal.ask("params temperature 0")
    temperature      0
    True
    >>> terminal.ask("exit")
    False
    """

    def __init__(self, run: Run, seed: int = 0, verbose: bool = False):
        self.run, self.seed, self.verbose = run, seed, verbose
        self.messages: list[dict[str, str]] = []

    def ask(self, line: str) -> bool:
        """Whether the conversation goes on."""
        command, *words = line.split()
        if command == "params":
            if words[1:]:
                self.set(words[0], " ".join(words[1:]))
            for name, value in self.params().items():
                if not words or name == words[0]:
                    print(f"{name:<16} {value}", flush=True)
        elif command in ("exit", "quit", "clear", "help") and not words:
            if command == "help":
                print(HELP, flush=True)
            elif command == "clear":
                self.messages.clear()
                _note("the conversation is forgotten")
            return command not in ("exit", "quit")
        else:
            self.answer(line)
        return True

    def params(self) -> dict[str, object]:
        g = self.run.config.generate
        return {"max_new_tokens": g.max_new_tokens, "temperature": g.temperature, "top_k": g.sample_top_k, "top_p": g.top_p,
                "stop": list(g.stop), "seed": self.seed}

    def set(self, name: str, text: str) -> None:
        """Sets a parameter from what was typed; ConfigError where there is none such, or the value cannot be."""
        need(name in self.params(), f"params: no {name!r}; there are {', '.join(self.params())}")
        value = None if text in ("none", "off") else yaml.safe_load(text)
        if name == "seed":
            need(isinstance(value, int) and 0 <= value < 2**63, f"params: seed={text}: must be a whole number from 0")
            self.seed = value
            return
        if name == "stop":
            value = [] if value is None else [str(value)]
        name = "sample_top_k" if name == "top_k" else name
        settings = from_dict(GenerateConfig, to_dict(self.run.config.generate) | {name: value}, "params")
        self.run = dataclasses.replace(self.run, config=dataclasses.replace(self.run.config, generate=settings))

    def answer(self, question: str) -> None:
        """Writes the answer as it is made; Ctrl-C ends it, and what was written stays in the conversation."""
        messages = [*self.messages, {"role": "user", "content": question}]
        ids, left_out = self.run.chat_prompt(messages)
        started, times, pieces = time.perf_counter(), [], []
        try:
            with closing(self.run.stream(ids, seed=self.seed)) as stream:
                for piece in stream:
                    times.append(time.perf_counter() - started)
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            _note("\n[stopped]")
        print(flush=True)
        self.seed += 1
        self.messages = [*messages[left_out:], {"role": "assistant", "content": "".join(pieces)}]
        if self.verbose and times:
            _note(f"{len(times)} tokens, {len(times) / times[-1]:,.0f} tokens/s, the first after {times[0]:.3f} s; "
                  f"{len(ids) + len(times)} tokens in a context of {self.run.model.cfg.max_seq_len}"
                  + (f"; the oldest {left_out} messages were left out" if left_out else ""))


def talk(run: Run, seed: int = 0, verbose: bool = False) -> None:
    """Reads questions from standard input until it ends or says exit. An error is told, and the next question asked."""
    terminal, by_hand = Terminal(run, seed, verbose), sys.stdin.isatty()
    if not run.config.data.supervised:
        _note(BASE)
    if by_hand:
        _note("help says what there is beside questions")
    for line in _lines(by_hand):
        try:
            if line.strip() and not terminal.ask(line.rstrip("\r\n")):
                break
        except (ConfigError, ValueError, yaml.YAMLError) as error:
            _note(f"error: {' '.join(str(error).split())}")


def _lines(by_hand: bool) -> Iterator[str]:
    if not by_hand:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401  (input then knows the arrow keys and what was typed before)
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
