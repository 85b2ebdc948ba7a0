"""Causal attention with grouped key/value heads, and the cache that makes decoding cheap (chapter 3).

Shapes: B batch, T new positions, S positions seen so far (cache and new), D model width, H query heads, G key/value
heads (G divides H; G = H is multi-head, G = 1 multi-query), C features of one head, L layers.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import ModelConfig
from minimoe.norm import RMSNorm
from minimoe.rope import apply_rope


class KVCache:
    """Keys and values of all layers for a batch of sequences that may have different lengths.

    >>> cache = KVCache(ModelConfig(dim=8, n_layers=1, n_heads=2, max_seq_len=4), batch_size=2)
    >>> cache.k_LBGSC.shape, cache.lengths
    (torch.Size([1, 2, 2, 4, 4]), [0, 0])
    """

    def __init__(self, cfg: ModelConfig, batch_size: int, max_len: int | None = None,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        shape = (cfg.n_layers, batch_size, cfg.kv_heads, max_len or cfg.max_seq_len, cfg.head_size)
        self.k_LBGSC = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSC = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size        # on the host: reading them never waits for a device

    def write(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new positions after each row's own end; returns all keys and values up to the longest row."""
        t, end = k_BGTC.shape[2], max(self.lengths) + k_BGTC.shape[2]
        k_BGSC, v_BGSC = self.k_LBGSC[layer], self.v_LBGSC[layer]
        if end > k_BGSC.shape[2]:
            raise ValueError(f"cache holds {k_BGSC.shape[2]} positions, {end} are needed: make it longer, or crop the prompt")
        if min(self.lengths) == max(self.lengths):
            k_BGSC[:, :, end - t:end], v_BGSC[:, :, end - t:end] = k_BGTC, v_BGTC
        else:
            for b, n in enumerate(self.lengths):
                k_BGSC[b, :, n:n + t], v_BGSC[b, :, n:n + t] = k_BGTC[b], v_BGTC[b]
        return k_BGSC[:, :, :end], v_BGSC[:, :, :end]

    def advance(self, counts: list[int]) -> None:
        """Moves each row's end on by its number of real (not padding) new tokens; call once, after the last layer."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]


def causal_mask(lengths: list[int], t: int, device: torch.device | str = "cpu") -> Tensor:
    """(B, 1, T, S) bool: new position i of a row that holds n tokens sees positions 0 ... n + i.

    >>> causal_mask([0, 1], 2).int().tolist()
    [[[[1, 0, 0], [1, 1, 0]]], [[[1, 1, 0], [1, 1, 1]]]]
    """
    last_BT = torch.tensor(lengths, device=device)[:, None] + torch.arange(t, device=device)
    return (torch.arange(max(lengths) + t, device=device) <= last_BT[..., None])[:, None]


def attend(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
    """Causal attention of T positions to themselves, softmax(q k / sqrt(C)) v (Vaswani et al. 2017, eq. 1). (B, H, T, C).

    PyTorch's fused kernel, but not in bfloat16 on a CPU: there it takes three times the time of the plain products (LOG.md).
    Up to 512 positions the products are written out, which keeps B x H x T x T values for the backward pass; beyond, the
    kernel runs in float32.

    >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    >>> attend(q, k, torch.arange(12.0).view(1, 1, 3, 4))[0, 1, :, 0]           # means of what each may see
    tensor([0., 2., 4.])
    """
    (b, h, t, c), g = q_BHTC.shape, k_BGTC.shape[1]
    if q_BHTC.device.type != "cpu" or q_BHTC.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, is_causal=True, enable_gqa=h != g)
    with torch.autocast("cpu", enabled=False):
        if t > 512:
            return attend(q_BHTC.float(), k_BGTC.float(), v_BGTC.float()).to(q_BHTC.dtype)
        hidden_TT = torch.full((t, t), -torch.inf, dtype=q_BHTC.dtype).triu(1)
        q, k, v = q_BHTC.reshape(b * g, -1, c), k_BGTC.reshape(b * g, t, c), v_BGTC.reshape(b * g, t, c)
        scores = torch.baddbmm(hidden_TT.repeat(h // g, 1), q, k.transpose(1, 2), alpha=c ** -0.5)
        return torch.bmm(scores.softmax(-1), v).view(b, h, t, c)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Vaswani et al. 2017, section 3.2; grouped heads: Ainslie et al. 2023).

    `forward(x_BTD, rope)` gives (B, T, D); `rope` is (cos, sin) of the T positions, or None to rotate nothing. With a
    cache the keys and values of earlier calls are used too. Raises ValueError where the cache is full.

    >>> attention = Attention(ModelConfig(dim=8, n_layers=1, n_heads=4, n_kv_heads=2))
    >>> attention(torch.randn(3, 5, 8)).shape, attention.k.weight.shape
    (torch.Size([3, 5, 8]), torch.Size([4, 8]))
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_heads, self.kv_heads, self.head_dim = cfg.n_heads, cfg.kv_heads, cfg.head_size
        q_width, kv_width = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size
        self.q = nn.Linear(cfg.dim, q_width, bias=cfg.qkv_bias)
        self.k = nn.Linear(cfg.dim, kv_width, bias=cfg.qkv_bias)
        self.v = nn.Linear(cfg.dim, kv_width, bias=cfg.qkv_bias)
        self.o = nn.Linear(q_width, cfg.dim, bias=False)
        self.norm_heads = cfg.qk_norm == "head"         # else over all heads together, or not at all
        sizes = {"none": None, "head": (cfg.head_size, cfg.head_size), "full": (q_width, kv_width)}[cfg.qk_norm]
        self.q_norm, self.k_norm = (RMSNorm(n, cfg.norm_eps) for n in sizes) if sizes else (nn.Identity(), nn.Identity())

    def heads(self, y_BTX: Tensor, norm: nn.Module) -> Tensor:
        """(B, T, heads x C) to (B, heads, T, C), normalized before or after the cut into heads."""
        cut = y_BTX.unflatten(-1, (-1, self.head_dim)) if self.norm_heads else norm(y_BTX).unflatten(-1, (-1, self.head_dim))
        return (norm(cut) if self.norm_heads else cut).transpose(1, 2)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None,
                layer: int = 0) -> Tensor:
        b, t, _ = x_BTD.shape
        if torch.is_autocast_enabled(x_BTD.device.type):        # once, not for q, k and v each
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        q_BHTC, k_BGTC = self.heads(self.q(x_BTD), self.q_norm), self.heads(self.k(x_BTD), self.k_norm)
        v_BGTC = self.v(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rope is not None:
            q_BHTC, k_BGTC = apply_rope(q_BHTC, *rope), apply_rope(k_BGTC, *rope)
        if cache is None or max(cache.lengths) == 0:
            if cache is not None:
                cache.write(layer, k_BGTC, v_BGTC)
            y_BHTC = attend(q_BHTC, k_BGTC, v_BGTC)
        else:
            y_BHTC = self._with_cache(q_BHTC, *cache.write(layer, k_BGTC, v_BGTC), cache.lengths)
        return self.o(y_BHTC.transpose(1, 2).reshape(b, t, -1))

    def _with_cache(self, q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, lengths: list[int]) -> Tensor:
        b, h, t, c = q_BHTC.shape
        if t == 1:      # one new token: fold each key head's queries into the length axis, so nothing is repeated
            mask = None if min(lengths) == max(lengths) else causal_mask(lengths, 1, q_BHTC.device)
            y = F.scaled_dot_product_attention(q_BHTC.view(b, self.kv_heads, -1, c), k_BGSC, v_BGSC, attn_mask=mask)
            return y.view(b, h, 1, c)
        return F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, attn_mask=causal_mask(lengths, t, q_BHTC.device),
                                              enable_gqa=h != self.kv_heads)
