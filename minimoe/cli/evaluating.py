"""minimoe evaluate."""
from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import newest_run, parse
from minimoe.settings import ConfigError, need


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Measures runs: what they score, with chance level and interval."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders, or "shipped"; several are compared. Default the newest under runs/, else the shipped one."""
    tasks: tuple[str, ...] = ()
    """Names, also those of lm-evaluation-harness (arc_easy, arc_challenge, mmlu, hellaswag, winogrande, gsm8k, humaneval …), or
    file.py:function for benchmarks of your own; separated by spaces or commas. Default the run's own tasks, else all that
    need no other data."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask a tenth of the questions: enough to see that all works, too few to tell much."""
    questions: Annotated[int | None, tyro.conf.arg(aliases=("--limit",))] = None
    """Questions of each task; default the run's own, else 600, and of the harness's tasks all."""
    local: str | None = None
    """Folder with the data sets of the harness's tasks (arc_easy/test.jsonl, mmlu/anatomy/test.parquet, or copies of their
    repositories), from which alone they are read; default the run's own, else they are downloaded."""
    shots: int | None = None
    """Worked examples before each question of the harness's tasks; default the run's own, else what the task says."""
    allow_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let humaneval and its like run the programs that the model writes: within limits of time and memory, but with your
    files and network in reach."""
    seed: int = 0
    """Seed of the questions and of the intervals."""
    text: str | None = None
    """Measure on this text instead of the held-out one."""
    text_file: Path | None = None
    """Measure on the text of this file instead of the held-out one."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps."""
    step: int | None = None
    """The kept checkpoint of this step; default the weights with the lowest held-out loss."""


def evaluate(argv: list[str]) -> None:
    """Measure what a model can do: minimoe evaluate runs/pydocs --report report.md"""
    args = parse(EvaluateArgs, argv, "evaluate")
    from minimoe.checkpoint import load
    from minimoe.device import choose, tune_cpu
    from minimoe.evaluate import evaluate
    from minimoe.evaluate.results import table

    need(args.questions is None or args.questions >= 1, f"--questions {args.questions}: must be at least 1")
    tune_cpu()
    folders, text = args.runs or (newest_run(),), _text(args)
    runs = [load(folder, str(choose(args.device, "float32").device), args.step) for folder in folders]
    if not args.runs:
        print(f"using {folders[0]}", file=sys.stderr)
    tasks = [name for words in args.tasks for name in words.split(",") if name] or None
    for folder, run in zip(folders, runs):
        results = evaluate(run, tasks, quick=args.quick, seed=args.seed, questions=args.questions, text=text,
                           local=args.local, shots=args.shots, allow_code=args.allow_code,
                           say=lambda line: print(line, file=sys.stderr))
        print(f"{folder}\n\n{table(results)}")


def _text(args: EvaluateArgs) -> str | None:
    if args.text_file is None:
        return args.text
    need(args.text is None, "--text and --text-file: give one of them")
    try:
        return args.text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{args.text_file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{args.text_file}: {error.strerror}; name a text file") from None
