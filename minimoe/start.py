"""What a run starts from: another run's weights and tokenizer, with a fresh optimizer."""
from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from minimoe.checkpoint import Run, load
from minimoe.config import Config, ModelConfig
from minimoe.settings import ConfigError

# settings that no weight's shape or meaning depends on
FREE = ("vocab_size", "max_seq_len", "init_std", "dropout", "router_noise", "capacity_factor", "dispatch", "balance", "aux_coef",
        "aux_scope", "z_coef", "bias_speed", "mtp_coef")


def origin_of(init: str) -> Run:
    """The run at `init`. Raises ConfigError that lists the runs there are, where there is none.

    >>> origin_of("shipped").config.model.vocab_size
    1024
    """
    folder = Path(init)
    if init != "shipped" and not (folder / "model.safetensors").is_file():
        near = sorted({str(p.parent) for home in {folder.parent, Path("runs")} for p in home.glob("*/model.safetensors")})
        raise ConfigError(f"init: {init} is no run folder; there are {', '.join([*near, 'shipped'])}")
    return load(init)


def start_from(init: str, config: Config) -> tuple[Run, Config]:
    """The run at `init`, and the config with its vocabulary. Raises ConfigError that names the field in which the config's
    model is another one.

    >>> run, config = start_from("shipped", Config(model=replace(load("shipped").config.model, vocab_size=None, dropout=0.2)))
    >>> config.model.vocab_size, config.model.dropout
    (1024, 0.2)
    """
    run = origin_of(init)
    theirs, ours = run.config.model, config.model
    different = [f"{name} is {getattr(theirs, name)} there, {getattr(ours, name)} here"
                 for name in _compared(theirs, ours) if getattr(theirs, name) != getattr(ours, name)]
    if different:
        raise ConfigError(f"init: the model of {init} is another one: {'; '.join(different)}. Write the sizes of that run under "
                          "model")
    return run, replace(config, model=replace(ours, vocab_size=theirs.vocab_size))


def _compared(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    names = [f.name for f in fields(ModelConfig) if f.name not in FREE]
    learned = "learned" in (theirs.router_noise, ours.router_noise)             # noise that is learned has weights
    bias = "bias" in (theirs.balance, ours.balance)                             # and so has a selection bias
    return names + ["vocab_size"] * (ours.vocab_size is not None) + ["router_noise"] * learned + ["balance"] * bias + [
        "max_seq_len"] * (ours.positions == "learned")
