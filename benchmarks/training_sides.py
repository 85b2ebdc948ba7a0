"""One side of one comparison of training.py, as it runs in its own process: what it builds and how it is timed."""
from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import baseline_dense
import baseline_moe
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe import ModelConfig, MoETransformer, TrainConfig, Trainer
from minimoe.checkpoint import checkpoints
from minimoe.config import Config, DataConfig, load_config
from minimoe.data.loader import load_data
from minimoe.device import tune_cpu
from minimoe.start import train_from_config

CONFIGS = Path(__file__).parents[1] / "configs"
BLOCK = 64              # the windows that the whole held-out tenth is read in, by every side alike
MOELLAMA = ModelConfig(vocab_size=5000, dim=256, n_layers=4, n_heads=8, max_seq_len=256, n_experts=8, top_k=2,
                       expert_hidden=1024, n_shared_experts=1, shared_gate=True, activation="gelu", router_noise=0.1, dropout=0.1)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process is asked to do."""

    kind: str                       # shakespeare, loader, moellama or resume
    side: str                       # ours, twin or baseline; of resume: moellama or pydocs
    seed: int = 0
    steps: int | None = None        # of shakespeare: None is as many as the recipe says
    warmup: int = 2                 # updates that are not timed, of loader and moellama
    batches: int = 200              # that the loader makes
    batch: int = 16
    seq: int = 256
    tokenizer: str = "bpe"          # of loader and resume


def measure(work: Work) -> dict:
    """The figures of a work, `value` first. Two threads, or as many as OMP_NUM_THREADS says."""
    tune_cpu(int(os.environ.get("OMP_NUM_THREADS", 2)))
    return {"shakespeare": shakespeare, "loader": loader, "moellama": moellama, "resume": resume}[work.kind](work)


# --- seconds to a loss -----------------------------------------------------------------------------------------------
def shakespeare_text() -> tuple[str, str]:
    """The first nine tenths, and the last tenth by characters, as nanoGPT cuts them."""
    text = (Path(os.environ.get("MINIMOE_DATA", "dataset")) / "tinyshakespeare.txt").read_text(encoding="utf-8")
    return text[:int(len(text) * 0.9)], text[int(len(text) * 0.9):]


@torch.no_grad()
def held_out(logits: Callable[[Tensor], Tensor], ids: np.ndarray) -> float:
    """Mean cross-entropy of all targets of `ids` in non-overlapping windows of BLOCK, the last one shorter."""
    ids_N, total = torch.from_numpy(ids.astype(np.int64)), 0.0
    n = (len(ids_N) - 1) // BLOCK * BLOCK
    inputs_WB, targets_WB = ids_N[:n].view(-1, BLOCK), ids_N[1:n + 1].view(-1, BLOCK)
    batches = [*zip(inputs_WB.split(64), targets_WB.split(64)), (ids_N[None, n:-1], ids_N[None, n + 1:])]
    for inputs_WB, targets_WB in batches:
        if inputs_WB.numel():
            total += F.cross_entropy(logits(inputs_WB).flatten(0, 1).float(), targets_WB.flatten(), reduction="sum").item()
    return total / (len(ids) - 1)


def shakespeare(work: Work) -> dict:
    """Seconds from before the first to after the last of a number of updates fixed beforehand, and the loss then."""
    train_text, val_text = shakespeare_text()
    if work.side == "baseline":
        known = {c: i for i, c in enumerate(sorted(set(train_text + val_text)))}
        ids = lambda text: np.array([known[c] for c in text])
        training = baseline_dense.Training(ids(train_text), len(known), work.seed)
        model, steps, step = training.model, work.steps or baseline_dense.STEPS, training.step
        per_step, logits = baseline_dense.BATCH * baseline_dense.BLOCK, model
    else:
        config = load_config(CONFIGS / "shakespeare.yaml")
        steps = work.steps or config.train.steps
        data = load_data(config.data)
        assert sum(len(d.text) for c in data.corpora for d in c.train) <= len(train_text), "trains on held-out text"
        ids = lambda text: np.array(data.tokenizer.encode(text))
        cfg = replace(config.model, vocab_size=data.tokenizer.vocab_size)
        torch.manual_seed(work.seed)
        model = MoETransformer(cfg.dense_twin() if work.side == "twin" else cfg)
        trainer = Trainer(model, replace(config.train, steps=steps, seed=work.seed, device="cpu"), data, progress=False)
        step, per_step = trainer.train_step, config.train.batch_size * trainer.seq_len
        autocast = trainer.choice.autocast

        def logits(tokens_BT: Tensor) -> Tensor:
            with autocast():
                return model(tokens_BT).logits

    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    model.eval()
    return {"value": seconds, "cpu_seconds": cpu, "loss": held_out(logits, ids(val_text)), "steps": steps,
            "tokens": steps * per_step, "params": sum(p.numel() for p in model.parameters())}


# --- tokens per second -----------------------------------------------------------------------------------------------
def tokens_per_second(work: Work, step: Callable[[], object]) -> float:
    times = []
    for _ in range(work.warmup + work.steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return work.batch * work.seq / statistics.median(times[work.warmup:])


def loader(work: Work) -> dict:
    """What share of a step's time its batch takes: three sources packed to `seq`, the model of configs/pydocs.yaml. The
    batches are made one by one and not ahead, and they are part of the step that they are compared with."""
    config = load_config(CONFIGS / "pydocs.yaml")
    data = load_data(replace(config.data, mixture=("pydocs", "stdlib", "worlds"), tokenizer=work.tokenizer))
    torch.manual_seed(work.seed)
    train = replace(config.train, batch_size=work.batch, seq_len=work.seq, device="cpu")
    trainer = Trainer(MoETransformer(replace(config.model, vocab_size=data.tokenizer.vocab_size)), train, data, progress=False)
    trains = tokens_per_second(work, trainer.train_step)
    started = time.perf_counter()
    for i in range(work.batches):       # of a seed that nothing has been read with
        data.mixture.batch(i, work.batch, work.seq, seed=work.seed + 1)
    loads = work.batches * work.batch * work.seq / (time.perf_counter() - started)
    return {"value": trains / loads, "loader_tokens_per_second": loads, "training_tokens_per_second": trains}


def moellama(work: Work) -> dict:
    """Tokens per second of training steps on random tokens."""
    cfg = replace(MOELLAMA, vocab_size=64, dim=32, n_heads=4, expert_hidden=32) if work.seq < 64 else MOELLAMA
    torch.manual_seed(work.seed)
    rows_NT = torch.randint(cfg.vocab_size, (256, work.seq + 1), generator=torch.Generator().manual_seed(1))
    if work.side == "ours":
        pairs = [(row[:-1], row[1:]) for row in rows_NT]
        trainer = Trainer(MoETransformer(cfg), TrainConfig(batch_size=work.batch, seq_len=work.seq, device="cpu"), pairs,
                          progress=False)
        model, step = trainer.model, trainer.train_step
    else:
        model = baseline_moe.TutorialMoE(vocab=cfg.vocab_size, dim=cfg.dim, heads=cfg.n_heads, hidden=cfg.expert_hidden)

        def step() -> float:
            rows = rows_NT[torch.randint(len(rows_NT), (work.batch,))]
            return model.step(rows[:, :-1], rows[:, 1:])

    return {"value": tokens_per_second(work, step), "params": sum(p.numel() for p in model.parameters())}


# --- resume ----------------------------------------------------------------------------------------------------------
class Started(Exception):
    """The first update of a resumed run is due."""


def resume(work: Work) -> dict:
    """Seconds from reading the text to the first update of a resumed run, less what only reading the files of its
    checkpoint takes in the same process. The start of Python and the imports are over by then, as for any command."""
    config = load_config(CONFIGS / "pydocs.yaml")
    if work.side == "moellama":
        config = Config(model=replace(MOELLAMA, vocab_size=None), data=DataConfig(mixture="pydocs", tokenizer_vocab=5000))
    train = replace(config.train, steps=4, batch_size=2, seq_len=work.seq, device="cpu")
    config = replace(config, train=train, data=replace(config.data, tokenizer=work.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train_from_config(config, run, stop_after=2, progress=False)
        state = [p for p in checkpoints(run)[-1].rglob("*") if p.is_file()]
        started = time.perf_counter()
        for path in state:
            path.read_bytes()
        reading = time.perf_counter() - started

        def first(self: Trainer) -> None:
            raise Started

        before, Trainer.train_step = Trainer.train_step, first
        started = time.perf_counter()
        try:
            train_from_config(config, run, resume=True, progress=False)
        except Started:
            total = time.perf_counter() - started
        finally:
            Trainer.train_step = before
        size = sum(p.stat().st_size for p in state)
    return {"value": total - reading, "start_seconds": total, "reading_seconds": reading, "state_mb": size / 1e6}
