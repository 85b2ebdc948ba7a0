"""Figures as our own SVG, with nothing to install: the history of a run, and the pieces that other figures are made of."""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from minimoe.settings import need

# Okabe and Ito's colors for all kinds of color vision (jfly.uni-koeln.de/color), black replaced by gray; expert e takes
# the color e modulo 8, and its number is always written beside it
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442", "#8c8c8c")
PAPER, INK, MUTED, LINE = "#ffffff", "#1b2027", "#59626d", "#dde1e6"
SANS = "ui-sans-serif, system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
WIDTH, MARGIN = 860, 20         # pixels
POINTS = 400                    # of a line, at most


@dataclass(frozen=True)
class Figure:
    """An SVG and what it shows, in words. The last expression of a notebook cell shows itself; on paper of its own, so that
    it reads the same on a light and on a dark page."""

    alt: str
    text: str

    def svg(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Figure({self.alt})"

    def save(self, path: str | Path) -> Path:
        """Writes the SVG, and returns its path; missing folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text, encoding="utf-8")
        return path


def history(rows: list[dict]) -> Figure:
    """Loss (training, held-out), learning rate, and for each MoE layer the share of every expert, over the steps.

    `rows` are those of metrics.jsonl. Raises ConfigError where there is none.

    >>> history([{"step": 1, "ce": 3.0, "lr": 0.1}, {"step": 2, "ce": 2.0, "lr": 0.1, "val_ce": 2.5}]).alt
    'Training of 2 steps: loss from 3.00 to 2.00, held-out loss last 2.50, learning rate at most 0.1.'
    """
    need(bool(rows), "nothing to plot: no row has been logged yet")
    held_out = [(r["step"], r["val_ce"]) for r in rows if "val_ce" in r]
    thin = [*rows[:-1:max(1, math.ceil(len(rows) / POINTS))], rows[-1]]
    steps = (min(0, rows[0]["step"]), rows[-1]["step"])
    lines = {f"training {rows[-1]['ce']:.3f}": [(r["step"], r["ce"]) for r in thin]}
    if held_out:
        lines[f"held-out {held_out[-1][1]:.3f}"] = held_out
    losses = [y for points in lines.values() for _, y in points]
    body = [_panel(MARGIN, 24, 520, 190, "Loss, nats per token", steps, (min(losses), max(losses)), lines),
            _panel(MARGIN + 560, 24, 260, 190, "Learning rate", steps, (0, max(r["lr"] for r in thin)),
                   {"": [(r["step"], r["lr"]) for r in thin]})]
    layers, y = len(rows[-1].get("routing", ())), 284
    alt = (f"Training of {rows[-1]['step']} steps: loss from {rows[0]['ce']:.2f} to {rows[-1]['ce']:.2f}"
           + (f", held-out loss last {held_out[-1][1]:.2f}" if held_out else "")
           + f", learning rate at most {max(r['lr'] for r in rows):g}.")
    for layer in range(layers):
        x, load = MARGIN + layer % 2 * 420, rows[-1]["routing"][layer]["load"]
        body.append(_shares(x, y, 400, 110, f"MoE layer {layer}: load of each expert; even is {1 / len(load):.1%}", steps,
                            [(r["step"], r["routing"][layer]["load"]) for r in thin]))
        top, low = (pick(range(len(load)), key=load.__getitem__) for pick in (max, min))
        alt += f" MoE layer {layer} ends with expert {top} fullest, {load[top]:.1%}, and expert {low} emptiest, {load[low]:.1%}."
        y += 176 if layer % 2 or layer == layers - 1 else 0
    return Figure(alt, picture(alt, "Over the steps of training.", "\n".join(body), y))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two others, at most `most`.

    >>> ticks(0.3, 7.2), ticks(0, 0.003, most=4)
    ([2.0, 4.0, 6.0], [0.0, 0.001, 0.002, 0.003])
    """
    rough = (high - low) / most or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10, 20, 50)
                if math.floor(high / (unit * m) + 1e-9) - math.ceil(low / (unit * m) - 1e-9) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def mix(color: str, share: float, paper: str = PAPER) -> str:
    """`share` (0 to 1) of a color on paper, both "#rrggbb".

    >>> mix("#000000", 0.5)
    '#808080'
    """
    pairs = ((int(color[i:i + 2], 16), int(paper[i:i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def words(x: float, y: float, text: str, color: str, size: float, anchor: str = "start", weight: int = 400,
          font: str = SANS) -> str:
    """A text at a place."""
    return (f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" font-weight="{weight}" '
            f'text-anchor="{anchor}" font-family="{font}">{escape(text)}</text>')


def picture(alt: str, note: str, body: str, height: float, width: int = WIDTH) -> str:
    """A whole SVG on white paper, with its alternative text."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" role="img" '
            f'aria-label={quoteattr(alt)} style="max-width:100%;height:auto">\n'
            f"<title>{escape(alt)}</title>\n<desc>{escape(note)}</desc>\n"
            f'<rect width="{width}" height="{height:.0f}" rx="8" fill="{PAPER}"/>\n{body}\n</svg>')


def _axes(x: float, y: float, width: float, height: float, title: str, xs: tuple, ys: tuple, form: str = "g"):
    """Title, grid and numbers of a panel, and the functions that place a step and a value in it."""
    (x0, x1), (y0, y1) = ((low, high) if high > low else (low - 0.5, low + 0.5) for low, high in (xs, ys))
    left, base = x + 44, y + 14 + height
    at_x = lambda v: left + (v - x0) / (x1 - x0) * (x + width - left)
    at_y = lambda v: base - (v - y0) / (y1 - y0) * height
    out = [words(x, y, title, INK, 13, weight=600)]
    for v in ticks(y0, y1):
        out.append(f'<path d="M{left:.1f} {at_y(v):.1f}H{x + width:.1f}" stroke="{LINE}"/>'
                   + words(left - 6, at_y(v) + 4, format(v, form), MUTED, 11, "end"))
    out += [words(at_x(v), base + 16, f"{v:,g}" if v < 1e5 else f"{v:g}", MUTED, 11, "middle") for v in ticks(x0, x1, 5)]
    out.append(words(x + width, base + 30, "step", MUTED, 11, "end"))
    return out, at_x, at_y


def _panel(x: float, y: float, width: float, height: float, title: str, xs: tuple, ys: tuple, lines: dict) -> str:
    out, at_x, at_y = _axes(x, y, width, height, title, xs, ys)
    for i, (name, points) in enumerate(lines.items()):
        color, dashes = PALETTE[(0, 3)[i]], ' stroke-dasharray="6 3"' if i else ""
        path = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        if i or len(points) == 1:
            out += [f'<circle cx="{at_x(a):.1f}" cy="{at_y(b):.1f}" r="3" fill="{color}"/>' for a, b in points]
        if name:
            left = x + width - 250 + 130 * i
            out.append(f'<path d="M{left} {y - 4}h22" stroke="{color}" stroke-width="2"{dashes}/>'
                       + words(left + 28, y, name, INK, 12))
    return "\n".join(out)


def _shares(x: float, y: float, width: float, height: float, title: str, xs: tuple, loads: list) -> str:
    """Bands that fill the panel, one an expert, its number at the right where there is room."""
    out, at_x, at_y = _axes(x, y, width - 16, height, title, xs, (0.0, 1.0), ".0%")
    loads = [(xs[0], loads[0][1]), *loads]                  # from the left edge on, also where there is one row only
    bottom = [0.0] * len(loads)
    for e in range(len(loads[0][1])):
        top = [low + load[e] for low, (_, load) in zip(bottom, loads)]
        steps = [step for step, _ in loads]
        edge = [*zip(steps, top), *reversed([*zip(steps, bottom)])]
        path = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in edge)
        out.append(f'<polygon data-expert="{e}" points="{path}" fill="{mix(PALETTE[e % 8], 0.7)}" stroke="{PAPER}" '
                   f'stroke-width="{min(0.7, 8 / len(loads[0][1])):.2f}"/>')
        if (top[-1] - bottom[-1]) * height >= 8:
            out.append(words(x + width - 12, at_y((top[-1] + bottom[-1]) / 2) + 4, str(e), INK, 11))
        bottom = top
    return "\n".join(out)
