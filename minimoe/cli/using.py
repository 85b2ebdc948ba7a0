"""minimoe generate, doctor and info."""
from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import open_run, parse
from minimoe.config import load_config, read_yaml
from minimoe.data.sources import read_text
from minimoe.settings import ConfigError, need


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Writes on from a prompt."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """Run folder, or "shipped"; default the newest under runs/, else the shipped one."""
    prompt: str = "The "
    """Text to go on from."""
    prompts: Path | None = None
    """File of prompts instead, written on from in batches: one a line, or .jsonl with a text or a field prompt a line. What is
    drawn for one depends on the seed and its batch."""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask each prompt as a question in the chat template, of a model that was fine-tuned on conversations."""
    batch_size: int = 16
    """Prompts of a file that are written on from together."""
    out: Path | None = None
    """With --prompts: file for the answers, one JSON object (prompt, text) a line, instead of printing them."""
    max_new_tokens: int | None = None
    """Tokens to write; default the run's own."""
    temperature: float | None = None
    """0 takes the likeliest token always; default the run's own."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only; default the run's own."""
    top_p: float | None = None
    """Draw among the likeliest tokens that hold this share of the probability; default the run's own."""
    stop: tuple[str, ...] = ()
    """Texts that end the writing and are not shown; default the run's own."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps."""
    step: int | None = None
    """The kept checkpoint of this step; default the weights with the lowest held-out loss."""


def generate(argv: list[str]) -> None:
    """Write on from a prompt: minimoe generate runs/pydocs --prompt "The for statement" """
    args = parse(GenerateArgs, argv, "generate")
    need(args.out is None or args.prompts is not None, "--out is for the answers to a file of prompts: give --prompts too")
    need(args.out is None or not args.out.exists(), f"{args.out} exists already: name another --out")
    need(args.batch_size >= 1, f"--batch-size {args.batch_size}: must be at least 1")
    prompts = _prompts(args.prompts) if args.prompts else []
    run = open_run(args.run, args.device, args.step)
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
               "top_p": args.top_p, "seed": args.seed, "stop": args.stop or None}
    need(not args.chat or run.config.data.supervised, "--chat: this is a base model, which knows no questions: leave it out")
    start_of = lambda prompt: run.chat_prompt([{"role": "user", "content": prompt}])[0] if args.chat else prompt
    started = time.perf_counter()
    if not prompts:
        n, first = 0, started
        print(args.prompt, end="\n" if args.chat else "", flush=True)
        for piece in run.stream(start_of(args.prompt), **options):
            print(piece, end="", flush=True)
            first = time.perf_counter() if n == 0 else first
            n += 1
        print()
        seconds = time.perf_counter() - started
        print(f"{n} tokens in {seconds:.2f} s, the first after {first - started:.3f} s, {n / seconds:,.0f} tokens/s", file=sys.stderr)
        return
    n, file = 0, open(args.out, "w", encoding="utf-8") if args.out else None
    for i in range(0, len(prompts), args.batch_size):
        batch = prompts[i:i + args.batch_size]
        for prompt, text in zip(batch, run.generate([start_of(p) for p in batch], **options)):
            n += len(run.tokenizer.encode(text))
            if file:
                file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
                file.flush()
            else:
                print(f"--- {prompt!r}\n{text if args.chat else prompt + text}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{len(prompts)} prompts, {n} tokens in {seconds:.2f} s, {n / seconds:,.0f} tokens/s" + (
        f"; saved {args.out}" if file else ""), file=sys.stderr)


def _prompts(path: Path) -> list[str]:
    """One a line: plain text, or JSON (a text, or an object with a field prompt), in which a line may end."""
    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.startswith(('"', "{")) and path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}); mend or remove that line") from None
            line = row.get("prompt") if isinstance(row, dict) else row
            need(isinstance(line, str), f"{path}, line {number}: no text in the field prompt")
        if line.strip():
            prompts.append(line)
    return prompts


@dataclasses.dataclass(frozen=True)
class DoctorArgs:
    """Says what this machine will be used for, and checks that its arithmetic agrees with the CPU's."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """auto, float32, bfloat16, or on a GPU float16."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's own choice, -1 is all cores but two."""


def doctor(argv: list[str]) -> None:
    """Print device, dtype, threads and the reasons, and check one training step against the CPU."""
    args = parse(DoctorArgs, argv, "doctor")
    import platform

    import torch

    from minimoe.device import choose, tune_cpu
    from minimoe.doctor import dispatch, parity

    choice = choose(args.device, args.dtype, args.threads)
    tune_cpu(args.threads and choice.threads)
    print(f"minimoe on Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}")
    print("\n".join((*choice.reasons, dispatch(choice))))
    lines = parity(choice)
    print("\n".join(lines))
    if any("DIFFERS" in line for line in lines):
        sys.exit(1)


@dataclasses.dataclass(frozen=True)
class InfoArgs:
    """Prints what a run or a config holds."""

    what: Annotated[str, tyro.conf.Positional] = "shipped"
    """Run folder, "shipped", or a config file."""


def info(argv: list[str]) -> None:
    """Print parameters, active parameters, FLOPs and cache bytes of a run or a config, part by part, and all shapes."""
    args = parse(InfoArgs, argv, "info")
    from minimoe import counts
    from minimoe.model import shape_table

    path = Path(args.what)
    if path.suffix in (".yaml", ".yml"):
        from minimoe.stages import ORDER, load_stages

        values = read_yaml(path)
        staged = isinstance(values, dict) and values.keys() & set(ORDER)
        config = load_stages(path) if staged else load_config(path)
        data = next(stage.data for name in ORDER if (stage := getattr(config, name)).enabled) if staged else config.data
        m = config.model
        if m.vocab_size is None:                 # nothing trained yet: count with the size that the config asks for
            m = dataclasses.replace(m, vocab_size=data.tokenizer_vocab)
    else:
        from minimoe.checkpoint import load

        m = load(args.what).config.model
    print(f"{m.num_params():>14,} parameters\n{m.active_params():>14,} active per token\n"
          f"{m.flops_per_token():>14,} forward FLOPs per token, at {m.max_seq_len} tokens\n"
          f"{m.kv_bytes_per_token():>14,} bytes of key/value cache per token (float32)\n"
          f"{m.n_layers} layers, experts in {list(m.moe_layers)}: {m.n_experts} with top-{m.top_k}, {m.router} router")
    flops = counts.flops_by_part(m, m.max_seq_len)
    print(f"\n{'part':<12}{'parameters':>14}{'FLOPs per token':>18}")
    for part in {**counts.params_by_part(m), **flops}:
        print(f"{part:<12}{counts.params_by_part(m).get(part, 0):>14,}{flops.get(part, 0):>18,}")
    print("\n" + shape_table(m))
