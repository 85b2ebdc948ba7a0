"""The training loop: one for every device (chapter 8).

Shapes: B sequences, T tokens each.
"""
from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from minimoe import balance, lora, parallel
from minimoe.adapter import save_adapter
from minimoe.checkpoint import (
    Run,
    checkpoints,
    kept_checkpoint,
    load_state,
    remove_after,
    save,
    save_state,
    save_weights,
    write_safely,
)
from minimoe.config import Config, DataConfig, GenerateConfig, TrainConfig, differences, load_config
from minimoe.data.loader import TextData, load_data, shortened
from minimoe.data.tokenizer import Tokenizer
from minimoe.decode import lay_out_for_decoding
from minimoe.device import choose, tune_cpu
from minimoe.experts import MoE
from minimoe.launch import ctrl_c
from minimoe.limits import explained, fit_batch_size
from minimoe.measure import held_out_loss
from minimoe.model import MoETransformer
from minimoe.optimizer import lr_scale, make_optimizer
from minimoe.settings import ConfigError, need
from minimoe.track import Tracker, check_packages, colored, start_over, summary


class Trainer:
    """Trains a model and leaves a run folder.

    `data` is a corpus name, a `DataConfig`, a `TextData`, or any map-style dataset of (inputs, targets), each (T,) int64
    with targets already shifted. `fit()` returns the `Run`. Raises ConfigError before the first step for settings that
    do not fit together. `on_step(trainer, row)` is called after each logged row; `evaluate_with(run, step)` at every look at
    the held-out text, and what it returns stands in the row as "eval".
    """

    def __init__(self, model: MoETransformer, train: TrainConfig, data: object = "pydocs", *, out: str | Path | None = None,
                 tokenizer: Tokenizer | None = None, generate: GenerateConfig | None = None,
                 on_step: Callable[[Trainer, dict], None] | None = None, progress: bool = True,
                 evaluate_with: Callable[[Run, int], dict] | None = None):
        self.out, self.on_step, self.progress, self.evaluate_with = Path(out) if out else None, on_step, progress, evaluate_with
        check_packages(train, self.out)
        self.ranks = parallel.start(train, model.cfg)
        self.choice = choose(train.device, train.dtype, train.threads)
        tune_cpu(train.threads and self.choice.threads)
        most = train.seq_len or model.cfg.max_seq_len
        need(most <= model.cfg.max_seq_len, f"seq_len={most} is more than max_seq_len={model.cfg.max_seq_len}")
        self.data, data_cfg = _as_data(data, tokenizer, model.cfg.vocab_size, most)
        self.tokenizer = getattr(self.data, "tokenizer", tokenizer)
        size = getattr(self.tokenizer, "vocab_size", 0)
        need(size <= model.cfg.vocab_size, f"the tokenizer has {size} tokens, the model's vocab_size is {model.cfg.vocab_size}: raise "
                                           "vocab_size, or leave it null")
        self.seq_len = getattr(self.data, "seq_len", None) or most                  # conversations say how long they are
        need(self.seq_len <= most, f"conversations of {self.seq_len} tokens, and seq_len is {most}: give it to load_data too")
        text = isinstance(self.data, TextData)
        epoch = self.data.mixture.n_tokens if text else len(self.data) * self.seq_len
        self.notes = [*self.choice.reasons, *getattr(self.data, "notes", ())]       # said at the start, and in train.log
        if train.batch_size == "auto":
            most = max(1, epoch // self.seq_len) if epoch else 4096
            size, why = fit_batch_size(model.cfg, train, self.choice, self.seq_len, most)
            train = dataclasses.replace(train, batch_size=size)
            self.notes += [why]
        self.cfg = shortened(train.resolved(epoch, self.seq_len), self.data, self.seq_len)
        a_step = self.cfg.batch_size * self.cfg.accumulate * self.seq_len
        self.notes.append(f"length {self.cfg.steps:,} steps of {a_step:,} tokens"
                          + (f": {self.cfg.steps * a_step / epoch:.2f} epochs" if epoch else ""))
        self.config = Config(model=model.cfg, train=train, data=data_cfg, generate=generate or GenerateConfig())
        self.base = None                                # of adapters: which weights they were trained beside
        if train.method != "full":
            self.base = lora.adapt(model, train)
            self.notes.append(lora.describe(model))
        self.model = self.ranks.spread(model.to(self.choice.device))
        self.model.recompute(train.recompute)
        self.forward = self.ranks.wrap(torch.compile(self.model) if train.compile else self.model)
        self.optimizer = make_optimizer(self.model, train)
        # float16 gradients underflow: the loss is scaled up, and a step whose gradient overflowed is left out
        self.scaler = torch.amp.GradScaler(self.choice.device.type, enabled=self.choice.dtype == torch.float16)
        self.held_out = self.data.held_out() if text else {}
        self.step, self.best, self.seconds, self.rows, self.since = 0, math.inf, 0.0, [], []

    def fit(self, *, resume: bool = False, stop_after: int | None = None, from_step: int | None = None) -> Run:
        """Runs to the last step, or until `stop_after`, or until Ctrl-C, which ends with the step that is under way.

        The run folder keeps the weights with the lowest held-out loss, and checkpoints to go on from: with `resume` the
        newest complete one (or that of `from_step`, and the newer ones go) is where this run begins, and all that
        follows is as if it had never stopped. Raises ConfigError where the folder was made with other settings, and
        where memory or disk run out.
        """
        with explained(self.cfg, self.out):
            if self.out and resume and checkpoints(self.out):
                self._restore(from_step)
            elif self.out:
                self._start_folder()
        need(stop_after is None or stop_after >= 1, f"stop_after={stop_after}: must be at least 1")
        cfg, until = self.cfg, min(self.cfg.steps, stop_after or self.cfg.steps)
        bar = tqdm(total=cfg.steps, initial=self.step, disable=None if self.progress and self.ranks.main else True, unit="step",
                   dynamic_ncols=True)
        home = self.out if self.ranks.main else None
        with Tracker(home, self.config, self.step, self.rows) as self.track, bar, explained(cfg, self.out), ctrl_c() as pressed:
            for line in (*self.notes, f"begins after step {self.step}"):
                self.track.log.info(line)
            stop = False
            while self.step < until and not stop:
                self._one_step(bar)
                stop = self.ranks.any(pressed)
                if self.out and (self.step == until or stop or cfg.save_every and self.step % cfg.save_every == 0):
                    self._save_state()
            if self.out and not self.held_out:
                self._save_weights()
            self.track.log.info("%s after step %d of %d", "interrupted" if stop else "ended", self.step, cfg.steps)
        run = self._run()
        return dataclasses.replace(run, model=lay_out_for_decoding(run.model)) if self.step == cfg.steps else run

    def _start_folder(self) -> None:
        if self.ranks.main:
            start_over(self.out)
        save(self.out, self.model, self.tokenizer, self.config, self.ranks)
        if self.ranks.main:
            (self.out / "metrics.jsonl").write_text("", encoding="utf-8")

    def _run(self) -> Run:
        return Run(lora.merged(self.ranks.gather(self.model)).eval(), self.tokenizer, self.config, self.out, self.rows,
                   getattr(self.data, "corpora", None))

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
            if evaluate_now and self.evaluate_with:
                run = self._run()               # all ranks gather it
                row |= {"eval": self.evaluate_with(run, self.step)} if self.ranks.main else {}
            self._log(row)
            bar.set_postfix_str(colored(summary(row), "yellow", sys.stderr) if "alerts" in row else summary(row))
        bar.update()

    def _save_state(self) -> None:
        progress = {"step": self.step, "steps": self.cfg.steps, "best": self.best, "seconds": self.seconds, "since": self.since,
                    "scaler": self.scaler.state_dict(), "base": self.base}
        if isinstance(self.data, TextData):
            progress |= {"data": self.data.mixture.state(), "out": self.data.out}
        saved = save_state(self.out, self.step, self.model, self.optimizer, progress, self.cfg.keep, self.ranks)
        self.track.log.info("saved %s", saved)

    def _restore(self, from_step: int | None) -> None:
        """Goes back to a checkpoint, the newest by default; newer ones, and rows that came after it, are taken out."""
        different = differences(load_config(self.out / "config.yaml"), self.config)
        need(not different, f"{self.out} was made with other settings: {'; '.join(different)}. Give them as they were, or "
                            "name another folder")
        progress = load_state(kept_checkpoint(self.out, from_step), self.model, self.optimizer, self.ranks)
        need(progress.get("base") == self.base, f"{self.out}: its adapters were trained beside other weights than those that this "
             f"run starts from (init={self.cfg.init}); give the --init and seed that it began with, or name another folder")
        self.step, self.best, self.seconds, self.since = (progress[k] for k in ("step", "best", "seconds", "since"))
        if isinstance(self.data, TextData):
            self.data.mixture.restore(progress.get("data", {}))
        self.scaler.load_state_dict(progress.get("scaler", {}))
        path = self.out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
        if self.ranks.main:
            remove_after(self.out, self.step)
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
            out.logits = None                   # they go as soon as the backward pass has used them
            counts = [c + balance.load_counts(r) for c, r in zip(counts, out.routing)]
            # ce and mtp are means over this batch's targets: weigh them by their number; balancing losses by the batches
            share = int((targets_BT != -100).sum()) / n_targets
            weights = {name: share if name in ("ce", "mtp") else 1 / cfg.accumulate for name in out.losses}
            loss = sum(model.coefficient(name) * weights[name] * value for name, value in out.losses.items())
            self.scaler.scale(loss).backward()
            for name, value in out.losses.items():
                total[name] = total.get(name, 0.0) + value.item() * weights[name]
        self.scaler.unscale_(self.optimizer)
        statistics = [balance.statistics(*pair) for pair in zip(out.routing, routers)]       # gradients not yet clipped
        norm, total = self.ranks.clip(model, cfg.clip), self.ranks.mean_of(total)
        skipped = not math.isfinite(norm.item())
        if skipped and self.scaler.get_scale() <= 1:        # 1 where nothing is scaled
            raise FloatingPointError(f"step {self.step}: the gradient is not finite (loss {total['ce']:.3f}); "
                                     "lower lr, or use dtype: float32")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if model.cfg.balance == "bias" and cfg.method == "full":       # beside adapters the routers are frozen, biases too
            for router, counts_E in zip(routers, counts):
                balance.update_bias(router.bias_E, self.ranks.sum(counts_E), model.cfg.bias_speed)
        self.step += 1
        total["grad_norm"] = 0.0 if skipped else norm.item()
        return total | ({"skipped": float(skipped)} if self.scaler.is_enabled() else {}), statistics

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
        return tuple(self.ranks.rows(t).to(self.choice.device, non_blocking=t.is_pinned()) for t in (inputs_BT, targets_BT))

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
                self._save_weights()

    def _save_weights(self) -> None:
        save_weights(self.out / "model.safetensors", self.model, self.ranks)
        if self.cfg.method != "full" and self.ranks.main:
            save_adapter(self.out / "adapter", self.model)

    def _log(self, row: dict) -> None:
        self.rows.append(row)
        self.track.write(row)
        if self.on_step and self.ranks.main:
            self.on_step(self, row)


def _as_data(data: object, tokenizer: Tokenizer | None, vocab_size: int, seq_len: int) -> tuple[object, DataConfig]:
    if isinstance(data, TextData):
        names = [s.name for s in data.mixture.streams]
        return data, data.config or DataConfig(mixture=tuple(names))
    if isinstance(data, (str, DataConfig)):
        cfg = DataConfig(mixture=data, tokenizer_vocab=max(261, vocab_size)) if isinstance(data, str) else data
        return load_data(cfg, tokenizer, seq_len), cfg
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data):
        return data, DataConfig()
    raise ConfigError(f"data={type(data).__name__}: give a corpus name, a DataConfig, or a dataset of (inputs, targets) pairs")
