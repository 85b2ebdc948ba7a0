"""Do the experts of a small model specialize within half a minute of training? (chapter 0)

    python benchmarks/specialisation.py             five training seeds; writes benchmarks/results/specialisation.json
    python benchmarks/specialisation.py --quick     the same code in a minute; prints, writes only where --out says

Settled before the first run: a token counts with its first-choice expert, and the claim is about the mean over the
layers of the mutual information of expert and domain, less the permutation null, on held-out documents.

Shapes: R windows of T tokens, N = R x T tokens in all, L layers, E experts.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minimoe import ModelConfig, MoETransformer, TrainConfig, Trainer
from minimoe.data.corpora import Document, load_corpus
from minimoe.data.loader import TextData, join
from minimoe.data.mixture import Mixture, Stream
from minimoe.data.tokenizer import Tokenizer
from minimoe.explore import specialisation, specialisation_difference, token_identity_router
from minimoe.explore.specialisation import Difference, Specialisation

REAL = ("code", "prose")         # the domains that nobody generated: the claim is looked at on them alone, too
RESULT = Path(__file__).parent / "results" / "specialisation.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Text, model, training, and how much is measured."""

    corpora: tuple[str, ...] = ("pydocs", "stdlib", "worlds")
    characters: int = 1_000_000 # of a corpus at most: more than is read costs time before the first step
    vocab: int = 1024
    dim: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    experts: int = 8
    top_k: int = 2
    hidden: int = 64
    seq_len: int = 128
    batch: int = 16
    lr: float = 3e-3
    steps: int = 300
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    window: int = 64            # tokens of one piece of a document that is measured on
    documents: int = 24         # held-out documents per domain that are measured on
    pieces: int = 48            # windows of them per domain, fewer where they are short
    known: int = 300            # windows of training text per domain, to fit routers on that see the token alone
    draws: int = 500            # of the bootstrap


@dataclass(frozen=True)
class Probe:
    """Text to measure on: `tokens` (R, T), and for each of the N tokens its `domain` and its `document`, as numbers."""

    tokens: torch.Tensor
    domain: np.ndarray
    document: np.ndarray
    domains: tuple[str, ...]


def prepare(s: Settings) -> tuple[TextData, Probe, Probe]:
    """What to train on, the corpora in equal shares; windows of its documents; and windows of held-out documents.

    The library holds out few documents where they are long. An interval over documents needs more of them, so further
    whole ones are set apart, by a hash of their names, until there are enough of each domain.
    """
    train, held = [], []
    for corpus in map(load_corpus, s.corpora):
        apart = list(corpus.held_out)
        hashed = sorted(corpus.train, key=lambda d: zlib.crc32(d.name.encode()))
        for domain in sorted({d.domain for d in hashed}):
            missing = s.documents - sum(d.domain == domain for d in apart)
            apart += [d for d in hashed if d.domain == domain and len(d.text) > 8 * s.window][:max(0, missing)]
            held += [d for d in apart if d.domain == domain][:s.documents]
        rest = [d for d in hashed if d not in apart]
        fits = np.searchsorted(np.cumsum([len(d.text) for d in rest]), s.characters)
        train.append(tuple(rest[:max(1, fits)]))
    tokenizer = Tokenizer.bpe([d.text for documents in train for d in documents], s.vocab)
    streams = tuple(Stream(name, join(documents, tokenizer)) for name, documents in zip(s.corpora, train))
    data = TextData(Mixture(streams, (1.0,) * len(streams)), (), tokenizer)     # no corpora: no evaluation while training
    return data, probe(sum(train, ()), tokenizer, s.known, s.window), probe(held, tokenizer, s.pieces, s.window)


def model_config(s: Settings, vocab_size: int) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, dim=s.dim, n_layers=s.layers, n_heads=s.heads, n_kv_heads=s.kv_heads,
                       max_seq_len=s.seq_len, n_experts=s.experts, top_k=s.top_k, expert_hidden=s.hidden,
                       router="softmax", balance="aux")


def train_config(s: Settings, seed: int) -> TrainConfig:
    return TrainConfig(steps=s.steps, batch_size=s.batch, lr=s.lr, warmup=min(20, s.steps), seed=seed, log_every=10,
                       eval_every=0, device=s.device, dtype=s.dtype, threads=s.threads)


def train(data: TextData, s: Settings, seed: int) -> tuple[MoETransformer, Trainer]:
    """The model of that seed as it was before the first step, and the trainer that has trained it."""
    torch.manual_seed(seed)
    model = MoETransformer(model_config(s, data.tokenizer.vocab_size))
    untrained = copy.deepcopy(model)
    trainer = Trainer(model, train_config(s, seed), data, progress=False)
    trainer.fit()
    return untrained, trainer


