"""Everything that a run is made of, as frozen dataclasses that read and write YAML.

`ModelConfig` stands in a file of its own, and is named here too.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from minimoe.model_config import ModelConfig
from minimoe.settings import ConfigError, check_choices, from_dict, need, to_dict


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained."""

    steps: int | None = 500
    """Updates of the weights; the length may be given in epochs or tokens instead."""
    batch_size: int | Literal["auto"] = 16
    """Sequences per forward pass; auto takes the largest power of two that fits in memory."""
    accumulate: int = 1
    """Forward passes per update."""
    seq_len: int | None = None
    """Tokens per training sequence; null is the model's max_seq_len."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for the matrices of the blocks (turned in bfloat16 where the device has it) and AdamW for
    the rest, both at the same lr."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.1
    """Last learning rate, as a share of the peak."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the fall from the peak to the last learning rate."""
    warmup: int = 50
    """Updates of linear rise at the start."""
    weight_decay: float = 0.1
    """Decay of the weights, on matrices only."""
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
    eval_every: int | Literal["epoch"] = 100
    """Steps between looks at the held-out text; 0 looks at the end only, epoch once each epoch."""
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
    epochs: float | None = None
    """Length in readings of all training text (or of the whole dataset), instead of steps."""
    tokens: int | None = None
    """Length in tokens, instead of steps."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What train.log takes: everything from this level on."""
    tensorboard: bool = False
    """Write each logged row for TensorBoard too, to RUN/tensorboard."""
    wandb: bool = False
    """Send each logged row to Weights & Biases too (WANDB_MODE=offline keeps it in RUN/wandb)."""
    wandb_project: str = "minimoe"
    """Project at Weights & Biases."""
    wandb_name: str | None = None
    """Name of the run at Weights & Biases; null is that of the run folder."""
    parallel: Literal["none", "ddp", "fsdp", "ep"] = "none"
    """How the processes that torchrun starts share the work: the batch, also the model, or also the experts."""
    init: str | None = None
    """Run folder whose weights and tokenizer this run starts from, with a fresh optimizer; null starts from the seed."""
    method: Literal["full", "lora", "qlora"] = "full"
    """Train all weights, or low-rank adapters beside frozen ones, which qlora also keeps in 4 bits."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """What an adapter adds is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Share of an adapter's input that is zeroed in training."""
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o")
    """Names of the weights that get an adapter: q, k, v, o, w13 and w2 (experts and dense layers), or longer endings of names."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps == type(self).steps and (self.epochs, self.tokens) != (None, None):
            object.__setattr__(self, "steps", None)         # nobody asked for the default
        length = [f"{name}={value}" for name in ("steps", "epochs", "tokens") if (value := getattr(self, name)) is not None]
        need(len(length) == 1, f"{', '.join(length) or 'steps=None'}: give the length once, as steps, epochs or tokens")
        need(self.epochs is None or self.epochs > 0, f"epochs={self.epochs}: must be above 0")
        for name in ("steps", "tokens", "batch_size", "accumulate", "log_every", "keep"):
            value = getattr(self, name)
            need(value in (None, "auto") or value >= 1, f"{name}={value}: must be at least 1")
        for name in ("warmup", "weight_decay", "eval_every", "save_every"):
            value = getattr(self, name)
            need(value == "epoch" or value >= 0, f"{name}={value}: must not be negative")
        need(self.threads >= -1, f"threads={self.threads}: a number, 0 for PyTorch's own choice, -1 for all cores but two")
        need(self.seed >= 0, f"seed={self.seed}: must not be negative")
        need(self.lr > 0 and self.clip > 0, f"lr={self.lr}, clip={self.clip}: both must be above 0")
        need(self.lora_rank >= 1 and self.lora_alpha > 0, f"lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}: both must "
                                                          "be above 0")
        need(0 <= self.lora_dropout < 1, f"lora_dropout={self.lora_dropout}: at least 0 and below 1")
        need(self.method == "full" or bool(self.lora_targets), "lora_targets is empty: name at least one weight, such as q")
        need(0 <= self.min_lr <= 1, f"min_lr={self.min_lr}: a share of lr, between 0 and 1")

    def resolved(self, epoch: int | None, seq_len: int) -> TrainConfig:
        """The same with `steps` and `eval_every` as numbers, for data that holds `epoch` tokens, None if nobody knows.

        >>> cfg = TrainConfig(epochs=2, batch_size=4, eval_every="epoch").resolved(epoch=1000, seq_len=10)
        >>> cfg.steps, cfg.eval_every
        (50, 25)
        """
        need(epoch or self.epochs is None and self.eval_every != "epoch", "epochs: how long a stream is shows only when it "
             "has been read; give steps or tokens, and eval_every as a number")
        a_step = self.batch_size * self.accumulate * seq_len
        steps = self.steps or math.ceil(round((self.tokens or self.epochs * epoch) / a_step, 6))
        eval_every = max(1, round(epoch / a_step)) if self.eval_every == "epoch" else self.eval_every
        return replace(self, steps=steps, epochs=None, tokens=None, eval_every=eval_every)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of a mixture."""

    corpus: str = "pydocs"
    """Name of a corpus; path of a file or folder, or a pattern of files (txt, json, jsonl, csv, parquet, npy); or the
    owner/name of a Hugging Face dataset."""
    ratio: float = 1.0
    """Share of the tokens; the ratios of a mixture are normalized to sum to one."""
    percentage: float = 100.0
    """How much of the source is used at all, in percent; which documents is decided by a hash of each."""
    domains: tuple[str, ...] = ()
    """Labels of the documents that are used; none named, all are."""
    streaming: bool = False
    """Read document after document while training, in bounded memory, instead of all at the start."""
    subset: str | None = None
    """Subset of a dataset."""
    split: str | None = None
    """Split of a dataset; null is train."""
    field: str | None = None
    """Field or column that holds the text or the chat messages; null is text, else messages."""
    held_out: str | None = None
    """Path of a text that is only measured on, or another split of a dataset; null holds out a part of the source itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", (self.domains,) if isinstance(self.domains, str) else self.domains)
        check_choices(self)
        need(self.ratio > 0, f"mixture: ratio={self.ratio} of {self.corpus!r} must be above 0")
        need(0 < self.percentage <= 100, f"mixture: percentage={self.percentage} of {self.corpus!r}: above 0, at most 100")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a model reads."""

    mixture: tuple[Source, ...] = (Source(),)
    """The sources: one name, a list of names (equal shares), or a list of {corpus, ratio, percentage, domains, ...}."""
    strategy: Literal["weighted", "equal", "proportional"] = "weighted"
    """Shares of the sources: by their ratios, all the same, or by their numbers of tokens."""
    until: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """With all_exhausted a source that has been read begins anew until the steps are done; with first_exhausted the run
    ends when the first source has been read once, if that is before the last step."""
    workers: int = 0
    """Batches that a thread prepares ahead of the training step."""
    pin_memory: bool = False
    """Put batches into page-locked memory, from which a GPU copies faster."""
    tokenizer: str = "bpe"
    """bpe (trained on the training text, or that of the token shards), characters, bytes, gpt2 and o200k (rank files in
    MINIMOE_DATA), or the path of a tokenizer.json or of a run."""
    tokenizer_vocab: int = 1024
    """Vocabulary of a trained bpe tokenizer, the specials included."""
    supervised: bool = False
    """Documents are conversations, one a row of a batch, of which only the assistant's words are learned."""

    def __post_init__(self) -> None:
        entries = [self.mixture] if isinstance(self.mixture, str | Source) else self.mixture
        need(len(entries) > 0, "mixture is empty: name at least one corpus, for example mixture: pydocs")
        sources = tuple(Source(corpus=e) if isinstance(e, str) else e for e in entries)
        object.__setattr__(self, "mixture", sources)
        check_choices(self)
        parts = [(s.corpus, s.subset, s.split, s.field, s.domains) for s in sources]
        need(len(set(parts)) == len(parts),
             f"mixture: {max(parts, key=parts.count)[0]!r} is named twice; add its ratios")
        need(self.workers >= 0, f"workers={self.workers}: must not be negative")
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
    chat_template: Literal["turns"] = "turns"
    """How the turns of a conversation are marked, the same in fine-tuning, chat and evaluation."""

    def __post_init__(self) -> None:
        check_choices(self)
        need(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        need(self.temperature >= 0, f"temperature={self.temperature}: must not be negative")
        need(self.sample_top_k is None or self.sample_top_k >= 1,
             f"sample_top_k={self.sample_top_k}: at least 1, or null for all")
        need(self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p}: above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, saved with the run."""

    tasks: tuple[str, ...] = ()
    """Tasks of minimoe evaluate or of the harness, by name or as file.py:function; none named, all that need no other data."""
    questions: int | None = None
    """Questions of each task; null is each task's own number."""
    sample_prompts: tuple[str, ...] = ()
    """Beginnings, or for a chat questions, after which samples are written; none given, held-out documents begin them."""
    during: tuple[str, ...] = ()
    """Tasks to measure at every look at the held-out text too, of local data only; any named, all tasks are measured at the end."""
    during_questions: int = 60
    """Questions of each task during training."""
    local: str | None = None
    """Folder with the data sets of the harness's tasks, such as arc_easy/test.jsonl in it; null downloads them."""
    shots: int | None = None
    """Worked examples before each question of the harness's tasks; null is their own number."""

    def __post_init__(self) -> None:
        for name in ("tasks", "sample_prompts", "during"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else value)
        check_choices(self)
        need(self.questions is None or self.questions >= 1, f"questions={self.questions}: must be at least 1")
        need(self.during_questions >= 1, f"during_questions={self.during_questions}: must be at least 1")
        need(self.shots is None or self.shots >= 0, f"shots={self.shots}: must not be negative")
        need(all(self.sample_prompts), "sample_prompts: an empty prompt gives nothing to go on from")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: the five sections of a YAML file."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def load_config(path: str | Path) -> Config:
    """Reads a YAML file with the sections model, train, data, generate and evaluate; errors name the file and the key."""
    return from_dict(Config, read_yaml(path), str(Path(path)))


def read_yaml(path: str | Path) -> object:
    """What stands in a YAML file; an empty one is an empty dict. Errors name the file and the line."""
    path = Path(path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
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


def save_config(config: Config, path: str | Path) -> None:
    """Writes every setting, defaults included."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def differences(a: Config, b: Config) -> list[str]:
    """Each setting that differs and matters for what is computed, with both values.

    >>> differences(Config(), Config(train=TrainConfig(steps=7, device="cpu")))
    ['steps was 500, is 7']
    """
    free = ("device", "parallel", "init", "local", "workers", "pin_memory", "log_level", "tensorboard", "wandb", "wandb_project", "wandb_name")
    pairs = [(name, old, new) for section, values in to_dict(a).items() for name, old in values.items()
             if section != "evaluate" and (new := to_dict(b)[section][name]) != old and name not in free]
    return [f"{name} was {_spell(old)}, is {_spell(new)}" for name, old, new in pairs]


def _spell(value: object) -> object:
    """A setting in few words: of the sources of a mixture only what is not the default."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return value
    default = to_dict(Source())
    return " + ".join(" ".join([s["corpus"], *(f"{k}={v}" for k, v in s.items() if k != "corpus" and v != default[k])])
                      for s in value)
