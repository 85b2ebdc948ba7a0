"""Four routers on the same text with the same work: what does learning to route buy? (chapter 4)

    python benchmarks/routers.py             two tokenizers, four routers, five seeds; writes benchmarks/results/routers.json
    python benchmarks/routers.py --quick     the same code in a minute; prints, writes only where --out says

Within a seed all routers start from the same weights, read the same batches, and send every token to k experts.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minimoe import ModelConfig, MoETransformer, TrainConfig, Trainer
from minimoe.data.corpora import Corpus, worlds
from minimoe.data.loader import TextData, join
from minimoe.data.mixture import Mixture, Stream
from minimoe.data.tokenizer import Tokenizer

ROUTERS = {
    "learned": "softmax top-k, trained with the rest",
    "frozen": "the same, but its matrix stays as it was drawn",
    "hash": "a fixed function of the token's number",
    "random": "dice, thrown anew for every token: the negative control",
}
RESULT = Path(__file__).parent / "results" / "routers.json"
# 97.5 % point of Student's t by degrees of freedom: half the width of a 95 % interval, in standard errors
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run: text, model, steps."""

    tokenizer: str = "bpe"          # or characters
    vocab: int = 512                # of the bpe tokenizer
    documents: int = 8000           # of the corpus `worlds`; every tenth is held out
    held_out: int = 160             # held-out documents that are measured on
    steps: int = 1200
    eval_every: int = 300
    batch: int = 8
    seq_len: int = 128
    dim: int = 64
    layers: int = 4
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    hidden: int = 64
    lr: float = 2e-3
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1


def load_text(s: Settings) -> TextData:
    """The corpus `worlds` in tokens; the tokenizer is made from the training documents."""
    corpus = worlds(s.documents)
    train, held = corpus.train, corpus.held_out[:s.held_out]
    if s.tokenizer == "characters":
        tokenizer = Tokenizer.characters("".join(d.text for d in train))
    else:
        tokenizer = Tokenizer.bpe([d.text for d in train[:1000]], s.vocab)
    stream = Stream("worlds", join(train, tokenizer))
    return TextData(Mixture((stream,), (1.0,)), (Corpus("worlds", train, held),), tokenizer)


def make_model(router: str, seed: int, s: Settings, vocab_size: int) -> MoETransformer:
    """The model of that seed with one of the `ROUTERS`; all other weights are the same for all four."""
    learned = ModelConfig(vocab_size=vocab_size, dim=s.dim, n_layers=s.layers, n_heads=s.heads, max_seq_len=s.seq_len,
                          n_experts=s.experts, top_k=s.top_k, expert_hidden=s.hidden, router="softmax", balance="aux")
    torch.manual_seed(seed)
    model = MoETransformer(learned)
    if router == "frozen":
        for block in model.blocks:
            block.ffn.router.weight.requires_grad_(False)
    if router in ("hash", "random"):
        weights = model.state_dict()
        model = MoETransformer(dataclasses.replace(learned, router=router, balance="none"))
        model.load_state_dict({k: v for k, v in weights.items() if "router" not in k})
    return model


