"""From a base model to one that answers: base -> mid -> SFT out of one YAML file (chapter 10).

    DIR/base/  DIR/mid/  DIR/sft/      a run folder each
    DIR/stages.json                    the fingerprint of the weights that each stage started from

Each stage starts from the weights and the tokenizer of the one before. A finished stage is not run again, and one that was
interrupted goes on from its newest checkpoint.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from minimoe.checkpoint import SHIPPED, checkpoints, write_safely
from minimoe.config import (
    Config,
    DataConfig,
    GenerateConfig,
    ModelConfig,
    TrainConfig,
    differences,
    load_config,
    read_yaml,
)
from minimoe.settings import ConfigError, check_choices, from_dict, need
from minimoe.start import train_from_config

ORDER = ("base", "mid", "sft")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of training: as `minimoe train`, but that it starts from the stage before."""

    enabled: bool = True
    """Whether this stage is run."""
    train: TrainConfig = TrainConfig()
    """How it trains; `init` names an earlier stage or any run, null is the last stage before it that is enabled."""
    data: DataConfig = DataConfig()
    """What it reads."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """One model, and the stages that train it; a stage that is not mentioned is not enabled."""

    model: ModelConfig = ModelConfig()
    """The sizes, the same in all stages."""
    base: Stage = Stage(enabled=False)
    """Plain text, from the seed."""
    mid: Stage = Stage(enabled=False)
    """Plain text nearer to what is wanted."""
    sft: Stage = Stage(enabled=False)
    """Conversations (`supervised: true`)."""
    generate: GenerateConfig = GenerateConfig()
    """Defaults of generation, saved in every run folder."""

    def __post_init__(self) -> None:
        enabled = [name for name in ORDER if getattr(self, name).enabled]
        need(bool(enabled), f"no stage is enabled: write at least one of {', '.join(ORDER)}, with train and data")
        first = getattr(self, enabled[0])
        need(enabled[0] == "base" or first.train.init is not None,
             f"{enabled[0]}: the stages before it are not enabled, so it needs init: a run folder, or shipped, under train")
        for i, name in enumerate(ORDER):
            init = getattr(self, name).train.init
            need(init not in ORDER[i:] or not getattr(self, name).enabled, f"{name}: init={init} is no earlier stage")


def load_stages(path: str | Path, changes: tuple[str, ...] = ()) -> StagesConfig:
    """Reads a YAML file with the sections model, generate, base, mid and sft; of the last three each has `enabled`, `train`
    and `data`. Changes are texts like "sft.train.steps=100". Errors name file, stage and key."""
    values = read_yaml(path)
    for change in changes:
        place, equals, value = change.partition("=")
        *sections, key = place.strip().split(".")
        need(bool(equals and sections and key), f"--set {change}: write it as sft.train.steps=100")
        inner = values
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[key] = yaml.safe_load(value)
    return from_dict(StagesConfig, values, str(path))


def run_stages(config: StagesConfig, out: str | Path, *, progress: bool = True,
               say: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Runs every stage that is enabled and not finished; the folders of those that are now finished, the last one last.

    Where a stage is interrupted the later ones wait: the same call goes on. Raises ConfigError for a stage that was made
    with other settings, or that started from weights which are no longer there.
    """
    out, before, done = Path(out), None, []
    out.mkdir(parents=True, exist_ok=True)
    for name in (n for n in ORDER if getattr(config, n).enabled):
        folder, wanted = out / name, _config_of(config, name, out, before)
        told, goes_on = _told(out), (folder / "config.yaml").is_file()
        init = _fingerprint(wanted.train.init)
        if goes_on:
            _check(name, folder, wanted, told, init)
        else:
            text = json.dumps(told | {name: init}, indent=1) + "\n"
            write_safely(out / "stages.json", lambda p, text=text: p.write_text(text, encoding="utf-8"))
        if goes_on and finished(folder):
            say(f"{name}: finished before, {folder}")
        else:
            say(f"\n{name}: {folder}" + (f", from {wanted.train.init}" if wanted.train.init else "") + f", {wanted.train.method}")
            train_from_config(wanted, folder, resume=goes_on, progress=progress, say=say)
            if not finished(folder):
                say(f"{name} was interrupted; the same command goes on from there")
                return done
        before = folder
        done.append(folder)
    return done


def finished(folder: str | Path) -> bool:
    """Whether a run has come to its last step."""
    kept = checkpoints(Path(folder))
    if not kept:
        return False
    progress = json.loads((kept[-1] / "state" / "progress.json").read_text(encoding="utf-8"))
    return progress["step"] == progress.get("steps")


def _config_of(config: StagesConfig, name: str, out: Path, before: Path | None) -> Config:
    stage = getattr(config, name)
    init = stage.train.init or before
    if init in ORDER:
        init = out / init
        need((init / "model.safetensors").is_file(), f"{name}: init={stage.train.init}, and {init} is not there; enable that stage, or "
                                                     "name a run folder")
    train = dataclasses.replace(stage.train, init=None if init is None else str(init))
    return Config(model=config.model, train=train, data=stage.data, generate=config.generate)


def _told(out: Path) -> dict[str, str | None]:
    path = out / "stages.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise ConfigError(f"{path}: damaged; name another --out") from None


def _check(name: str, folder: Path, wanted: Config, told: dict[str, str | None], init: str | None) -> None:
    """That what stands in the folder is this stage, with these settings, from these weights."""
    need(name in told, f"{folder} exists already, and no stage made it: name another --out")
    saved = load_config(folder / "config.yaml")
    sizes = dataclasses.replace(wanted.model, vocab_size=wanted.model.vocab_size or saved.model.vocab_size)
    found = differences(saved, dataclasses.replace(wanted, model=sizes))
    remedy = f"put it back, remove {folder} to run this stage again, or name another --out"
    need(not found, f"{name} was made with other settings: {'; '.join(found)}; {remedy}")
    need(told[name] == init, f"{name} started from other weights than {wanted.train.init or 'the seed'} holds now: {remedy}")


def _fingerprint(init: str | None) -> str | None:
    """Of a run's weights: the same as long as no file of them has changed."""
    if init is None:
        return None
    folder, digest = SHIPPED if init == "shipped" else Path(init), hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
