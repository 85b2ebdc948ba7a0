"""The run folder: everything that a training run leaves behind, and the one thing all commands take.

    config.yaml  tokenizer.json  model.safetensors  metrics.jsonl  train.log

Files are written under another name in the same folder, flushed to disk and renamed into place, so a reader never sees
half a file and a failed write leaves the old one as it was.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file

from minimoe.config import Config, ModelConfig, load_config, save_config
from minimoe.data.tokenizer import Tokenizer
from minimoe.generate import generate, stream
from minimoe.model import MoETransformer
from minimoe.settings import ConfigError

SHIPPED = Path(__file__).parent / "assets" / "pydocs"


@dataclass
class Run:
    """A trained model with its tokenizer, its config and, where it came from one, its folder."""

    model: MoETransformer
    tokenizer: Tokenizer | None
    config: Config
    folder: Path | None = None

    def generate(self, text: str, max_new_tokens: int | None = None, temperature: float | None = None,
                 seed: int = 0) -> str:
        """The text that the model writes after `text`; what is not given comes from the run's `generate:` section."""
        ids = generate(self.model, self.encode(text), **self._options(max_new_tokens, temperature, seed))
        return self.tokenizer.decode(ids)

    def stream(self, text: str, max_new_tokens: int | None = None, temperature: float | None = None, seed: int = 0):
        """As `generate`, but yields pieces of text as they are made; a character that spans tokens comes whole."""
        ids, shown = [], 0
        for (token,) in stream(self.model, [self.encode(text)], **self._options(max_new_tokens, temperature, seed)):
            if token is not None:
                ids.append(token)
            text_so_far = self.tokenizer.decode(ids)
            if not text_so_far.endswith("\ufffd"):
                yield text_so_far[shown:]
                shown = len(text_so_far)

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ConfigError("this run has no tokenizer.json: give token ids to minimoe.generate, or add a tokenizer")
        if not text:
            raise ConfigError("the prompt is empty: give at least one character")
        return self.tokenizer.encode(text)

    def metrics(self) -> list[dict]:
        """The rows of metrics.jsonl."""
        if self.folder is None or not (self.folder / "metrics.jsonl").is_file():
            raise ConfigError(f"{self.folder or 'this run'}: no metrics.jsonl here; it is written by minimoe train")
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _options(self, max_new_tokens: int | None, temperature: float | None, seed: int) -> dict:
        g = self.config.generate
        stop = () if self.tokenizer.end_of_text is None else (self.tokenizer.end_of_text,)
        return {"max_new_tokens": g.max_new_tokens if max_new_tokens is None else max_new_tokens,
                "temperature": g.temperature if temperature is None else temperature,
                "top_k": g.sample_top_k, "top_p": g.top_p, "seed": seed, "stop_ids": stop}


def save(folder: str | Path, model: MoETransformer, tokenizer: Tokenizer | None = None,
         config: Config | None = None) -> None:
    """Writes what `load(folder)` reads. A config not given is the model's, with defaults for the rest."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safely(folder / "config.yaml", lambda p: save_config(config or Config(model=model.cfg), p))
    if tokenizer is not None:
        write_safely(folder / "tokenizer.json", tokenizer.save)
    save_weights(folder / "model.safetensors", model)


def save_weights(path: Path, model: MoETransformer) -> None:
    """The weights as safetensors, a tied head left out."""
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if not _tied(k, model.cfg)}
    write_safely(path, lambda p: save_file(state, str(p)))


def load(folder: str | Path, device: str = "cpu") -> Run:
    """The model of a run folder, float32, in evaluation mode. `load("shipped")` is the one in the package.

    Raises ConfigError naming the file and the remedy, for a folder or file that is missing, damaged or does not fit.
    """
    folder = SHIPPED if str(folder) == "shipped" else Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder; train one with minimoe train, or use shipped")
    for name in ("config.yaml", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: not a run folder, {name} is missing; minimoe train writes one")
    config = load_config(folder / "config.yaml")
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    model = MoETransformer(config.model)
    load_weights(folder / "model.safetensors", model)
    return Run(model.to(device).eval(), tokenizer, config, folder)


def load_weights(path: Path, model: MoETransformer) -> None:
    """Reads safetensors into the model; every name and shape must fit, nothing is executed."""
    try:
        state = load_file(str(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged or not a safetensors file ({str(error)[:80]}); "
                          "copy it again or train again") from None
    own = {k: v for k, v in model.state_dict().items() if not _tied(k, model.cfg)}
    wrong = [f"{k} is missing" for k in own if k not in state] + [f"{k} is not in this model" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]
    if wrong:
        raise ConfigError(f"{path}: does not fit config.yaml: {wrong[0]}" +
                          (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    model.load_state_dict(state, strict=False)


def write_safely(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the finished file into place; on an error the old file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tied(name: str, cfg: ModelConfig) -> bool:
    return cfg.tie_embeddings and name == "head.weight"
