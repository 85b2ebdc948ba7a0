"""minimoe train."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import parse, value_of
from minimoe.config import Config, TrainConfig, load_config
from minimoe.launch import is_main, watch
from minimoe.settings import ConfigError, need

LENGTHS = ("steps", "epochs", "tokens")
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
    step: int | None = None
    """With --resume: go on from the kept checkpoint of this step; the newer ones and the rows after it are removed."""
    plot: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draw the run when it ends: loss, learning rate and the load of the experts, in RUN/plot.svg."""
    stop_after: int | None = None
    """Stop after this step, as if interrupted; --resume goes on."""
    settings: tyro.conf.FlagConversionOff[Config] = Config()         # --tie-embeddings False: each has a default to leave


def _as_there(init: str) -> Config:
    from minimoe.start import origin_of

    return Config(model=origin_of(init).config.model)


def train(argv: list[str]) -> None:
    """Train a model: minimoe train --config configs/pydocs.yaml"""
    path = value_of("--config", argv)
    init = value_of("--init", argv)
    config = load_config(path) if path else _as_there(init) if init else Config()
    if any(value_of(f"--{name}", argv) for name in LENGTHS):        # a length given as a flag replaces the file's
        train_section = dataclasses.replace(config.train, steps=TrainConfig.steps, epochs=None, tokens=None)
        config = dataclasses.replace(config, train=train_section)
    defaults = TrainArgs(settings=config)
    args = parse(TrainArgs, argv, "train", default=defaults)
    need(args.step is None or args.resume, f"--step {args.step} names the checkpoint to go on from: give --resume too")
    out = args.out or Path("runs") / (args.config.stem if args.config else "train")
    if is_main() and (out.is_file() or out.exists() and any(out.iterdir()) and not (args.overwrite or args.resume)):
        raise ConfigError(f"{out} exists already: name another --out, go on with --resume, or give --overwrite")
    from minimoe.checkpoint import load
    from minimoe.evaluate import during_training, evaluate, table
    from minimoe.parallel import finish
    from minimoe.start import train_from_config

    evaluate_with = during_training(args.settings.evaluate)
    with watch():
        run = train_from_config(args.settings, out, resume=args.resume, stop_after=args.stop_after, say=print,
                                samples=SAMPLE_PROMPTS, from_step=args.step, evaluate_with=evaluate_with)
    finish()
    if not is_main():
        return
    rows = run.metrics()
    if args.plot:
        print(f"drawn in {run.plot().save(out / 'plot.svg')}")
    if evaluate_with and rows and rows[-1]["step"] == run.config.train.steps:
        kept = load(out, str(run.model.embedding.weight.device))        # the weights that stay, and the text that has been read
        print("\n" + table(evaluate(dataclasses.replace(kept, corpora=run.corpora), say=print)))
    if rows:
        then = f"chat {out}" if args.settings.data.supervised else f'generate {out} --prompt "The for statement"'
        print(f"{rows[-1]['tokens']:,} tokens in {rows[-1]['seconds']:.0f} s of training; saved {out}\nnext: minimoe {then}")
