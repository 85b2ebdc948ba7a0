"""Normalization (chapter 1).

Shapes: ... any leading sizes, D features.
"""
import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis, then scales each feature.

    y = x / sqrt(mean(x^2) + eps) * weight, computed in float32 whatever the input (Zhang & Sennrich 2019, eq. 4).
    Input and output (..., D), same dtype.

    >>> RMSNorm(2)(torch.tensor([3.0, 4.0])).square().mean().round(decimals=4)
    tensor(1., grad_fn=<RoundBackward1>)
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)
