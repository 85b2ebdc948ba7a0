"""What a training step on many devices costs, and how much of a pipeline stands still (chapter 12).

R devices (ranks), N tokens per step, P parameters, L MoE layers, D model width, K choices, E experts.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

from minimoe.counts import params_by_part
from minimoe.model_config import ModelConfig
from minimoe.settings import need

BUCKET = 25 * 2**20         # bytes of gradients that DDP sends at a time


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device and its way to the others; the defaults are of the order of an H100 on a 400 Gbit/s network."""

    flops: float = 4e14
    """FLOPs per second that training really reaches, not the data sheet's."""
    bandwidth: float = 5e10
    """Bytes per second that one device can send."""
    latency: float = 1e-5
    """Seconds that a message takes however small it is."""
    memory: float = 8e10
    """Bytes of a device."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one training step on one device."""

    compute: float
    """Seconds of matrix products."""
    communication: float
    """Seconds of sending."""
    sent: dict[str, float]
    """Bytes that one device sends, by collective."""
    memory: float
    """Bytes at the peak: weights, gradients, optimizer, kept activations."""
    fits: bool
    """Whether that is within the device's memory."""

    @property
    def total(self) -> float:
        """Seconds, with nothing overlapped: an upper bound; the larger of the two parts is the lower one."""
        return self.compute + self.communication


def step_cost(cfg: ModelConfig, seq_len: int, batch: int, devices: int, machine: Machine, parallel: str = "ddp",
              bytes_per_value: int = 4) -> Cost:
    """The cost of one step over `batch` sequences (of all devices together) with `parallel` ddp, fsdp or ep.

    Assumptions. The backward pass costs twice the forward pass; only matrix products take time; loads are even. All
    devices are equally far from each other. Each sends of b bytes 2 (R - 1) / R b for an all-reduce, half of it for an all-gather
    or a reduce-scatter, the least that is possible; log2 R messages wait for each other on the way, as in a tree (Sanders
    et al. 2009, "Two-tree algorithms"). An all-to-all sends (R - 1) / R of the rows to R - 1 others, one by one. DDP averages float32 gradients once, in buckets of 25 MiB. FSDP gathers each block in the forward and again in
    the backward pass, what stands outside of the blocks once, and scatters the gradients (Rajbhandari et al. 2020, section 7).
    Experts spread over the ranks: K rows a token go out and come back, forward and backward, at `bytes_per_value` (2 in
    bfloat16), and the gradients of all but the experts are averaged as in DDP (Lepikhin et al. 2020, section 3.2). Memory: 16
    bytes a parameter (weight, gradient, two of Adam's), of which FSDP holds 1/R and two gathered blocks; activations
    by `activations_per_token`, and two more copies of the logits while their gradient is made. Raises ConfigError where devices do not divide the batch or, for ep, the experts.

    >>> cfg = ModelConfig(vocab_size=1000, dim=64, n_layers=2, n_heads=4, n_experts=8, top_k=2, expert_hidden=64)
    >>> [step_cost(cfg, 256, 64, r, Machine(), "ddp").sent["all_reduce"] / cfg.num_params() for r in (1, 2, 4)]
    [0.0, 4.0, 6.0]
    """
    need(batch % devices == 0, f"batch={batch} cannot be shared equally by {devices} devices")
    need(parallel in ("ddp", "fsdp", "ep"), f"parallel={parallel!r}: one of ddp, fsdp, ep")
    parts, tokens = params_by_part(cfg), batch * seq_len // devices
    whole, experts, others, deep = 4 * cfg.num_params(), 4 * parts["experts"], devices - 1, math.ceil(math.log2(devices))
    root = 4 * (parts["embedding"] + parts["positions"] + parts["head"] + (cfg.dim if cfg.norm != "none" else 0))
    sent, messages, held = {}, 0, whole
    if parallel == "fsdp":
        n_blocks = cfg.n_layers + cfg.n_predict - 1
        sent = {"all_gather": (2 * (whole - root) + root) * others / devices, "reduce_scatter": whole * others / devices}
        messages, held = (3 * n_blocks + 2) * deep, whole / devices
    else:
        if parallel == "ep":
            need(cfg.n_experts % devices == 0, f"n_experts={cfg.n_experts} cannot be spread equally over {devices} devices")
            need(cfg.n_experts > 1, "parallel='ep': a dense model has no experts to spread")
            rows = len(cfg.moe_layers) * tokens * cfg.top_k * others / devices
            sent, messages = {"all_to_all": 4 * rows * cfg.dim * bytes_per_value}, 4 * len(cfg.moe_layers) * others
            held = whole - experts + experts / devices
        averaged = whole - experts if parallel == "ep" else whole
        sent["all_reduce"] = 2 * averaged * others / devices
        messages += 2 * deep * math.ceil(averaged / BUCKET)
    gathered = (root + 2 * (whole - root) / max(cfg.n_layers, 1)) if parallel == "fsdp" and devices > 1 else 0
    memory = 4 * held + gathered + tokens * (bytes_per_value * activations_per_token(cfg) + 8 * cfg.vocab_size)
    return Cost(compute=3 * tokens * cfg.flops_per_token(seq_len) / machine.flops, sent=sent, memory=memory,
                communication=sum(sent.values()) / machine.bandwidth + messages * machine.latency, fits=memory <= machine.memory)


