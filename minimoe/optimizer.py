"""The rule that turns gradients into updates, and the learning rate of each (chapter 8).

Shapes: M matrices of R rows and C columns.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minimoe.config import TrainConfig
from minimoe.device import choose


def make_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only: norms and biases are left alone (Loshchilov & Hutter 2019). With
    `optimizer: muon` the matrices inside the blocks, routers and adapters left out, are turned by Muon.

    >>> layer = torch.nn.Linear(2, 3)
    >>> [len(group["params"]) for group in make_optimizer(layer, TrainConfig()).param_groups]
    [1, 1]
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = {name: p for name, p in named if cfg.optimizer == "muon" and p.dim() >= 2
             and name.startswith(("blocks.", "extra_heads.")) and not any(part in name for part in ("router.", "shared_gate", "lora_"))}
    outer = [p for name, p in named if name not in inner]
    groups = [{"params": [p for p in outer if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in outer if p.dim() < 2], "weight_decay": 0.0}]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)
    gated = model.cfg.gated
    halves = [p for name, p in inner.items() if gated and "w13" in name]
    whole = [p for name, p in inner.items() if not (gated and "w13" in name)]
    groups += [{"params": ps, "weight_decay": cfg.weight_decay, "pieces": n} for n, ps in ((1, whole), (2, halves))]
    return Muon(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups with `pieces`: their matrices take momentum, made orthogonal, as the update (Jordan et al.
    2024), scaled by 0.2 sqrt(max(R, C)) so that its size, and with it `lr` and the decay, is that of AdamW (Liu et al.
    2025, "Muon is scalable for LLM training", section 2.2).

    A stacked tensor (E, R, C) holds one matrix per expert, and each is turned on its own. `pieces` says how many matrices
    of equal size lie side by side in one, along the features that it gives out: 2 for a gate and an up projection.

    >>> w = torch.nn.Parameter(torch.zeros(4, 4))
    >>> w.grad = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    >>> Muon([{"params": [w], "pieces": 1}], lr=1.0, weight_decay=0.0).step()
    >>> (w.diag() / -0.4).round().tolist()          # all directions alike, where the gradient has one of 8 and one of 1
    [1.0, 1.0, 1.0, 1.0]
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        found_inf = getattr(self, "found_inf", None)       # GradScaler's, in float16: such a step is left out
        if found_inf is not None and found_inf.item():
            return None
        alike: dict[tuple, list[tuple[dict, Tensor, Tensor]]] = {}
        for group in self.param_groups:
            for p in group["params"] if "pieces" in group else ():
                if p.grad is not None:
                    ahead = self._ahead(p)
                    pieces = ahead.chunk(group["pieces"], dim=0 if p.dim() == 2 else -1)
                    for piece, update in zip(p.chunk(group["pieces"], dim=0 if p.dim() == 2 else -1), pieces):
                        alike.setdefault(tuple(sorted(piece.shape[-2:])), []).append((group, piece, update))
                    p.grad = None                           # used up: AdamW, below, must not see it
        for (small, large), entries in alike.items():       # matrices of one size go through in one batch
            flat = [_wide(u).reshape(-1, small, large) for _, _, u in entries]
            turned = orthogonalize(torch.cat(flat)).split([len(f) for f in flat])
            for (group, piece, _), update in zip(entries, turned):
                piece.mul_(1 - group["lr"] * group["weight_decay"])
                _wide(piece).add_(update.view(_wide(piece).shape), alpha=-0.2 * math.sqrt(large) * group["lr"])
        return super().step(closure)

    def _ahead(self, p: Tensor, momentum: float = 0.95) -> Tensor:
        """Nesterov's look ahead: the running mean of the gradients, and once more the newest one."""
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return p.grad.lerp(state["momentum"].lerp_(p.grad, 1 - momentum), momentum)


def _wide(m: Tensor) -> Tensor:
    return m.mT if m.shape[-2] > m.shape[-1] else m


def orthogonalize(m_MRC: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: the nearest matrices whose rows are orthonormal, R <= C, roughly: all singular values come to lie
    between 0.5 and 1.5. Five products of a polynomial instead of a decomposition, in bfloat16 where that is fast (Jordan
    et al. 2024, https://kellerjordan.github.io/posts/muon/). (M, R, C) to (M, R, C).

    >>> m = orthogonalize(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 5.0, 0.0]]]))
    >>> bool((torch.linalg.svdvals(m.float()) - 1).abs().max() < 0.5)
    True
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x_MRC = m_MRC.to(choose(str(m_MRC.device)).dtype)
    x_MRC = x_MRC / x_MRC.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram_MRR = x_MRC @ x_MRC.mT
        x_MRC = torch.baddbmm(x_MRC, torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c), x_MRC, beta=a)
    return x_MRC.to(m_MRC.dtype)


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
