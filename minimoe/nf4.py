"""Frozen weights in four bits: NF4 with double quantization (Dettmers et al. 2023, "QLoRA", section 3; chapter 10).

A block of 64 weights is 64 codes, each the number of one of sixteen levels, times one scale:

    w[i] = LEVELS[code[i]] * scale          16 levels, dense around 0 where normal weights are: 4 bits each
    scale = low * (high / low)^(c / 255)    c: 8 bits; low and high: two float32 for 256 scales

so a weight takes 4 + 8/64 + 64/(64 * 256) = 4.129 bits, 0.258 of bfloat16. Two things are not as in the paper: a scale is
fitted to its block by least squares, where the paper takes the largest weight, and rounded to a step of its logarithm,
where the paper takes an 8-bit float less the mean. Both cost nothing afterwards and lower the error (LOG.md).

Shapes: M blocks of 64, P = 32 bytes with two codes each, G groups of 256 blocks.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
          -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
BLOCK, GROUP = 64, 256
AT_ONCE = 32 * GROUP            # blocks: what is between codes and weights stays small beside them, and in the cache


class NF4(nn.Module):
    """One weight tensor of any shape, in four bits. `dequantize(dtype)` gives a new tensor of that shape.

    >>> w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> q = NF4(w)
    >>> round((q.dequantize() - w).square().mean().sqrt().item(), 3), q.nbytes / (2 * w.numel())
    (0.09, 0.259765625)
    """

    def __init__(self, w: Tensor):
        super().__init__()
        self.shape, self.dtype = w.shape, w.dtype
        blocks = F.pad(w.detach().flatten(), (0, -w.numel() % BLOCK)).view(-1, BLOCK)
        parts = [_quantize(part.float()) for part in blocks.split(AT_ONCE)]
        for name, tensors in zip(("codes_MP", "scales_M", "ends_G2"), zip(*parts)):
            self.register_buffer(name, torch.cat(tensors))

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the ends of the scales together."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        out = torch.empty(len(self.codes_MP), BLOCK, dtype=dtype or self.dtype, device=self.codes_MP.device)
        levels = torch.tensor(LEVELS, device=out.device)
        pairs = torch.stack((levels.repeat(16), levels.repeat_interleave(16)), 1)           # both weights of each byte
        groups = AT_ONCE // GROUP
        for i, (codes_MP, scales_M) in enumerate(zip(self.codes_MP.split(AT_ONCE), self.scales_M.split(AT_ONCE))):
            scale_M = _scales(scales_M, self.ends_G2[i * groups:(i + 1) * groups])
            values = F.embedding(codes_MP.int(), pairs).flatten(1)
            out[i * AT_ONCE:i * AT_ONCE + len(values)] = values * scale_M[:, None]
        return out.flatten()[:self.numel()].view(self.shape)


def _quantize(blocks_MB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (M, P) uint8, scales (M,) uint8, ends of the scales (G, 2) float32, of whole groups and at most one more."""
    levels = torch.tensor(LEVELS, device=blocks_MB.device)
    between = (levels[1:] + levels[:-1]) / 2
    tiny = torch.finfo(torch.float32).tiny
    scale_M = blocks_MB.abs().amax(1)
    for _ in range(4):              # codes for the scale, then the best scale for the codes: neither makes the error larger
        codes_MB = torch.bucketize(blocks_MB / scale_M.clamp_min(tiny)[:, None], between)
        value_MB = levels[codes_MB]
        scale_M = (value_MB * blocks_MB).sum(1) / value_MB.square().sum(1).clamp_min(tiny)
    high_G = F.pad(scale_M, (0, -len(scale_M) % GROUP)).view(-1, GROUP).amax(1).clamp_min(tiny)
    some_G = torch.where(scale_M > 0, scale_M, torch.inf)
    low_G = F.pad(some_G, (0, -len(some_G) % GROUP), value=torch.inf).view(-1, GROUP).amin(1)
    low_G = torch.maximum(torch.minimum(low_G, high_G), high_G * 1e-4)          # what is smaller is next to nothing
    ends_G2 = torch.stack((low_G, high_G), 1)
    low_M, high_M = (e.repeat_interleave(GROUP)[:len(scale_M)] for e in (low_G, high_G))
    step_M = ((high_M / low_M).log() / 255).clamp_min(1e-12)
    scales_M = ((scale_M.clamp_min(tiny) / low_M).log() / step_M).round().clamp(0, 255).to(torch.uint8)
    codes_MB = torch.bucketize(blocks_MB / _scales(scales_M, ends_G2)[:, None], between).to(torch.uint8)
    return codes_MB[:, 0::2] | codes_MB[:, 1::2] << 4, scales_M, ends_G2


def _scales(scales_M: Tensor, ends_G2: Tensor) -> Tensor:
    low_M, high_M = (e.repeat_interleave(GROUP)[:len(scales_M)] for e in ends_G2.unbind(1))
    return low_M * (high_M / low_M) ** (scales_M.float() / 255)


class FrozenProduct(torch.autograd.Function):
    """`forward(x, w)` for a weight that is kept in four bits, and `backward(gradient, w)` for the gradient of x. It is made
    in full for each of the two and let go of after it: of all weights, one at a time is there in full.

    >>> x, q = torch.ones(1, 2, requires_grad=True), NF4(torch.eye(2))
    >>> FrozenProduct.apply(x, q, torch.matmul, lambda g, w: g @ w.mT).sum().backward()
    >>> x.grad
    tensor([[1., 1.]])
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: NF4, forward: Callable[[Tensor, Tensor], Tensor],
                backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.weight, ctx.back = weight, backward
        return forward(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return ctx.back(grad.contiguous(), ctx.weight.dequantize(grad.dtype)), None, None, None
