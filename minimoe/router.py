"""Routers: who sends which token to which experts (chapter 4).

Shapes: N tokens (all rows of a batch, one after the other), D model width, E experts, K choices per token.

Every router gives a `Routing`; the experts, the balancing losses and the explorer read nothing else. Logits and scores
are float32 even under autocast: in bfloat16 neighboring probabilities round to ties.
"""
from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """What one MoE layer decided for N tokens.

    `weights` (N, K) float32, the weight of each choice, before dropping; `experts` (N, K) int64; `probs` (N, E), one per
    token sums to 1; `logits` (N, E), before noise and bias; `kept` (N, K) bool, False where a choice found no place.
    Expert choice, where a token may be taken by 0 to E experts, has K = E and `kept` says which.

    >>> r = softmax_topk(torch.zeros(3, 4), k=2)
    >>> {name: tuple(getattr(r, name).shape) for name in ("weights", "experts", "probs", "logits", "kept")}
    {'weights': (3, 2), 'experts': (3, 2), 'probs': (3, 4), 'logits': (3, 4), 'kept': (3, 2)}
    """

    weights: Tensor
    experts: Tensor
    probs: Tensor
    logits: Tensor
    kept: Tensor


def softmax_topk(logits_NE: Tensor, k: int, normalize: bool = True, noise_NE: Tensor | None = None) -> Routing:
    """Softmax over all experts, then the k likeliest (Shazeer et al. 2017, section 2.1; Mixtral, section 2.1).

    With `normalize` the k weights are divided by their sum; without, they stay probabilities, and with k = 1 the router
    still learns (Switch: Fedus et al. 2022, eq. 2). `noise_NE` is added to the logits before the softmax: it moves the
    choice, the weights and the probabilities.

    >>> r = softmax_topk(torch.tensor([[2.0, 1.0, 0.0]]), k=2)
    >>> r.experts.tolist(), r.weights.round(decimals=3).tolist()
    ([[0, 1]], [[0.731..., 0.268...]])
    """
    logits_NE = logits_NE.float()
    probs_NE = (logits_NE if noise_NE is None else logits_NE + noise_NE).softmax(-1)
    weights_NK, experts_NK = probs_NE.topk(k, dim=-1)
    if normalize:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return Routing(weights_NK, experts_NK, probs_NE, logits_NE, torch.ones_like(experts_NK, dtype=torch.bool))


def sigmoid_topk(logits_NE: Tensor, k: int, bias_E: Tensor | None = None, normalize: bool = True,
                 score: str = "sigmoid") -> Routing:
    """Scores each expert on its own; the bias helps to choose, the unbiased scores weigh (DeepSeek-V3, eq. 12-16).

    `score="softmax"` gives softmax scores under the same selection bias. `probs` are the scores divided by their sum.

    >>> r = sigmoid_topk(torch.tensor([[0.0, 0.0, -1.0]]), k=1, bias_E=torch.tensor([0.0, 0.0, 1.0]), normalize=False)
    >>> r.experts.item(), round(r.weights.item(), 3)          # chosen by 0.269 + 1, weighed by 0.269
    (2, 0.269)
    """
    logits_NE = logits_NE.float()
    scores_NE = logits_NE.sigmoid() if score == "sigmoid" else logits_NE.softmax(-1)
    choice_NE = scores_NE.detach() if bias_E is None else scores_NE.detach() + bias_E
    experts_NK = choice_NE.topk(k, dim=-1).indices
    weights_NK = scores_NE.gather(-1, experts_NK)
    if normalize:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True).clamp_min(1e-20)
    probs_NE = scores_NE / scores_NE.sum(-1, keepdim=True).clamp_min(1e-20)
    return Routing(weights_NK, experts_NK, probs_NE, logits_NE, torch.ones_like(experts_NK, dtype=torch.bool))


