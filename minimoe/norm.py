"""Normalization (chapter 1).

Shapes: ... any leading sizes, D features.
"""
import torch
import torch.nn.functional as F
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


class LayerNorm(nn.Module):
    """Takes the mean away too, then divides by the standard deviation and scales; no bias.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight, in float32 (Ba et al. 2016, eq. 3). Input and output (..., D), same
    dtype.

    >>> LayerNorm(2)(torch.tensor([3.0, 5.0])).tolist()
    [-0.999..., 0.999...]
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), eps=self.eps).to(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "none": lambda dim, eps: nn.Identity()}
"""By the name that the config gives."""
