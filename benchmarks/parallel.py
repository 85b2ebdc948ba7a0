"""The cost model beside measured steps: 2 and 4 processes with ddp, fsdp and ep, on this machine.

usage: python benchmarks/parallel.py [--quick] [--out FILE]

The machine is calibrated first, per number of processes R, all R at once: the rate of a training step of one process on its
own share (so that the model's own weakness, small matrix products, is not blamed on the ranks), and for gloo the bandwidth
and the latency of an all-reduce of 16 MB and of 4 bytes. Then steps are timed, medians over rounds that alternate
between the kinds. gloo has no reduce-scatter: fsdp's counts twice. Where processes share cores, R of them compute no faster than one.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from minimoe import parallel
from minimoe.config import ModelConfig, TrainConfig
from minimoe.cost import Machine, step_cost
from minimoe.model import MoETransformer
from minimoe.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "parallel.json"
CFG = ModelConfig(vocab_size=512, dim=256, n_layers=4, n_heads=8, max_seq_len=128, n_experts=8, top_k=2, expert_hidden=256)
BATCH = 16
KINDS = ("ddp", "fsdp", "ep")


class Tokens:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(0, CFG.vocab_size, (CFG.max_seq_len + 1,), generator=torch.Generator().manual_seed(i))
        return tokens[:-1], tokens[1:]


def trainer(kind: str, batch: int) -> Trainer:
    torch.manual_seed(0)
    train = TrainConfig(steps=1000, batch_size=batch, device="cpu", dtype="float32", warmup=0, parallel=kind)
    return Trainer(MoETransformer(CFG), train, Tokens(), progress=False)


def seconds(run, times: int) -> float:
    """The median of `times` calls, each begun by all processes together."""
    run()
    taken = []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def rank_of(rank: int, size: int, port: int, rounds: int, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    alone = trainer("none", BATCH // size)
    large, small = torch.ones(2**22), torch.ones(1)
    slow, quick = seconds(lambda: dist.all_reduce(large), 5), seconds(lambda: dist.all_reduce(small), 50)
    steps = 3
    own = seconds(alone.train_step, steps)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    measured = {kind: [] for kind in KINDS}
    trainers = {kind: trainer(kind, BATCH) for kind in KINDS}
    for _ in range(rounds):
        for kind, t in trainers.items():
            measured[kind].append(seconds(t.train_step, steps))
    if rank == 0:
        tokens = BATCH // size * CFG.max_seq_len
        machine = Machine(flops=3 * tokens * CFG.flops_per_token() / own, latency=quick / 2 / (size // 2), memory=2**34,
                          bandwidth=2 * (size - 1) / size * large.nbytes / (slow - quick))
        rows = []
        for kind in KINDS:
            cost = step_cost(CFG, CFG.max_seq_len, BATCH, size, machine, kind)
            expected = cost.total + cost.sent.get("reduce_scatter", 0) / machine.bandwidth
            took = statistics.median(measured[kind])
            rows.append({"kind": kind, "processes": size, "expected_s": expected, "compute_s": cost.compute,
                         "measured_s": took, "ratio": took / expected, "raw_s": measured[kind], "sent_bytes": cost.sent})
        pipe.send({"flops": machine.flops, "bandwidth": machine.bandwidth, "latency": machine.latency, "rows": rows})
    parallel.finish()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="one round, and nothing is recorded unless --out is given")
    options.add_argument("--out", type=Path, help="where the JSON goes")
    given, found, context = options.parse_args(), [], multiprocessing.get_context("spawn")
    for size in (2, 4):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        here, there = context.Pipe()
        ranks = [context.Process(target=rank_of, args=(r, size, port, 1 if given.quick else 5, there)) for r in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        found.append(here.recv())
        print(f"{size} processes: {found[-1]['flops'] / 1e9:.1f} GFLOP/s each, {found[-1]['bandwidth'] / 1e6:.0f} MB/s, "
              f"{found[-1]['latency'] * 1e6:.0f} us\n| kind | expected, ms | of it compute | measured, ms | measured / expected |\n|---|---|---|---|---|")
        for row in found[-1]["rows"]:
            print(f"| {row['kind']} | {row['expected_s'] * 1e3:.0f} | {row['compute_s'] * 1e3:.0f} | {row['measured_s'] * 1e3:.0f} | {row['ratio']:.2f} |")
    if given.out or not given.quick:
        result = {"command": " ".join(["python", "benchmarks/parallel.py", *sys.argv[1:]]), "machine": {"processor": platform.machine(), "cores": os.cpu_count(),
                  "load": os.getloadavg()[0]}, "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}, "runs": found}
        (given.out or RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
