"""The run folder: everything that a training run leaves behind, and the one thing all commands take.

    config.yaml  tokenizer.json  model.safetensors  metrics.jsonl
    checkpoints/00000500/model.safetensors
    checkpoints/00000500/state/optimizer.safetensors  progress.json  and, where adapters were trained, adapter.safetensors

Files, and checkpoints as whole folders, are written under another name in the same folder, flushed to disk and renamed
into place: a reader never sees half of one, and a failed write leaves the old one as it was.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

from minimoe.config import Config, ModelConfig, load_config, save_config
from minimoe.data.held_out import Corpus
from minimoe.data.tokenizer import Tokenizer
from minimoe.decode import lay_out_for_decoding
from minimoe.generate import generate, stream
from minimoe.lora import ADAPTER, adapted, merged_state
from minimoe.model import MoETransformer
from minimoe.parallel import ALONE, Ranks
from minimoe.plot import Figure, history
from minimoe.settings import ConfigError, need

SHIPPED = Path(__file__).parent / "assets" / "pydocs"
NO_TOKENIZER = "this run has no tokenizer.json: give token ids to minimoe.generate, or add a tokenizer"


@dataclass
class Run:
    """A trained model with its tokenizer, its config and, where it came from one, its folder."""

    model: MoETransformer
    tokenizer: Tokenizer | None
    config: Config
    folder: Path | None = None
    rows: list[dict] | None = field(default=None, repr=False)
    corpora: tuple[Corpus, ...] | None = field(default=None, repr=False)       # the text beside which it was trained

    def generate(self, start: str | list[str] | list[list[int]], max_new_tokens: int | None = None,
                 **options: object) -> str | list[str]:
        """The text that the model writes after `start`, or after each of a list of texts or of their ids, all together.
        Options: temperature, top_k, top_p, seed, and `stop`, a text or texts that end the writing and are not shown; what is
        not given comes from the run's `generate:` section."""
        if isinstance(start, str):
            return "".join(self.stream(start, max_new_tokens, **options))
        options, stop = self._options({"max_new_tokens": max_new_tokens, **options})
        prompts = [self.encode(s) if isinstance(s, str) else s for s in start]
        texts = [self.tokenizer.decode(ids) for ids in generate(self.model, prompts, **options)]
        return [t[:min((at for s in stop if (at := t.find(s)) >= 0), default=len(t))] for t in texts]

    def stream(self, start: str | list[int], max_new_tokens: int | None = None, **options: object) -> Iterator[str]:
        """As `generate`, but yields a piece of text a token, from a text or its ids. The piece is empty while a character
        that spans tokens is not whole, or what may be the beginning of a stop text is not clear."""
        options, stop = self._options({"max_new_tokens": max_new_tokens, **options})
        ids, shown = [], 0
        with closing(stream(self.model, [self.encode(start) if isinstance(start, str) else start], **options)) as tokens:
            for (token,) in tokens:
                if token is not None:
                    ids.append(token)
                so_far = self.tokenizer.decode(ids)
                ends = [at for s in stop if (at := so_far.find(s)) >= 0]
                if ends:
                    yield so_far[shown:min(ends)]
                    return
                waits = max((n for s in stop for n in range(1, len(s)) if so_far.endswith(s[:n])), default=0)
                clear = shown if so_far.endswith("\ufffd") else max(shown, len(so_far) - waits)
                yield so_far[shown:clear]
                shown = clear
        if ids and len(so_far) > shown:
            yield so_far[shown:]

    def chat(self, messages: Sequence[dict[str, str]], max_new_tokens: int | None = None, **options: object) -> Iterator[str]:
        """The answer to a conversation (messages and template as in `Tokenizer.chat`), in pieces as they are made; options
        as in `generate`. A base model, whose config does not say `supervised`, knows no turns: it goes on from the newest
        message."""
        return self.stream(self.chat_prompt(messages, max_new_tokens)[0], max_new_tokens, **options)

    def chat_prompt(self, messages: Sequence[dict[str, str]], max_new_tokens: int | None = None) -> tuple[list[int], int]:
        """The ids that an answer goes on from, and how many of the oldest messages are left out of them: those that do not
        fit into the context beside an answer of up to half of it. What the system says and the newest question stay.

        Raises ConfigError where these alone are too long, or the last message is not a user's."""
        need(bool(messages) and messages[-1].get("role") == "user", "a conversation ends with a message whose role is user")
        if not self.config.data.supervised:
            return self.encode(messages[-1].get("content")), 0
        need(self.tokenizer is not None, NO_TOKENIZER)
        limit = self.model.cfg.max_seq_len
        room = limit - min(max_new_tokens or self.config.generate.max_new_tokens, limit // 2)
        system, turns = ([m for m in messages if (m.get("role") == "system") is is_system] for is_system in (True, False))
        ids, kept = [], len(turns)
        for first in sorted({0, *(i for i, m in enumerate(turns) if m.get("role") == "user")}, reverse=True):
            longer = self.tokenizer.chat([*system, *turns[first:]], reply=True)[0]
            if ids and len(longer) > room:
                break
            ids, kept = longer, first
        need(len(ids) < limit, f"this message has {len(ids)} tokens, with its marks, and the model's context is {limit}: shorten it")
        return ids, kept

    def encode(self, text: str) -> list[int]:
        need(self.tokenizer is not None, NO_TOKENIZER)
        need(bool(text), "the prompt is empty: give at least one character")
        return self.tokenizer.encode(text)

    def metrics(self) -> list[dict]:
        """The rows of metrics.jsonl, or of the training that this run has just come from."""
        if self.rows is not None:
            return self.rows
        if self.folder is None or not (self.folder / "metrics.jsonl").is_file():
            raise ConfigError(f"{self.folder or 'this run'}: no metrics.jsonl here; it is written by minimoe train")
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def plot(self) -> Figure:
        """Loss, learning rate, and the load of every expert over the steps, as a figure that shows itself in Jupyter; its
        `save(path)` writes the SVG."""
        return history(self.metrics())

    def _options(self, given: dict) -> tuple[dict, tuple[str, ...]]:
        g = self.config.generate
        options = {"max_new_tokens": g.max_new_tokens, "temperature": g.temperature, "top_k": g.sample_top_k,
                   "top_p": g.top_p, "seed": 0, "stop": g.stop}
        if unknown := set(given) - set(options):
            raise TypeError(f"unknown option {min(unknown)!r}; known are {', '.join(options)}")
        options |= {name: value for name, value in given.items() if value is not None}
        stop = (options["stop"],) if isinstance(options["stop"], str) else tuple(options["stop"])
        need(all(stop), "stop: an empty text would end everything before it begins")
        ends = () if self.tokenizer is None else (self.tokenizer.end_of_text, self.tokenizer.end_of_turn)
        return {k: v for k, v in options.items() if k != "stop"} | {"stop_ids": ends}, stop


def save(folder: str | Path, model: MoETransformer, tokenizer: Tokenizer | None = None,
         config: Config | None = None, ranks: Ranks = ALONE) -> None:
    """Writes what `load(folder)` reads. A config not given is the model's, with defaults for the rest."""
    folder = Path(folder)
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_safely(folder / "config.yaml", lambda p: save_config(config or Config(model=model.cfg), p))
        if tokenizer is not None:
            write_safely(folder / "tokenizer.json", tokenizer.save)
    save_weights(folder / "model.safetensors", model, ranks)


def save_weights(path: Path, model: MoETransformer, ranks: Ranks = ALONE) -> None:
    """The weights as safetensors, each once: a tied head and the further copies of a shared router are left out, adapters
    are merged. Of many ranks all must call it, and the first one writes."""
    state = {k: ranks.whole(k, v).contiguous().cpu() for k, v in merged_state(model) if not _tied(k, model.cfg)}
    if ranks.main:
        write_safely(path, lambda p: save_file(state, str(p)))


def load(folder: str | Path, device: str = "cpu", step: int | None = None) -> Run:
    """The model of a run folder, float32, in evaluation mode. `load("shipped")` is the one in the package; `step` takes a
    checkpoint that was kept instead of the best weights.

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
    need(tokenizer is None or config.model.vocab_size is None or tokenizer.vocab_size <= config.model.vocab_size,
         f"{folder}: tokenizer.json does not fit: it has {getattr(tokenizer, 'vocab_size', 0)} tokens, the model's vocab_size is "
         f"{config.model.vocab_size}; put back the one that the model was trained with")
    model = MoETransformer(config.model)
    load_weights((folder if step is None else kept_checkpoint(folder, step)) / "model.safetensors", model)
    return Run(lay_out_for_decoding(model.to(device).eval()), tokenizer, config, folder)


def load_weights(path: Path, model: MoETransformer, ranks: Ranks = ALONE) -> None:
    """Reads safetensors into the model; every name and shape must fit, nothing is executed. Each rank takes its part."""
    try:
        state = load_file(str(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged or not a safetensors file ({str(error)[:80]}); "
                          "copy it again or train again") from None
    own = {k: v for k, v in model.state_dict().items() if not _tied(k, model.cfg)}
    state = {k: ranks.part(k, v, own[k]) if k in own else v for k, v in state.items()}
    wrong = [f"{k} is missing" for k in own if k not in state] + [f"{k} is not in this model" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in own.items()
              if k in state and state[k].shape != v.shape]
    if wrong:
        raise ConfigError(f"{path}: does not fit config.yaml: {wrong[0]}" +
                          (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    model.load_state_dict(state, strict=False)


def save_state(run: Path, step: int, model: MoETransformer, optimizer: torch.optim.Optimizer, progress: dict,
               keep: int = 2, ranks: Ranks = ALONE) -> Path:
    """Writes checkpoints/<step> of a run folder, all that going on needs, and removes all but the `keep` newest.

    `progress` is what JSON can hold. No random state is needed: each step seeds itself by its number. Of many ranks all
    must call it, and the first one writes: the same files, whatever their number.
    """
    home = run / "checkpoints"
    folder, part = home / f"{step:08d}", home / f".{step:08d}.part"
    if folder.is_dir():                         # saved before, and the same step is the same state
        return folder
    if ranks.main:
        for unfinished in home.glob(".*.part"):     # of a process that was killed
            shutil.rmtree(unfinished)
        (part / "state").mkdir(parents=True)
    names = {p: name for name, p in model.named_parameters()}
    tensors = {(k := f"{names[p]}|{key}"): ranks.whole(k, value).cpu().contiguous() for p, state in optimizer.state.items()
               for key, value in state.items() if isinstance(value, torch.Tensor)}
    try:
        save_weights(part / "model.safetensors", model, ranks)
        if not ranks.main:
            return folder
        write_safely(part / "state" / "optimizer.safetensors", lambda path: save_file(tensors, str(path)))
        if adapted(model):                      # exactly: what is merged has been rounded
            adapters = {name: p.detach().cpu().contiguous() for p, name in names.items() if ADAPTER in name}
            write_safely(part / "state" / "adapter.safetensors", lambda path: save_file(adapters, str(path)))
        write_safely(part / "state" / "progress.json", lambda path: path.write_text(json.dumps(progress), encoding="utf-8"))
        _flush(part / "state")
        _flush(part)
        os.replace(part, folder)
    finally:
        if ranks.main:
            shutil.rmtree(part, ignore_errors=True)         # on a full disk its room is needed
    _flush(home)
    for old in checkpoints(run)[:-keep]:
        _remove(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdigit() and p.is_dir())


def kept_checkpoint(run: Path, step: int | None = None) -> Path:
    """The complete checkpoint of a step, or the newest; ConfigError naming those that are kept."""
    kept = {int(p.name): p for p in checkpoints(run)}
    step = max(kept, default=None) if step is None else step
    need(step in kept, f"{run}: no checkpoint of step {step}; kept are {', '.join(map(str, kept)) or 'none'}, or leave the step out")
    return kept[step]


def remove_after(run: Path, step: int) -> None:
    """Removes the checkpoints that are newer than `step`."""
    for path in checkpoints(run):
        if int(path.name) > step:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    part = checkpoint.with_name(f".{checkpoint.name}.part")
    os.replace(checkpoint, part)                            # never half a checkpoint under a complete one's name
    shutil.rmtree(part)


def load_state(folder: Path, model: MoETransformer, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE) -> dict:
    """Reads a checkpoint into model and optimizer, and gives the `progress` that was saved with it. Of a model with
    adapters those alone: its base is there."""
    if not adapted(model):
        load_weights(folder / "model.safetensors", model, ranks)
    parameters = dict(model.named_parameters())
    with _undamaged(folder):
        if adapted(model):
            adapters = load_file(str(folder / "state" / "adapter.safetensors"))
            for name in (n for n in parameters if ADAPTER in n):
                parameters[name].data.copy_(adapters[name])
        tensors = load_file(str(folder / "state" / "optimizer.safetensors"))
        for key, value in tensors.items():
            name, _, part = key.rpartition("|")
            place = parameters[name]
            optimizer.state[place][part] = ranks.part(key, value, place)
    return read_progress(folder)


def read_progress(folder: Path) -> dict:
    """The `progress` that was saved with a checkpoint."""
    with _undamaged(folder):
        return json.loads((folder / "state" / "progress.json").read_text(encoding="utf-8"))


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder / 'state'}: damaged ({str(error)[:80]}); remove this checkpoint to go on from the one "
                          "before") from None


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


def _flush(folder: Path) -> None:
    """Makes the names in a folder durable, where the system knows how."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _tied(name: str, cfg: ModelConfig) -> bool:
    """Whether a weight is the same tensor as another that stands before it."""
    copies = tuple(f"blocks.{i}.ffn.router." for i in cfg.moe_layers[1:]) if cfg.share_router else ()
    return cfg.tie_embeddings and name == "head.weight" or name.startswith(copies) and not name.endswith("bias_E")
