"""The report of a run, or of several beside each other: Markdown, with figures and the numbers as JSON beside it (chapter 11)."""
from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minimoe import counts
from minimoe.checkpoint import SHIPPED, write_safely
from minimoe.evaluate.figures import intervals, load_map, loads
from minimoe.evaluate.results import Result, markdown, number, span, table
from minimoe.evaluate.text import held_out
from minimoe.explore.svg import alt_text, routing_svg
from minimoe.explore.trace import routing_trace
from minimoe.model import shape_table
from minimoe.plot import Figure
from minimoe.settings import ConfigError, need, to_dict

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

ROUTED = 120            # tokens of the passage whose routing is drawn


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run in a report."""

    name: str
    run: Run
    results: Sequence[Result]


class Page:
    """A report under way: its entries, and where its figures go."""

    def __init__(self, entries: Sequence[Entry], path: Path):
        self.entries, self.path = entries, path

    def figure(self, name: str, figure: Figure) -> str:
        """Writes the SVG beside the report, and gives the Markdown that shows it."""
        file = self.path.with_name(f"{self.path.stem}-{name}.svg")
        write_safely(file, lambda p: p.write_text(figure.svg() + "\n", encoding="utf-8"))
        alt = " ".join(figure.alt.split()).replace("[", "(").replace("]", ")")
        return f"![{alt}]({file.name.replace(' ', '%20')})"

    def per_run(self, show: Callable[[Entry], str]) -> str:
        """What `show` gives for each run, below its name where there are several."""
        return "\n\n".join((f"### {e.name}\n\n" if len(self.entries) > 1 else "") + show(e) for e in self.entries)


def write_report(run: Run | Sequence[Run], results: Sequence[Result] | Sequence[Sequence[Result]], path: str | Path | None = None, *,
                 sections: Sequence[Callable] = (), names: Sequence[str] | None = None, seed: int = 0) -> Path:
    """Writes the report of a run and its results, or of several, and returns the path: `path`, else
    RUN/reports/<date>.md of the first run under a name that is still free. `sections` are functions of your own:
    `f(run, results)` gives Markdown; its docstring's first line is the heading.

    >>> import tempfile
    >>> from minimoe.checkpoint import load
    >>> r = Result(task="sums", metric="accuracy", value=0.5, low=0.4, high=0.6, n=100, chance=0.25)
    >>> path = write_report(load("shipped"), [r], tempfile.mkdtemp() + "/report.md")
    >>> path.read_text(encoding="utf-8").splitlines()[0], sorted(p.suffix for p in path.parent.iterdir())[:2]
    ('# Report of shipped', ['.json', '.md'])
    """
    runs = [run] if not isinstance(run, Sequence) else list(run)
    per_run = [results] if not isinstance(run, Sequence) else list(results)
    need(runs and len(runs) == len(per_run) and all(per_run), f"{len(runs)} runs with {len(per_run)} lists of results: give each run its own")
    names = [_name(r) for r in runs] if names is None else list(names)
    names = [n if names.count(n) == 1 else f"{n} ({names[:i + 1].count(n)})" for i, n in enumerate(names)]
    path = _free_path(runs[0]) if path is None else Path(path)
    need(not path.is_dir(), f"{path}: a folder; name the report's file, for example {path / 'report.md'}")
    page = Page([Entry(*entry) for entry in zip(names, runs, per_run)], path)
    parts = {"Summary": summary, "Results": scores, "Architecture": architecture, "Parameters": parameters, "Training": training,
             "Load and routing": routing, "Samples": samples}
    text = [f"# Report of {', '.join(names)}"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text += [f"## {title}\n\n{show(page)}" for title, show in parts.items()]
        for own in sections:
            title = (own.__doc__ or own.__name__).strip().splitlines()[0].rstrip(".")
            text.append(f"## {title}\n\n" + page.per_run(lambda e, own=own: str(own(e.run, e.results))))
        text.append(f"---\n\nSeed {seed}; minimoe on PyTorch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, "
                    f"{datetime.date.today()}. Beside this file lie its figures, and {path.stem}.json with all numbers.")
        record = {"date": f"{datetime.date.today()}", "seed": seed, "torch": torch.__version__.split("+")[0],
                  "runs": [{"name": e.name, "config": to_dict(e.run.config), "parameters": e.run.config.model.num_params(),
                            "active": e.run.config.model.active_params(), "results": [dataclasses.asdict(r) for r in e.results]}
                           for e in page.entries]}
        write_safely(path.with_suffix(".json"), lambda p: p.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
        write_safely(path, lambda p: p.write_text("\n\n".join(text) + "\n", encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; name a file in a folder that can be written to") from None
    return path


def _name(run: Run) -> str:
    return "a run" if run.folder is None else "shipped" if run.folder == SHIPPED else run.folder.resolve().name


def _free_path(run: Run) -> Path:
    """RUN/reports/<date>.md, or with a number where that is taken."""
    need(run.folder is not None, "this run has no folder: name the report's file")
    need(run.folder != SHIPPED, "the shipped run lies in the package, where no report is written: name a file with --report, or path=")
    home, today = run.folder / "reports", datetime.date.today()
    names = [f"{today}", *(f"{today}-{i}" for i in range(2, 1000))]
    return home / next(f"{n}.md" for n in names if not any((home / f"{n}{suffix}").exists() for suffix in (".md", ".json")))


def summary(page: Page) -> str:
    """In plain words what the results say, and what they do not."""
    return page.per_run(lambda e: _words(e.results))


def _words(results: Sequence[Result]) -> str:
    results = [r for i, r in enumerate(results) if (r.task, r.value, r.low, r.chance) not in
               {(o.task, o.value, o.low, o.chance) for o in results[:i]}]           # acc_norm where it must be the accuracy
    said = {verdict: [f"{_title(r)} {number(r.value)} (chance {number(r.chance)})" for r in results if r.verdict == verdict]
            for verdict in ("better", "worse", "not told apart")}
    lines = []
    if said["better"]:
        lines.append("Better than chance, with an interval that excludes it: " + ", ".join(said["better"]) + ".")
    if said["not told apart"]:
        lines.append("Not told apart from chance, which lies within the interval: " + ", ".join(said["not told apart"])
                     + ". The model may know a little of this or nothing; more questions would narrow the interval.")
    if said["worse"]:
        lines.append("Worse than chance: " + ", ".join(said["worse"]) + ". Where answers are written, this mostly means that the model does "
                     "not give the form that was asked for.")
    rest = [f"{_title(r)} {number(r.value)}" for r in results if not r.verdict]
    if rest:
        lines.append("Without a chance level or an interval, to be read beside others only: " + ", ".join(rest) + ".")
    wide = [(r.high - r.low) / 2 for r in results if r.low is not None and r.better == "higher" and r.chance is not None]
    if wide:
        lines.append(f"Half an interval is {number(max(wide))} at most: a smaller difference between two models may be chance.")
    return "\n\n".join(lines)


def _title(r: Result) -> str:
    return r.metric if r.metric.startswith(r.task) else f"{r.task} ({r.metric})"


def scores(page: Page) -> str:
    """The table of results, its figure, and how each task was asked."""
    if len(page.entries) == 1:
        text = table(page.entries[0].results)
    else:
        text = comparison([(e.name, e.results) for e in page.entries])
    figure = intervals([(e.name, e.results) for e in page.entries])
    notes = {r.task: r.details["note"] for e in page.entries for r in e.results if r.details.get("note")}
    return "\n\n".join([text, *([page.figure("results", figure)] if figure else []),
                        "Intervals are 95 % percentile bootstraps over the items (questions, documents). Chance is what needs no model.",
                        *(["\n".join(f"- **{task}**: {note}" for task, note in notes.items())] if notes else [])])


def comparison(runs: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """One table of several runs: a row for each metric, a column for each run, the interval below its value.

    >>> r = Result(task="sums", metric="accuracy", value=0.5, low=0.4, high=0.6, n=100, chance=0.25)
    >>> print(comparison([("a", [r]), ("b", [])]))
    | task | metric   | chance |   n | a                      | b |
    | ---- | -------- | -----: | --: | ---------------------- | -- |
    | sums | accuracy |  0.250 | 100 | 0.500 (0.400 to 0.600) |    |
    """
    found = [{(r.task, r.metric): r for r in results} for _, results in runs]
    rows = []
    for key in dict.fromkeys(key for results in found for key in results):
        here = [results[key] for results in found if key in results]
        each = [" / ".join(dict.fromkeys(values)) for values in ([number(r.chance) for r in here], [f"{r.n:,}" for r in here])]
        cells = [f"{number(r.value)} ({span(r)})" if (r := results.get(key)) and span(r) else number(r.value) if r else "" for results in found]
        rows.append([*key, *each, *cells])
    return markdown(["task", "metric", "chance", "n", *(name for name, _ in runs)], rows, right=(2, 3))


def architecture(page: Page) -> str:
    """The settings of the models that differ from the defaults, or that everybody asks for."""
    asked = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "n_experts", "top_k", "expert_hidden", "router",
             "balance")
    fields = dataclasses.fields(page.entries[0].run.config.model)
    models = [e.run.config.model for e in page.entries]
    kept = [f.name for f in fields if f.name in asked or any(getattr(m, f.name) != f.default for m in models)]
    rows = [[f"`{name}`", *(str(getattr(m, name)) for m in models)] for name in kept]
    return markdown(["setting", *(e.name for e in page.entries)], rows) + "\n\nAll other settings have their defaults."


def parameters(page: Page) -> str:
    """Parameters, all and active, part by part; the shapes below."""
    models = [e.run.config.model for e in page.entries]
    parts = [counts.params_by_part(m) for m in models]
    rows = [["total", *(f"{m.num_params():,}" for m in models)], ["active per token", *(f"{m.active_params():,}" for m in models)],
            ["forward FLOPs per token", *(f"{m.flops_per_token():,}" for m in models)],
            *([part, *(f"{p[part]:,}" for p in parts)] for part in parts[0] if any(p[part] for p in parts))]
    right = range(1, len(models) + 1)
    return markdown(["parameters", *(e.name for e in page.entries)], rows, right) + "\n\n" + page.per_run(
        lambda e: f"```text\n{shape_table(e.run.config.model)}\n```")


def training(page: Page) -> str:
    """Steps, tokens, seconds and last losses, and the history as a figure."""
    def show(e: Entry) -> str:
        try:
            rows = e.run.metrics()
        except ConfigError:
            rows = []
        if not rows:
            return "No metrics.jsonl lies beside these weights, so nothing is known of their training."
        last, best = rows[-1], min((r for r in rows if "val_ce" in r), key=lambda r: r["val_ce"], default=None)
        train, data = e.run.config.train, e.run.config.data
        lines = [f"{last['step']:,} of {train.steps:,} steps, {last['tokens']:,} tokens, {last['seconds']:,.0f} seconds of training; "
                 f"{train.optimizer}, learning rate {train.lr:g}, {train.dtype} on {train.device}, seed {train.seed}; text: "
                 f"{', '.join(f'{s.corpus} ({s.ratio:g})' for s in data.mixture)}.",
                 f"Loss at the end {last['ce']:.3f} nats per token" + (
                     f"; the lowest on held-out text {best['val_ce']:.3f} ({best['val_bpb']:.3f} bits per byte), at step {best['step']:,}."
                     if best else ".")]
        place = "history" if len(page.entries) == 1 else f"history-{page.entries.index(e) + 1}"
        return "\n\n".join([*lines, page.figure(place, e.run.plot())])
    return page.per_run(show)


def routing(page: Page) -> str:
    """Where the tokens of the held-out text go: load of each expert in each layer, and one passage token by token."""
    def show(e: Entry) -> str:
        layers, place = e.run.config.model.moe_layers, "" if len(page.entries) == 1 else f"-{page.entries.index(e) + 1}"
        if not layers:
            return "This model is dense: no layer has a router."
        try:
            text = held_out(e.run)[0].held_out[0].text
        except ConfigError as error:
            return f"Not measured: {error}"
        shares, trace = loads(e.run), routing_trace(e.run, text, max_tokens=ROUTED)
        e_ = e.run.config.model.n_experts
        worst = [max(load) * e_ - 1 for load in shares["all"]]
        middle = trace.layers[len(trace.layers) // 2].index
        alt = "\n".join(f"- layer {layer}: the fullest expert has {1 + over:.2f} times the even share (MaxVio {over:.2f})"
                        for layer, over in zip(layers, worst))
        passage = Figure(alt_text(trace, middle), routing_svg(trace, middle))
        return "\n\n".join([alt, page.figure(f"load{place}", load_map(shares, layers)),
                            f"The beginning of the held-out text in layer {middle}: below each token its first two experts.",
                            page.figure(f"routing{place}", passage)])
    return page.per_run(show)


def samples(page: Page) -> str:
    """What the models write, and the first questions of each task with their answers."""
    def show(e: Entry) -> str:
        blocks, seen = [], set()
        for r in e.results:
            if r.task in seen or not r.details.get("samples"):
                continue
            seen.add(r.task)
            blocks.append(f"**{r.task}**\n\n" + "\n\n".join(_fenced(_sample(s)) for s in r.details["samples"][:8 if r.task == "samples" else 2]))
        return "\n\n".join(blocks) or "No task of this report writes samples."
    return page.per_run(show)


def _sample(s: dict) -> str:
    if "answers" in s:
        marks = [("right" if i == s["right"] else "") + (", " if i == s["right"] == s["chosen"] else "") + ("chosen" if i == s["chosen"] else "")
                 for i in range(len(s["answers"]))]
        return s["context"] + "\n" + "\n".join(f"  {chr(65 + i)}) {a!r}{f'   <- {m}' if m else ''}" for i, (a, m) in enumerate(zip(s["answers"], marks)))
    if "written" in s:
        return f"{s['prompt']}▸{s['written']}" + (f"\n(right: {s['right']})" if "right" in s else "")
    return "\n".join(f"{name}: {value}" for name, value in s.items())         # of somebody's own benchmark


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
