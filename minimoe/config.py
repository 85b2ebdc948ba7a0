"""Everything that a run is made of, as frozen dataclasses that read and write YAML.

The counts (`num_params`, `active_params`, `flops_per_token`, `kv_bytes_per_token`) come from the numbers of the config
alone; a test holds them equal to what the built model holds.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from minimoe.settings import ConfigError, check_choices, from_dict, need, to_dict


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model, and how its experts are chosen and kept in balance.

    >>> cfg = ModelConfig(vocab_size=65, dim=64, n_layers=2, n_heads=4, n_experts=4, top_k=2, expert_hidden=128)
    >>> cfg.moe_layers, cfg.num_params() > cfg.active_params()
    ((0, 1), True)
    """

    vocab_size: int | None = None
    """Number of token ids; null takes the tokenizer's."""
    dim: int = 256
    """Width of the residual stream, D."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int | None = None
    """Key/value heads; fewer than n_heads is grouped-query attention, 1 is multi-query; null is n_heads."""
    head_dim: int | None = None
    """Width of one head; null is dim / n_heads."""
    max_seq_len: int = 256
    """Longest sequence that positions are prepared for."""
    norm_eps: float = 1e-6
    """Epsilon inside the root of RMSNorm."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    qk_norm: Literal["none", "head"] = "none"
    """RMSNorm of queries and keys, per head, before the rotation."""
    dropout: float = 0.0
    """Dropout on the embeddings and on the output of every sub-layer, in training only."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head too."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; layers that write to the residual stream get less."""
    dense_hidden: int | None = None
    """Hidden size of dense feed-forward layers; null is top_k + n_shared_experts experts wide."""
    n_experts: int = 8
    """Routed experts per MoE layer; 1 is a dense model."""
    top_k: int = 2
    """Experts that each token is sent to."""
    expert_hidden: int = 512
    """Hidden size of one expert."""
    n_shared_experts: int = 0
    """Experts that every token uses, with weight one, outside the router."""
    moe_every: int = 1
    """An MoE layer at every n-th block."""
    n_dense_first: int = 0
    """Blocks at the bottom that stay dense."""
    router: Literal["softmax", "sigmoid", "expert_choice", "hash", "random"] = "softmax"
    """Who chooses: see minimoe.router."""
    norm_topk: bool = True
    """Divide the k weights by their sum (Mixtral, Qwen3-MoE); false keeps the probabilities (Switch, OLMoE)."""
    router_noise: float = 0.0
    """Standard deviation of Gaussian noise on the router's logits, in training only."""
    capacity_factor: float | None = None
    """Places per expert and sequence, as a multiple of the even share, in training only; null drops nothing."""
    dispatch: Literal["auto", "grouped", "loop"] = "auto"
    """How tokens reach their experts; auto takes the loop where grouped_mm cannot run."""
    balance: Literal["none", "aux", "bias"] = "aux"
    """What keeps the experts evenly used."""
    aux_coef: float = 0.01
    """Weight of the auxiliary balancing loss."""
    aux_scope: Literal["batch", "sequence"] = "batch"
    """Balance over all tokens forwarded together, or within each sequence."""
    z_coef: float = 0.0
    """Weight of the router's z-loss."""
    bias_speed: float = 0.001
    """Step of the selection-bias rule, with balance: bias."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("dim", "n_layers", "n_heads", "max_seq_len", "n_experts", "top_k", "expert_hidden", "moe_every"):
            need(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("n_shared_experts", "n_dense_first", "router_noise", "aux_coef", "z_coef", "bias_speed"):
            need(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must not be negative")
        for name in ("init_std", "norm_eps", "rope_base"):
            need(getattr(self, name) > 0, f"{name}={getattr(self, name)}: must be above 0")
        need(self.vocab_size is None or self.vocab_size >= 1, f"vocab_size={self.vocab_size}: must be at least 1")
        need(0 <= self.dropout < 1, f"dropout={self.dropout}: must be in [0, 1)")
        need(self.head_dim is not None or self.dim % self.n_heads == 0,
             f"dim={self.dim} is not a multiple of n_heads={self.n_heads}: change one of them or give head_dim")
        need(self.n_heads % self.kv_heads == 0,
             f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.kv_heads}: each key head serves whole groups")
        need(self.head_size % 2 == 0, f"head_dim={self.head_size} must be even: rotary positions turn pairs of values")
        need(self.top_k <= self.n_experts or self.n_experts == 1,
             f"top_k={self.top_k} is more than n_experts={self.n_experts}: lower top_k")
        need(self.capacity_factor is None or self.capacity_factor > 0,
             f"capacity_factor={self.capacity_factor}: must be above 0, or null to drop nothing")
        need(self.balance != "bias" or self.router in ("softmax", "sigmoid"),
             f"balance: bias corrects a router that scores experts; router={self.router} does not: use balance: none")

    # --- derived sizes -----------------------------------------------------------------------------------------------
    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def dense_size(self) -> int:
        """Hidden size of a dense feed-forward layer: as wide as what one token uses in an MoE layer, unless given."""
        return self.dense_hidden or (self.top_k + self.n_shared_experts) * self.expert_hidden

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices, from 0, of the blocks that hold experts."""
        if self.n_experts == 1:
            return ()
        return tuple(i for i in range(self.n_layers) if i >= self.n_dense_first and (i + 1) % self.moe_every == 0)

    # --- counts ------------------------------------------------------------------------------------------------------
    def _attention_weights(self) -> int:
        return self.dim * self.head_size * (2 * self.n_heads + 2 * self.kv_heads)

    def num_params(self) -> int:
        """Parameters of the whole model, a tied embedding counted once."""
        d, n_moe = self.dim, len(self.moe_layers)
        need(self.vocab_size is not None, "vocab_size is null: it is filled in from the tokenizer before counting")
        norms = self.n_layers * (2 * d + (2 * self.head_size if self.qk_norm == "head" else 0)) + d
        router = self.n_experts * d if self.router in ("softmax", "sigmoid", "expert_choice") else 0
        moe = router + 3 * d * self.expert_hidden * (self.n_experts + self.n_shared_experts)
        dense = 3 * d * self.dense_size
        heads = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return heads + norms + self.n_layers * self._attention_weights() + n_moe * moe + (self.n_layers - n_moe) * dense

    def active_params(self) -> int:
        """Parameters that one token uses: all but the routed experts that it is not sent to."""
        unused = (self.n_experts - self.top_k) * 3 * self.dim * self.expert_hidden
        return self.num_params() - len(self.moe_layers) * unused

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Forward FLOPs per token, averaged over a causal sequence of `seq_len` tokens: matrix products only, two per
        multiply-add, attention scores and the output head included (the embedding lookup is none)."""
        t, d, n_moe = seq_len or self.max_seq_len, self.dim, len(self.moe_layers)
        need(self.vocab_size is not None, "vocab_size is null: it is filled in from the tokenizer before counting")
        router = self.n_experts * d if self.router in ("softmax", "sigmoid", "expert_choice") else 0
        moe = router + 3 * d * self.expert_hidden * (self.top_k + self.n_shared_experts)
        products = (self.vocab_size * d + self.n_layers * self._attention_weights()
                    + n_moe * moe + (self.n_layers - n_moe) * 3 * d * self.dense_size)
        scores = 2 * self.n_layers * self.n_heads * self.head_size * (t + 1)     # q.k and p.v, (t + 1) / 2 keys each
        return 2 * products + scores

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Bytes that the key/value cache grows by with each token."""
        return 2 * self.n_layers * self.kv_heads * self.head_size * bytes_per_value

    def dense_twin(self, equal: Literal["active", "total"] = "active") -> ModelConfig:
        """The dense model whose active or total parameters are nearest to this one's (hidden size a multiple of 8)."""
        target = self.active_params() if equal == "active" else self.num_params()
        base = dataclasses.replace(self, n_experts=1, top_k=1, n_shared_experts=0, balance="none", dense_hidden=8)
        per_unit = 3 * self.dim * self.n_layers
        hidden = 8 * max(1, round((target - base.num_params() + 8 * per_unit) / per_unit / 8))
        return dataclasses.replace(base, dense_hidden=hidden)


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

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            need(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("warmup", "weight_decay", "eval_every"):
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
