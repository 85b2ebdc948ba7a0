"""minimoe compare."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minimoe.cli.parse import parse
from minimoe.config import Config, load_config
from minimoe.settings import need


@dataclasses.dataclass(frozen=True)
class CompareArgs:
    """Trains several configs at equal cost, over several seeds, and measures them on the same held-out text.

    The length of the first is its own (--steps); the others get as many steps as come nearest to the same cost, and warm-up
    and eval_every keep their share. Finished runs are not run again. A setting given as a flag holds for every config.
    """

    configs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """YAML files; the first one is what the others are compared with."""
    dense: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Beside each config its dense twins: of equal active, and of equal total parameters."""
    equal: Literal["bytes", "flops", "active"] = "bytes"
    """What all runs have in common. bytes: training text read, tokens x the mean bytes per token of the training text, by
    the mixture's ratios. flops: training FLOPs, tokens x 3 x the forward FLOPs per token that minimoe info prints, at the
    training length. active: active parameters x tokens."""
    seeds: int = 3
    """Runs of each config; they count up from the first config's seed."""
    out: Path | None = None
    """Folder for the runs, compare.json, compare.md and compare.svg; default runs/compare-<names of the configs>."""
    settings: tyro.conf.FlagConversionOff[Config] = Config()


def compare(argv: list[str]) -> None:
    """Compare configs at equal cost: minimoe compare configs/pydocs.yaml --dense --seeds 3"""
    args = parse(CompareArgs, argv, "compare")
    need(args.configs, "name at least one config: minimoe compare configs/pydocs.yaml --dense")
    stems = [p.stem for p in args.configs]
    need(len(set(stems)) == len(stems), f"two configs are called {max(stems, key=stems.count)!r}: rename one of the files")
    configs = {p.stem: parse(CompareArgs, argv, "compare", default=CompareArgs(settings=load_config(p))).settings
               for p in args.configs}
    from minimoe.compare import compare

    out = args.out or Path("runs") / f"compare-{'-'.join(stems)}"
    result = compare(configs, out=out, equal=args.equal, dense=args.dense, seeds=args.seeds, say=print)
    print(f"\n{result.table()}\nsaved {out}")
