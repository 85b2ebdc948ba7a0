"""What the page and the programs share: which runs there are, loading them once, and answering within limits."""
from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from minimoe.checkpoint import SHIPPED, Run, checkpoints, load
from minimoe.config import GenerateConfig, load_config
from minimoe.settings import ConfigError, check_choices, need, to_dict

TURN = 0.005            # seconds that one answer is written before it is another's turn


class NotThere(ConfigError):
    """No such run, or no such step of it."""


class Busy(ConfigError):
    """Too many answers are being written or waited for."""


class OutOfTime(ConfigError):
    """An answer took longer than it may."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server gives."""

    max_prompt: int = 20_000
    """Characters of a question, with all that was said before it."""
    max_tokens: int = 1000
    """Tokens of an answer."""
    max_seconds: float = 120
    """Seconds that an answer may take; then it ends with a note."""
    parallel: int = 4
    """Answers that are written at the same time."""
    waiting: int = 16
    """Questions that wait for their turn; one more is refused."""
    runs_in_memory: int = 3
    """Runs that stay loaded."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in to_dict(self).items():
            need(value > 0, f"{name}={value}: must be above 0")
        need(self.parallel + self.waiting <= 32, f"parallel={self.parallel}, waiting={self.waiting}: together at most 32")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of which run. Exactly one of `prompt` (a text to go on from, as it is) and `messages` (a conversation, as
    `Run.chat` takes it). Options left out are the run's own.

    >>> Question(prompt="The ", temperature=float("nan"))
    Traceback (most recent call last):
    minimoe.settings.ConfigError: temperature=nan: must be a number or null
    """

    prompt: str | None = None
    messages: tuple[dict, ...] | None = None
    run: str | None = None
    step: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    """0 draws among all tokens."""
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        need((self.prompt is None) != (self.messages is None), "give either prompt, a text, or messages, a list")
        need(0 <= self.seed < 2**63, f"seed={self.seed}: from 0 to 2^63 - 1")
        need(self.temperature is None or self.temperature <= 5, f"temperature={self.temperature}: at most 5")
        need(len(self.stop) <= 8 and all(isinstance(s, str) and 0 < len(s) <= 100 for s in self.stop),
             "stop: at most 8 texts of 1 to 100 characters")
        for m in self.messages or ():
            need(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") in ("user", "assistant", "system"),
                 "messages: each needs role (user, assistant or system) and content, a text")
        for text in self.texts():
            need(text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text), "the text holds half a character (a lone surrogate)")

    def texts(self) -> list[str]:
        return [*self.stop, *([self.prompt] if self.prompt is not None else [m["content"] for m in self.messages])]


