"""Slow and plain second opinions that the tests compare the library with. Nothing here is used by the library."""
import math

import torch


def expert(x, w13, w2, activation="swiglu"):
    """One token (D,) through one expert, w13 (D, 2H) or, for plain GELU, (D, H); w2 (H, D)."""
    hidden = x @ w13
    gelu = lambda v: v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))
    if activation == "gelu":
        return gelu(hidden) @ w2
    gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2:]
    return ((gate / (1 + torch.exp(-gate)) if activation == "swiglu" else gelu(gate)) * up) @ w2


def moe(x_ND, routing, w13, w2, activation="swiglu"):
    """Token by token, choice by choice."""
    return mixture(x_ND, [[(int(routing.experts[n, k]), routing.weights[n, k]) for k in range(routing.experts.shape[1])
                           if routing.kept[n, k]] for n in range(len(x_ND))], w13, w2, activation)


def mixture(x_ND, choices, w13, w2, activation="swiglu"):
    """`choices`: for each token its (expert, weight) pairs."""
    rows = []
    for x, pairs in zip(x_ND, choices):
        y = torch.zeros_like(x)
        for e, weight in pairs:
            y = y + weight * expert(x, w13[e], w2[e], activation)
        rows.append(y)
    return torch.stack(rows)


def choices(cfg, logits, noise, bias, ids, rows, dice):
    """What the router that `cfg` names decides, one token after the other: for each its (expert, weight) pairs. `logits`,
    `noise` and `bias` are lists of tensors that carry gradients."""
    e_all, k, out = range(cfg.n_experts), cfg.top_k, []
    if cfg.router == "expert_choice":
        out = [[] for _ in ids]
        for row in sorted(set(rows)):
            tokens = [n for n in range(len(ids)) if rows[n] == row]
            for e in e_all:
                prob = {n: logits[n].exp()[e] / logits[n].exp().sum() for n in tokens}
                places = math.ceil((cfg.capacity_factor or 1.0) * len(tokens) * k / cfg.n_experts)
                for n in sorted(tokens, key=lambda n: -float(prob[n].detach()))[:places]:
                    out[n].append((e, prob[n]))
        return out
    for n in range(len(ids)):
        if cfg.router == "hash":
            first = ((ids[n] + 1) * 2654435761 % 2**32 >> 15) % cfg.n_experts
            out.append([((first + i) % cfg.n_experts, 1 / k) for i in range(k)])
            continue
        if cfg.router == "random":
            out.append([(e, 1 / k) for e in topk(dice[n], k)])
            continue
        z = logits[n] + noise[n]
        scores = 1 / (1 + (-z).exp()) if cfg.router == "sigmoid" else z.exp() / z.exp().sum()
        chosen = topk([float(scores[e].detach()) + bias[e] for e in e_all], k)
        total = sum(scores[e] for e in chosen) if cfg.norm_topk else 1.0
        out.append([(e, scores[e] / total) for e in chosen])
    if cfg.capacity_factor:
        limit = {r: math.ceil(cfg.capacity_factor * rows.count(r) * k / cfg.n_experts) for r in set(rows)}
        used = {}
        for n, pairs in enumerate(out):
            for e, _ in pairs:
                used[rows[n], e] = used.get((rows[n], e), 0) + 1
                if used[rows[n], e] > limit[rows[n]]:
                    out[n] = [p for p in out[n] if p[0] != e]
    return out


def softmax(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [v / sum(exps) for v in exps]


def topk(row, k):
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def kept_within(experts, rows, capacity):
    """Places fill by position, then by choice, per (row, expert)."""
    used, kept = {}, []
    for n, choices in enumerate(experts):
        kept.append([])
        for e in choices:
            place = used.get((rows[n], e), 0)
            kept[-1].append(place < capacity)
            used[rows[n], e] = place + 1
    return kept