def expert_choice(logits_NE: Tensor, capacity: int | Tensor, row_N: Tensor | None = None) -> Routing:
    """Each expert takes the `capacity` tokens of a sequence that want it most (Zhou et al. 2022, section 3.2).

    Perfectly balanced by construction. But whether a token is taken depends on the tokens after it, which a causal
    model does not have when it writes: what it was trained with is not what it can do. `row_N` says which sequence a
    token belongs to (default: all one); `capacity` is one number, or one per token (its row's). Gives K = E.

    >>> r = expert_choice(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), capacity=1)
    >>> r.kept.int().tolist()
    [[1, 0], [0, 0], [0, 1]]
    """
    logits_NE = logits_NE.float()
    probs_NE = logits_NE.softmax(-1)
    n, e = probs_NE.shape
    row_N = torch.zeros(n, dtype=torch.long, device=logits_NE.device) if row_N is None else row_N
    # rank of each token among its sequence's tokens, for each expert: sort by probability, then stably by sequence
    by_prob_NE = probs_NE.detach().argsort(dim=0, descending=True, stable=True)
    by_row_NE = by_prob_NE.gather(0, row_N[by_prob_NE].argsort(dim=0, stable=True))
    start_N = _starts(row_N)[row_N].sort().values
    rank_sorted_N1 = (torch.arange(n, device=row_N.device) - start_N)[:, None]
    rank_NE = torch.empty_like(by_row_NE).scatter_(0, by_row_NE, rank_sorted_N1.expand(n, e))
    experts_NE = torch.arange(e, device=logits_NE.device).expand(n, e)
    limit = capacity[:, None] if isinstance(capacity, Tensor) else capacity
    return Routing(probs_NE, experts_NE, probs_NE, logits_NE, rank_NE < limit)


def hash_routing(token_ids_N: Tensor, k: int, n_experts: int, seed: int = 0) -> Routing:
    """The token's identity alone decides, through a fixed hash (Roller et al. 2021, section 3). Weights 1 / k.

    >>> hash_routing(torch.tensor([5, 6, 5]), k=2, n_experts=4).experts.tolist()
    [[1, 2], [0, 1], [1, 2]]
    """
    mixed_N = (token_ids_N.long() + 1 + seed) * 2654435761 % 2**32
    first_N1 = (mixed_N >> 15)[:, None] % n_experts
    return _fixed((first_N1 + torch.arange(k, device=token_ids_N.device)) % n_experts, n_experts)


def random_routing(n_tokens: int, k: int, n_experts: int, generator: torch.Generator | None = None,
                   device: torch.device | str = "cpu") -> Routing:
    """Throws dice for every token: the control that any router has to beat. Weights 1 / k.

    >>> random_routing(3, k=2, n_experts=4, generator=torch.Generator().manual_seed(0)).weights[0].tolist()
    [0.5, 0.5]
    """
    dice_NE = torch.rand(n_tokens, n_experts, generator=generator, device=device)
    return _fixed(dice_NE.topk(k, dim=-1).indices, n_experts)


def _fixed(experts_NK: Tensor, n_experts: int) -> Routing:
    n, k = experts_NK.shape
    weights_NK = torch.full((n, k), 1.0 / k, device=experts_NK.device)
    logits_NE = torch.zeros(n, n_experts, device=experts_NK.device)
    probs_NE = logits_NE.scatter(1, experts_NK, weights_NK)
    return Routing(weights_NK, experts_NK, probs_NE, logits_NE, torch.ones_like(experts_NK, dtype=torch.bool))


# --- capacity --------------------------------------------------------------------------------------------------------
def capacity(factor: float, tokens: int, k: int, n_experts: int) -> int:
    """Places per expert for a sequence: the even share times the factor, rounded up (Fedus et al. 2022, eq. 3).

    >>> capacity(1.25, tokens=10, k=1, n_experts=4)
    4
    """
    return math.ceil(factor * tokens * k / n_experts)


