"""minimoe generate, doctor and info."""
from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import newest_run, parse
from minimoe.config import load_config


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Writes on from a prompt."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """Run folder, or "shipped"; default the newest under runs/, else the shipped one."""
    prompt: str = "The "
    """Text to go on from."""
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
    from minimoe.checkpoint import load
    from minimoe.device import choose, tune_cpu

    tune_cpu()
    folder = args.run or newest_run()
    run = load(folder, str(choose(args.device, "float32").device), args.step)
    if args.run is None:
        print(f"using {folder}", file=sys.stderr)
    started, print_now = time.perf_counter(), lambda text: print(text, end="", flush=True)
    print_now(args.prompt)
    n = 0
    for piece in run.stream(args.prompt, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                            top_p=args.top_p, seed=args.seed, stop=args.stop or None):
        print_now(piece)
        n += 1
    print()
    seconds = time.perf_counter() - started
    print(f"{n} tokens in {seconds:.2f} s, {n / seconds:,.0f} tokens/s", file=sys.stderr)


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
        config = load_config(path)
        if config.model.vocab_size is None:      # nothing trained yet: count with the size that the config asks for
            model = dataclasses.replace(config.model, vocab_size=config.data.tokenizer_vocab)
            config = dataclasses.replace(config, model=model)
    else:
        from minimoe.checkpoint import load

        config = load(args.what).config
    m = config.model
    print(f"{m.num_params():>14,} parameters\n{m.active_params():>14,} active per token\n"
          f"{m.flops_per_token():>14,} forward FLOPs per token, at {m.max_seq_len} tokens\n"
          f"{m.kv_bytes_per_token():>14,} bytes of key/value cache per token (float32)\n"
          f"{m.n_layers} layers, experts in {list(m.moe_layers)}: {m.n_experts} with top-{m.top_k}, {m.router} router")
    flops = counts.flops_by_part(m, m.max_seq_len)
    print(f"\n{'part':<12}{'parameters':>14}{'FLOPs per token':>18}")
    for part in {**counts.params_by_part(m), **flops}:
        print(f"{part:<12}{counts.params_by_part(m).get(part, 0):>14,}{flops.get(part, 0):>18,}")
    print("\n" + shape_table(m))
