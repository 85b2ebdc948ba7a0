"""Keeping the experts evenly used: losses, the bias rule, and the numbers to watch (chapter 6).

Shapes: N tokens, E experts, K choices per token, R rows (sequences). Every function is pure: a Routing goes in, a
number comes out. Choices count as the router made them, before capacity drops any.
"""
from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

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
    """(E,): each expert's share of all choices; 1 / E each is perfect balance.

    >>> from minimoe.router import softmax_topk
    >>> load_shares(softmax_topk(torch.eye(2)[[0, 0, 0, 1]], k=1)).tolist()
    [0.75, 0.25]
    """
    counts_E = load_counts(routing)
    return counts_E / counts_E.sum().clamp_min(1)


def aux_loss(routing: Routing, row_N: Tensor | None = None, over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Switch/GShard auxiliary loss, E * sum_e f_e P_e: f the shares of the choices, P the mean probabilities.

    Equals 1 when both are even, up to E on collapse (Fedus et al. 2022, eq. 4-6; for top-k the shares are of all N * K
    choices). The gradient flows through P only. With `row_N` the loss is taken within each sequence, then averaged. `over_ranks`
    gives the mean over the ranks of a run on many devices: the shares f are those of all their tokens.

    >>> from minimoe.router import softmax_topk
    >>> round(aux_loss(softmax_topk(torch.zeros(6, 3) + torch.eye(3).repeat(2, 1), k=1)).item(), 4)
    1.0
    """
    n, e = routing.probs.shape
    if row_N is None:
        share_E = torch.bincount(routing.experts.flatten(), minlength=e) / max(n, 1)
        share_E = share_E if over_ranks is None else over_ranks(share_E)
        return e * (share_E * routing.probs.sum(0) / max(n, 1)).sum() / routing.experts.shape[1]
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


def simbal_loss(weight_ED: Tensor) -> Tensor:
    """Sum of |W W^T - I| over the router's rows: 0 when they are orthonormal, so that similar tokens get similar
    probabilities and no two experts the same ones (Omi et al. 2025, "Similarity Preserving Routers", L_orth).

    >>> simbal_loss(torch.eye(2, 3)).item(), simbal_loss(torch.ones(2, 1)).item()
    (0.0, 2.0)
    """
    return (weight_ED @ weight_ED.T - torch.eye(len(weight_ED), device=weight_ED.device)).abs().sum()


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


def statistics(routing: Routing, router: nn.Module | None = None) -> dict[str, object]:
    """Plain numbers for the log: load shares, MaxVio, mean entropy of the probabilities (nats), share dropped; with the
    router that made them its selection bias, where it has one, and after a backward pass the norm of its gradient.

    >>> from minimoe.router import softmax_topk
    >>> statistics(softmax_topk(torch.eye(2), k=1))
    {'load': [0.5, 0.5], 'max_vio': 0.0, 'entropy': 0.5822, 'dropped': 0.0}
    """
    counts_E = load_counts(routing)
    probs = routing.probs.detach()
    numbers = {
        "load": [round(x, 4) for x in (counts_E / counts_E.sum().clamp_min(1)).tolist()],
        "max_vio": round(max_violation(counts_E), 4),
        "entropy": round(-(probs * probs.clamp_min(1e-20).log()).sum(-1).mean().item(), 4),
        "dropped": round(1 - routing.kept.float().mean().item(), 4),
    }
    if getattr(router, "bias_E", None) is not None:
        numbers["bias"] = [round(x, 4) for x in router.bias_E.tolist()]
    if getattr(router, "weight", None) is not None and router.weight.grad is not None:
        norm = router.weight.grad.norm()
        numbers["router_grad"] = getattr(norm, "full_tensor", lambda: norm)().item()        # of many ranks, the whole one
    return numbers


def alerts(rows: list[dict], *, window: int = 100, min_share: float = 0.4, max_cv: float = 1.0, z_factor: float = 2.0,
           z_window: int = 500, z_bound: float = 100.0, min_gradient: float = 1e-7) -> list[str]:
    """What is wrong with the routing now, one line each; an empty list is health. `rows` are those of metrics.jsonl.

    An expert under `min_share` of its fair share over the last `window` steps (at 8 experts and 0.4: 5 % of the choices);
    a load whose coefficient of variation (standard deviation over mean) is above `max_cv`; a z-loss above `z_factor`
    times its median of the last `z_window` steps, or above `z_bound` (logits near 10, where bfloat16 rounds by 0.06); a
    router whose gradient has a norm under `min_gradient`.

    >>> alerts([{"step": 200, "z": 4.0, "routing": [{"load": [1.0, 0.0, 0.0], "router_grad": 0.1}]}])
    ['MoE layer 0: the load is uneven, coefficient of variation 1.41 (above 1)']
    """
    if not rows:
        return []
    now, found = rows[-1], []
    recent = [r for r in rows if r["step"] > now["step"] - window]
    for layer, statistics_now in enumerate(now.get("routing", ())):
        load_E = torch.tensor(statistics_now["load"])
        fair = 1 / len(load_E)
        if rows[0]["step"] <= now["step"] - window:         # the rows reach back a whole window
            mean_E = torch.tensor([r["routing"][layer]["load"] for r in recent]).mean(0)
            found += [f"MoE layer {layer}: expert {e} got {share:.1%} of the choices over {window} steps, under "
                      f"{min_share:.0%} of its fair share of {fair:.1%}"
                      for e, share in enumerate(mean_E.tolist()) if share < min_share * fair]
        if (cv := (load_E.std(correction=0) / load_E.mean().clamp_min(1e-20)).item()) > max_cv:
            found.append(f"MoE layer {layer}: the load is uneven, coefficient of variation {cv:.2f} (above {max_cv:g})")
        if statistics_now.get("router_grad", 1.0) < min_gradient:
            found.append(f"MoE layer {layer}: the router gets no gradient (norm {statistics_now['router_grad']:.1e})")
    before = [r["z"] for r in rows[:-1] if "z" in r and r["step"] > now["step"] - z_window]
    if now.get("z", 0.0) > z_bound:
        found.append(f"z-loss {now['z']:.1f} is above {z_bound:g}: the router's logits have grown too large")
    elif len(before) >= 5 and now.get("z", 0.0) > z_factor * median(before):
        found.append(f"z-loss {now['z']:.2f} is above {z_factor:g} times its median of the last {z_window} steps")
    return found