def probe(documents: Sequence[Document], tokenizer: Tokenizer, pieces: int, window: int) -> Probe:
    """About `pieces` windows of each domain, shared out evenly among its documents and spread evenly within each."""
    domains = tuple(sorted({d.domain for d in documents}))
    in_domain, rows, domain, document = Counter(d.domain for d in documents), [], [], []
    for number, doc in enumerate(documents):
        each = -(-pieces // in_domain[doc.domain])
        ids = tokenizer.encode(doc.text)
        n = min(each, len(ids) // window)
        for start in np.linspace(0, len(ids) - window, n).astype(int) if n else ():
            rows.append(ids[start:start + window])
            domain.append(domains.index(doc.domain))
            document.append(number)
    return Probe(torch.tensor(rows), np.repeat(domain, window), np.repeat(document, window), domains)


@torch.no_grad()
def first_choices(model: MoETransformer, text: Probe) -> np.ndarray:
    """(N, L) the first expert of each token in each layer."""
    was_training, device = model.training, model.embedding.weight.device
    model.eval()
    batches = [[r.experts[:, 0].cpu() for r in model(rows.to(device)).routing] for rows in text.tokens.split(32)]
    model.train(was_training)
    return torch.cat([torch.stack(layers, 1) for layers in batches]).numpy()


def numbered(first_NL: np.ndarray, n_experts: int) -> np.ndarray:
    """The experts of all layers numbered through: layer l, expert e becomes l * E + e.

    Every token is in every layer once, so the layer tells nothing about the domain, and the information of such a
    number about the domain is exactly the mean over the layers: I(layer, expert; domain) = I(expert; domain | layer).

    >>> numbered(np.array([[1, 0]]), n_experts=8).tolist()
    [[1, 8]]
    """
    return first_NL + n_experts * np.arange(first_NL.shape[1])


def habits(known: Probe, known_NL: np.ndarray, new: Probe, n_experts: int, vocab_size: int) -> np.ndarray:
    """(N, L) the same router with its context taken away: a token goes where its id went most often in `known`.

    An id that is not in `known` goes to the expert with the most tokens.
    """
    ids_N, columns = known.tokens.flatten().numpy(), []
    for first_N in known_NL.T:
        counts = np.bincount(ids_N * n_experts + first_N, minlength=vocab_size * n_experts).reshape(vocab_size, -1)
        habit_V = np.where(counts.sum(1) > 0, counts.argmax(1), counts.sum(0).argmax())
        columns.append(habit_V[new.tokens.flatten().numpy()])
    return np.stack(columns, 1)


def measure(model: MoETransformer, untrained: MoETransformer, known: Probe, new: Probe, draws: int = 500) -> dict:
    """Everything that is claimed about one trained model, as plain numbers in bits, rounded to 4 places."""
    e, v = model.cfg.n_experts, model.cfg.vocab_size
    trained_NL, untrained_NL, known_NL = (first_choices(m, t) for m, t in
                                          ((model, new), (untrained, new), (model, known)))
    habit_NL = habits(known, known_NL, new, e, v)
    expert_V = token_identity_router(known.tokens.flatten().numpy(), known.domain, e, v)
    rivals = {"untrained": numbered(untrained_NL, e), "identity": expert_V[new.tokens.flatten().numpy()],
              "habit": numbered(habit_NL, e)}
    compare = lambda rival, at=slice(None): specialisation_difference(
        numbered(trained_NL, e)[at], rival[at], new.domain[at], new.document[at], e * model.cfg.n_layers, n_boot=draws)
    layer = lambda first_N: plain(specialisation(first_N, new.domain, new.document, e, n_boot=draws))
    differences = {name: compare(rival) for name, rival in rivals.items()}
    real_N = np.isin(np.array(new.domains)[new.domain], REAL)
    real = compare(rivals["untrained"], real_N) if real_N.any() else None
    return {
        "trained": plain(differences["untrained"].a),
        **{name: plain(d.b) for name, d in differences.items()},
        "trained_minus": {name: plain(d) for name, d in differences.items()},
        "layers": {"trained": [layer(c) for c in trained_NL.T], "untrained": [layer(c) for c in untrained_NL.T]},
        "real_text": real and {"trained": plain(real.a), "untrained": plain(real.b), "trained_minus_untrained": plain(real)},
        "agrees_with_habit": [round(float(x), 4) for x in (habit_NL == trained_NL).mean(0)],
    }


def plain(x: Specialisation | Difference) -> dict[str, float]:
    """The numbers of an estimate by name, rounded."""
    return {k: round(v, 4) for k, v in dataclasses.asdict(x).items() if isinstance(v, float)}


def shares(first_NL: np.ndarray, text: Probe, n_experts: int) -> list:
    """For each layer and domain the share of its tokens that each expert is the first choice of."""
    table = [[np.bincount(first_N[text.domain == d], minlength=n_experts) for d in range(len(text.domains))]
             for first_N in first_NL.T]
    return [[[round(float(n / row.sum()), 4) for n in row] for row in layer] for layer in table]


def run(seeds: int, s: Settings, say: Callable[[str], None] = print) -> dict:
    """Trains and measures one model per seed."""
    data, known, new = prepare(s)
    cfg = model_config(s, data.tokenizer.vocab_size)
    result = {"what": __doc__.split("\n")[0], "date": datetime.date.today().isoformat(), "machine": machine(),
              "settings": dataclasses.asdict(s), "params": cfg.num_params(), "active_params": cfg.active_params(),
              "domains": new.domains, "held_out": {name: {"documents": len(set(new.document[new.domain == i].tolist())),
                                  "tokens": int((new.domain == i).sum())} for i, name in enumerate(new.domains)},
              "seeds": []}
    for seed in range(seeds):
        started = time.process_time()
        untrained, trainer = train(data, s, seed)
        cpu_seconds = round(time.process_time() - started, 1)
        found = measure(trainer.model, untrained, known, new, s.draws)
        stats = trainer.rows[-1]["routing"]
        result["seeds"].append({"seed": seed, **found, "max_vio": [x["max_vio"] for x in stats],
                                "ce": [[row["step"], row["ce"]] for row in trainer.rows],
                                "cpu_seconds": cpu_seconds})
        if seed == 0:
            trained_NL, untrained_NL = (first_choices(m, new) for m in (trainer.model, untrained))
            result["shares"] = {"trained": shares(trained_NL, new, s.experts),
                                "untrained": shares(untrained_NL, new, s.experts)}
            result["favourites"] = favourites(trained_NL, new, data.tokenizer, s.experts)
            result["same_token"] = same_token(trained_NL[:, -1], new, data.tokenizer, s.experts)
        d = found["trained_minus"]
        say(f"seed {seed}: trained {found['trained']['excess']:.3f} bits; minus untrained {line(d['untrained'])}; minus "
            f"identity {line(d['identity'])}; minus habit {line(d['habit'])}; {cpu_seconds} CPU seconds")
    return result


def favourites(first_NL: np.ndarray, text: Probe, tokenizer: Tokenizer, n_experts: int, most: int = 6) -> list:
    """For each layer and expert the pieces of text that it is most often the first choice of, with their counts."""
    ids_N = text.tokens.flatten().numpy()
    return [[[[tokenizer.decode([int(i)]), int(n)] for i, n in Counter(ids_N[first_N == e].tolist()).most_common(most)]
             for e in range(n_experts)] for first_N in first_NL.T]


def same_token(first_N: np.ndarray, text: Probe, tokenizer: Tokenizer, n_experts: int, least: int = 20) -> list[dict]:
    """Tokens that stand at least `least` times in two domains or more: which expert each domain sends them to.

    For every domain the number of places, the commonest first expert, and the share of the places that it has.
    """
    ids_N, found = text.tokens.flatten().numpy(), []
    for token in np.unique(ids_N).tolist():
        by_domain = {}
        for d, name in enumerate(text.domains):
            counts = np.bincount(first_N[(ids_N == token) & (text.domain == d)], minlength=n_experts)
            if counts.sum() >= least:
                by_domain[name] = [int(counts.sum()), int(counts.argmax()), round(float(counts.max() / counts.sum()), 4)]
        if len(by_domain) > 1:
            found.append({"token": tokenizer.decode([token]), "domains": by_domain})
    return sorted(found, key=lambda row: -sum(n for n, _, _ in row["domains"].values()))


def line(d: dict[str, float]) -> str:
    return f"{d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"


def machine() -> dict:
    """What the numbers were made on: no names of hosts or users."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, 20 steps, one corpus, fewer draws")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name} in results/, with --quick nowhere")
    args = parser.parse_args(argv)
    settings, seeds = Settings(steps=args.steps, threads=args.threads), args.seeds
    if args.quick:
        settings, seeds = Settings(corpora=("worlds",), steps=20, known=30, draws=50), 2
    out = args.out or (None if args.quick else RESULT)
    started = time.perf_counter()
    result = run(seeds, settings, lambda text: print(text, flush=True))
    result["command"] = shlex.join(["python", "benchmarks/specialisation.py", *argv])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_suffix(".part")
        scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        scratch.replace(out)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
