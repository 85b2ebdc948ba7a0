"""minimoe stages."""
from __future__ import annotations

import dataclasses
from pathlib import Path

from minimoe.cli.parse import parse
from minimoe.settings import need


@dataclasses.dataclass(frozen=True)
class StagesArgs:
    """Trains a model in stages, base, mid and sft, each from the weights of the one before.

    A finished stage is not run again, and one that was interrupted goes on.
    """

    config: Path = Path("configs/stages.yaml")
    """YAML file with the sections model, generate, and base, mid and sft, each with enabled, train and data."""
    out: Path | None = None
    """Folder for the runs, DIR/base, DIR/mid and DIR/sft; default runs/<name of the config>."""
    set: tuple[str, ...] = ()
    """Settings instead of those of the file, such as sft.train.steps=100 mid.enabled=false."""


def stages(argv: list[str]) -> None:
    """Train in stages, base, mid and SFT: minimoe stages --config configs/stages.yaml --out runs/stages"""
    args = parse(StagesArgs, argv, "stages")
    from minimoe.stages import ORDER, load_stages, run_stages

    config, out = load_stages(args.config, args.set), args.out or Path("runs") / args.config.stem
    need(not out.is_file(), f"{out} is a file: name another --out")
    wanted = [name for name in ORDER if getattr(config, name).enabled]
    done = run_stages(config, out, say=print)
    if len(done) == len(wanted):
        use = "chat" if getattr(config, wanted[-1]).data.supervised else "generate"
        print(f"saved {', '.join(map(str, done))}\nnext: minimoe {use} {done[-1]}")