def within_capacity(routing: Routing, capacity_: int | Tensor, row_N: Tensor) -> Routing:
    """Marks as dropped every choice that finds its expert full; places fill by position, then by choice.

    Each sequence (`row_N`, one number per token, rows contiguous) has places of its own, so what is dropped depends on
    earlier tokens of the same text only. `capacity_` is one number, or one per token (its row's).

    >>> r = softmax_topk(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), k=1)
    >>> within_capacity(r, 1, torch.tensor([0, 0, 0])).kept.flatten().tolist()
    [True, False, True]
    """
    n, k = routing.experts.shape
    place_of_P = (row_N[:, None] * routing.probs.shape[1] + routing.experts).flatten()      # one number per (row, expert)
    order_P = place_of_P.argsort(stable=True)                                               # stable: by position, choice
    sorted_P = place_of_P[order_P]
    rank_sorted_P = torch.arange(n * k, device=sorted_P.device) - torch.searchsorted(sorted_P, sorted_P)
    rank_NK = torch.empty_like(order_P).scatter_(0, order_P, rank_sorted_P).view(n, k)
    limit = capacity_[:, None] if isinstance(capacity_, Tensor) else capacity_
    return dataclasses.replace(routing, kept=routing.kept & (rank_NK < limit))


def _starts(row_N: Tensor) -> Tensor:
    counts = torch.bincount(row_N)
    return counts.cumsum(0) - counts


class Router(nn.Module):
    """One linear map from a token to a score per expert, and the rule that the config names.

    `forward(x_ND, token_ids_N, row_N)` gives a `Routing`. Noise and capacity act in training only. Learned noise has a
    standard deviation per token and expert, softplus(noise_weight x) (Shazeer et al. 2017, eq. 4). `bias_E` is the
    selection bias: not a parameter, moved by `balance.update_bias`, zero unless `balance="bias"`. `weight` (E, D) holds no values
    until the model draws them.

    >>> router = Router(ModelConfig(dim=8, n_heads=2, n_experts=4, top_k=2, router="hash"))
    >>> router(torch.zeros(3, 8), torch.tensor([5, 6, 5]), torch.zeros(3, dtype=torch.long)).experts.tolist()
    [[1, 2], [0, 1], [1, 2]]
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        if cfg.has_router:
            self.weight = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim))
        if cfg.router_noise == "learned":
            self.noise_weight = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim))
        if cfg.balance == "bias":
            self.register_buffer("bias_E", torch.zeros(cfg.n_experts))

    def forward(self, x_ND: Tensor, token_ids_N: Tensor, row_N: Tensor) -> Routing:
        cfg = self.cfg
        if cfg.router == "hash":
            routing = hash_routing(token_ids_N, cfg.top_k, cfg.n_experts)
        elif cfg.router == "random":
            routing = random_routing(len(x_ND), cfg.top_k, cfg.n_experts, device=x_ND.device)
        else:
            with torch.autocast(x_ND.device.type, enabled=False):
                logits_NE = x_ND.float() @ self.weight.float().T
                noise_NE = self._noise(x_ND.float()) if self.training and cfg.router_noise else None
            if cfg.router == "expert_choice":
                return expert_choice(logits_NE, self._places(row_N), row_N)
            if cfg.router == "sigmoid" or cfg.balance == "bias":
                noisy_NE = logits_NE if noise_NE is None else logits_NE + noise_NE
                routing = sigmoid_topk(noisy_NE, cfg.top_k, getattr(self, "bias_E", None), cfg.norm_topk, cfg.router)
                routing = dataclasses.replace(routing, logits=logits_NE)
            else:
                routing = softmax_topk(logits_NE, cfg.top_k, cfg.norm_topk, noise_NE)
        if cfg.capacity_factor and self.training:
            routing = within_capacity(routing, self._places(row_N), row_N)
        return routing

    def _noise(self, x_ND: Tensor) -> Tensor:
        std = self.cfg.router_noise
        if std == "learned":
            std = F.softplus(x_ND @ self.noise_weight.float().T)
        return torch.randn(len(x_ND), self.cfg.n_experts, device=x_ND.device) * std

    def _places(self, row_N: Tensor) -> Tensor:
        """(N,) the capacity of each token's own row: `capacity` in float64, where it is exact."""
        share_N = (self.cfg.capacity_factor or 1.0) * torch.bincount(row_N)[row_N].double() * self.cfg.top_k
        return (share_N / self.cfg.n_experts).ceil().long()
