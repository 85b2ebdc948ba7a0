"""Experts, and how tokens get to them and back (chapter 5).

Shapes: N tokens, D model width, E experts, K choices per token, H hidden size of one expert, F = 2 H where a gate and
an up projection lie side by side, else H; P = pairs of a token and an expert that it is really sent to (N x K less what
was dropped).

    x_ND --take the rows, sorted by expert--> x_PD --each expert on its own rows--> y_PD --add up by token--> y_ND
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimoe.config import ModelConfig
from minimoe.router import Router, Routing


def activate(h: Tensor, activation: str) -> Tensor:
    """What happens between an expert's two products, (..., F) to (..., H): gated by SiLU or GELU (Shazeer 2020, eq. 6),
    or plain GELU (Hendrycks & Gimpel 2016).

    >>> activate(torch.tensor([1.0, 3.0]), "swiglu"), activate(torch.tensor([0.0, 1.0]), "gelu")
    (tensor([2.1932]), tensor([0.0000, 0.8413]))
    """
    if activation == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "swiglu" else F.gelu(gate)) * up


class FeedForward(nn.Module):
    """Dense feed-forward layer, (..., D) to (..., D): what an expert is, for all tokens.

    >>> FeedForward(ModelConfig(dim=8, n_heads=2), hidden=12)(torch.zeros(5, 8)).shape
    torch.Size([5, 8])
    """

    def __init__(self, cfg: ModelConfig, hidden: int):
        super().__init__()
        self.activation = cfg.activation
        self.w13 = nn.Linear(cfg.dim, hidden * (2 if cfg.gated else 1), bias=False)
        self.w2 = nn.Linear(hidden, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(activate(self.w13(x), self.activation))


class Experts(nn.Module):
    """E experts as two stacked tensors. `forward(x_ND, routing)` gives (N, D):

        y[n] = sum over kept k of  weights[n, k] * expert[experts[n, k]](x[n])

    A dropped choice contributes exactly zero. `dispatch` is "grouped" (one matrix product for all experts, or a few of
    fixed sizes), "loop" (one expert after the other) or "auto" (see `choose`). With `recompute` the hidden values are computed
    again in the backward pass instead of kept. Raises ValueError where "grouped" cannot run.

    >>> experts = Experts(ModelConfig(dim=8, n_heads=2, n_experts=4, expert_hidden=16))
    >>> [tuple(p.shape) for p in experts.parameters()]
    [(4, 8, 32), (4, 16, 8)]
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.dispatch, self.activation, self.recompute = cfg.dispatch, cfg.activation, False
        f = cfg.expert_hidden * (2 if cfg.gated else 1)
        self.w13_EDF = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim, f))
        self.w2_EHD = nn.Parameter(torch.empty(cfg.n_experts, cfg.expert_hidden, cfg.dim))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        (w13_EDF, w2_EHD), dtype = self.weights(), x_ND.dtype
        if torch.is_autocast_enabled(x_ND.device.type):        # grouped_mm does not know autocast: cast by hand
            dtype = torch.get_autocast_dtype(x_ND.device.type)
            w13_EDF, w2_EHD = w13_EDF.to(dtype), w2_EHD.to(dtype)
        multiply, round_to = choose(self.dispatch, routing.experts.numel(), w13_EDF, w2_EHD)
        token_P, weight_P, counts_E = sort_by_expert(routing, w13_EDF.shape[0], round_to)
        compute = lambda x_ND, *w: self.compute(multiply, x_ND.index_select(0, token_P), counts_E, *w)
        if self.recompute and torch.is_grad_enabled():
            compute = partial(checkpoint, compute, use_reentrant=False)
        y_PD = compute(x_ND.to(dtype), w13_EDF, w2_EHD)
        return WeightedSum.apply(y_PD, weight_P, token_P, len(x_ND)).to(x_ND.dtype)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w13_EDF, self.w2_EHD

    def compute(self, multiply: Callable[..., Tensor], x_PD: Tensor, counts_E: Tensor, w13_EDF: Tensor, w2_EHD: Tensor) -> Tensor:
        return multiply(activate(multiply(x_PD, w13_EDF, counts_E), self.activation), w2_EHD, counts_E)


