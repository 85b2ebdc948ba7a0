"""The rule that turns gradients into updates, and the learning rate of each (chapter 8)."""
from __future__ import annotations

import math

import torch

from minimoe.config import TrainConfig


def make_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: norms and biases are left alone (Loshchilov & Hutter 2019)."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def lr_scale(step: int, cfg: TrainConfig) -> float:
    """The learning rate of update `step` (from 0) as a share of the peak: linear warm-up, then cosine or linear fall.

    >>> cfg = TrainConfig(steps=100, warmup=10, min_lr=0.1)
    >>> lr_scale(0, cfg), lr_scale(9, cfg), round(lr_scale(99, cfg), 3)
    (0.1, 1.0, 0.1)
    """
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    done = (step - cfg.warmup + 1) / max(1, cfg.steps - cfg.warmup)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if cfg.schedule == "cosine" else 1 - done
    return cfg.min_lr + (1 - cfg.min_lr) * fall
