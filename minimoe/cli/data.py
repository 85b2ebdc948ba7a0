"""minimoe data prepare, merge, verify and info: token shards on disk."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minimoe.cli.parse import parse
from minimoe.settings import ConfigError


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
    """Encodes texts once, into token shards that a mixture can name like a corpus."""

    corpora: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names of corpora, or paths of text files and folders."""
    out: Path
    """Folder to write; one that an interrupted prepare left is begun anew."""
    tokenizer: str = "bpe"
    """bpe (trained on these texts), characters, bytes, gpt2, o200k, or the path of a tokenizer.json or of a run."""
    tokenizer_vocab: int = 4096
    """Vocabulary of a trained bpe tokenizer, the specials included."""
    shard_tokens: int = 1 << 24
    """Tokens in a shard."""


def prepare(argv: list[str]) -> None:
    """Encode texts into shards: minimoe data prepare pydocs stdlib --out data/both"""
    args = parse(PrepareArgs, argv, "data prepare")
    from minimoe.data import shards

    _made(args.out, lambda: shards.prepare(args.corpora, args.out, args.tokenizer, args.tokenizer_vocab, args.shard_tokens))


@dataclasses.dataclass(frozen=True)
class MergeArgs:
    """Makes one folder of shards out of several that have the same tokenizer."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that minimoe data prepare made."""
    out: Path
    """Folder to write."""
    strategy: Literal["weighted", "equal", "proportional"] = "proportional"
    """proportional takes every token; equal as many of each folder, and weighted in the ratios given, without any token
    twice: of the folders with more than their share the beginning is taken."""
    ratios: tuple[float, ...] = ()
    """Shares of the tokens, one for each folder, for weighted."""
    shard_tokens: int = 1 << 24
    """Tokens in a shard."""


def merge(argv: list[str]) -> None:
    """Make one folder of several: minimoe data merge data/a data/b --out data/ab --strategy weighted --ratios 3 1"""
    args = parse(MergeArgs, argv, "data merge")
    from minimoe.data import shards

    _made(args.out, lambda: shards.merge(args.folders, args.out, args.strategy, args.ratios, args.shard_tokens))


@dataclasses.dataclass(frozen=True)
class FolderArgs:
    """Looks at a folder of shards."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder that minimoe data prepare or merge made."""


def verify(argv: list[str]) -> None:
    """Read every shard and name every fault: minimoe data verify data/both"""
    args = parse(FolderArgs, argv, "data verify")
    from minimoe.data.verify import verify

    faults, report = verify(args.folder)
    print("\n".join([*report, *faults]))
    if faults:
        raise ConfigError(f"{args.folder}: {len(faults)} fault{'s' * (len(faults) > 1)}; prepare it again")
    print(f"{args.folder}: no fault")


def info(argv: list[str]) -> None:
    """Print tokens, documents, shards, domains and tokenizer: minimoe data info data/both"""
    args = parse(FolderArgs, argv, "data info")
    from minimoe.data.verify import describe

    print("\n".join(describe(args.folder)))


ACTIONS: dict[str, Callable[[list[str]], None]] = {"prepare": prepare, "merge": merge, "verify": verify, "info": info}


def data(argv: list[str]) -> None:
    """Prepare, merge, verify and describe token shards: minimoe data prepare pydocs --out data/pydocs"""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: minimoe data ACTION [OPTIONS]      (minimoe data ACTION --help lists the options)\n")
        print("\n".join(f"  {name:<10} {action.__doc__.strip()}" for name, action in ACTIONS.items()))
        return
    if argv[0] not in ACTIONS:
        raise ConfigError(f"data: unknown action {argv[0]!r}; one of {', '.join(ACTIONS)}")
    ACTIONS[argv[0]](argv[1:])


def _made(out: Path, make: Callable[[], dict]) -> None:
    try:
        index = make()
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}; not finished, run the same command again once there is room "
                          "and access") from None
    print(f"{index['tokens']:,} tokens in {len(index['shards'])} shards; saved {out}\n"
          f"next: minimoe train --mixture {out}")
