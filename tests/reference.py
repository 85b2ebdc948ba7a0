"""Slow and plain second opinions that the tests compare the library with. Nothing here is used by the library."""
import math

import torch


def swiglu(x, w13, w2):
    """One token (D,) through one expert, w13 (D, 2H), w2 (H, D)."""
    hidden = x @ w13
    gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2:]
    return (gate / (1 + torch.exp(-gate)) * up) @ w2


def moe(x_ND, routing, w13, w2):
    """Token by token, choice by choice."""
    rows = []
    for n in range(len(x_ND)):
        y = torch.zeros_like(x_ND[n])
        for k in range(routing.experts.shape[1]):
            if routing.kept[n, k]:
                e = int(routing.experts[n, k])
                y = y + routing.weights[n, k] * swiglu(x_ND[n], w13[e], w2[e])
        rows.append(y)
    return torch.stack(rows)


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