def train(router: str, seed: int, s: Settings, text: TextData, log_every: int = 50) -> tuple[Trainer, dict]:
    """Trains one model; the trainer, and what is recorded of the run."""
    model = make_model(router, seed, s, text.tokenizer.vocab_size)
    cfg = TrainConfig(steps=s.steps, batch_size=s.batch, lr=s.lr, warmup=min(50, s.steps // 5), seed=seed,
                      eval_every=s.eval_every, log_every=log_every, device=s.device, dtype=s.dtype, threads=s.threads)
    trainer = Trainer(model, cfg, text, progress=False)
    trainer.fit()
    last = trainer.rows[-1]
    known, new = token_choices(trainer.model, text, s)
    return trainer, {
        "tokenizer": s.tokenizer, "router": router, "seed": seed, "val_ce": last["val_ce"], "val_bpb": last["val_bpb"],
        "val_curve": [[row["step"], row["val_bpb"]] for row in trainer.rows if "val_bpb" in row],
        "curve": [[row["step"], round(row["ce"], 4)] for row in trainer.rows],
        "by_identity": [round(share_by_identity(a, b, text.tokenizer.vocab_size, s.experts), 4)
                        for a, b in zip(known, new)],
        "largest_load": [round(float(np.bincount(b[1]).max() / len(b[1])), 4) for b in new],
        "seconds": round(trainer.seconds, 1),
    }


@torch.no_grad()
def choices(model: MoETransformer, ids: np.ndarray, seq_len: int, batch: int = 16) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each MoE layer the token ids of a stream and the first expert of each, in windows of `seq_len`."""
    ids = ids[:len(ids) // (seq_len * batch) * seq_len * batch].astype(np.int64)
    model.eval()
    torch.manual_seed(0)                                        # for the router that throws dice
    device = model.embedding.weight.device
    found = [[r.experts[:, 0].cpu().numpy() for r in model(torch.from_numpy(x).to(device)).routing]
             for x in ids.reshape(-1, batch, seq_len)]
    return [(ids, np.concatenate(layer)) for layer in zip(*found)]


def token_choices(model: MoETransformer, text: TextData, s: Settings) -> tuple[list, list]:
    """The choices on a piece of the training text, and on the held-out text."""
    held = join(text.corpora[0].held_out, text.tokenizer)
    seen = text.mixture.streams[0].tokens[:4 * len(held)]
    return choices(model, seen, s.seq_len), choices(model, held, s.seq_len)


def share_by_identity(known: tuple, new: tuple, vocab_size: int, experts: int) -> float:
    """How often the first expert is foretold by the token's number alone.

    The forecast is the expert that most tokens of that number went to in `known`; it is scored on `new`. A router that
    is a function of the number scores 1, dice score one over the number of experts.

    >>> share_by_identity((np.array([5, 5, 7]), np.array([1, 1, 0])), (np.array([5, 7]), np.array([1, 1])), 8, 2)
    0.5
    """
    ids, first = known
    counts = np.bincount(ids * experts + first, minlength=vocab_size * experts).reshape(vocab_size, experts)
    forecast = np.where(counts.sum(1) > 0, counts.argmax(1), counts.sum(0).argmax())
    ids, first = new
    return float((forecast[ids] == first).mean())


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b, seed by seed, and half the width of its 95 % interval (Student's t).

    >>> [round(x, 3) for x in paired([1.0, 1.2, 1.1], [0.9, 1.0, 1.0])]
    [0.133, 0.143]
    """
    d = np.array(a) - np.array(b)
    return float(d.mean()), float(STUDENT[len(d) - 1] * d.std(ddof=1) / len(d) ** 0.5)


def values(result: dict, tokenizer: str, router: str, key: str = "val_bpb") -> list:
    """One number a seed, in the order of the seeds."""
    rows = [r for r in result["runs"] if (r["tokenizer"], r["router"]) == (tokenizer, router)]
    return [r[key] for r in sorted(rows, key=lambda r: r["seed"])]


def run(tokenizers: list[str], seeds: int, settings: Settings, say=print, after=lambda result: None) -> dict:
    """All runs; `after(result)` is called when another one is done."""
    result = {"what": __doc__.split("\n")[0], "date": datetime.date.today().isoformat(), "machine": machine(),
              "settings": dataclasses.asdict(settings), "runs": []}
    cut = {t: dataclasses.replace(settings, tokenizer=t) for t in tokenizers}
    texts = {t: load_text(s) for t, s in cut.items()}
    for seed in range(seeds):
        for tokenizer in tokenizers:
            for router in ROUTERS:
                record = train(router, seed, cut[tokenizer], texts[tokenizer])[1]
                result["runs"].append(record)
                say(f"{tokenizer:<10} {router:<8} seed {seed}: {record['val_bpb']:.4f} bits per byte, "
                    f"by identity {record['by_identity']}, {record['seconds']} s")
                after(result)
    return result


def machine() -> dict:
    """What the numbers were made on: no names of hosts or users."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, 20 steps, a small model")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--tokenizers", nargs="+", default=["bpe", "characters"], choices=["bpe", "characters"])
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name} in results/, with --quick nowhere")
    args = parser.parse_args(argv)
    settings, seeds = Settings(steps=args.steps), args.seeds
    if args.quick:
        settings, seeds = Settings(steps=20, eval_every=10, documents=400, held_out=20, layers=2, seq_len=64), 2
    out = args.out or (None if args.quick else RESULT)

    def write(result: dict) -> None:
        if out is not None:
            result["command"] = shlex.join(["python", "benchmarks/routers.py", *argv])
            out.parent.mkdir(parents=True, exist_ok=True)
            scratch = out.with_suffix(".part")
            scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            scratch.replace(out)

    started = time.perf_counter()
    result = run(args.tokenizers, seeds, settings, lambda line: print(line, flush=True), write)
    for tokenizer in args.tokenizers:
        for router in list(ROUTERS)[1:]:
            mean, half = paired(values(result, tokenizer, router), values(result, tokenizer, "learned"))
            print(f"{tokenizer}: {router} minus learned {mean:+.4f} +- {half:.4f} bits per byte")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