class Service:
    """The runs under runs/, the shipped one, and `first`, which is the default; each is loaded when it is first asked for.

    >>> service = Service("shipped")
    >>> service.models()[0]["run"], len(list(service.answer(Question(prompt="The for", max_new_tokens=3))))
    ('shipped', 3)
    """

    def __init__(self, first: str, step: int | None = None, device: str = "cpu", limits: Limits | None = None,
                 runs: Path = Path("runs")):
        self.first, self.step, self.device, self.limits, self.folder = str(Path(first)), step, device, limits or Limits(), runs
        self.lock, self.places = threading.Lock(), threading.Semaphore(self.limits.parallel)
        self.writing, self.waiting, self.loaded, self.turns = 0, 0, {}, Turns()

    def runs(self) -> dict[str, Path]:
        """The name and the folder of every run, the default one first."""
        found = {self.first: SHIPPED if self.first == "shipped" else Path(self.first)}
        weights = [*self.folder.glob("*/model.safetensors"), *self.folder.glob("*/*/model.safetensors")]
        for folder in sorted(p.parent for p in weights):
            if (folder / "tokenizer.json").is_file() and folder.resolve() != found[self.first].resolve():
                found[str(folder)] = folder
        return found if "shipped" in found else found | {"shipped": SHIPPED}

    def models(self) -> list[dict]:
        """Of every run its name, kept steps, sizes, the defaults of its options, and whether it knows turns."""
        found = []
        for name, folder in self.runs().items():
            try:
                config = load_config(folder / "config.yaml")
            except ConfigError:                         # half copied, or not ours: it cannot be asked anything
                continue
            found.append({"run": name, "steps": [int(p.name) for p in checkpoints(folder)], "chat": config.data.supervised,
                          "params": config.model.num_params(), "active_params": config.model.active_params(),
                          "context": config.model.max_seq_len, "defaults": to_dict(config.generate)})
        return found

    def load(self, name: str | None = None, step: int | None = None) -> Run:
        """A run by its name, as `runs` gives it; many that ask at once wait for one loading. NotThere for any other."""
        if name is None:
            name, step = self.first, self.step if step is None else step
        folder = self.runs().get(name)
        if folder is None or step is not None and step not in [int(p.name) for p in checkpoints(folder)]:
            raise NotThere(f"no run {name[:100]!r}" + (f" with a step {step}" if folder else "") + "; GET /models lists them")
        weights = folder / "model.safetensors" if step is None else folder / "checkpoints" / f"{step:08d}"
        key = name, step, weights.stat().st_mtime_ns        # a run that is still training is read anew
        with self.lock:
            future = self.loaded.pop(key, None)
            mine = future is None
            self.loaded[key] = future = future or Future()  # the newest last
            while len(self.loaded) > self.limits.runs_in_memory:
                self.loaded.pop(next(iter(self.loaded)))
        if mine:
            try:
                future.set_result(load(folder, self.device, step))
            except BaseException as error:
                with self.lock:
                    self.loaded.pop(key, None)
                future.set_exception(error)
        return future.result()

    def answer(self, q: Question) -> Iterator[str]:
        """The pieces of an answer as they are made. Raises ConfigError, mostly before the first one: for options that
        cannot be, Busy where too many wait, OutOfTime after what was written in the time that there is."""
        limits, size = self.limits, sum(map(len, q.texts()))
        need(size <= limits.max_prompt, f"{size:,} characters: at most {limits.max_prompt:,} can be sent, all that was said included")
        need(q.max_new_tokens is None or q.max_new_tokens <= limits.max_tokens,
             f"max_new_tokens={q.max_new_tokens}: at most {limits.max_tokens}")
        run = self.load(q.run, q.step)
        g = run.config.generate
        length = min(g.max_new_tokens, limits.max_tokens) if q.max_new_tokens is None else q.max_new_tokens
        top_k = {None: g.sample_top_k, 0: None}.get(q.top_k, q.top_k)
        settings = GenerateConfig(max_new_tokens=length, sample_top_k=top_k,
                                  temperature=g.temperature if q.temperature is None else q.temperature,
                                  top_p=g.top_p if q.top_p is None else q.top_p, stop=q.stop or g.stop)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, generate=settings))
        with self.place():
            started = time.monotonic()
            stream = run.stream(q.prompt, seed=q.seed) if q.messages is None else run.chat(q.messages, seed=q.seed)
            with closing(stream) as pieces:
                while True:
                    with self.turns:                    # side by side they would wait for each other at every operation
                        some = [*_for(TURN, pieces)]
                    if not some:
                        return
                    yield from some
                    if time.monotonic() - started > limits.max_seconds:
                        raise OutOfTime(f"stopped: an answer may take {limits.max_seconds:g} s")

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places where an answer is written, after waiting for one; Busy where too many wait already."""
        busy = Busy(f"{self.limits.parallel} answers are being written and {self.limits.waiting} questions wait; please try again "
                    "in a moment")
        if not self.places.acquire(blocking=False):
            with self.lock:
                if self.waiting >= self.limits.waiting:
                    raise busy
                self.waiting += 1
            try:
                if not self.places.acquire(timeout=self.limits.max_seconds):
                    raise busy
            finally:
                with self.lock:
                    self.waiting -= 1
        with self.lock:
            self.writing += 1
        try:
            yield
        finally:
            with self.lock:
                self.writing -= 1
            self.places.release()


def _for(seconds: float, pieces: Iterator[str]) -> Iterator[str]:
    """The next piece, and those after it that are made within so many seconds."""
    until = time.monotonic() + seconds
    for piece in pieces:
        yield piece
        if time.monotonic() >= until:
            return


class Turns:
    """A lock that is given in the order in which it was asked for.

    >>> turns = Turns()
    >>> with turns:
    ...     len(turns.queue)
    1
    """

    def __init__(self):
        self.lock, self.queue = threading.Lock(), deque()

    def __enter__(self) -> None:
        gate = threading.Event()
        with self.lock:
            self.queue.append(gate)
            if self.queue[0] is gate:
                gate.set()
        gate.wait()

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.queue.popleft()
            if self.queue:
                self.queue[0].set()


def paced(pieces: Iterator[str], per_second: float = 20, per_character: float = 0.0) -> Iterator[str]:
    """The first piece at once, then what has come together, at most so many times a second; `per_character` are the seconds
    that whoever shows it needs for each character that is there already, half a second in all at most.

    >>> list(paced((piece for piece in ["a", "", "b", "c"]), per_second=0.001))
    ['a', 'bc']
    """
    collected, due, shown = "", -math.inf, 0
    with closing(pieces):
        for piece in pieces:
            collected += piece
            if collected and time.monotonic() >= due:
                yield collected
                shown += len(collected)
                collected, due = "", time.monotonic() + max(1 / per_second, min(0.5, shown * per_character))
    if collected:
        yield collected
