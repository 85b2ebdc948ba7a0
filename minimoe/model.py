"""The language model: embeddings, blocks of attention and experts, output head (chapter 7).

Shapes: B batch, T positions, D model width, V vocabulary, N = B x T tokens (less padding), E experts, K choices.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimoe import balance
from minimoe.attention import Attention, KVCache
from minimoe.config import ModelConfig
from minimoe.experts import Experts, FeedForward, MoE
from minimoe.norm import NORMS
from minimoe.rope import rope_table
from minimoe.router import Routing
from minimoe.settings import ConfigError


@dataclass
class Output:
    """`logits` (B, T, V); `loss` a scalar, or None without targets; `losses` its raw parts by name: "ce", where used
    "aux", "simbal" and "z" (means over the MoE layers) and "mtp" (mean over the extra heads, each summed and divided by the
    number of all targets: DeepSeek-V3, eq. 24); `routing` one per MoE layer, lowest first.

    >>> Output(torch.zeros(1, 2, 3), None, {}, []).loss is None
    True
    """

    logits: Tensor
    loss: Tensor | None
    losses: dict[str, Tensor]
    routing: list[Routing]


class Dropout(nn.Module):
    """Zeroes a share `p` of the values in training, and divides the others by 1 - p (Srivastava et al. 2014, section 4). On a
    CPU from 16 random bits a value, in half the time of PyTorch's own draws.

    >>> Dropout(0.5)(torch.ones(4, 4)).unique()
    tensor([0., 2.])
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        kept = bits[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x)), dense or MoE.

    `forward(x_BTD, tokens_BT, real_BT, rope, cache)` gives (B, T, D) and the `Routing`, or None from a dense block; `real_BT`
    marks what is not padding (Xiong et al. 2020, figure 1b).

    >>> block = Block(ModelConfig(dim=8, n_layers=1, n_heads=2, n_experts=1), layer=0)
    >>> y, routing = block(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long))
    >>> y.shape, routing
    (torch.Size([2, 3, 8]), None)
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention_norm = NORMS[cfg.norm](cfg.dim, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.ffn_norm = NORMS[cfg.norm](cfg.dim, cfg.norm_eps)
        self.ffn = MoE(cfg) if layer in cfg.moe_layers else FeedForward(cfg, cfg.dense_size)
        self.dropout = Dropout(cfg.dropout)

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor, real_BT: Tensor | None = None,
                rope: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rope, cache, self.layer))
        h_BTD, routing = self.ffn_norm(x_BTD), None
        if not isinstance(self.ffn, MoE):
            y_BTD = self.ffn(h_BTD)
        elif real_BT is None:
            y_ND, routing = self.ffn(h_BTD.flatten(0, 1), tokens_BT.flatten(), rows_of(tokens_BT))
            y_BTD = y_ND.view_as(h_BTD)
        else:                                   # padding is not routed and not counted
            y_ND, routing = self.ffn(h_BTD[real_BT], tokens_BT[real_BT], rows_of(tokens_BT, real_BT))
            y_BTD = torch.zeros_like(h_BTD).masked_scatter(real_BT[..., None], y_ND)
        return x_BTD + self.dropout(y_BTD), routing


