"""Baseline (b) of training.py: an MoE language model as tutorials write it, with the defaults of `moellama`.

One module per expert, and for each expert a boolean mask of the tokens that chose it. Noise on the router's logits, top-2
of 8, one shared expert behind a gate; GELU, hidden size 1024, biases; RMSNorm, rotary positions, tied embeddings, dropout
0.1; AdamW 3e-4; float32. The attention is PyTorch's, which many tutorials do not use: the comparison is of experts, not of attention.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class MoE(nn.Module):
    def __init__(self, dim: int, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.router, self.top_k = nn.Linear(dim, experts, bias=False), top_k
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(experts))
        self.shared, self.gate = Expert(dim, hidden), nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.view(-1, x.shape[-1])
        logits = self.router(flat)
        noisy = logits + 0.1 * torch.randn_like(logits)
        weights, chosen = noisy.softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(dim=-1)
            if mask.any():
                weight = (weights * (chosen == e)).sum(-1)[mask]
                out[mask] += expert(flat[mask]) * weight[:, None]
        share = F.one_hot(chosen, len(self.experts)).float().mean(dim=(0, 1))
        aux = len(self.experts) * (share * logits.softmax(-1).mean(0)).sum()
        return (out + self.gate(flat).sigmoid() * self.shared(flat)).view_as(x), aux


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, seq: int):
        super().__init__()
        self.heads, self.q, self.k = heads, nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v, self.o = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        size = dim // heads
        angles = torch.outer(torch.arange(seq), 10_000.0 ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos[:x.shape[2]] + torch.cat([-b, a], dim=-1) * self.sin[:x.shape[2]]

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (layer(x).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, seq: int, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention, self.moe = Attention(dim, heads, seq), MoE(dim, hidden, experts, top_k)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.dropout(self.attention(self.norm_1(x)))
        y, aux = self.moe(self.norm_2(x))
        return x + y, aux


class TutorialMoE(nn.Module):
    """`step(inputs, targets)`, each (B, T), does one update and gives the cross-entropy."""

    def __init__(self, *, vocab: int = 5000, dim: int = 256, layers: int = 4, heads: int = 8, seq: int = 256,
                 hidden: int = 1024, experts: int = 8, top_k: int = 2):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocab, dim), nn.RMSNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, seq, hidden, experts, top_k) for _ in range(layers))
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embedding.weight
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=3e-4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, total = self.embedding(tokens), 0.0
        for block in self.blocks:
            x, aux = block(x)
            total = total + aux
        return self.head(self.norm(x)), total / len(self.blocks)

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        logits, aux = self(inputs)
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (ce + 0.01 * aux).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return ce.item()
