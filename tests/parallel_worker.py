"""What tests/test_parallel.py runs in several processes: python -m tests.parallel_worker FOLDER.

The imports are done once, then this process forks into one, four and two ranks. Each rank goes through all runs one after
the other; rank 0 writes what came out to FOLDER/<ranks>.json.
"""
from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import struct
import sys
from pathlib import Path

import torch

from minimoe import parallel
from minimoe.config import ModelConfig, TrainConfig
from minimoe.model import MoETransformer
from minimoe.trainer import Trainer

KINDS = ("ddp", "fsdp", "ep")
STEPS, QUARTER = 20, 5
MODEL = ModelConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2, max_seq_len=8, n_experts=4, top_k=2, expert_hidden=16, z_coef=0.01)
TRAIN = TrainConfig(steps=STEPS, batch_size=8, warmup=2, lr=3e-3, device="cpu", dtype="float32", eval_every=0, log_every=1, save_every=0)
WIDE = dataclasses.replace(MODEL, dim=64, vocab_size=64, n_experts=8, expert_hidden=64)
CASES = {
    "auxiliary loss, tied, accumulated": (dataclasses.replace(MODEL, aux_coef=0.1, tie_embeddings=True, n_shared_experts=1), {"accumulate": 2}),
    "bias, uneven, one expert without tokens": (dataclasses.replace(MODEL, router="sigmoid", balance="bias", bias_speed=0.01), {}),
    "per sequence, capacity, two tokens ahead": (dataclasses.replace(MODEL, aux_scope="sequence", capacity_factor=1.0, n_predict=2, aux_coef=0.1), {"recompute": "blocks"}),
    "expert choice, first layer dense": (dataclasses.replace(MODEL, router="expert_choice", balance="none", n_dense_first=1, n_layers=3), {"recompute": "experts"}),
    "SimBal, one router": (dataclasses.replace(MODEL, balance="simbal", share_router=True), {}),
    "adapters": (MODEL, {"method": "lora", "lora_targets": ("q", "experts.w13", "w2"), "lora_rank": 4}),       # ddp only
}


class Pairs:
    """Pairs of (inputs, targets), some with far fewer targets than others; one row in five has none."""

    def __len__(self) -> int:
        return 37

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(0, 32, (9,), generator=torch.Generator().manual_seed(i))
        targets = tokens[1:].clone()
        targets[: (i % 5) * 2] = -100
        return tokens[:-1], targets


def trainer(model: ModelConfig, kind: str = "none", out: Path | None = None, **train: object) -> Trainer:
    torch.manual_seed(0)
    built = MoETransformer(model)
    if model.balance == "bias":
        for block in built.blocks:              # expert 0 is in every choice, expert 3 in none
            block.ffn.router.bias_E += torch.tensor([5.0, 0.0, 0.0, -5.0])
    return Trainer(built, dataclasses.replace(TRAIN, parallel=kind, **train), Pairs(), out=out, progress=False)


def losses(name: str, kind: str = "none") -> list[tuple[list[float], list[list[float]]]]:
    """Of each step: cross-entropy, the other losses, the norm of the gradient; then the load of each expert."""
    model, train = CASES[name]
    t, rows = trainer(model, kind, **train), []
    for _ in range(STEPS):
        parts, routing = t.train_step()
        rows.append((list(parts.values()), [s["load"] for s in t.ranks.statistics(routing)]))
    return rows


def resumed(out: Path, kind: str = "none", stop_after: int | None = None) -> list[float]:
    t = trainer(MODEL, kind, out)
    t.fit(resume=True, stop_after=stop_after)
    return [row["ce"] for row in t.rows]


def wire() -> int:
    """Bytes that this process has sent over TCP and that arrived, from the kernel's own count (Linux)."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not entry.readlink().name.startswith("socket:"):
                continue
            with socket.fromfd(int(entry.name), socket.AF_INET, socket.SOCK_STREAM) as s:
                total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 120)[0]
        except (OSError, struct.error):         # closed meanwhile, or not TCP
            continue
    return total


def sent(kind: str) -> float:
    """Bytes that a process sends for one step, the mean over the processes."""
    t = trainer(WIDE, kind, batch_size=64)
    t.train_step()
    t.ranks.any(False)                          # all are there
    before = wire()
    for _ in range(3):
        t.train_step()
    t.ranks.any(False)
    return t.ranks.mean(torch.tensor(wire() - before).double()).item() / 3


def rank_of(size: int, rank: int, port: int, folder: Path) -> None:
    """One process of `size`."""
    torch.set_num_threads(1)
    if size == 1:
        found = {"losses": {name: losses(name) for name in CASES}}
        for kind in KINDS:
            resumed(folder / f"{kind}-from-1-in-4", stop_after=QUARTER)
    else:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        found = {"losses": {f"{kind}: {name}": losses(name, kind) for kind in KINDS for name, (model, _) in CASES.items()
                            if not (kind == "fsdp" and model.share_router) and (kind == "ddp" or name != "adapters")}}
        found["sent"] = {kind: sent(kind) for kind in KINDS} if Path("/proc/self/fd").is_dir() else None
        for out in sorted(folder.glob(f"*-in-{size}")):
            found[out.name] = resumed(out, out.name.split("-")[0], 2 * QUARTER if size == 4 else None)
        parallel.finish()
    if rank == 0:
        (folder / f"{size}.json").write_text(json.dumps(found), encoding="utf-8")


def main(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for size in (1, 4, 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = [fork.Process(target=rank_of, args=(size, rank, port, folder)) for rank in range(size)]
        for r in ranks:
            r.start()
        for r in ranks:
            r.join()
            assert r.exitcode == 0, f"a rank of {size} ended with {r.exitcode}"
        if size == 4:                           # what four processes wrote, two go on with, and one
            for out in list(folder.glob("*-in-4")):
                for goal in ("in-2", "in-1"):
                    shutil.copytree(out, folder / out.name.replace("in-4", goal))


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  what DDP would import in each process

    main(Path(sys.argv[1]))
