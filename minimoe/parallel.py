"""One training run on many devices, each driven by a process of its own, a rank (chapter 12).

    torchrun --nproc-per-node 4 -m minimoe train --config configs/pydocs.yaml --parallel ddp

    ddp    every rank holds the whole model; gradients are averaged                        (Li et al. 2020, "PyTorch Distributed")
    fsdp   every rank holds 1/R of every tensor; a block is gathered when it is needed     (Rajbhandari et al. 2020, ZeRO stage 3)
    ep     every rank holds E/R of the experts; tokens travel to them and back, the rest is ddp   (Lepikhin et al. 2020, GShard)

Every rank takes an equal slice of the rows of each batch, and one rule makes R ranks equal one process: what a rank
computes is scaled so that the mean over the ranks is the value of the whole batch. DDP and FSDP take that mean of the
gradients anyway. For cross-entropy with unequal numbers of targets, and for the auxiliary loss, whose shares are those of
all tokens, this needs one number more from the other ranks: `Ranks.mean`.

Shapes: R ranks, N tokens of this rank, M rows that reach this rank's experts, D model width, E experts, K choices.
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minimoe.balance import max_violation
from minimoe.config import ModelConfig, TrainConfig
from minimoe.experts import Experts, WeightedSum, sort_by_expert
from minimoe.model import MoETransformer
from minimoe.router import Routing
from minimoe.settings import need

PATIENCE = timedelta(minutes=10)        # that a rank waits for another, which may be writing a large checkpoint


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees them. Alone, every method gives back what it was given.

    >>> ALONE.main, ALONE.rows(torch.arange(4)), ALONE.mean(torch.tensor(3.0))
    (True, tensor([0, 1, 2, 3]), tensor(3.))
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this rank writes the run folder, the log and the progress."""
        return self.rank == 0

    def rows(self, x_B: Tensor) -> Tensor:
        """This rank's slice of a batch, (B, ...) to (B / R, ...)."""
        return x_B.chunk(self.size)[self.rank]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, the same on each; no gradient flows through it."""
        if self.size > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks."""
        return x if self.size == 1 else self.sum(x) / self.size

    def any(self, flag: object) -> bool:
        """Whether any rank says yes."""
        return bool(flag) if self.size == 1 else bool(self.sum(torch.tensor(float(bool(flag)))))

    def mean_of(self, numbers: dict[str, float]) -> dict[str, float]:
        """The mean of each number over the ranks."""
        if self.size == 1:
            return numbers
        return dict(zip(numbers, self.mean(torch.tensor(list(numbers.values()), dtype=torch.float64)).tolist()))

    def statistics(self, layers: list[dict]) -> list[dict]:
        """The routing statistics of the whole batch from those of each slice."""
        if self.size == 1 or not layers:
            return layers
        rows = torch.tensor([[*s["load"], s["entropy"], s["dropped"]] for s in layers], dtype=torch.float64)
        whole = [([round(x, 4) for x in load], round(entropy, 4), round(dropped, 4))
                 for *load, entropy, dropped in self.mean(rows).tolist()]
        return [s | {"load": load, "max_vio": round(max_violation(torch.tensor(load)), 4), "entropy": entropy, "dropped": dropped}
                for s, (load, entropy, dropped) in zip(layers, whole)]

    def from_main(self, x: object) -> object:
        """What the first rank gives, on every rank."""
        box = [x]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    # --- the model ---------------------------------------------------------------------------------------------------
    def spread(self, model: MoETransformer) -> MoETransformer:
        """Leaves on this rank, in place, the part of the model that it holds. The whole model is made first on every rank,
        from the seed, so that the weights are those of one process."""
        if self.size > 1:
            model.over_ranks = self.mean
        if self.kind == "ep":
            for moe in [m for m in model.modules() if isinstance(getattr(m, "experts", None), Experts)]:
                moe.experts = SpreadExperts(moe.experts, self)
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(model.embedding.weight.device.type, (self.size,))
            for part in (*model.blocks, *model.extra_heads, model):
                fully_shard(part, mesh=mesh)
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """What the training step calls: DDP averages the gradients while the backward pass still runs."""
        if self.kind not in ("ddp", "ep"):
            return model
        # left alone: the experts that are spread, and the buffers, which each rank computes alike
        others = [name for name, _ in model.named_parameters() if self._spread(name)] + [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def exchange(self, forward: nn.Module, now: bool) -> None:
        """Whether the next backward pass averages the gradients: with accumulation only the last one has to. FSDP does
        so each time, since it never holds whole gradients."""
        if isinstance(forward, DistributedDataParallel):
            forward.require_backward_grad_sync = now

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Clips the gradients by the norm of all of them, on whatever rank, and gives that norm."""
        if self.kind != "ep":
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        ours = []
        for p in (p for name, p in model.named_parameters() if self._spread(name)):
            if p.grad is None:                  # no token came; one process would still apply decay and momentum
                p.grad = torch.zeros_like(p)
            ours.append(p.grad.div_(self.size))         # it held the sum over all ranks' tokens
        others = [p.grad for name, p in model.named_parameters() if not self._spread(name) and p.grad is not None]
        norm_of = torch.nn.utils.get_total_norm
        norm = (norm_of(others).square() + self.sum(norm_of(ours).square())).sqrt()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    # --- its tensors, for checkpoints that any number of ranks can read ----------------------------------------------
    def whole(self, name: str, x: Tensor) -> Tensor:
        """The whole tensor of which this rank holds `x`: a weight, or `weight|state` of the optimizer. All ranks ask in
        the same order."""
        if hasattr(x, "full_tensor"):
            return x.full_tensor()
        if not self._spread(name.partition("|")[0]) or not x.dim():
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def part(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        """What this rank holds of the whole tensor `x`, on the device of the weight `like`; scalars stay as they are."""
        x = x.to(like.device)
        if not x.dim():
            return x
        if hasattr(like, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
        here = slice(self.rank * len(like), (self.rank + 1) * len(like))
        return x[here].clone() if self._spread(name.partition("|")[0]) else x

    def gather(self, model: MoETransformer) -> MoETransformer:
        """The trained model in one piece, on every rank."""
        if self.kind not in ("fsdp", "ep"):
            return model
        state = {name: self.whole(name, x) for name, x in model.state_dict().items()}
        alone = MoETransformer(model.cfg).to(model.embedding.weight.device)
        alone.load_state_dict(state)
        return alone

    def _spread(self, name: str) -> bool:
        return self.kind == "ep" and name.endswith((".w13_EDF", ".w2_EHD"))


ALONE = Ranks()


def start(train: TrainConfig, model: ModelConfig) -> Ranks:
    """Joins the other processes that torchrun started: gloo between CPUs, NCCL between GPUs. Does nothing for `parallel: none`.

    Raises ConfigError where the settings, the number of ranks and the way that the program was started do not fit.
    """
    kind, size = train.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none":
        need(size == 1, f"{size} processes were started by torchrun, but parallel is none: add --parallel ddp, fsdp or ep")
        return ALONE
    need("RANK" in os.environ, f"parallel={kind}: start it with torchrun --nproc-per-node N -m minimoe train … --parallel {kind}, "
                               "or with --parallel none for one process")
    need(train.batch_size != "auto", f"batch_size=auto finds what one process can hold: with parallel={kind} give a number")
    need(train.dtype != "float16" or kind == "ddp", f"dtype=float16 with parallel={kind}: each rank would leave out other steps; "
                                                       "use bfloat16, or ddp")
    need(train.batch_size % size == 0, f"batch_size={train.batch_size} cannot be shared equally by {size} ranks: "
                                       f"make it a multiple of {size}")
    need(not train.compile or kind == "ddp", f"compile does not go with parallel: {kind}; leave it out, or use ddp")
    if kind == "ep":
        need(model.n_experts > 1, "parallel=ep: the model is dense, so there are no experts to spread; use ddp or fsdp")
        need(model.n_experts % size == 0, f"n_experts={model.n_experts} cannot be spread equally over {size} ranks: "
                                          f"make it a multiple of {size}")
    if kind == "fsdp":
        need(not model.share_router and model.balance != "simbal",
             "parallel=fsdp gathers one block at a time, but share_router and balance: simbal need the routers of all blocks "
             "at once: use ddp or ep")
        need(train.optimizer == "adamw", "parallel=fsdp: Muon needs whole matrices: use ddp or ep, or adamw")
    need(train.device in ("auto", "cpu", "cuda"), f"device={train.device}: with parallel={kind} each rank takes a GPU of its own; "
                                                  "write cuda, cpu or auto")
    if train.device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        need(local < gpus, f"local rank {local} has no GPU, {gpus} are here: lower --nproc-per-node, or use device: cpu")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Ranks(kind, dist.get_rank(), size)


class SpreadExperts(Experts):
    """This rank's E/R experts of a layer, and the way of the tokens to them and back: two all-to-alls, which the
    backward pass goes the other way round.

        x_ND --sort by expert--> x_PD --to the expert's rank--> x_MD --Experts--> y_MD --back--> y_PD --add up--> y_ND

    Between the two, a row that came in is a token with one choice, of weight 1: the same `Experts` as on one device.
    """

    def __init__(self, whole: Experts, ranks: Ranks):
        nn.Module.__init__(self)
        self.ranks, self.n_experts = ranks, len(whole.w13_EDF)
        self.dispatch, self.activation, self.recompute = whole.dispatch, whole.activation, whole.recompute
        self.w13_EDF, self.w2_EHD = (nn.Parameter(ranks.rows(w.detach()).clone()) for w in (whole.w13_EDF, whole.w2_EHD))

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        dtype, device = x_ND.dtype, x_ND.device.type
        if torch.is_autocast_enabled(device):                  # half the bytes to send
            dtype = torch.get_autocast_dtype(device)
        token_P, weight_P, counts_E = sort_by_expert(routing, self.n_experts)
        came_RE = torch.empty_like(counts_E)                   # rows from each rank for each expert here
        dist.all_to_all_single(came_RE, counts_E)
        came_RE, here = came_RE.view(self.ranks.size, -1), len(self.w13_EDF)
        send, receive = counts_E.view(self.ranks.size, -1).sum(1).tolist(), came_RE.sum(1).tolist()
        x_MD = Travel.apply(x_ND.to(dtype).index_select(0, token_P), send, receive)
        expert_M = torch.arange(here, device=x_ND.device).repeat(self.ranks.size).repeat_interleave(came_RE.flatten())[:, None]
        one_M = torch.ones_like(expert_M, dtype=torch.float32)
        y_MD = super().forward(x_MD, Routing(one_M, expert_M, one_M.expand(-1, here), one_M, expert_M >= 0))
        return WeightedSum.apply(Travel.apply(y_MD, receive, send), weight_P, token_P, len(x_ND)).to(x_ND.dtype)


class Travel(torch.autograd.Function):
    """`Travel.apply(x_PD, send, receive)`: the first `send[0]` rows go to rank 0, and so on; gives the rows that came in,
    `receive[0]` from rank 0 first, (M, D). The backward pass sends their gradients the other way."""

    @staticmethod
    def forward(ctx, x_PD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.way_back = receive, send
        x_MD = x_PD.new_empty(sum(receive), x_PD.shape[1])
        dist.all_to_all_single(x_MD, x_PD.contiguous(), receive, send)
        return x_MD

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        return Travel.apply(grad_MD, *ctx.way_back), None, None


def finish() -> None:
    """Leaves the other processes in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()