class WeightedSum(torch.autograd.Function):
    """Adds up weight_P * y_PD by token, in float32 or wider: (N, D). Autograd would keep the products as well; the backward
    pass only needs the rows, their weights and their tokens.

    >>> y, weight, token = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0, 1, 0])
    >>> WeightedSum.apply(y, weight, token, 2).flatten()
    tensor([3., 2.])
    """

    @staticmethod
    def forward(ctx, y_PD: Tensor, weight_P: Tensor, token_P: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(y_PD, weight_P, token_P)
        weighted_PD = y_PD * weight_P[:, None]
        return weighted_PD.new_zeros(n_tokens, y_PD.shape[1]).index_add_(0, token_P, weighted_PD)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_PD, weight_P, token_P = ctx.saved_tensors
        grad_PD = grad_ND.index_select(0, token_P)
        grad_weight_P = (y_PD.to(grad_PD.dtype) * grad_PD).sum(-1).to(weight_P.dtype)
        return grad_PD.mul_(weight_P[:, None]).to(y_PD.dtype), grad_weight_P, None, None


def choose(dispatch: str, n_pairs: int, w13_EDF: Tensor, w2_EHD: Tensor) -> tuple[Callable[..., Tensor], int]:
    """The product of sorted rows with their experts' matrices, and the `round_to` that it wants. Each case but the first two
    was measured on CPUs (LOG.md): few pairs are bound by reading the weights, and in bfloat16 every new number of rows has
    its price. Raises ValueError where dispatch="grouped" cannot run.

    >>> choose("auto", 4096, torch.zeros(4, 8, 16), torch.zeros(4, 8, 8))[0].__name__
    'grouped'
    """
    reason, on_cpu, n_experts = cannot_group(w13_EDF, w2_EHD), w13_EDF.device.type == "cpu", len(w13_EDF)
    if dispatch == "grouped" and reason:
        raise ValueError(f'dispatch="grouped" cannot run here: {reason}; use dispatch="auto"')
    if dispatch == "auto" and on_cpu and n_experts <= n_pairs <= 8 * n_experts:
        return batched, 0
    if dispatch == "loop" or reason or dispatch == "auto" and on_cpu and n_pairs < n_experts:
        return looped, 1
    prepared = on_cpu and w13_EDF.dtype == torch.bfloat16
    return blocked if prepared and n_pairs > 512 * n_experts else grouped, 64 if prepared else 1


def sort_by_expert(routing: Routing, n_experts: int, round_to: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The kept pairs in the order of their experts: token (P,), weight (P,), rows per expert (E,).

    `round_to` fills each expert's rows up to a multiple with pairs of weight zero; 0 fills all up to the fullest.

    >>> from minimoe.router import softmax_topk
    >>> r = softmax_topk(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 1.0]]), k=1)
    >>> [t.tolist() for t in sort_by_expert(r, 2)]
    [[1, 0, 2], [1.0, 1.0, 1.0], [1, 2]]
    """
    k = routing.experts.shape[1]
    expert_P, weight_P = routing.experts.flatten(), routing.weights.flatten()
    pair_P = torch.arange(expert_P.numel(), device=expert_P.device)
    if not routing.kept.all():
        pair_P = routing.kept.flatten().nonzero().squeeze(1)
        expert_P, weight_P = expert_P[pair_P], weight_P[pair_P]
    order_P = expert_P.argsort(stable=True)
    counts_E = torch.bincount(expert_P, minlength=n_experts)
    token_P, weight_P = pair_P[order_P] // k, weight_P[order_P]
    if round_to == 1:
        return token_P, weight_P, counts_E
    if round_to == 0:
        filled_E = counts_E.max().expand(n_experts)
    else:
        filled_E = (counts_E + round_to - 1) // round_to * round_to
    shift_E = (filled_E - counts_E).cumsum(0) - (filled_E - counts_E)         # how far each expert's rows move back
    place_P = torch.arange(token_P.numel(), device=token_P.device) + shift_E[expert_P[order_P]]
    size = int(filled_E.sum())
    return (token_P.new_zeros(size).index_copy(0, place_P, token_P),
            weight_P.new_zeros(size).index_copy(0, place_P, weight_P), filled_E)


def looped(x_PD: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """The reference: the rows of each expert in turn, times its matrix. (P, D) to (P, F), as the three below.

    >>> looped(torch.ones(3, 2), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([1, 2])).flatten()
    tensor([3., 7., 7.])
    """
    return torch.cat([x @ w for x, w in zip(x_PD.split(counts_E.tolist()), w_EDF.unbind(0))])


def batched(x_PD: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """The same in one batched matrix product, where every expert has as many rows.

    >>> x, w, counts = torch.randn(4, 8), torch.randn(2, 8, 4), torch.tensor([2, 2])
    >>> torch.allclose(batched(x, w, counts), looped(x, w, counts), atol=1e-5)
    True
    """
    return torch.bmm(x_PD.view(len(w_EDF), -1, x_PD.shape[1]), w_EDF).flatten(0, 1)


def grouped(x_PD: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """The same in one grouped matrix product.

    >>> x, w, counts = torch.randn(3, 4), torch.randn(2, 4, 4), torch.tensor([1, 2])
    >>> torch.allclose(grouped(x, w, counts), looped(x, w, counts), atol=1e-5)
    True
    """
    return F.grouped_mm(x_PD, w_EDF, offs=counts_E.cumsum(0).int())


def blocked(x_PD: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """The same in products of six sizes, where all counts are multiples of 64: in bfloat16 on a CPU oneDNN prepares a kernel
    for each number of rows that it meets. Many small blocks cost more than the kernels.

    >>> x, w, counts = torch.randn(128, 8), torch.randn(2, 8, 4), torch.tensor([0, 128])
    >>> torch.allclose(blocked(x, w, counts), looped(x, w, counts), atol=1e-5)
    True
    """
    return _Blocked.apply(x_PD, w_EDF, *cut(counts_E.tolist()))


class _Blocked(torch.autograd.Function):
    """`blocked`, and the two products of its backward pass, of the same few sizes."""

    @staticmethod
    def forward(ctx, x_PD: Tensor, w_EDF: Tensor, experts: list[int], sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_PD, w_EDF)
        ctx.blocks, w, y_PF = (experts, sizes), w_EDF.unbind(0), x_PD.new_empty(len(x_PD), w_EDF.shape[-1])
        for e, x, y in zip(experts, x_PD.split(sizes), y_PF.split(sizes)):
            torch.mm(x, w[e], out=y)
        return y_PF

    @staticmethod
    def backward(ctx, grad_PF: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x_PD, w_EDF), (experts, sizes), (for_x, for_w, *_) = ctx.saved_tensors, ctx.blocks, ctx.needs_input_grad
        grad_PD = _Blocked.apply(grad_PF, w_EDF.mT, experts, sizes) if for_x else None
        grad_EDF = torch.zeros_like(w_EDF) if for_w else None
        for before, e, x, grad in zip([None, *experts], experts, x_PD.split(sizes), grad_PF.split(sizes)) if for_w else ():
            grad_EDF[e].addmm_(x.T, grad, beta=int(e == before))
        return grad_PD, grad_EDF, None, None


def cut(counts: list[int]) -> tuple[list[int], list[int]]:
    """Blocks of rows, whose they are and how many rows each has: the smallest of an expert first, as their sum is rounded.

    >>> cut([1088, 0, 320])
    ([0, 0, 2, 2], [64, 1024, 64, 256])
    """
    experts, sizes = [], []
    for e, rows in enumerate(counts):
        first = len(sizes)
        while rows:
            sizes.insert(first, next(size for size in (1024, 512, 256, 192, 128, 64) if size <= rows))
            experts, rows = experts + [e], rows - sizes[first]
    return experts, sizes


def cannot_group(w13_EDF: Tensor, w2_EHD: Tensor) -> str | None:
    """Why `torch.nn.functional.grouped_mm` cannot run on these weights, or None where it can.

    >>> cannot_group(torch.zeros(2, 3, 5), torch.zeros(2, 5, 3))
    'rows of (3, 5) or (5, 3) are not a multiple of 16 bytes'
    """
    if w13_EDF.device.type not in ("cpu", "cuda"):
        return f"no grouped_mm on {w13_EDF.device.type}"
    if w13_EDF.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no grouped_mm for {w13_EDF.dtype}"
    if any(size * w13_EDF.element_size() % 16 for size in (*w13_EDF.shape[1:], *w2_EHD.shape[1:])):
        return f"rows of {tuple(w13_EDF.shape[1:])} or {tuple(w2_EHD.shape[1:])} are not a multiple of 16 bytes"
    return None


class MoE(nn.Module):
    """A whole MoE layer: the router chooses, the experts work, shared experts see every token, whatever the router says.

    `forward(x_ND, token_ids_N, row_N)` gives (N, D) and the `Routing`; `row_N` says which sequence each token is of. A
    gate, where there is one, weighs the shared experts by sigmoid(gate x) (Qwen2-MoE); without, they count fully
    (DeepSeekMoE: Dai et al. 2024, section 3.2).

    >>> layer = MoE(ModelConfig(dim=8, n_heads=2, n_experts=4, top_k=2, expert_hidden=16, n_shared_experts=1))
    >>> layer.shared.w2.weight.shape
    torch.Size([8, 16])
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.router = Router(cfg)
        self.experts = Experts(cfg)
        self.shared = FeedForward(cfg, cfg.shared_size) if cfg.n_shared_experts else None
        self.shared_gate = nn.Linear(cfg.dim, 1, bias=False) if cfg.shared_gate else None

    def forward(self, x_ND: Tensor, token_ids_N: Tensor, row_N: Tensor) -> tuple[Tensor, Routing]:
        routing = self.router(x_ND, token_ids_N, row_N)
        y_ND = self.experts(x_ND, routing)
        return (y_ND if self.shared is None else y_ND + self.shared_output(x_ND)), routing

    def shared_output(self, x_ND: Tensor) -> Tensor:
        shared_ND = self.shared(x_ND)
        return shared_ND if self.shared_gate is None else self.shared_gate(x_ND).sigmoid() * shared_ND
