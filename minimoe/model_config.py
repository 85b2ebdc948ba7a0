"""The shape of a model: every architecture, router and balancing rule of the course is one of these.

The counts (`num_params`, `active_params`, `flops_per_token`, `kv_bytes_per_token`) come from the numbers of the config
alone, part by part in counts.py; a test holds them equal to what the built model holds and computes.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from minimoe import counts
from minimoe.settings import check_choices, need


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
    norm: Literal["rms", "layer", "none"] = "rms"
    """Normalization before each sub-layer and before the head: RMSNorm, LayerNorm (no bias), or none."""
    norm_eps: float = 1e-6
    """Epsilon inside the root of the norms."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary positions in the attention, or a learned vector per position added to the embedding."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "ntk"] = "none"
    """Stretches the rotation over rope_factor times the trained length: all angles alike, or slow ones more (ntk)."""
    rope_factor: float = 1.0
    """How many times the trained length, with rope_scaling."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys before the rotation: of each head (Qwen3), or over all heads together (OLMoE)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    dropout: float = 0.0
    """Dropout on the embeddings and on the output of every sub-layer, in training only."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head too."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; layers that write to the residual stream get less."""
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """Feed-forward layers and experts: gated by SiLU or by GELU (three matrices), or plain GELU (two)."""
    dense_hidden: int | None = None
    """Hidden size of dense feed-forward layers; null is as wide as the experts that one token uses."""
    n_experts: int = 8
    """Routed experts per MoE layer; 1 is a dense model."""
    top_k: int = 2
    """Experts that each token is sent to."""
    expert_hidden: int = 512
    """Hidden size of one expert."""
    n_shared_experts: int = 0
    """Experts that every token uses, with weight one, outside the router."""
    shared_hidden: int | None = None
    """Hidden size of one shared expert; null is expert_hidden."""
    shared_gate: bool = False
    """Weigh the shared experts by a sigmoid gate of the token (Qwen2-MoE)."""
    moe_every: int = 1
    """An MoE layer at every n-th block."""
    n_dense_first: int = 0
    """Blocks at the bottom that stay dense."""
    router: Literal["softmax", "sigmoid", "expert_choice", "hash", "random"] = "softmax"
    """Who chooses: see minimoe.router."""
    norm_topk: bool = True
    """Divide the k weights by their sum (Mixtral, Qwen3-MoE); false keeps the probabilities (Switch, OLMoE)."""
    router_noise: float | Literal["learned"] = 0.0
    """Standard deviation of Gaussian noise on the router's logits, or learned per token; in training only."""
    share_router: bool = False
    """One router matrix for all MoE layers."""
    capacity_factor: float | None = None
    """Places per expert and sequence, as a multiple of the even share, in training only; null drops nothing."""
    dispatch: Literal["auto", "grouped", "loop"] = "auto"
    """How tokens reach their experts; auto takes the loop where grouped_mm cannot run, and what is faster for few tokens and in bfloat16."""
    balance: Literal["none", "aux", "bias", "simbal"] = "aux"
    """What keeps the experts evenly used: nothing, the auxiliary loss, the selection bias, or similarity preservation."""
    aux_coef: float = 0.01
    """Weight of the balancing loss, with balance: aux or simbal."""
    aux_scope: Literal["batch", "sequence"] = "batch"
    """Balance over all tokens forwarded together, or within each sequence."""
    z_coef: float = 0.0
    """Weight of the router's z-loss."""
    bias_speed: float = 0.001
    """Step of the selection-bias rule, with balance: bias."""
    n_predict: int = 1
    """Tokens predicted at each position; each beyond the first is a head of its own, used in training only."""
    mtp_coef: float = 0.3
    """Weight of the loss of the extra heads, with n_predict above 1."""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least_1 = ("dim", "n_layers", "n_heads", "max_seq_len", "n_experts", "top_k", "expert_hidden", "moe_every",
                      "n_predict", "rope_factor", "vocab_size", "n_kv_heads", "head_dim", "dense_hidden", "shared_hidden")
        for name in at_least_1:
            value = getattr(self, name)
            need(value is None or value >= 1, f"{name}={value}: must be at least 1")
        for name in ("n_shared_experts", "n_dense_first", "router_noise", "aux_coef", "z_coef", "bias_speed", "mtp_coef"):
            value = getattr(self, name)
            need(value == "learned" or value >= 0, f"{name}={value}: must not be negative")
        for name in ("init_std", "norm_eps", "rope_base"):
            need(getattr(self, name) > 0, f"{name}={getattr(self, name)}: must be above 0")
        need(0 <= self.dropout < 1, f"dropout={self.dropout}: must be in [0, 1)")
        need(self.head_dim is not None or self.dim % self.n_heads == 0,
             f"dim={self.dim} is not a multiple of n_heads={self.n_heads}: change one of them or give head_dim")
        need(self.n_heads % self.kv_heads == 0,
             f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.kv_heads}: each key head serves whole groups")
        need(self.head_size % 2 == 0 or self.positions != "rope",
             f"head_dim={self.head_size} must be even: rotary positions turn pairs of values")
        need(self.rope_scaling == "none" or self.positions == "rope",
             f"rope_scaling={self.rope_scaling} needs positions: rope")
        need(self.rope_factor == 1 or self.rope_scaling != "none",
             f"rope_factor={self.rope_factor} does nothing with rope_scaling: none; choose linear or ntk")
        need(self.top_k <= self.n_experts or self.n_experts == 1,
             f"top_k={self.top_k} is more than n_experts={self.n_experts}: lower top_k")
        need(self.capacity_factor is None or self.capacity_factor > 0,
             f"capacity_factor={self.capacity_factor}: must be above 0, or null to drop nothing")
        need(self.balance != "bias" or self.router in ("softmax", "sigmoid"),
             f"balance: bias corrects a router that scores experts; router={self.router} does not: use balance: none")
        need(not self.router_noise or self.router in ("softmax", "sigmoid"),
             f"router_noise={self.router_noise} needs a router that scores experts for a token; router={self.router} does not")
        need(self.has_router or not (self.share_router or self.balance == "simbal"),
             f"router={self.router} has no matrix: share_router and balance: simbal need softmax, sigmoid or expert_choice")
        need(self.n_shared_experts > 0 or not self.shared_gate, "shared_gate needs n_shared_experts of at least 1")

    # --- derived sizes -----------------------------------------------------------------------------------------------
    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def gated(self) -> bool:
        """Whether feed-forward layers hold a gate beside the up projection: three matrices instead of two."""
        return self.activation != "gelu"

    @property
    def has_router(self) -> bool:
        """Whether the router is learned; hash and random routers hold no weights."""
        return self.router in ("softmax", "sigmoid", "expert_choice")

    @property
    def shared_size(self) -> int:
        """Hidden size of all shared experts together."""
        return self.n_shared_experts * (self.shared_hidden or self.expert_hidden)

    @property
    def dense_size(self) -> int:
        """Hidden size of a dense feed-forward layer: as wide as what one token uses in an MoE layer, unless given."""
        return self.dense_hidden or self.top_k * self.expert_hidden + self.shared_size

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices, from 0, of the blocks that hold experts."""
        if self.n_experts == 1:
            return ()
        return tuple(i for i in range(self.n_layers) if i >= self.n_dense_first and (i + 1) % self.moe_every == 0)

    # --- counts ------------------------------------------------------------------------------------------------------
    def num_params(self) -> int:
        """Parameters of the whole model; what is shared (a tied embedding, a shared router) is counted once."""
        return sum(counts.params_by_part(self).values())

    def active_params(self) -> int:
        """Parameters that one token uses: all but the routed experts that it is not sent to."""
        experts = counts.params_by_part(self)["experts"]
        return self.num_params() - experts // self.n_experts * (self.n_experts - self.top_k)

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Forward FLOPs per token, averaged over a causal sequence of `seq_len` tokens: matrix products only, two per
        multiply-add, attention scores and the output head included. The embedding lookup is none; router noise and the
        extra heads of n_predict are not counted: only training uses them."""
        return sum(counts.flops_by_part(self, seq_len or self.max_seq_len).values())

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Bytes that the key/value cache grows by with each token."""
        return 2 * self.n_layers * self.kv_heads * self.head_size * bytes_per_value

    def dense_twin(self, equal: Literal["active", "total"] = "active") -> ModelConfig:
        """The dense model whose active or total parameters are nearest to this one's (hidden size a multiple of 8)."""
        target = self.active_params() if equal == "active" else self.num_params()
        twin = lambda hidden: dataclasses.replace(
            self, n_experts=1, top_k=1, n_shared_experts=0, shared_gate=False, share_router=False, router_noise=0.0,
            capacity_factor=None, balance="none", dense_hidden=hidden)
        smallest, per_8 = twin(8).num_params(), twin(16).num_params() - twin(8).num_params()
        return twin(8 * max(1, 1 + round((target - smallest) / per_8)))
