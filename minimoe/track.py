"""Where the rows of a run go: metrics.jsonl and train.log always, TensorBoard and Weights & Biases where asked for.

    metrics.jsonl            one JSON object a logged step; on resume cut back to the step that the run goes on from
    train.log                what was said, each row in a line, tracebacks; train.log.1 to .3 are its older parts
    tensorboard/             on resume a further event file, whose first event purges the steps that were cut
    wandb/                   on resume a further run of the same id, which begins with the rows that were kept
"""
from __future__ import annotations

import importlib.util
import json
import logging
import os
import secrets
import shutil
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from minimoe.config import Config, TrainConfig
from minimoe.settings import ConfigError, need, to_dict


class Tracker:
    """Takes the rows of one `fit`; as a context manager it also writes the traceback of what ended it to train.log.

    Its logger is its own, and only passes on to the standard logger "minimoe": nothing stays behind when it closes.
    """

    def __init__(self, out: Path | None, config: Config, step: int = 0, kept: list[dict] | None = None):
        train, self.out, self.writer, self.wandb = config.train, out, None, None
        self.log = logging.Logger("minimoe", train.log_level.upper())
        self.log.parent = logging.getLogger("minimoe")
        self.log.addHandler(_file_handler(out / "train.log") if out else logging.NullHandler())
        if out and train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
        if out and train.wandb:
            import wandb

            (out / "wandb").mkdir(exist_ok=True)
            name = out / "wandb" / "id.txt"
            if not name.exists():
                name.write_text(secrets.token_hex(4), encoding="utf-8")
            try:
                self.wandb = wandb.init(project=train.wandb_project, name=train.wandb_name or out.resolve().name, dir=str(out),
                                        id=name.read_text(encoding="utf-8"), config=to_dict(config), reinit="create_new",
                                        settings=wandb.Settings(console="off"))
            except wandb.Error as error:
                raise ConfigError(f"wandb: true: Weights & Biases cannot be reached ({' '.join(str(error).split())[:100]}); "
                                  "log in with wandb login, or set WANDB_MODE=offline") from None
            for row in kept or ():
                self.wandb.log(flat(row), step=row["step"])

    def write(self, row: dict) -> None:
        """Adds one row everywhere."""
        self.log.info("step %d: %s", row["step"], summary(row | {"alerts": ()}))
        alerts = row.get("alerts", ())
        for line in alerts:
            self.log.warning("step %d: %s", row["step"], line)
        if self.out:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.writer:
            for name, value in flat(row).items():
                self.writer.add_scalar(name, value, row["step"])
            if alerts:
                self.writer.add_text("alerts", "\n\n".join(alerts), row["step"])
        if self.wandb:
            self.wandb.log(flat(row), step=row["step"])
            if alerts:
                self.wandb.alert(title="routing", text=f"step {row['step']}: " + "\n".join(alerts), wait_duration=600)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.log.error("ended by %s", kind.__name__, exc_info=error)
            if self.out:
                error.add_note(f"the traceback stands in {self.out / 'train.log'}")
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish(exit_code=int(error is not None))
        for handler in [*self.log.handlers]:
            self.log.removeHandler(handler)
            handler.close()


def check_packages(train: TrainConfig, out: Path | None) -> None:
    """ConfigError before anything is done, where a tracker was asked for that is not installed or has no folder."""
    for name in ("tensorboard", "wandb"):
        if getattr(train, name):
            spec = importlib.util.find_spec(name)           # a folder of this name has a spec without an origin
            need(spec and spec.origin, f"{name}: true needs a package that is not installed: pip install minimoe[track]")
            need(out, f"{name}: true writes into the run folder: name one with out")


def start_over(out: Path) -> None:
    """Takes away what an older run left in the folder: its checkpoints, adapters, rows and logs."""
    for name in ("checkpoints", "adapter", "tensorboard", "wandb"):
        shutil.rmtree(out / name, ignore_errors=True)
    for old in (*out.glob("train.log*"), *out.glob("metrics.jsonl"), *out.glob("plot.svg")):
        old.unlink()


def flat(row: dict) -> dict[str, float]:
    """The numbers of a row under one name each, and how many alerts it has.

    >>> flat({"step": 7, "ce": 2.5, "routing": [{"load": [0.75, 0.25]}], "alerts": ["uneven"]})
    {'ce': 2.5, 'routing/0/load/0': 0.75, 'routing/0/load/1': 0.25, 'alerts': 1}
    """
    def walk(value: object, name: str) -> dict[str, float]:
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return {k: v for key, item in items for k, v in walk(item, f"{name}/{key}").items()}
        return {name[1:]: value} if isinstance(value, (int, float)) else {}

    numbers = {k: v for k, v in row.items() if k not in ("step", "alerts")}
    return walk(numbers, "") | {"alerts": len(row.get("alerts", ()))}


def summary(row: dict) -> str:
    """A row in a few words, for the progress line and train.log.

    >>> summary({"step": 2, "ce": 3.25, "val_bpb": 1.5, "tokens": 900, "seconds": 0.5})
    'loss 3.250 held-out 1.500 bpb, 1,800 tokens/s'
    """
    return (f"loss {row['ce']:.3f}" + (f" held-out {row['val_bpb']:.3f} bpb" if "val_bpb" in row else "")
            + f", {row['tokens'] / max(row['seconds'], 1e-9):,.0f} tokens/s"
            + (f", {len(row['alerts'])} alerts: {row['alerts'][0]}" if row.get("alerts") else ""))


def colored(text: str, color: str, stream: TextIO) -> str:
    """The text in red or yellow where the stream is a terminal, unless NO_COLOR is set (no-color.org).

    >>> import io; colored("text", "red", io.StringIO())
    'text'
    """
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{ {'red': 31, 'yellow': 33}[color]}m{text}\033[0m"


def _file_handler(path: Path) -> logging.Handler:
    handler = RotatingFileHandler(path, maxBytes=1_000_000, backupCount=3, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    handler.handleError = lambda record: None       # a full disk is reported once, by what really needs it
    return handler
