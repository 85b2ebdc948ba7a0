"""One side of one comparison of engine.py: what it builds, and how it is timed in the process that runs it.

Ours and theirs do the same work on the same numbers: the seeds of the weights, the tokens and the routing are fixed, the
optimizer is one function, and both clip, step and clear the gradients alike.
"""
from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minimoe import ModelConfig, MoETransformer, TrainConfig, device, generate
from minimoe.experts import Experts, FeedForward
from minimoe.hub import load_hf
from minimoe.optimizer import make_optimizer
from minimoe.router import softmax_topk

THEIRS = ("eager", "grouped_mm")        # the ways of transformers to run the experts; the faster one counts


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process is asked to do; equal works share their figures."""

    kind: str                   # experts, train or generate
    side: str                   # ours; twin or dense (our own dense layers); eager or grouped_mm (transformers)
    dtype: str = "float32"      # auto is the library's choice; bfloat16 is autocast, in generation bfloat16 weights
    tuned: bool = True          # tune_cpu(): the allocator settings of the command line and the Trainer
    device: str = "cpu"
    threads: int = 2
    clock: str = "wall"         # or cpu, the process's own seconds
    vocab: int = 65
    dim: int = 256
    layers: int = 4
    heads: int = 8
    experts: int = 8
    top_k: int = 2
    hidden: int = 512
    seq: int = 256
    batch: int = 16
    tokens: int = 4096          # that an expert layer sees
    fresh: bool = False         # an expert layer's routing drawn anew for each pass
    recompute: str = "none"
    prompt: int = 16
    new: int = 200
    warmup: int = 2             # bfloat16 kernels are prepared per shape: not timed
    steps: int = 8

    def name(self) -> str:
        """Short, and different for different works of one part of the table."""
        same = [f.name for f in dataclasses.fields(Work) if f.default is not dataclasses.MISSING]
        told = {n: getattr(self, n) for n in same if getattr(self, n) != Work.__dataclass_fields__[n].default}
        return " ".join([self.side, *(f"{n}={v}" for n, v in told.items())])

    def config(self) -> ModelConfig:
        cfg = ModelConfig(vocab_size=self.vocab, dim=self.dim, n_layers=self.layers, n_heads=self.heads,
                          n_kv_heads=self.heads, max_seq_len=self.seq, n_experts=self.experts, top_k=self.top_k,
                          expert_hidden=self.hidden)
        return cfg.dense_twin() if self.side == "twin" else cfg


def measure(work: Work) -> dict:
    """The figure of a work: `value` in its unit, and what else is recorded with it."""
    if work.tuned:
        device.tune_cpu(work.threads)
    else:
        torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    return {"experts": measure_experts, "train": measure_train, "generate": measure_generate}[work.kind](work)


def seconds(work: Work, run: Callable[[], object]) -> float:
    """Of one call, on the clock that the work names."""
    clock = time.process_time if work.clock == "cpu" else time.perf_counter
    wait = torch.cuda.synchronize if work.device == "cuda" else lambda: None
    wait()
    started = clock()
    run()
    wait()
    return clock() - started


def highest_memory(work: Work) -> float:
    """Highest resident size of this process so far, in MB; of the device's memory on a GPU."""
    if work.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def resident() -> float | None:
    """Resident size now, in MB, where the system tells it; below the highest so far if building took more for a while."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if statm.is_file() else None


# --- the expert layer ------------------------------------------------------------------------------------------------
def measure_experts(work: Work) -> dict:
    """Milliseconds of forward and backward, routing given, gradients for the input, the weights and the routing's."""
    cfg, place = work.config(), torch.device(work.device)
    layer = Experts(cfg) if work.side == "ours" else FeedForward(cfg, cfg.dense_size)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02)
    layer.to(place)
    x_ND = torch.randn(work.tokens, work.dim, device=place, requires_grad=True)
    grad_ND = torch.randn(work.tokens, work.dim, device=place)
    autocast = device.choose(work.device, work.dtype).autocast
    times, routing = [], None
    for step in range(work.warmup + work.steps):
        if routing is None or work.fresh:
            routing = softmax_topk(torch.randn(work.tokens, work.experts, device=place), work.top_k)
            routing = dataclasses.replace(routing, weights=routing.weights.requires_grad_())
        given = (x_ND, routing) if work.side == "ours" else (x_ND,)

        def both(given: tuple = given) -> None:
            with autocast():
                y_ND = layer(*given)
            y_ND.backward(grad_ND.to(y_ND.dtype))

        took = seconds(work, both)
        if step >= work.warmup:
            times.append(took * 1000)
        x_ND.grad = routing.weights.grad = None
        layer.zero_grad(set_to_none=True)
    return {"value": statistics.median(times)}


