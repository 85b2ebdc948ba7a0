"""minimoe chat."""
from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated

import tyro

from minimoe.cli.parse import newest_run, parse
from minimoe.settings import need


@dataclasses.dataclass(frozen=True)
class ChatArgs:
    """Talks with a run, in the terminal or in the browser.

    In the terminal a line is a question, or one of params, clear, help and exit; through a pipe too, one answer a line.
    """

    run: Annotated[str | None, tyro.conf.Positional] = None
    """Run folder, or "shipped"; default the newest under runs/, else the shipped one."""
    temperature: float | None = None
    """0 takes the likeliest token always; default the run's own."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only; default the run's own."""
    top_p: float | None = None
    """Draw among the likeliest tokens that hold this share of the probability; default the run's own."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; default the run's own."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are not shown; default the run's own."""
    seed: int = 0
    """Seed of the first answer in the terminal; each one adds one to it."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps."""
    step: int | None = None
    """The kept checkpoint of this step; default the weights with the lowest held-out loss."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """After each answer in the terminal: its tokens, tokens/s, time to the first one, and tokens in the context."""
    web: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Serve the chat page, and /generate for programs, instead (pip install minimoe[chat])."""
    host: str = "127.0.0.1"
    """Address that the page is served at; 0.0.0.0 lets other machines in, without asking who they are."""
    port: int = 7860
    """Port of the page; 0 takes a free one."""
    max_prompt: int = 20_000
    """Characters that can be sent to the page at once, with all that was said before."""
    max_tokens: int = 1000
    """Tokens of an answer of the page at most."""
    max_seconds: float = 120
    """Seconds that an answer of the page may take; then it ends with a note."""
    parallel: int = 4
    """Answers that the page writes at the same time."""
    waiting: int = 16
    """Questions that wait for their turn; one more is refused."""


def chat(argv: list[str]) -> None:
    """Talk with a run, in the terminal or with --web in the browser: minimoe chat runs/stages/sft"""
    args = parse(ChatArgs, argv, "chat")
    need(0 <= args.seed < 2**63, f"seed={args.seed}: from 0 to 2^63 - 1")
    from minimoe.device import choose, tune_cpu

    # each thread of the server brings CPU threads of its own: with few for each, answers share the cores (LOG.md)
    tune_cpu(max(1, (os.cpu_count() or 1) // max(1, args.parallel)) if args.web else 0)
    folder, device = args.run or newest_run(), str(choose(args.device, "float32").device)
    if args.run is None:
        print(f"using {folder}", file=sys.stderr)
    given = {"temperature": args.temperature, "sample_top_k": args.top_k, "top_p": args.top_p,
             "max_new_tokens": args.max_new_tokens, "stop": args.stop or None}
    given = {name: value for name, value in given.items() if value is not None}
    if args.web:
        from minimoe.chat.http import serve
        from minimoe.chat.service import Limits, Service

        need(not given, f"{', '.join(given)}: on the page these are set by its controls; leave them out")
        limits = Limits(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Limits) if hasattr(args, f.name)})
        return serve(Service(folder, args.step, device, limits), args.host, args.port)
    from minimoe.chat.terminal import talk
    from minimoe.checkpoint import load

    run = load(folder, device, args.step)
    settings = dataclasses.replace(run.config.generate, **given)
    talk(dataclasses.replace(run, config=dataclasses.replace(run.config, generate=settings)), args.seed, args.verbose)