def rows_of(tokens_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """(N,) the row of the batch that each real token stands in.

    >>> rows_of(torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])).tolist()
    [0, 1, 1]
    """
    row_BT = torch.arange(len(tokens_BT), device=tokens_BT.device)[:, None].expand(tokens_BT.shape)
    return row_BT.flatten() if real_BT is None else row_BT[real_BT]


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
        self.cfg, self.recompute_blocks, self.over_ranks = cfg, False, None     # over_ranks: see balance.aux_loss
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.positions = nn.Embedding(cfg.max_seq_len, cfg.dim) if cfg.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        if cfg.share_router and cfg.moe_layers:
            first, *others = (self.blocks[i].ffn.router for i in cfg.moe_layers)
            for router in others:
                for name, weight in first.named_parameters():
                    setattr(router, name, weight)
        self.extra_heads = nn.ModuleList(Block(cfg, cfg.n_layers + i) for i in range(cfg.n_predict - 1))
        self.norm = NORMS[cfg.norm](cfg.dim, cfg.norm_eps)
        self.head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.dropout = Dropout(cfg.dropout)
        if cfg.positions == "rope":
            cos, sin = rope_table(cfg.max_seq_len, cfg.head_size, cfg.rope_base, cfg.rope_scaling, cfg.rope_factor)
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
            at = slice(starts[0], starts[0] + t)
        else:
            at = torch.tensor(starts, device=tokens_BT.device)[:, None] + torch.arange(t, device=tokens_BT.device)
        real_BT = None
        if lengths is not None and min(lengths) < t:
            real_BT = torch.arange(t, device=tokens_BT.device) < torch.tensor(lengths, device=tokens_BT.device)[:, None]
        x_BTD, rope = self.embedding(tokens_BT), None
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[at]
        else:
            rope = tuple(table[at] if isinstance(at, slice) else table[at][:, None] for table in (self.cos, self.sin))
        x_BTD, routing = self.dropout(x_BTD), []
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.recompute_blocks and self.training else block
            x_BTD, layer_routing = run(x_BTD, tokens_BT, real_BT, rope, cache)
            if layer_routing is not None:
                routing.append(layer_routing)
        if cache is not None:
            cache.advance(lengths or [t] * b)
        logits_BTV = self.head(self.norm(x_BTD))
        loss, losses = None, {}
        if targets_BT is not None:
            losses = {"ce": cross_entropy(logits_BTV, targets_BT)}
            losses |= self.routing_losses(routing, rows_of(tokens_BT, real_BT))
            if self.extra_heads:                # head i predicts i + 2 tokens ahead: the targets moved on by i + 1
                later = [self.head(self.norm(head(x_BTD, tokens_BT, real_BT, rope)[0])) for head in self.extra_heads]
                sums = [SummedCrossEntropy.apply(logits[:, :t - i].flatten(0, 1), targets_BT[:, i:].flatten())
                        for i, logits in enumerate(later, 1)]
                losses["mtp"] = torch.stack(sums).mean() / (targets_BT != -100).sum().clamp_min(1)
            loss = sum(self.coefficient(name) * value for name, value in losses.items())
        return Output(logits_BTV, loss, losses, routing)

    def coefficient(self, name: str) -> float:
        """The weight of a loss in the sum that is trained on; cross-entropy has 1."""
        cfg = self.cfg
        return {"ce": 1.0, "aux": cfg.aux_coef, "simbal": cfg.aux_coef, "z": cfg.z_coef, "mtp": cfg.mtp_coef}[name]

    def routing_losses(self, routing: list[Routing], row_N: Tensor) -> dict[str, Tensor]:
        """The raw balancing losses that the config asks for, each the mean over the MoE layers."""
        cfg, losses = self.cfg, {}
        if not routing:
            return losses
        if cfg.balance == "aux":
            ranks = self.over_ranks if self.training else None       # a rank may evaluate alone
            within = row_N if cfg.aux_scope == "sequence" else None
            losses["aux"] = torch.stack([balance.aux_loss(r, within, ranks) for r in routing]).mean()
        if cfg.balance == "simbal":
            routers = [self.blocks[i].ffn.router.weight for i in cfg.moe_layers]
            losses["simbal"] = torch.stack([balance.simbal_loss(w) for w in routers]).mean()
        if cfg.z_coef or cfg.balance == "aux":
            losses["z"] = torch.stack([balance.z_loss(r) for r in routing]).mean()
        return losses

    def recompute(self, what: str) -> None:
        """What the backward pass computes again instead of keeping: "none", the hidden values of the "experts", or whole
        "blocks". Memory for time; the numbers stay the same (Chen et al. 2016, "Training deep nets with sublinear memory
        cost", section 4)."""
        if what not in ("none", "experts", "blocks"):
            raise ValueError(f"recompute={what!r}: none, experts or blocks")
        self.recompute_blocks = what == "blocks"
        for module in self.modules():
            if isinstance(module, Experts):
                module.recompute = what == "experts"

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


def shape_table(cfg: ModelConfig) -> str:
    """The tensors of the model that `cfg` describes, like layers in one line: name, shape, how many, parameters.

    >>> print(shape_table(ModelConfig(vocab_size=9, dim=8, n_layers=2, n_heads=2, n_experts=1, dense_hidden=4)))
    embedding.weight                     (9, 8)  x 1            72
    blocks.*.attention_norm.weight         (8,)  x 2            16
    ...
    """
    with torch.device("meta"):                  # no memory is needed to know the shapes
        model = MoETransformer(cfg)
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, p in model.named_parameters():
        key = re.sub(r"\.\d+\.", ".*.", name), tuple(p.shape)
        groups[key] = groups.get(key, 0) + 1
    return "\n".join(f"{name:<30} {str(shape):>12}  x {n:<3} {n * math.prod(shape):>11,}"
                     for (name, shape), n in groups.items())


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean over the targets that are not -100, in float32, in nats; 0 where there are none.

    >>> cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).item()       # ln 4
    1.3862...
    """
    total = SummedCrossEntropy.apply(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return total / (targets_BT != -100).sum().clamp_min(1)


class SummedCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target], summed, from (N, V) and (N,), some rows at a time: at a large vocabulary the float32
    copies that PyTorch's own makes of all rows would be the largest tensors of a training step.

    >>> SummedCrossEntropy.apply(torch.zeros(3, 2), torch.tensor([0, 1, -100])).item() / 2        # ln 2
    0.6931...
    """

    @staticmethod
    def rows(logits_NV: Tensor) -> int:
        return max(1, 2**19 // logits_NV.shape[1])          # two megabytes, so that a block stays in the cache

    @staticmethod
    def forward(ctx, logits_NV: Tensor, target_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, target_N)
        rows = SummedCrossEntropy.rows(logits_NV)
        blocks = zip(logits_NV.split(rows), target_N.split(rows))
        return sum(F.cross_entropy(logits.float(), targets, reduction="sum") for logits, targets in blocks)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, target_N = ctx.saved_tensors
        grad_NV, scale_N1 = torch.empty_like(logits_NV), (grad * (target_N != -100))[:, None]
        rows = SummedCrossEntropy.rows(logits_NV)
        for i in range(0, len(logits_NV), rows):
            at = slice(i, i + rows)
            probs = logits_NV[at].float().softmax(-1)
            probs.scatter_add_(1, target_N[at].clamp_min(0)[:, None], probs.new_full((len(probs), 1), -1.0))
            torch.mul(probs, scale_N1[at], out=grad_NV[at])
        return grad_NV, None
