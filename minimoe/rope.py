"""Rotary position embeddings (chapter 2).

Shapes: B batch, H heads, T positions, C features of one head (even), C2 = C / 2.

    a head of C features is C2 pairs (i, i + C2); pair i turns by the angle  position / base^(2 i / C)
    [ x0 x1 x2 | x3 x4 x5 ]   pairs (x0 x3) (x1 x4) (x2 x5): the "rotate-half" layout of Llama and Mixtral
"""
import torch
from torch import Tensor


def rope_table(n_positions: int, head_dim: int, base: float = 10_000.0, scaling: str = "none",
               factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, each (n_positions, C2), float32 (Su et al. 2021, section 3.2.2).

    Past the trained length the angles are new to the model. `scaling="linear"` divides every position by `factor`, so
    that `factor` times the length turns as far as before (Chen et al. 2023, eq. 4). `"ntk"` raises the base instead:
    the slowest pair turns as in linear, the fastest as before, so neighbors stay apart (Peng et al. 2023, section 3.1).

    >>> cos, sin = rope_table(4, 6)
    >>> cos.shape, cos[0].tolist(), sin[0].tolist()
    (torch.Size([4, 3]), [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    >>> torch.equal(rope_table(5, 6, scaling="linear", factor=2.0)[0][4], cos[2])
    True
    """
    if scaling not in ("none", "linear", "ntk"):
        raise ValueError(f"scaling={scaling!r}: none, linear or ntk")
    if scaling == "ntk" and head_dim > 2:
        base = base * factor ** (head_dim / (head_dim - 2))
    frequency_C2 = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    position_T = torch.arange(n_positions).float() / (factor if scaling == "linear" else 1.0)
    angle_TC2 = position_T[:, None] * frequency_C2
    return angle_TC2.cos(), angle_TC2.sin()


def apply_rope(x_BHTC: Tensor, cos_TC2: Tensor, sin_TC2: Tensor) -> Tensor:
    """Turns every pair of features by its position's angle; cos and sin broadcast against (B, H, T, C2).

    >>> cos, sin = rope_table(3, 2)
    >>> apply_rope(torch.tensor([[[[1.0, 0.0]] * 3]]), cos, sin)[0, 0, 2]      # (cos 2, sin 2)
    tensor([-0.4161,  0.9093])
    """
    a, b = x_BHTC.chunk(2, dim=-1)
    return torch.cat((a * cos_TC2 - b * sin_TC2, b * cos_TC2 + a * sin_TC2), dim=-1).to(x_BHTC.dtype)
