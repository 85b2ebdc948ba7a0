"""minimoe evaluate."""
from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import newest_run, open_run, parse
from minimoe.settings import need


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
    report: Path | None = None
    """Markdown file to write, its figures and numbers beside it; default RUN/reports/<date>.md, never written over."""
    section: tuple[str, ...] = ()
    """Further sections of the report: file.py:function, which gets the run and its results and gives Markdown."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps."""
    step: int | None = None
    """The kept checkpoint of this step; default the weights with the lowest held-out loss."""


def evaluate(argv: list[str]) -> None:
    """Measure what a model can do: minimoe evaluate runs/pydocs --report report.md"""
    args = parse(EvaluateArgs, argv, "evaluate")
    from minimoe.checkpoint import SHIPPED
    from minimoe.data.sources import read_text
    from minimoe.evaluate import comparison, evaluate, from_file, table, with_text, write_report

    need(args.questions is None or args.questions >= 1, f"--questions {args.questions}: must be at least 1")
    sections = [from_file(s) for s in args.section]
    need(all(map(callable, sections)), f"--section {' '.join(args.section)}: must name functions")
    need(args.text is None or args.text_file is None, "--text and --text-file: give one of them")
    text = args.text if args.text_file is None else read_text(args.text_file)
    folders = args.runs or (newest_run(),)
    runs = [open_run(name, args.device, args.step) for name in args.runs or (None,)]
    if text is not None:
        runs = [with_text(run, text, "the text of --text" if args.text_file is None else args.text_file.name) for run in runs]
    tasks = [name for words in args.tasks for name in words.split(",") if name] or None
    results = [evaluate(run, tasks, quick=args.quick, seed=args.seed, questions=args.questions, local=args.local,
                        shots=args.shots, allow_code=args.allow_code, say=lambda line: print(line, file=sys.stderr)) for run in runs]
    print(table(results[0]) if len(runs) == 1 else comparison([*zip(folders, results)]))
    if args.report is None and runs[0].folder == SHIPPED:
        print("no report: the shipped run lies in the package, where none is written; name one with --report", file=sys.stderr)
        return
    print(f"report: {write_report(runs, results, args.report, sections=sections, seed=args.seed)}")
