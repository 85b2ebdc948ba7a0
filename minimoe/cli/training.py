"""minimoe train."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import parse, value_of
from minimoe.config import Config, load_config
from minimoe.launch import is_main, watch
from minimoe.parallel import finish
from minimoe.settings import ConfigError

SAMPLE_PROMPTS = ("The for statement", "An object is")


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
    path = value_of("--config", argv)
    defaults = TrainArgs(settings=load_config(path) if path else Config())
    args = parse(TrainArgs, argv, "train", default=defaults)
    out = args.out or Path("runs") / (args.config.stem if args.config else "train")
    if is_main() and out.exists() and any(out.iterdir()) and not (args.overwrite or args.resume):
        raise ConfigError(f"{out} exists already: name another --out, go on with --resume, or give --overwrite")
    from minimoe.trainer import train_from_config

    with watch():
        run = train_from_config(args.settings, out, resume=args.resume, stop_after=args.stop_after, say=print,
                                samples=SAMPLE_PROMPTS)
    finish()
    if not is_main():
        return
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
