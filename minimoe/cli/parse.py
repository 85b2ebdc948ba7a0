"""What the commands share: flags out of dataclasses, and which folder is meant."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from minimoe.config import Source
from minimoe.settings import need

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

PLAIN = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def newest_run() -> str:
    """The run folder under runs/, at any depth, that was written last, else "shipped"."""
    runs = [p.parent for p in Path("runs").rglob("model.safetensors") if (p.parent / "config.yaml").is_file()]
    return str(max(runs, key=lambda p: (p / "model.safetensors").stat().st_mtime)) if runs else "shipped"


def open_run(name: str | None, device: str = "cpu", step: int | None = None) -> Run:
    """The run of that name, ready to be used, or the newest, said on stderr."""
    from minimoe.checkpoint import load
    from minimoe.device import choose, tune_cpu

    tune_cpu()
    run = load(name or newest_run(), str(choose(device, "float32").device), step)
    if name is None:
        print(f"using {newest_run()}", file=sys.stderr)
    return run


def new_folder(out: Path) -> Path:
    need(not out.exists() or out.is_dir() and not any(out.iterdir()), f"{out} exists already: name another --out")
    return out


def parse(cls: type, argv: list[str], command: str, **kwargs: object):
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


def value_of(flag: str, argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word[len(flag) + 1:]
    return None
