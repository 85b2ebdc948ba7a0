"""The command line: one program, every option of a config also a flag.

Exit code 0 for success, 2 for what the user can mend (one line says what and how), 1 for anything else.
"""
from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.config import Config, Source, load_config
from minimoe.settings import ConfigError, need

SAMPLE_PROMPTS = ("The for statement", "An object is")
PLAIN = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Trains a model and writes a run folder."""

    config: Path | None = None
    """YAML file with the sections model, train, data, generate; flags win over it."""
    out: Path | None = None
    """Run folder to write; default runs/<name of the config>."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write over a run folder that exists."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the newest complete checkpoint in the run folder."""
    stop_after: int | None = None
    """Stop after this step, as if interrupted; --resume goes on."""
    settings: tyro.conf.FlagConversionOff[Config] = Config()         # --tie-embeddings False: each has a default to leave


def train(argv: list[str]) -> None:
    """Train a model: minimoe train --config configs/pydocs.yaml"""
    path = _value_of("--config", argv)
    defaults = TrainArgs(settings=load_config(path) if path else Config())
    args = _parse(TrainArgs, argv, "train", default=defaults)
    out = args.out or Path("runs") / (args.config.stem if args.config else "train")
    if out.exists() and any(out.iterdir()) and not (args.overwrite or args.resume):
        raise ConfigError(f"{out} exists already: name another --out, go on with --resume, or give --overwrite")
    from minimoe.trainer import train_from_config

    run = train_from_config(args.settings, out, resume=args.resume, stop_after=args.stop_after, say=print,
                            samples=SAMPLE_PROMPTS)
    rows = run.metrics()
    best = min((r for r in rows if "val_bpb" in r), key=lambda r: r["val_ce"], default=None)
    if best:
        from minimoe.data.loader import load_data, xz_bits_per_byte

        data = load_data(args.settings.data, run.tokenizer)
        for corpus in data.corpora:
            measured = best["val"][corpus.name]
            print(f"held-out {corpus.name}: {measured:.3f} bits per byte at step {best['step']}; xz -9e, given all "
                  f"training text, {xz_bits_per_byte(data, corpus):.3f}")
    if rows:
        print(f"{rows[-1]['tokens']:,} tokens in {rows[-1]['seconds']:.0f} s of training; saved {out}\n"
              f'next: minimoe generate {out} --prompt "The for statement"')


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


def generate(argv: list[str]) -> None:
    """Write on from a prompt: minimoe generate runs/pydocs --prompt "The for statement" """
    args = _parse(GenerateArgs, argv, "generate")
    from minimoe.checkpoint import load
    from minimoe.device import choose, tune_cpu

    tune_cpu()
    folder = args.run or newest_run()
    run = load(folder, str(choose(args.device, "float32").device))
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


def doctor(argv: list[str]) -> None:
    """Print device, dtype, threads and the reasons, and check one training step against the CPU."""
    args = _parse(DoctorArgs, argv, "doctor")
    import platform

    import torch

    from minimoe.device import choose, tune_cpu
    from minimoe.doctor import dispatch, parity

    tune_cpu()
    choice = choose(args.device)
    print(f"minimoe on Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}")
    print("\n".join((*choice.reasons, dispatch(choice))))
    for line in parity(choice):
        print(line)


@dataclasses.dataclass(frozen=True)
class InfoArgs:
    """Prints what a run or a config holds."""

    what: Annotated[str, tyro.conf.Positional] = "shipped"
    """Run folder, "shipped", or a config file."""


def info(argv: list[str]) -> None:
    """Print parameters, active parameters, FLOPs and cache bytes of a run or a config, part by part, and all shapes."""
    args = _parse(InfoArgs, argv, "info")
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


@dataclasses.dataclass(frozen=True)
class ImportArgs:
    """Turns a folder that transformers wrote into a run folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with config.json and safetensors: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE or Llama."""
    out: Path | None = None
    """Run folder to write; default runs/<name of the folder>."""


def import_folder(argv: list[str]) -> None:
    """Turn a folder of transformers into a run: minimoe import FOLDER --out RUN"""
    args = _parse(ImportArgs, argv, "import")
    out = _new_folder(args.out or Path("runs") / args.folder.resolve().name)
    from minimoe.checkpoint import save
    from minimoe.data.tokenizer import Tokenizer
    from minimoe.hub import load_hf

    model, tokenizer = load_hf(args.folder), None
    try:
        found = Tokenizer.load(args.folder / "tokenizer.json")
        need(found.vocab_size <= model.cfg.vocab_size, f"tokenizer.json has {found.vocab_size} tokens, more than the model")
        # Tokenizer takes one that does not cut texts before it merges for one of characters
        need(found.inner.pre_tokenizer is not None or not json.loads(found.inner.to_str())["model"].get("merges"),
             "tokenizer.json merges over whole texts (SentencePiece), which minimoe cannot")
        tokenizer = found
    except ConfigError as error:
        print(f"without a tokenizer, so for token ids only: {error}")
    save(out, model, tokenizer)
    print(f"{model.cfg.num_params():,} parameters, {model.embedding.weight.dtype}; saved {out}")


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Writes a run as a folder that transformers loads."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """Run folder, or "shipped"; default the newest under runs/, else the shipped one."""
    out: Path | None = None
    """Folder to write; default exports/<name of the run>."""


def export(argv: list[str]) -> None:
    """Write a run as a folder that transformers loads: minimoe export RUN --out FOLDER"""
    args = _parse(ExportArgs, argv, "export")
    folder = args.run or newest_run()
    out = _new_folder(args.out or Path("exports") / Path(folder).resolve().name)
    from minimoe.checkpoint import load
    from minimoe.hub import save_hf

    run = load(folder)
    print(f"{save_hf(run.model, out, run.tokenizer)}{'' if run.tokenizer else ', without a tokenizer'}; saved {out}")


def _new_folder(out: Path) -> Path:
    need(not out.exists() or out.is_dir() and not any(out.iterdir()), f"{out} exists already: name another --out")
    return out


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train, "generate": generate, "doctor": doctor, "info": info, "import": import_folder, "export": export}


def main(argv: list[str] | None = None) -> int:
    """The program `minimoe`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: minimoe COMMAND [OPTIONS]      (minimoe COMMAND --help lists the options)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {command.__doc__.strip()}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"minimoe: error: unknown command {argv[0]!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except (ConfigError, ValueError) as error:
        print(f"minimoe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminimoe: stopped", file=sys.stderr)
        return 130
    return 0


def newest_run() -> str:
    """The run folder under runs/ that was written last, else "shipped"."""
    runs = [p.parent for p in Path("runs").glob("*/model.safetensors")]
    return str(max(runs, key=lambda p: (p / "model.safetensors").stat().st_mtime)) if runs else "shipped"


def _parse(cls: type, argv: list[str], command: str, **kwargs: object):
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not Source:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1, metavar="CORPUS[:RATIO]", instance_from_str=lambda args: _source(args[0]),
            is_instance=lambda x: isinstance(x, Source), str_from_instance=lambda s: [f"{s.corpus}:{s.ratio:g}"])

    return tyro.cli(cls, args=argv, prog=f"minimoe {command}", config=PLAIN, registry=registry, **kwargs)


def _source(text: str) -> Source:
    name, _, ratio = text.rpartition(":")
    try:
        return Source(corpus=name, ratio=float(ratio)) if name else Source(corpus=text)
    except ValueError:                          # a path with a colon in it
        return Source(corpus=text)


def _value_of(flag: str, argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word[len(flag) + 1:]
    return None


if __name__ == "__main__":
    sys.exit(main())
