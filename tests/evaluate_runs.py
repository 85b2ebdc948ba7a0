"""Runs with known answers: a tiny model, one that knows nothing, and ones whose logits are what a test says."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from minimoe.checkpoint import Run
from minimoe.config import Config, ModelConfig
from minimoe.data.corpora import load_corpus
from minimoe.data.held_out import Corpus
from minimoe.data.tokenizer import Tokenizer
from minimoe.model import MoETransformer


def tiny(**options) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 260, "dim": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 320, "n_experts": 4, "top_k": 2,
                          "expert_hidden": 16, "init_std": 0.3, **options})


def worlds(documents: int = 48) -> tuple[Corpus, ...]:
    return (Corpus("worlds", (), load_corpus("worlds").held_out[:documents]),)


def tiny_run(cfg: ModelConfig | None = None, **options) -> Run:
    torch.manual_seed(0)
    cfg = cfg or tiny()
    options = {"corpora": worlds(), **options}
    return Run(MoETransformer(cfg).eval(), Tokenizer.bytes(), Config(model=cfg), **options)


def uninformed() -> Run:
    """Every token is equally likely, always."""
    run = tiny_run()
    torch.nn.init.zeros_(run.model.head.weight)
    return run


class Says(torch.nn.Module):
    """A model whose logits (V,) after some tokens are `says(tokens)`."""

    def __init__(self, cfg: ModelConfig, says):
        super().__init__()
        self.cfg, self.says, self.embedding = cfg, says, torch.nn.Embedding(1, 1)

    def forward(self, tokens_BT, lengths):
        rows = [[self.says(tuple(row[:t + 1])) for t in range(len(row))] for row in tokens_BT.tolist()]
        return SimpleNamespace(logits=torch.tensor(rows), routing=[])


def saying(says, **options) -> Run:
    run = tiny_run(**options)
    run.model = Says(run.model.cfg, says).eval()
    return run


def knowing(pairs: list[tuple[list[int], list[int]]], **options) -> Run:
    """Knows what comes next in these pairs of context and answer, and nothing else."""
    after = {tuple([*context, *answer][:i]): ([*context, *answer][i]) for context, answer in pairs
             for i in range(len(context), len(context) + len(answer))}
    return saying(lambda tokens: [20.0 * (i == after.get(tokens)) for i in range(260)], **options)
