"""Baseline (a) of training.py: a GPT-2 style dense model with the settings of nanoGPT's quick start on a CPU.

4 layers, 4 heads, width 128, sequences of 64, batch 12; LayerNorm and GELU, learned positions, tied embeddings, no biases,
no dropout; AdamW from 1e-3 to 1e-4 (0.9, 0.99), decay 0.1, 100 updates of warm-up, cosine, clip 1.0; 2,000 updates in
float32 (https://github.com/karpathy/nanoGPT, "Quick start", "I only have a macbook").
"""
from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, BLOCK, WIDTH, LAYERS, HEADS = 12, 64, 128, 4, 4
STEPS, WARMUP, LR, MIN_LR = 2000, 100, 1e-3, 1e-4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.attn_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.fc, self.mlp_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (y.view(b, t, HEADS, d // HEADS).transpose(1, 2) for y in self.qkv(self.ln_1(x)).split(d, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp_proj(F.gelu(self.fc(self.ln_2(x))))


class GPT(nn.Module):
    """Token ids (B, T) to logits (B, T, V)."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * LAYERS) if "proj" in name else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[:tokens.shape[1]]
        return self.head(self.ln_f(self.blocks(x)))


def learning_rate(step: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * (LR - MIN_LR)


class Training:
    """`step()` does one update on BATCH random windows of the training text; `tokens` are its ids."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, seed: int):
        torch.manual_seed(seed)
        self.tokens, self.model, self.done = torch.from_numpy(tokens.astype(np.int64)), GPT(vocab_size), 0
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))

    def step(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done)
        starts = torch.randint(len(self.tokens) - BLOCK, (BATCH,)).tolist()
        inputs = torch.stack([self.tokens[i:i + BLOCK] for i in starts])
        targets = torch.stack([self.tokens[i + 1:i + 1 + BLOCK] for i in starts])
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss.item()