def activations_per_token(cfg: ModelConfig) -> int:
    """Values that the forward pass keeps for the backward pass, per token, with fused attention and no recomputation.

    >>> cfg = ModelConfig(vocab_size=1000, dim=64, n_layers=2, n_heads=4, n_experts=8, top_k=2, expert_hidden=64)
    >>> activations_per_token(cfg)
    4200
    """
    q, kv, d = cfg.n_heads * cfg.head_size, cfg.kv_heads * cfg.head_size, cfg.dim
    wide = 3 if cfg.gated else 1                                # gate, up and their product, or the hidden values
    attention = 2 * d + 3 * q + 4 * kv                          # its input twice (norm), queries and keys before and after turning
    n_moe, n_dense = len(cfg.moe_layers), cfg.n_layers - len(cfg.moe_layers)
    moe = 2 * d + cfg.top_k * (2 * d + (wide + 1) * cfg.expert_hidden) + 4 * cfg.n_experts + (wide + 1) * cfg.shared_size
    dense = 2 * d + (wide + 1) * cfg.dense_size
    return cfg.n_layers * attention + n_moe * moe + n_dense * dense + 3 * d + cfg.vocab_size


@dataclass(frozen=True)
class Slot:
    """One piece of work in a pipeline: forward or backward of one micro-batch on one stage, from `start` to `end`."""

    stage: int
    microbatch: int
    forward: bool
    start: float
    end: float


def pipeline_schedule(stages: int, microbatches: int, kind: str = "gpipe", backward: float = 2.0) -> tuple[list[Slot], float]:
    """Simulates a pipeline; gives the timetable and the share of time that stages stand idle, the bubble.

    A forward pass of a stage takes 1, a backward pass `backward`. "gpipe" runs all forward passes first (Huang et al.
    2019, section 2.3); "1f1b" begins each backward pass as soon as it can, so that stage s of p never holds the activations of more
    than p - s micro-batches (Narayanan et al. 2021, section 2.2). Both have a bubble of (p - 1) / (m + p - 1).

    >>> slots, bubble = pipeline_schedule(stages=4, microbatches=12)
    >>> round(bubble, 6), max(s.end for s in slots)
    (0.2, 45.0)
    """
    need(stages >= 1 and microbatches >= 1, f"stages={stages}, microbatches={microbatches}: both must be at least 1")
    need(kind in ("gpipe", "1f1b"), f"kind={kind!r}: gpipe or 1f1b")
    order: list[list[tuple[bool, int]]] = []
    for stage in range(stages):
        ahead = microbatches if kind == "gpipe" else min(stages - stage, microbatches)
        work = [(True, m) for m in range(ahead)]
        for m in range(microbatches):
            work += [(False, m)] + ([(True, m + ahead)] if m + ahead < microbatches else [])
        order.append(work)
    done: dict[tuple[bool, int, int], float] = {}
    slots, at, free = [], [0] * stages, [0.0] * stages
    while len(slots) < 2 * stages * microbatches:
        for stage in range(stages):
            while at[stage] < len(order[stage]):
                forward, m = order[stage][at[stage]]
                first = stage == 0 if forward else stage == stages - 1
                before = (forward, stage + (-1 if forward else 1), m) if not first else (True, stage, m)
                if not (forward and first) and before not in done:
                    break
                start = max(free[stage], 0.0 if forward and first else done[before])
                free[stage] = done[forward, stage, m] = start + (1.0 if forward else backward)
                slots.append(Slot(stage, m, forward, start, free[stage]))
                at[stage] += 1
    busy = microbatches * (1 + backward)
    return sorted(slots, key=lambda s: (s.start, s.stage)), 1 - busy / max(free)
