"""Which tasks there are, and `evaluate`, which runs them."""
from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minimoe.config import EvaluateConfig
from minimoe.evaluate.benchmark import Benchmark
from minimoe.evaluate.choices import continuation, next_word
from minimoe.evaluate.recall import docstrings
from minimoe.evaluate.results import Result
from minimoe.evaluate.text import text_scores, with_text
from minimoe.evaluate.written import arithmetic, arithmetic_choice, letters, letters_choice, samples
from minimoe.settings import ConfigError, need

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

OWN = (
    Benchmark(name="perplexity", function=text_scores),
    Benchmark(name="continuation", function=continuation),
    Benchmark(name="next_word", function=next_word),
    Benchmark(name="arithmetic", function=arithmetic),
    Benchmark(name="arithmetic_choice", function=arithmetic_choice),
    Benchmark(name="letters", function=letters),
    Benchmark(name="letters_choice", function=letters_choice),
    Benchmark(name="docstrings", function=docstrings, questions=100, quick=10),
    Benchmark(name="samples", function=samples, questions=8, quick=2),
)


def evaluate(run: Run, tasks: Sequence[str | Benchmark] | None = None, *, quick: bool = False, seed: int = 0,
             questions: int | None = None, text: str | None = None, say: Callable[[str], None] = lambda line: None,
             local: str | Path | None = None, shots: int | None = None, allow_code: bool = False, download: bool = True) -> list[Result]:
    """The results of a run on some tasks: names, `file.py:function`, or benchmarks; by default those of its config, else all own
    ones that can be asked of this run, and `say` gets the reason for each that cannot. Names that are not known here go to the
    harness, with `local`, `shots`, `allow_code` and `download` (see `run_harness`).

    `quick` asks a tenth of the questions, `questions` a number of them; `text` is measured on instead of the held-out text.
    Raises ConfigError for a task that is unknown, or that this run cannot be asked.

    >>> from minimoe.checkpoint import load
    >>> evaluate(load("shipped"), ["perplexity"], text="The for statement is used to iterate.")[0].n
    1
    """
    need(questions is None or questions >= 1, f"questions={questions}: must be at least 1")
    if text is not None:
        run = with_text(run, text)
    cfg, results, scores = run.config.evaluate, [], []
    named = tasks if tasks is not None else cfg.tasks or None
    need(named is None or len(named), "no task is named; known are " + ", ".join(b.name for b in OWN))
    theirs = [t for t in named or () if in_harness(t)]
    wanted = [find(t) for t in (OWN if named is None else named) if t not in theirs]
    if theirs:                  # first: it says at once what data it lacks
        from minimoe.evaluate.harness import run_harness

        scores = run_harness(run, theirs, limit=questions or (None if quick else cfg.questions), quick=quick, seed=seed,
                             local=local or cfg.local, shots=cfg.shots if shots is None else shots, allow_code=allow_code, download=download)
    for b in wanted:
        try:
            results += b(run, seed=seed, questions=questions or (b.quick if quick else cfg.questions or b.questions))
        except ValueError as error:
            if named is not None:
                raise
            say(f"{b.name}: left out ({error})")
    need(results or scores, f"{run.folder or 'this run'}: no task could be asked of it; name one with --tasks, or tasks=, to see why")
    return results + scores


def in_harness(task: str | Benchmark) -> bool:
    """Whether a task is to be looked for in the harness: a name that is no own one, nor one misspelt."""
    return isinstance(task, str) and ".py:" not in task and not difflib.get_close_matches(task, [b.name for b in OWN], cutoff=0.9)


def during_training(cfg: EvaluateConfig, seed: int = 0) -> Callable[[Run, int], dict] | None:
    """What `Trainer` takes as `evaluate_with`: a few questions of each task in `during`, always the same ones; None where there
    is none. ConfigError for a task that is unknown, or that needs data from elsewhere.

    >>> during_training(EvaluateConfig()) is None
    True
    """
    theirs = [t for t in cfg.during if in_harness(t)]
    tasks = [find(t) for t in cfg.during if t not in theirs]
    if theirs:
        from minimoe.evaluate.harness import check_harness

        check_harness(theirs, local=cfg.local, shots=cfg.shots, download=False)
    for b in tasks:
        need(b.local, f"during: {b.name} may need data from elsewhere, which training never fetches; measure it with minimoe evaluate")

    def measure(run: Run, step: int) -> dict:
        found: dict[str, dict] = {}
        for r in evaluate(run, [*tasks, *theirs], seed=seed, questions=cfg.during_questions, download=False):
            numbers = {"value": r.value, "low": r.low, "high": r.high, "chance": r.chance}
            found.setdefault(r.task, {})[r.metric] = {k: round(v, 5) for k, v in numbers.items() if v is not None}
        return found

    return measure if cfg.during else None


def find(task: str | Benchmark) -> Benchmark:
    """The task of a name, or that of `file.py:function`; an unknown name is a ConfigError with the nearest."""
    if isinstance(task, Benchmark):
        return task
    own = {b.name: b for b in OWN}
    if task in own:
        return own[task]
    if ".py:" in task:
        found = from_file(task)
        need(isinstance(found, Benchmark), f"{task}: not a benchmark; put @benchmark(\"name\") above the function")
        return found
    near = difflib.get_close_matches(task, own, n=1, cutoff=0.4)
    raise ConfigError(f"unknown task {task!r}; " + (f"did you mean {near[0]!r}? " if near else "")
                      + f"known are {', '.join(own)}, and file.py:function")


def from_file(where: str) -> object:
    """What `path/to/file.py:name` names; the file is run."""
    path, _, name = where.rpartition(":")
    need(Path(path).is_file(), f"{path}: no such file, so there is no {name} to take from it")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be run ({type(error).__name__}: {error}); mend it first") from error
    near = difflib.get_close_matches(name, vars(module), n=1)
    need(hasattr(module, name), f"{path}: has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return getattr(module, name)
