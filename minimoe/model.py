"""The language model: embeddings, blocks of attention and experts, output head (chapter 7).

Shapes: B batch, T positions, D model width, V vocabulary, N = B x T tokens (less padding), E experts, K choices.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe import balance
from minimoe.attention import Attention, KVCache
from minimoe.config import ModelConfig
from minimoe.experts import FeedForward, MoE
from minimoe.norm import RMSNorm
from minimoe.rope import rope_table
from minimoe.router import Routing
from minimoe.settings import ConfigError


@dataclass
class Output:
    """`logits` (B, T, V); `loss` a scalar, or None without targets; `losses` its raw parts by name: "ce", and for a
    sparse model "aux" and "z" (means over the MoE layers); `routing` one per MoE layer, lowest first."""

    logits: Tensor
    loss: Tensor | None
    losses: dict[str, Tensor]
    routing: list[Routing]


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x)), dense or MoE."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn = MoE(cfg) if layer in cfg.moe_layers else FeedForward(cfg.dim, cfg.dense_size)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor, real_BT: Tensor | None, cos: Tensor, sin: Tensor,
                cache: KVCache | None) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), cos, sin, cache, self.layer))
        h_BTD, routing = self.ffn_norm(x_BTD), None
        if not isinstance(self.ffn, MoE):
            y_BTD = self.ffn(h_BTD)
        elif real_BT is None:
            b, t, d = h_BTD.shape
            row_N = torch.arange(b, device=h_BTD.device).repeat_interleave(t)
            y_ND, routing = self.ffn(h_BTD.view(b * t, d), tokens_BT.flatten(), row_N)
            y_BTD = y_ND.view(b, t, d)
        else:                                   # padding is not routed and not counted
            y_ND, routing = self.ffn(h_BTD[real_BT], tokens_BT[real_BT], real_BT.nonzero()[:, 0])
            y_BTD = torch.zeros_like(h_BTD).masked_scatter(real_BT[..., None], y_ND)
        return x_BTD + self.dropout(y_BTD), routing


class MoETransformer(nn.Module):
    """A decoder-only language model; its dense twin is the same class with `n_experts=1`.

    >>> cfg = ModelConfig(vocab_size=11, dim=16, n_layers=2, n_heads=2, n_experts=4, top_k=2, expert_hidden=8)
    >>> out = MoETransformer(cfg)(torch.zeros(3, 5, dtype=torch.long))
    >>> out.logits.shape, len(out.routing), out.routing[0].experts.shape
    (torch.Size([3, 5, 11]), 2, torch.Size([15, 2]))
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.vocab_size is None:
            raise ConfigError("vocab_size is null: give the tokenizer's vocab_size before building the model")
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(cfg.dropout)
        cos, sin = rope_table(cfg.max_seq_len, cfg.head_size, cfg.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, init_std); layers that write to the residual stream are divided by sqrt(2 L), so that its variance
        does not grow with depth (GPT-2: Radford et al. 2019, section 2.3)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                continue                                                        # norms start at one
            writes = name.endswith(("attention.o.weight", "w2.weight", "w2_EHD"))
            p.normal_(0.0, self.cfg.init_std / (math.sqrt(2 * self.cfg.n_layers) if writes else 1.0))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, cache: KVCache | None = None,
                lengths: list[int] | None = None) -> Output:
        """Logits for every position, and the losses when targets are given (already shifted; -100 is ignored).

        `lengths` are the real tokens of each row, the rest being padding on the right. With `cache` the tokens go on
        from what it holds. Raises ValueError where the positions end or an id is out of the vocabulary.
        """
        b, t = tokens_BT.shape
        starts = cache.lengths if cache is not None else [0] * b
        self._check(tokens_BT, max(starts) + t, cache)
        if min(starts) == max(starts):
            cos, sin = (table[starts[0]:starts[0] + t] for table in (self.cos, self.sin))
        else:
            at_BT = torch.tensor(starts, device=tokens_BT.device)[:, None] + torch.arange(t, device=tokens_BT.device)
            cos, sin = (table[at_BT][:, None] for table in (self.cos, self.sin))
        real_BT = None
        if lengths is not None and min(lengths) < t:
            real_BT = torch.arange(t, device=tokens_BT.device) < torch.tensor(lengths, device=tokens_BT.device)[:, None]
        x_BTD, routing = self.dropout(self.embedding(tokens_BT)), []
        for block in self.blocks:
            x_BTD, layer_routing = block(x_BTD, tokens_BT, real_BT, cos, sin, cache)
            if layer_routing is not None:
                routing.append(layer_routing)
        if cache is not None:
            cache.advance(lengths or [t] * b)
        logits_BTV = self.head(self.norm(x_BTD))
        loss, losses = None, {}
        if targets_BT is not None:
            ce = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=-100)
            losses = {"ce": ce, **self.routing_losses(routing, real_BT, b, t)}
            loss = ce + self.cfg.aux_coef * losses.get("aux", 0.0) + self.cfg.z_coef * losses.get("z", 0.0)
        return Output(logits_BTV, loss, losses, routing)

    def routing_losses(self, routing: list[Routing], real_BT: Tensor | None, b: int, t: int) -> dict[str, Tensor]:
        """The raw balancing losses that the config asks for, each the mean over the MoE layers."""
        losses = {}
        if routing and self.cfg.balance == "aux":
            row_N = None
            if self.cfg.aux_scope == "sequence":
                device = routing[0].probs.device
                row_N = (torch.arange(b, device=device).repeat_interleave(t) if real_BT is None
                         else real_BT.nonzero()[:, 0])
            losses["aux"] = torch.stack([balance.aux_loss(r, row_N) for r in routing]).mean()
        if routing and (self.cfg.z_coef or self.cfg.balance == "aux"):
            losses["z"] = torch.stack([balance.z_loss(r) for r in routing]).mean()
        return losses

    def _check(self, tokens_BT: Tensor, end: int, cache: KVCache | None) -> None:
        if end > self.cfg.max_seq_len:
            raise ValueError(f"{end} positions are more than max_seq_len={self.cfg.max_seq_len}: "
                             "shorten the text, or train with a larger max_seq_len")
        if cache is not None and self.cfg.router == "expert_choice":
            raise ValueError("expert choice cannot write token by token: which tokens an expert takes depends on later "
                             "tokens, which are not there yet; use another router to generate")
        if tokens_BT.device.type == "cpu" and tokens_BT.numel() and not 0 <= int(tokens_BT.min()) <= int(
                tokens_BT.max()) < self.cfg.vocab_size:
            raise ValueError(f"token ids must be in 0 ... {self.cfg.vocab_size - 1} (vocab_size), "
                             f"found {int(tokens_BT.min())} ... {int(tokens_BT.max())}: was another tokenizer used?")
