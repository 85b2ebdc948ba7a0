"""A tiny run that chats, and a chat server in a process of its own, for the tests of the terminal and the page."""

from __future__ import annotations

import os
import string
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from minimoe.checkpoint import save
from minimoe.config import Config, DataConfig, GenerateConfig, ModelConfig
from minimoe.data.tokenizer import SPECIALS, Tokenizer
from minimoe.model import MoETransformer

ROOT = Path(__file__).parents[1]


def make_talker(folder: Path, supervised: bool = True, seed: int = 0, **options) -> Path:
    """A run folder with random weights. Greedy, which is its default, it writes letters and never ends by itself."""
    tokenizer = Tokenizer.characters(string.printable)
    cfg = ModelConfig(**dict(vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=2, max_seq_len=128, n_experts=4,
                             top_k=2, expert_hidden=16, tie_embeddings=False, init_std=0.3) | options)
    torch.manual_seed(seed)
    model = MoETransformer(cfg)
    with torch.no_grad():
        silent = [i for i in range(cfg.vocab_size) if i < len(SPECIALS) or not tokenizer.decode([i]).isalnum()]
        model.head.weight[silent] = 0           # some other logit is above 0
    save(folder, model, tokenizer, Config(model=cfg, data=DataConfig(supervised=supervised),
                                          generate=GenerateConfig(max_new_tokens=20, temperature=0.0)))
    return folder


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "minimoe", "chat", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def chat_server(folder: Path, *words: object):
    """`minimoe chat … --web` in `folder`, at a free port; yields (address, process, path of its log)."""
    log = folder / "server.log"
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(command(*words, "--web", "--port", 0), cwd=folder, stdout=subprocess.PIPE, stderr=file,
                                  text=True, encoding="utf-8", env=environment())
        try:
            line = server.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), log.read_text(encoding="utf-8")
            yield line.split()[0], server, log
        finally:
            server.terminate()
            server.wait(20)
            server.stdout.close()
