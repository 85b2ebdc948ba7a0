"""The figures of a report as our own SVG: scores with their intervals, and the load of every expert on held-out text."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from minimoe import balance
from minimoe.data.loader import join
from minimoe.evaluate.likelihood import tokenizer_of
from minimoe.evaluate.results import Result, number, span
from minimoe.evaluate.text import held_out
from minimoe.plot import INK, LINE, MARGIN, MUTED, PALETTE, PAPER, WIDTH, Figure, mix, picture, ticks, words

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

NAMES, RIGHT, ROW = 270, 620, 18         # pixels
WINDOWS = 16                             # sequences of each corpus whose routing is counted


def intervals(runs: Sequence[tuple[str, Sequence[Result]]]) -> Figure | None:
    """Each score as a point with its 95 % interval, and chance as a vertical mark; scores of which less is better are drawn as a
    share of their chance level. Several runs stand below one another. None where there is nothing to draw.

    >>> r = Result(task="sums", metric="accuracy", value=0.5, low=0.4, high=0.6, n=100, chance=0.25)
    >>> intervals([("run", [r])]).alt
    'Scores with 95 % intervals: sums accuracy 0.500 (0.400 to 0.600), chance 0.250.'
    """
    drawn: dict[tuple[str, str], list[tuple[int, Result]]] = {}
    for i, (_, results) in enumerate(runs):
        for r in results:
            if r.better == "lower" and r.chance or r.better == "higher" and 0 <= r.value <= 1 and (r.high or 0) <= 1:
                drawn.setdefault((r.task, r.metric), []).append((i, r))
    if not drawn:
        return None
    place = lambda v: NAMES + (RIGHT - NAMES) * min(max(v, 0), 1.02)
    body, y, said = [words(MARGIN, 28, "Scores with 95 % intervals; the gray mark is chance", INK, 15, weight=600)], 52, []
    for i, (name, _) in enumerate(runs if len(runs) > 1 else ()):
        body.append(f'<circle cx="{MARGIN + 5}" cy="{y - 4}" r="5" fill="{PALETTE[i % 8]}"/>' + words(MARGIN + 16, y, name, INK, 12))
        y += ROW
    for lower in (False, True):
        rows = {key: found for key, found in drawn.items() if (found[0][1].better == "lower") == lower}
        if not rows:
            continue
        body.append(words(NAMES, y + 4, "less is better, as a share of the chance level" if lower else "more is better", MUTED, 12))
        top, y = y + 12, y + 24
        for (task, metric), found in rows.items():
            title = f"{task} {metric}" if task != metric else task
            body.append(words(NAMES - 12, y + 4, title, INK, 12, "end"))
            for i, r in found:
                unit, color = (r.chance if lower else 1.0), PALETTE[i % 8]
                if r.low is not None:
                    body.append(f'<path d="M{place(r.low / unit):.1f} {y}H{place(r.high / unit):.1f}" stroke="{color}" stroke-width="3"/>')
                if r.chance is not None:
                    body.append(f'<path d="M{place(r.chance / unit):.1f} {y - 7}v14" stroke="{MUTED}" stroke-width="2"/>')
                body.append(f'<circle data-task="{task}" cx="{place(r.value / unit):.1f}" cy="{y}" r="4.5" fill="{color}" stroke="{PAPER}"/>'
                            + words(RIGHT + 16, y + 4, f"{number(r.value)}  {f'({span(r)})' if span(r) else ''}", MUTED, 11))
                said.append((f"{runs[i][0]}: " if len(runs) > 1 else "") + f"{title} {number(r.value)}"
                            + (f" ({span(r)})" if span(r) else "") + (f", chance {number(r.chance)}" if r.chance is not None else ""))
                y += ROW
        for v in ticks(0, 1):
            body.insert(0, f'<path d="M{place(v):.1f} {top}V{y - 6}" stroke="{LINE}"/>')
            body.append(words(place(v), y + 8, f"{v:g}", MUTED, 11, "middle"))
        y += 36
    alt = "Scores with 95 % intervals: " + "; ".join(said) + "."
    return Figure(alt, picture(alt, "A point for each score, a line for its interval, a gray mark for chance.", "\n".join(body), y))


@torch.inference_mode()
def loads(run: Run) -> dict[str, list[list[float]]]:
    """For all held-out text, and for each corpus where there are several: of each MoE layer, the share (E,) of every expert in
    the choices of the tokens. At most WINDOWS sequences of each corpus are read."""
    model, limit, tokenizer, counts = run.model, run.model.cfg.max_seq_len, tokenizer_of(run), {}
    was_training = model.training
    model.eval()
    for corpus in held_out(run):
        tokens = torch.from_numpy(join(corpus.held_out, tokenizer)[:limit * WINDOWS]).long()
        routings = [model(part[None].to(model.embedding.weight.device)).routing for part in tokens.split(limit)]
        counts[corpus.name] = [sum(balance.load_counts(r) for r in layer).cpu() for layer in zip(*routings)]
    model.train(was_training)
    rows = {"all": [sum(layers) for layers in zip(*counts.values())]} | (counts if len(counts) > 1 else {})
    return {name: [(c / c.sum().clamp_min(1)).tolist() for c in layers] for name, layers in rows.items()}


def load_map(shares: dict[str, list[list[float]]], layers: Sequence[int]) -> Figure:
    """The load of every expert, layer by layer, as a table of colors: paper where none, blue where three times the even share.

    >>> load_map({"all": [[0.75, 0.25]]}, [0]).alt
    'Load of 2 experts on held-out text; an even share is 50.0%. Layer 0: expert 0 most, 75.0%, expert 1 least, 25.0%.'
    """
    e = len(next(iter(shares.values()))[0])
    cell, left, y = min(70.0, (WIDTH - MARGIN - 170) / e), 170, 62
    body = [words(MARGIN, 28, f"Load of the experts on held-out text; an even share is {1 / e:.1%}", INK, 15, weight=600)]
    said = []
    if cell >= 14:
        body += [words(left + (i + 0.5) * cell, 52, str(i), MUTED, 11, "middle") for i in range(e)]
    for number_, layer in enumerate(layers):
        for name, rows in shares.items():
            load = rows[number_]
            body.append(words(left - 10, y + 13, f"layer {layer}, {name}" if name == "all" else name[:24], INK if name == "all" else MUTED,
                              12, "end"))
            for i, share in enumerate(load):
                strength = min(1.0, share * e / 3)
                body.append(f'<rect data-expert="{i}" data-load="{share:.4f}" x="{left + i * cell:.1f}" y="{y}" width="{cell - 1:.1f}" '
                            f'height="17" fill="{mix(PALETTE[0], 0.05 + 0.75 * strength)}"/>')
                if cell >= 34:
                    body.append(words(left + (i + 0.5) * cell, y + 13, f"{share:.0%}", INK, 11, "middle"))
            y += ROW
        y += 10
        load = shares["all"][number_]
        most, least = (pick(range(e), key=load.__getitem__) for pick in (max, min))
        said.append(f"Layer {layer}: expert {most} most, {load[most]:.1%}, expert {least} least, {load[least]:.1%}.")
    alt = f"Load of {e} experts on held-out text; an even share is {1 / e:.1%}. " + " ".join(said)
    return Figure(alt, picture(alt, "A row for each layer, and for each corpus in it; a column for each expert.", "\n".join(body), y + 8))
