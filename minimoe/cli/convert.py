"""minimoe import and export."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from minimoe.cli.parse import new_folder, newest_run, parse
from minimoe.settings import ConfigError, need


@dataclasses.dataclass(frozen=True)
class ImportArgs:
    """Turns a folder that transformers wrote into a run folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with config.json and safetensors: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE or Llama."""
    out: Path | None = None
    """Run folder to write; default runs/<name of the folder>."""


def import_folder(argv: list[str]) -> None:
    """Turn a folder of transformers into a run: minimoe import FOLDER --out RUN"""
    args = parse(ImportArgs, argv, "import")
    out = new_folder(args.out or Path("runs") / args.folder.resolve().name)
    from minimoe.checkpoint import save
    from minimoe.data.tokenizer import Tokenizer
    from minimoe.hub import load_hf

    model, tokenizer = load_hf(args.folder), None
    try:
        found = Tokenizer.load(args.folder / "tokenizer.json")
        need(found.vocab_size <= model.cfg.vocab_size, f"tokenizer.json has {found.vocab_size} tokens, more than the model")
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
    step: int | None = None
    """The kept checkpoint of this step; default the weights with the lowest held-out loss."""


def export(argv: list[str]) -> None:
    """Write a run as a folder that transformers loads: minimoe export RUN --out FOLDER"""
    args = parse(ExportArgs, argv, "export")
    folder = args.run or newest_run()
    out = new_folder(args.out or Path("exports") / Path(folder).resolve().name)
    from minimoe.checkpoint import load
    from minimoe.hub import save_hf

    run = load(folder, step=args.step)
    print(f"{save_hf(run.model, out, run.tokenizer)}{'' if run.tokenizer else ', without a tokenizer'}; saved {out}")
