"""From a config to a trained run: what `minimoe train` does. And what a run may start from, another run's weights."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path

import torch

from minimoe import parallel
from minimoe.checkpoint import Run, checkpoints, kept_checkpoint, load, read_progress
from minimoe.config import Config, ModelConfig, load_config
from minimoe.data.loader import held_out_lines, load_data
from minimoe.data.tokenizer import Tokenizer
from minimoe.device import tune_cpu
from minimoe.model import MoETransformer, shape_table
from minimoe.settings import ConfigError, need
from minimoe.trainer import Trainer

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


def train_from_config(config: Config, out: str | Path | None = None, *, resume: bool = False, stop_after: int | None = None,
                      progress: bool = True, say: Callable[[str], None] | None = None,
                      samples: Iterable[str] = (), from_step: int | None = None,
                      evaluate_with: Callable[[Run, int], dict] | None = None) -> Run:
    """Everything that `minimoe train` does: data, tokenizer, a model from the seed, training, samples."""
    tune_cpu()
    ranks = parallel.start(config.train, config.model)
    tell = bool(say and ranks.main)
    say, samples = (say, samples) if tell else (lambda line: None, ())
    goes_on = bool(resume and out and checkpoints(Path(out)))
    need(from_step is None or goes_on, f"{out}: no checkpoint to go on from, so there is none of step {from_step}")
    if resume and not goes_on:
        say(f"{out}: no complete checkpoint to go on from, so this run starts at step 0")
    origin, seq_len = None, config.train.seq_len or config.model.max_seq_len
    if config.train.init:
        origin, config = start_from(config.train.init, config)
        say(f"starts from {origin.folder}")
    known = Tokenizer.load(Path(out)) if goes_on else origin and origin.tokenizer
    start = kept_checkpoint(Path(out), from_step) if goes_on else None
    seen = read_progress(start).get("out") if start else None           # what is on disk was read through when the run began
    data = load_data(config.data, known, seq_len, seen) if ranks.main else None
    tokenizer = ranks.from_main(data and data.tokenizer.inner.to_str())         # trained once
    seen = ranks.from_main(data and data.out)
    data = data or load_data(config.data, Tokenizer.from_text(tokenizer), seq_len, seen)
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    if goes_on and config.train.batch_size == "auto":       # what was found when the run began
        found = load_config(Path(out) / "config.yaml").train.batch_size
        config = replace(config, train=replace(config.train, batch_size=found))
    torch.manual_seed(config.train.seed)
    model = MoETransformer(config.model)
    if origin:
        model.load_state_dict(origin.model.state_dict())
    trainer = Trainer(model, config.train, data, out=out, generate=config.generate, progress=progress,
                      evaluate_with=evaluate_with)
    trainer.config = replace(config, train=trainer.config.train)
    cfg = trainer.cfg
    trainer.notes.append(data.mixture.describe(cfg.steps * cfg.batch_size * cfg.accumulate * trainer.seq_len))
    m = config.model
    trainer.notes.append(f"model: {m.num_params():,} parameters, {m.active_params():,} active per token, "
                         f"{m.flops_per_token(trainer.seq_len):,} forward FLOPs per token\n{shape_table(m)}")
    if goes_on:
        newer = [str(int(p.name)) for p in checkpoints(Path(out)) if p > start]
        trainer.notes.append(f"goes on from step {int(start.name)}" + (
            f"; the newer checkpoints ({', '.join(newer)}) and the rows after it go" if newer else ""))
    for line in trainer.notes:
        say(line)
    run = trainer.fit(resume=resume, stop_after=stop_after, from_step=from_step)
    if trainer.step < cfg.steps:
        say(f"stopped at step {trainer.step} of {cfg.steps}; the same command with --resume goes on")
    for prompt in () if config.data.supervised else samples:            # they are no questions
        try:
            run.encode(prompt)
        except ValueError:                      # characters that this text does not have: begin as the text does
            prompt = next((d.text for c in data.corpora for d in (*c.train, *c.held_out)), "the")[:16]
        say(f"--- {prompt!r}\n{prompt}{run.generate(prompt, max_new_tokens=60)}")
    for line in held_out_lines(run.metrics(), data) if tell else ():
        say(line)
    return run
