"""Everything that a run is made of, as frozen dataclasses that read and write YAML.

`ModelConfig` stands in a file of its own, and is named here too.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from minimoe.model_config import ModelConfig
from minimoe.settings import ConfigError, check_choices, from_dict, need, to_dict


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    steps: int = 500
    """Updates of the weights."""
    batch_size: int = 16
    """Sequences per forward pass."""
    accumulate: int = 1
    """Forward passes per update."""
    seq_len: int | None = None
    """Tokens per training sequence; null is the model's max_seq_len."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.1
    """Last learning rate, as a share of the peak."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the fall from the peak to the last learning rate."""
    warmup: int = 50
    """Updates of linear rise at the start."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging rates."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the matrix products; auto chooses by the device and says why."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps, or auto."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's own choice, -1 is all cores but two."""
    seed: int = 0
    """Seed of the weights, the order of the data, dropout and router noise."""
    eval_every: int = 100
    """Steps between looks at the held-out text; 0 looks at the end only."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints that a run can be resumed from; 0 saves at the end only."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    recompute: Literal["none", "experts", "blocks"] = "none"
    """What the backward pass computes again instead of keeping in memory."""
    compile: bool = False
    """Run the model through torch.compile: some minutes of compiling, then a little faster."""
    parallel: Literal["none", "ddp", "fsdp", "ep"] = "none"
    """How the processes that torchrun starts share the work: the batch, also the model, or also the experts."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            need(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("warmup", "weight_decay", "eval_every", "save_every"):
            need(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must not be negative")
        need(self.lr > 0 and self.clip > 0, f"lr={self.lr}, clip={self.clip}: both must be above 0")
        need(0 <= self.min_lr <= 1, f"min_lr={self.min_lr}: a share of lr, between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of a mixture."""

    corpus: str = "pydocs"
    """Name of a corpus, or path of a text file."""
    ratio: float = 1.0
    """Share of the tokens; the ratios of a mixture are normalized to sum to one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a model reads."""

    mixture: tuple[Source, ...] = (Source(),)
    """The sources: one name, a list of names (equal shares), or a list of {corpus, ratio}."""
    tokenizer: str = "bpe"
    """bpe (trained on the training text), characters, bytes, or the path of a tokenizer.json."""
    tokenizer_vocab: int = 1024
    """Vocabulary of a trained bpe tokenizer, the specials included."""

    def __post_init__(self) -> None:
        entries = [self.mixture] if isinstance(self.mixture, str) else self.mixture
        need(len(entries) > 0, "mixture is empty: name at least one corpus, for example mixture: pydocs")
        sources = tuple(Source(corpus=e) if isinstance(e, str) else e for e in entries)
        object.__setattr__(self, "mixture", sources)
        for s in sources:
            need(s.ratio > 0, f"mixture: ratio={s.ratio} of {s.corpus!r} must be above 0")
        names = [s.corpus for s in sources]
        need(len(set(names)) == len(names), f"mixture: {max(names, key=names.count)!r} is named twice; add its ratios")
        need(self.tokenizer_vocab >= 261, f"tokenizer_vocab={self.tokenizer_vocab}: at least 261 (bytes and specials)")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Defaults of generation, saved with the run."""

    max_new_tokens: int = 200
    """Tokens to write."""
    temperature: float = 0.8
    """0 always takes the likeliest token."""
    sample_top_k: int | None = 50
    """Draw among the k likeliest tokens only."""
    top_p: float | None = 0.95
    """Draw among the likeliest tokens that hold this share of the probability."""
    stop: tuple[str, ...] = ()
    """Texts that end the writing; they are not shown."""

    def __post_init__(self) -> None:
        need(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        need(self.temperature >= 0, f"temperature={self.temperature}: must not be negative")
        need(self.sample_top_k is None or self.sample_top_k >= 1,
             f"sample_top_k={self.sample_top_k}: at least 1, or null for all")
        need(self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p}: above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: the four sections of a YAML file."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    generate: GenerateConfig = GenerateConfig()


def load_config(path: str | Path) -> Config:
    """Reads a YAML file with the sections model, train, data and generate; errors name the file and the key."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder, not a config file; name the .yaml file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: not readable as YAML{line}: {getattr(error, 'problem', error)}") from None
    return from_dict(Config, values or {}, str(path))


def save_config(config: Config, path: str | Path) -> None:
    """Writes every setting, defaults included."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
