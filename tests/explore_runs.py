"""Small models and traces that the tests of the explorer share."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from minimoe.config import ModelConfig
from minimoe.data.tokenizer import Tokenizer
from minimoe.explore import RoutingTrace
from minimoe.explore.trace import LayerTrace, trace_layer
from minimoe.model import MoETransformer
from minimoe.router import softmax_topk, within_capacity

CODE = "def total(prices):\n    return sum(prices)\n\nna\u00efve \u2192 \U0001f642 end"
CHOICE = dict(router="expert_choice", balance="none", n_experts=6, top_k=1)
HOSTILE = ("</script><img src=x onerror=\"document.title='broken'\"><!--<script> & \"'\n"
           "e\u0301 \u0301 \u200b\u202e\ufe0f \U0001f469\u200d\U0001f4bb \u2028 \x07 {} ${1} `")


def make_run(tokenizer=None, **options):
    """A small random model whose routers are decided (weights far from even), with a tokenizer."""
    tokenizer = tokenizer or Tokenizer.bpe([CODE * 3], 290)
    torch.manual_seed(options.pop("seed", 0))
    base = dict(vocab_size=tokenizer.vocab_size, dim=24, n_layers=3, n_heads=2, max_seq_len=96, n_experts=5, top_k=2,
                expert_hidden=16)
    model = MoETransformer(ModelConfig(**base | options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("router.weight"):
                p.mul_(20)
    return SimpleNamespace(model=model.eval(), tokenizer=tokenizer)


def made(layers, tokens, n_experts, top_k, router="softmax"):
    tokens = tuple(tokens)
    return RoutingTrace("".join(tokens), tokens, ("",) * len(tokens), tuple(range(len(tokens))), 0, n_experts, top_k,
                        router, len(layers), tuple(layers))


def heavy(n_experts=16):
    """One token an expert, each with all the weight: the deepest colors that there are."""
    eye = tuple(tuple(map(float, row)) for row in np.eye(n_experts))
    ids = tuple((e, (e + 5) % n_experts) for e in range(n_experts))
    full = ((1.0, 1.0),) * n_experts
    layer = LayerTrace(0, ids, full, ((True, True),) * n_experts, eye, (0.0,) * n_experts, (1 / n_experts,) * n_experts)
    return made([layer], [" word"] * n_experts, n_experts, 2)


def dropping():
    """Four tokens that all want expert 1, which has two places."""
    routing = softmax_topk(torch.tensor([[0.0, 3.0, 0.0]] * 4), k=1)
    return made([trace_layer(0, within_capacity(routing, 2, torch.zeros(4, dtype=torch.long)))], "abcd", 3, 1)