# --- the training step -----------------------------------------------------------------------------------------------
def mixtral(work: Work, init_std: float = 0.02) -> nn.Module:
    """Mixtral of the same sizes with random weights, attention by scaled_dot_product_attention as ours."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cfg = MixtralConfig(
        vocab_size=work.vocab, hidden_size=work.dim, intermediate_size=work.hidden, num_hidden_layers=work.layers,
        num_attention_heads=work.heads, num_key_value_heads=work.heads, num_local_experts=work.experts,
        num_experts_per_tok=work.top_k, max_position_embeddings=work.seq, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, initializer_range=init_std,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    way = work.side if work.side in THEIRS else THEIRS[0]
    return MixtralForCausalLM._from_config(cfg, attn_implementation="sdpa", experts_implementation=way)


def training(work: Work) -> tuple[nn.Module, Callable[[], float]]:
    """A model, and a function that does one update on new random tokens and gives its cross-entropy."""
    cfg = work.config()
    model = mixtral(work) if work.side in THEIRS else MoETransformer(cfg)
    model.to(work.device).train()
    if work.recompute != "none":
        model.recompute(work.recompute)
    optimizer = make_optimizer(model, TrainConfig())
    autocast = device.choose(work.device, work.dtype, work.threads).autocast
    drawn = torch.Generator().manual_seed(1)

    def step() -> float:
        tokens_BT = torch.randint(work.vocab, (work.batch, work.seq + 1), generator=drawn).to(work.device)
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
        with autocast():
            if work.side in THEIRS:     # targets that are shifted already, as ours are; no cache, which saves it work
                loss = ce = model(inputs_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss
            else:
                out = model(inputs_BT, targets_BT)
                loss, ce = out.loss, out.losses["ce"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ce.item()

    return model, step


def measure_train(work: Work) -> dict:
    """Tokens per second, and by how much the highest memory grew from before the first step."""
    model, step = training(work)
    before, now, losses, times = highest_memory(work), resident(), [], []
    for _ in range(work.warmup + work.steps):
        times.append(seconds(work, lambda: losses.append(step())))
    return {"value": work.batch * work.seq / statistics.median(times[work.warmup:]),
            "memory": max(highest_memory(work) - before, 0.001), "memory_before": round(before, 1),
            "resident_before": now and round(now, 1),
            "loss": round(losses[-1], 4), "first_loss": round(losses[0], 4), "dtype": str(
                device.choose(work.device, work.dtype).dtype).removeprefix("torch."),
            "params": sum(p.numel() for p in model.parameters())}


# --- generation ------------------------------------------------------------------------------------------------------
def generation(work: Work) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model, and a function that writes greedily after a fixed prompt and gives the new ids, (B, new).

    Weights of 0.02, as before training, write one token over and over: the same two experts, always warm. Weights of 0.1
    write text as varied as a trained model's, so experts are read as they are in use.
    """
    model = mixtral(work, init_std=0.1)
    prompt_BT = torch.randint(work.vocab, (work.batch, work.prompt), generator=torch.Generator().manual_seed(1))
    prompt_BT, dtype = prompt_BT.to(work.device), getattr(torch, work.dtype)
    if work.side not in THEIRS:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = load_hf(folder, dtype, work.device)
        return model, lambda: generate(model, prompt_BT, work.new, temperature=0.0)
    for p in model.parameters():        # these alone: angles stay float32, as load_hf leaves ours
        p.data = p.data.to(dtype)
    model = model.to(work.device).eval()
    return model, lambda: model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=work.new,
                                         do_sample=False, use_cache=True, pad_token_id=0)[:, work.prompt:].cpu()


def measure_generate(work: Work) -> dict:
    """Tokens per second of all sequences together, the prompt's pass included, and the tokens."""
    _, write = generation(work)
    times, written = [], []
    for step in range(work.warmup + work.steps):
        took = seconds(work, lambda: written.append(write()))
        if step >= work.warmup:
            times.append(took)
    ids = written[-1].tolist()
    assert all(torch.equal(w.cpu(), written[0].cpu()) for w in written), "greedy text differs from call to call"
    return {"value": work.batch * work.new / statistics.median(times), "tokens": ids,
            "different_tokens": len({t for row in ids for t in row})}
