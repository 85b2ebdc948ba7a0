"""Keeping the experts evenly used: losses, the bias rule, and the numbers to watch (chapter 6).

Shapes: N tokens, E experts, K choices per token, R rows (sequences). Every function is pure: a Routing goes in, a
number comes out. Choices count as the router made them, before capacity drops any.
"""
from __future__ import annotations

import torch
from torch import Tensor

from minimoe.router import Routing


def load_counts(routing: Routing) -> Tensor:
    """(E,) float: how many choices fell on each expert. Expert choice counts the tokens taken.

    >>> from minimoe.router import softmax_topk
    >>> load_counts(softmax_topk(torch.eye(3), k=1)).tolist()
    [1.0, 1.0, 1.0]
    """
    e = routing.probs.shape[1]
    taken = routing.experts[routing.kept] if routing.experts.shape[1] == e else routing.experts.flatten()
    return torch.bincount(taken, minlength=e).float()


def load_shares(routing: Routing) -> Tensor:
    """(E,): each expert's share of all choices; 1 / E each is perfect balance."""
    counts_E = load_counts(routing)
    return counts_E / counts_E.sum().clamp_min(1)


def aux_loss(routing: Routing, row_N: Tensor | None = None) -> Tensor:
    """Switch/GShard auxiliary loss, E * sum_e f_e P_e: f the shares of the choices, P the mean probabilities.

    Equals 1 when both are even, up to E on collapse (Fedus et al. 2022, eq. 4-6; for top-k the shares are of all N * K
    choices). The gradient flows through P only. With `row_N` the loss is taken within each sequence, then averaged.

    >>> from minimoe.router import softmax_topk
    >>> round(aux_loss(softmax_topk(torch.zeros(6, 3) + torch.eye(3).repeat(2, 1), k=1)).item(), 4)
    1.0
    """
    n, e = routing.probs.shape
    if row_N is None:
        row_N = torch.zeros(n, dtype=torch.long, device=routing.probs.device)
    rows = int(row_N.max()) + 1 if n else 1
    tokens_R1 = torch.bincount(row_N, minlength=rows).clamp_min(1)[:, None]
    chosen_NE = torch.zeros_like(routing.probs).scatter_add_(1, routing.experts, torch.ones_like(routing.weights))
    share_RE = torch.zeros(rows, e, device=row_N.device).index_add(0, row_N, chosen_NE) / tokens_R1
    prob_RE = torch.zeros(rows, e, device=row_N.device).index_add(0, row_N, routing.probs) / tokens_R1
    return e * (share_RE * prob_RE).sum(-1).mean() / routing.experts.shape[1]


def z_loss(routing: Routing) -> Tensor:
    """Mean square of logsumexp(logits): keeps the router's logits small (Zoph et al. 2022, eq. 5).

    >>> from minimoe.router import softmax_topk
    >>> round(z_loss(softmax_topk(torch.zeros(2, 4), k=1)).item(), 4)         # (ln 4)^2
    1.9218
    """
    return routing.logits.logsumexp(-1).square().mean()


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
    """Adds `speed` to the bias of experts below the mean load and takes it from those above, in place.

    The sign rule of DeepSeek-V3 (section 2.1.2); counts are those of one whole step, not cumulative.

    >>> bias = torch.zeros(3); update_bias(bias, torch.tensor([5.0, 1.0, 3.0]), 0.1); bias.tolist()
    [-0.1..., 0.1..., 0.0]
    """
    bias_E += speed * (counts_E.mean() - counts_E).sign()


def max_violation(counts_E: Tensor) -> float:
    """MaxVio: how far the busiest expert is above the mean, as a share of it (Wang et al. 2024, eq. 4). 0 is even.

    >>> max_violation(torch.tensor([3.0, 1.0]))
    0.5
    """
    return (counts_E.max() / counts_E.mean().clamp_min(1e-20) - 1).item()


def statistics(routing: Routing) -> dict[str, object]:
    """Plain numbers for the log: load shares, MaxVio, mean entropy of the probabilities (nats), share dropped."""
    counts_E = load_counts(routing)
    probs = routing.probs.detach()
    return {
        "load": [round(x, 4) for x in (counts_E / counts_E.sum().clamp_min(1)).tolist()],
        "max_vio": round(max_violation(counts_E), 4),
        "entropy": round(-(probs * probs.clamp_min(1e-20).log()).sum(-1).mean().item(), 4),
        "dropped": round(1 - routing.kept.float().mean().item(), 4),
    }
