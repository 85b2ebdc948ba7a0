"""The training loop: one for every device (chapter 8).

Shapes: B sequences, T tokens each.
"""
from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from minimoe import balance, parallel
from minimoe.checkpoint import Run, checkpoints, load_state, save, save_state, save_weights, write_safely
from minimoe.config import Config, DataConfig, GenerateConfig, TrainConfig, load_config
from minimoe.data.loader import TextData, join, load_data
from minimoe.data.tokenizer import Tokenizer
from minimoe.device import choose, tune_cpu
from minimoe.experts import MoE
from minimoe.generate import lay_out_for_decoding
from minimoe.model import MoETransformer, shape_table
from minimoe.optimizer import lr_scale, make_optimizer
from minimoe.settings import ConfigError, need, to_dict


class Trainer:
    """Trains a model and leaves a run folder.

    `data` is a corpus name, a `DataConfig`, a `TextData`, or any map-style dataset of (inputs, targets), each (T,) int64
    with targets already shifted. `fit()` returns the `Run`. Raises ConfigError before the first step for settings that
    do not fit together. `on_step(trainer, row)` is called after each logged row.
    """

    def __init__(self, model: MoETransformer, train: TrainConfig, data: object = "pydocs", *, out: str | Path | None = None,
                 tokenizer: Tokenizer | None = None, generate: GenerateConfig | None = None,
                 on_step: Callable[[Trainer, dict], None] | None = None, progress: bool = True):
        self.cfg, self.out, self.on_step, self.progress = train, Path(out) if out else None, on_step, progress
        self.ranks = parallel.start(train, model.cfg)
        self.choice = choose(train.device, train.dtype, train.threads)
        tune_cpu(train.threads and self.choice.threads)
        self.data, data_cfg = _as_data(data, tokenizer, model.cfg.vocab_size)
        self.tokenizer = getattr(self.data, "tokenizer", tokenizer)
        if self.tokenizer is not None and self.tokenizer.vocab_size > model.cfg.vocab_size:
            raise ConfigError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model's vocab_size is "
                              f"{model.cfg.vocab_size}: raise vocab_size, or leave it null")
        self.seq_len = train.seq_len or model.cfg.max_seq_len
        if self.seq_len > model.cfg.max_seq_len:
            raise ConfigError(f"seq_len={self.seq_len} is more than max_seq_len={model.cfg.max_seq_len}")
        self.config = Config(model=model.cfg, train=train, data=data_cfg, generate=generate or GenerateConfig())
        self.model = self.ranks.spread(model.to(self.choice.device))
        self.model.recompute(train.recompute)
        self.forward = self.ranks.wrap(torch.compile(self.model) if train.compile else self.model)
        self.optimizer = make_optimizer(self.model, train)
        corpora = self.data.corpora if isinstance(self.data, TextData) else ()
        self.held_out = {c.name: (join(c.held_out, self.tokenizer), sum(len(d.text.encode()) for d in c.held_out))
                         for c in corpora if c.held_out}
        self.step, self.best, self.seconds, self.rows, self.since = 0, math.inf, 0.0, [], []

    def fit(self, *, resume: bool = False, stop_after: int | None = None) -> Run:
        """Runs to the last step, or until `stop_after`, or until Ctrl-C, which ends with the step that is under way.

        The run folder keeps the weights with the lowest held-out loss, and checkpoints to go on from: with `resume` the
        newest complete one is where this run begins, and all that follows is as if it had never stopped. Raises
        ConfigError where the folder was made with other settings.
        """
        if self.out and resume and checkpoints(self.out):
            self._restore()
        elif self.out:
            if self.ranks.main:
                shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
            save(self.out, self.model, self.tokenizer, self.config, self.ranks)
            if self.ranks.main:
                (self.out / "metrics.jsonl").write_text("", encoding="utf-8")
        cfg, until = self.cfg, min(self.cfg.steps, stop_after or self.cfg.steps)
        bar = tqdm(total=cfg.steps, initial=self.step, disable=None if self.progress and self.ranks.main else True, unit="step",
                   dynamic_ncols=True)
        with ctrl_c() as pressed:
            stop = False
            while self.step < until and not stop:
                self._one_step(bar)
                stop = self.ranks.any(pressed)
                if self.out and (self.step == until or stop or cfg.save_every and self.step % cfg.save_every == 0):
                    self._save_state()
        bar.close()
        if self.out and not self.held_out:
            save_weights(self.out / "model.safetensors", self.model, self.ranks)
        model = self.ranks.gather(self.model).eval()
        return Run(lay_out_for_decoding(model) if self.step == cfg.steps else model, self.tokenizer, self.config, self.out)

    def _one_step(self, bar: tqdm) -> None:
        cfg, started = self.cfg, time.perf_counter()
        losses, routing_stats = self.train_step()
        self.seconds += time.perf_counter() - started
        self.since.append(losses)
        evaluate_now = self.step == cfg.steps or (cfg.eval_every and self.step % cfg.eval_every == 0)
        if self.step % cfg.log_every == 0 or evaluate_now:
            row = self._row(self.since, self.ranks.statistics(routing_stats))
            self.since = []
            if evaluate_now and self.held_out:
                row |= self.evaluate()
                self._keep_best(row["val_ce"])
            self._log(row)
            bar.set_postfix_str(f"loss {row['ce']:.3f}" + (f" held-out {row['val_bpb']:.3f} bpb" if "val_bpb" in row else "")
                                + f", {row['tokens'] / row['seconds']:,.0f} tokens/s"
                                + (f", {len(row['alerts'])} alerts: {row['alerts'][0]}" if "alerts" in row else ""))
        bar.update()

    def _save_state(self) -> None:
        progress = {"step": self.step, "best": self.best, "seconds": self.seconds, "since": self.since}
        save_state(self.out, self.step, self.model, self.optimizer, progress, self.cfg.keep, self.ranks)

    def _restore(self) -> None:
        """Goes back to the newest checkpoint; rows of the log that came after it are taken out."""
        different = differences(load_config(self.out / "config.yaml"), self.config)
        need(not different, f"{self.out} was made with other settings: {'; '.join(different)}. Give them as they were, or "
                            "name another folder")
        progress = load_state(checkpoints(self.out)[-1], self.model, self.optimizer, self.ranks)
        self.step, self.best, self.seconds, self.since = (progress[k] for k in ("step", "best", "seconds", "since"))
        path = self.out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
        if self.ranks.main:
            write_safely(path, lambda p: p.write_text("".join(kept), encoding="utf-8"))
        self.rows = [json.loads(line) for line in kept]

    def train_step(self) -> tuple[dict[str, float], list[dict]]:
        """One update; returns the raw losses and the routing statistics of each MoE layer."""
        cfg, model = self.cfg, self.model.train()
        # dropout and noise: a function of (seed, step, rank)
        torch.manual_seed(cfg.seed * 1_000_003 + self.step + (self.ranks.rank << 40))
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * lr_scale(self.step, cfg)
        micro = [self._batch(self.step * cfg.accumulate + i) for i in range(cfg.accumulate)]
        # of all ranks the mean, here and below: that of their gradients is then the gradient of the whole batch
        n_targets = self.ranks.mean(torch.tensor(sum(int((targets != -100).sum()) for _, targets in micro)).double()).item()
        if n_targets == 0:
            raise ConfigError(f"step {self.step}: no target in the whole batch (all are -100): check the dataset")
        total: dict[str, float] = {}
        routers = [m.router for m in model.modules() if isinstance(m, MoE)]
        counts = [0.0] * len(routers)
        for i, (inputs_BT, targets_BT) in enumerate(micro, 1):
            self.ranks.exchange(self.forward, now=i == cfg.accumulate)
            with self.choice.autocast():
                out = self.forward(inputs_BT, targets_BT)
            counts = [c + balance.load_counts(r) for c, r in zip(counts, out.routing)]
            # ce is a mean over this batch's targets: weigh it by their number; balancing losses by the batches
            share = int((targets_BT != -100).sum()) / n_targets
            extra = out.loss - out.losses["ce"]
            (out.losses["ce"] * share + extra / cfg.accumulate).backward()
            for name, value in out.losses.items():
                weight = share if name == "ce" else 1 / cfg.accumulate
                total[name] = total.get(name, 0.0) + value.item() * weight
        statistics = [balance.statistics(*pair) for pair in zip(out.routing, routers)]       # gradients not yet clipped
        norm, total = self.ranks.clip(model, cfg.clip), self.ranks.mean_of(total)
        if not math.isfinite(norm.item()):
            raise FloatingPointError(f"step {self.step}: the gradient is not finite (loss {total['ce']:.3f}); "
                                     "lower lr, or use dtype: float32")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if model.cfg.balance == "bias":
            for router, counts_E in zip(routers, counts):
                balance.update_bias(router.bias_E, self.ranks.sum(counts_E), model.cfg.bias_speed)
        self.step += 1
        return total | {"grad_norm": norm.item()}, statistics

    def evaluate(self) -> dict[str, object]:
        """Cross-entropy per token and bits per byte of the whole held-out text, and bits per byte of each corpus; each
        token is predicted from at least half a sequence of what stands before it."""
        total, count, n_bytes, val = 0.0, 0, 0, {}
        for name, (tokens, size) in self.held_out.items():
            with self.choice.autocast():
                nats, n = held_out_loss(self.model, tokens, self.seq_len, self.cfg.batch_size, self.seq_len // 2, self.ranks)
            val[name] = round(nats / math.log(2) / size, 5)
            total, count, n_bytes = total + nats, count + n, n_bytes + size
        return {"val_ce": round(total / count, 5), "val_bpb": round(total / math.log(2) / n_bytes, 5), "val": val}

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        b = self.cfg.batch_size
        if isinstance(self.data, TextData):
            inputs_BT, targets_BT = self.data.mixture.batch(index, b, self.seq_len, self.cfg.seed)
        else:
            n = len(self.data)
            picks = []
            for i in range(index * b, index * b + b):
                order = np.random.Generator(np.random.Philox((self.cfg.seed << 32) + i // n)).permutation(n)
                picks.append(self.data[int(order[i % n])])
            inputs_BT, targets_BT = (torch.stack([torch.as_tensor(p[j]) for p in picks]) for j in (0, 1))
        return tuple(self.ranks.rows(x_BT).to(self.choice.device) for x_BT in (inputs_BT, targets_BT))

    def _row(self, since: list[dict], routing_stats: list[dict]) -> dict:
        row = {"step": self.step, "tokens": self.step * self.cfg.batch_size * self.cfg.accumulate * self.seq_len,
               "seconds": round(self.seconds, 3), "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {name: round(sum(s[name] for s in since) / len(since), 5) for name in since[0]}
        row |= {"routing": routing_stats} if routing_stats else {}
        found = balance.alerts([*self.rows, row])
        return row | ({"alerts": found} if found else {})

    def _keep_best(self, val_ce: float) -> None:
        if val_ce < self.best:
            self.best = val_ce
            if self.out:
                save_weights(self.out / "model.safetensors", self.model, self.ranks)

    def _log(self, row: dict) -> None:
        self.rows.append(row)
        if self.out and self.ranks.main:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.on_step and self.ranks.main:
            self.on_step(self, row)


@torch.no_grad()
def held_out_loss(model: MoETransformer, tokens: np.ndarray, seq_len: int, batch_size: int = 16,
                  stride: int | None = None, ranks: parallel.Ranks = parallel.ALONE) -> tuple[float, int]:
    """Summed cross-entropy (nats) of every token but the first, and their number.

    The text is read in windows of `seq_len` at `stride` (default: no overlap); of each window but the first only the
    last `stride` tokens count, so that a smaller stride gives every token a longer context. Ranks share each batch.
    """
    was_training, device, stride = model.training, model.embedding.weight.device, stride or seq_len
    model.eval()
    text, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    starts = range(0, max(1, len(text) - 1 - (seq_len - stride)), stride)
    windows = [(text[i:i + seq_len + 1], seq_len - stride if i else 0) for i in starts]
    while windows:      # windows of one length and one number of tokens to skip go together
        like = [w for w in windows[:batch_size] if (len(w[0]), w[1]) == (len(windows[0][0]), windows[0][1])]
        windows, skip = windows[len(like):], like[0][1]
        batch = torch.stack([w for w, _ in like]).to(device)
        mine = batch[ranks.rank::ranks.size]
        logits = model((mine if len(mine) else batch[:1])[:, :-1]).logits[:len(mine), skip:]      # all ranks must call it
        total += F.cross_entropy(logits.flatten(0, 1).float(), mine[:, 1 + skip:].flatten(), reduction="sum").item()
    model.train(was_training)
    return ranks.sum(torch.tensor(total, dtype=torch.float64)).item(), len(text) - 1


@contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """While it lasts, the first Ctrl-C puts its signal in the list, and the second one interrupts as usual."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def differences(a: Config, b: Config) -> list[str]:
    """Each setting that differs but the device and the way of sharing the work, with both values.

    >>> differences(Config(), Config(train=TrainConfig(steps=7, device="cpu")))
    ['steps was 500, is 7']
    """
    pairs = [(name, old, new) for section, values in to_dict(a).items() for name, old in values.items()
             if (new := to_dict(b)[section][name]) != old and name not in ("device", "parallel")]
    return [f"{name} was {old}, is {new}" for name, old, new in pairs]


def _as_data(data: object, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[object, DataConfig]:
    if isinstance(data, TextData):
        names = [s.name for s in data.mixture.streams]
        return data, DataConfig(mixture=tuple(names))
    if isinstance(data, (str, DataConfig)):
        cfg = DataConfig(mixture=data, tokenizer_vocab=max(261, vocab_size)) if isinstance(data, str) else data
        return load_data(cfg, tokenizer), cfg
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data):
        return data, DataConfig()
    raise ConfigError(f"data={type(data).__name__}: give a corpus name, a DataConfig, or a dataset with at least one "
                      "(inputs, targets) pair")


def train_from_config(config: Config, out: str | Path | None = None, *, resume: bool = False, stop_after: int | None = None,
                      progress: bool = True, say: Callable[[str], None] = lambda line: None,
                      samples: Iterable[str] = ()) -> Run:
    """Everything that `minimoe train` does: data, tokenizer, a model from the seed, training, samples."""
    tune_cpu()
    ranks = parallel.start(config.train, config.model)
    say, samples = (say, samples) if ranks.main else (lambda line: None, ())
    goes_on = bool(resume and out and checkpoints(Path(out)))
    if resume and not goes_on:
        say(f"{out}: no complete checkpoint to go on from, so this run starts at step 0")
    data = load_data(config.data, Tokenizer.load(Path(out)) if goes_on else None) if ranks.main else None
    tokenizer = ranks.from_main(data and data.tokenizer.inner.to_str())         # trained once
    data = data or load_data(config.data, Tokenizer.from_text(tokenizer))
    vocab_size = config.model.vocab_size or data.tokenizer.vocab_size
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    torch.manual_seed(config.train.seed)
    trainer = Trainer(MoETransformer(config.model), config.train, data, out=out, generate=config.generate,
                      progress=progress)
    trainer.config = config
    for line in trainer.choice.reasons:
        say(line)
    say(data.mixture.describe(config.train.steps * config.train.batch_size * config.train.accumulate * trainer.seq_len))
    m = config.model
    say(f"model: {m.num_params():,} parameters, {m.active_params():,} active per token, "
        f"{m.flops_per_token(trainer.seq_len):,} forward FLOPs per token\n{shape_table(m)}")
    if goes_on:
        say(f"goes on from step {int(checkpoints(Path(out))[-1].name)}")
    run = trainer.fit(resume=resume, stop_after=stop_after)
    if trainer.step < config.train.steps:
        say(f"stopped at step {trainer.step} of {config.train.steps}; the same command with --resume goes on")
    for prompt in samples:
        try:
            run.encode(prompt)
        except ValueError:                      # characters that this text does not have: begin as the text does
            prompt = data.corpora[0].train[0].text[:16]
        say(f"--- {prompt!r}\n{prompt}{run.generate(prompt, max_new_tokens=60)}")
    return run
