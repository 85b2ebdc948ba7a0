"""The stepper: one token on its way through a softmax router, step by step, with sliders (chapter 4).

    logits -> + noise -> / temperature -> softmax over all experts -> the k likeliest -> weights

In JupyterLab a widget, on a page without a kernel the same module, where no script runs a table. E experts.
"""
from __future__ import annotations

import dataclasses
import html as markup
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from minimoe.explore import html
from minimoe.explore.svg import PALETTE
from minimoe.explore.text import labels
from minimoe.explore.trace import routing_trace
from minimoe.router import softmax_topk

STYLES = ("explorer.css", "stepper.css")


@dataclass(frozen=True)
class Example:
    """A token to step through: its `name` in the list, its E `logits`, and the text around it, if it has one."""

    name: str
    logits: tuple[float, ...]
    before: str = ""
    token: str = ""
    after: str = ""
    where: str = ""


def token_example(run: object, text: str, at: int = -1, layer: int | None = None, name: str = "") -> Example:
    """The logits that the router of one layer gave to token number `at` of a text (default: the last one).

    `run` is anything with `.model` and `.tokenizer`, as for `routing_trace`; `layer` is the index in the model (default:
    the first with a router). Raises ValueError for a layer without a router, IndexError for a token that is not there.
    """
    trace = routing_trace(run, text)
    index, shown = trace.layer(layer).index, labels(trace)
    at = range(len(shown))[at]
    model = run.model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            routing = model(torch.tensor([trace.ids], device=next(model.parameters()).device)).routing
    finally:
        model.train(was_training)
    logits_E = routing[model.cfg.moe_layers.index(index)].logits[at]
    around = ["".join(s).replace("·", " ") for s in (shown[max(0, at - 12):at], shown[at + 1:at + 9])]
    return Example(name or f"“{shown[at]}”, layer {index}", tuple(round(x, 3) for x in logits_E.tolist()),
                   around[0], shown[at], around[1], f"token {at}, layer {index}")


class Stepper:
    """A stepper ready to be shown; the last expression of a notebook cell shows itself. Made by `stepper`."""

    def __init__(self, examples: tuple[Example, ...], start: dict, dice: tuple[float, ...]):
        self.examples, self.start, self.dice = examples, start, dice

    def __repr__(self) -> str:
        return f"Stepper({len(self.dice)} experts, {len(self.examples)} examples)"

    @property
    def figure_alt(self) -> str:
        """What the picture shows before anything is moved, in words."""
        first, weights = self.examples[0], self._rows()
        chosen = sorted((r for r in weights if r[3] is not None), key=lambda r: r[3])
        experts = ", ".join(f"expert {r[0]} with weight {r[4]:.2f}" for r in chosen)
        what = "renormalized" if self.start["normalize"] else "not renormalized"
        return (f"One token through a router with {len(self.dice)} experts, a row for each: its logit, its probability, "
                f"whether it is in the top-{self.start['k']}, its weight ({what}). {first.name} goes to {experts}.")

    def html(self) -> str:
        """A piece of HTML with everything inside: no kernel, no network; a table stands in where no script runs."""
        return html.fragment(self._state(), self.table(), "stepper.js", STYLES)

    def table(self) -> str:
        """The first example as a plain HTML table, its numbers from `minimoe.router.softmax_topk`."""
        heads = ("Expert", "Logit", "Softmax", "Top-k", "Weight")
        rows = ["".join(f'<th scope="col">{h}</th>' for h in heads)]
        for e, logit, prob, rank, weight in self._rows():
            cells = (f"{logit:.2f}", f"{prob:.3f}", "–" if rank is None else str(rank + 1),
                     "–" if rank is None else f"{weight:.3f}")
            rows.append(f'<th scope="row">{e}</th>' + "".join(f"<td>{c}</td>" for c in cells))
        return (f'<table aria-label="{markup.escape(self.figure_alt)}"><caption>{markup.escape(self.examples[0].name)}'
                "</caption>" + "".join(f"<tr>{r}</tr>" for r in rows) + "</table>")

    def save_html(self, path: str | Path, title: str = "One token through a router") -> Path:
        """Writes a page that stands alone, and returns its path; missing folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html.page(self.html(), title), encoding="utf-8")
        return path

    def widget(self) -> object:
        """The Jupyter widget. Raises ModuleNotFoundError that names the remedy when anywidget is not installed."""
        try:
            from minimoe.explore.widget import ExplorerWidget
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(f"the stepper's widget needs {e.name}: pip install minimoe[course]",
                                      name=e.name) from None

        class StepperWidget(ExplorerWidget):        # here, since anywidget is an extra
            _esm = html.source("stepper.js")
            _css = "".join(map(html.source, STYLES))

        return StepperWidget(self._state())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        """The widget for JupyterLab, and text/html for the site and for readers without a kernel."""
        data = {"text/plain": repr(self), "text/html": self.html()}
        try:
            bundle = self.widget()._repr_mimebundle_()
        except ModuleNotFoundError:
            return data, {}
        shown, meta = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**shown, **data}, meta

    def _state(self) -> dict:
        """What the module draws."""
        return {"examples": [dataclasses.asdict(e) for e in self.examples], "start": self.start, "dice": self.dice,
                "palette": PALETTE, "alt": self.figure_alt}

    def _rows(self) -> list[tuple[int, float, float, int | None, float]]:
        """(expert, logit, probability, rank of the choice or None, weight) of the first example, by the library."""
        s, logits = self.start, self.examples[0].logits
        scores = (torch.tensor([logits]) + s["noise"] * torch.tensor([self.dice])) / s["temperature"]
        r = softmax_topk(scores, s["k"], s["normalize"])
        rank = {e: i for i, e in enumerate(r.experts[0].tolist())}
        return [(e, logits[e], p, rank.get(e), r.weights[0, rank[e]].item() if e in rank else 0.0)
                for e, p in enumerate(r.probs[0].tolist())]


def stepper(examples: list[Example], k: int = 2, temperature: float = 1.0, noise: float = 0.0, normalize: bool = True,
            seed: int = 0) -> Stepper:
    """One token through softmax((logits + noise) / temperature), top-k and weights, with a slider for each.

    `noise` is the standard deviation; what it multiplies is drawn once from `seed`, so that a slider moves it smoothly.
    Raises ValueError when the examples have different numbers of experts or a setting cannot be.

    >>> stepper([Example("by hand", (2.0, 1.0, 0.0))])
    Stepper(3 experts, 1 examples)
    """
    sizes = {len(e.logits) for e in examples}
    if len(sizes) != 1:
        raise ValueError(f"examples with {sorted(sizes) or 'no'} experts: give at least one, all of one number of experts")
    (n,) = sizes
    if not all(math.isfinite(x) for e in examples for x in e.logits):
        raise ValueError("a logit is not finite: the softmax has no value there")
    if not 1 <= k <= n or temperature <= 0 or noise < 0:
        raise ValueError(f"k={k}, temperature={temperature}, noise={noise}: k from 1 to {n}, temperature above 0, "
                         "noise not negative")
    dice = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    start = {"k": k, "temperature": temperature, "noise": noise, "normalize": normalize}
    return Stepper(tuple(examples), start, tuple(round(x, 4) for x in dice.tolist()))
