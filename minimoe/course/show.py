"""`show(figure, alt=…)`: one way to put a figure into a notebook, with words for those who cannot see it.

What is stored is text that comes out the same at each run: every number of a plotly figure is rounded to six
significant digits and arrays become lists (plotly stores them bit by bit otherwise), an SVG stays as it is.
"""
from __future__ import annotations

import base64
import json
import math
import re
from html import escape
from typing import Any

PLOTLY = "application/vnd.plotly.v1+json"
MIN_ALT = 40        # characters: shorter texts repeat the title
DIGITS = 6
HEIGHT = 400        # pixels, where a figure does not say
GRAY = "#767676"    # 4.5 : 1 on white and 4.1 : 1 on a dark page

# Lab draws a plotly figure without a name. A hidden text follows it, which a screen reader finds there; where scripts
# may run, the figure itself takes the text as its label and the hidden copy goes.
_LABEL = """<div class="minimoe-alt"><span style="position:absolute;width:1px;height:1px;overflow:hidden;\
clip:rect(0,0,0,0)">{alt}</span><script>(function () {{
var here = document.currentScript.parentElement, own = here.closest(".jp-OutputArea-child, .output");
var before = own && own.previousElementSibling, figure = before && (before.matches(".book-plotly") ? before
  : before.querySelector(".jp-RenderedPlotly, .book-plotly"));
if (!figure) return;
figure.setAttribute("role", "img"); figure.setAttribute("aria-label", here.firstElementChild.textContent);
own.style.display = "none"; here.firstElementChild.remove(); }})();</script></div>"""


def show(figure: Any, alt: str) -> None:
    """Displays a plotly figure, an SVG string or an object with `svg()` or `_repr_svg_()`, labelled with `alt`.

    `alt` says in a sentence what the figure shows: its kind, its axes, and what is to be seen. It becomes the
    `aria-label` of the figure, in Lab and on the site.

    Raises:
        ValueError: `alt` is shorter than 40 characters.
        TypeError: `figure` is nothing that can be shown.
    """
    from IPython.display import display

    alt = checked_alt(alt)
    if hasattr(figure, "to_plotly_json"):
        display({PLOTLY: plotly_json(figure, alt), "text/plain": alt}, raw=True)
        display({"text/html": _LABEL.format(alt=escape(alt)), "text/plain": "(the text of the figure above)"}, raw=True)
    else:
        display({"text/html": labelled_svg(_svg_of(figure), alt), "text/plain": alt}, raw=True)


def checked_alt(alt: str) -> str:
    """`alt` with its white space made single.

    >>> checked_alt("Loss")
    Traceback (most recent call last):
    ValueError: alt="Loss" has 4 characters: say in at least 40 what the figure shows, not its title
    """
    text = " ".join(str(alt).split())
    if len(text) < MIN_ALT:
        raise ValueError(f'alt="{text}" has {len(text)} characters: say in at least {MIN_ALT} what the figure shows, '
                         f'not its title')
    return text


def plotly_json(figure: Any, alt: str) -> dict:
    """The figure as plain lists and rounded numbers, in the course's template, with `alt` in `layout.meta.alt`."""
    spec = plain(figure.to_plotly_json())
    layout = spec.setdefault("layout", {})
    meta = layout.get("meta")
    layout["meta"] = {**(meta if isinstance(meta, dict) else {}), "alt": alt}
    layout["template"] = plotly_template()
    layout.setdefault("height", HEIGHT)
    spec["config"] = {"displaylogo": False, "responsive": True, **spec.get("config", {})}
    return json.loads(json.dumps(spec, allow_nan=False))


def plotly_template() -> dict:
    """One look for all figures: the explorer's colors, told apart by dash, symbol and pattern too; no background."""
    from minimoe.explore.svg import PALETTE

    dashes = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "5px,2px,1px,2px", "8px,3px")
    symbols = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
    patterns = ("", "/", ".", "x", "-", "\\", "|", "+")
    axis = {"gridcolor": "rgba(127,127,127,0.25)", "linecolor": GRAY, "zerolinecolor": "rgba(127,127,127,0.5)",
            "ticks": "outside", "tickcolor": GRAY, "automargin": True, "title": {"standoff": 8}}
    return {
        "data": {
            "scatter": [{"line": {"dash": dash, "width": 2.5}, "marker": {"symbol": symbol, "size": 8}}
                        for dash, symbol in zip(dashes, symbols)],
            "bar": [{"marker": {"pattern": {"shape": p, "solidity": 0.25}}} for p in patterns],
            "heatmap": [{"colorscale": "Cividis", "colorbar": {"outlinewidth": 0, "thickness": 14}}],
        },
        "layout": {
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 14, "color": GRAY},
            "title": {"x": 0, "xanchor": "left", "font": {"size": 16}},
            "colorway": list(PALETTE),
            "colorscale": {"sequential": "Cividis"},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 60, "r": 20, "t": 70, "b": 50},
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GRAY, "activecolor": "#0072b2"},
            "hovermode": "closest", "xaxis": axis, "yaxis": axis,
        },
    }


def plain(value: Any) -> Any:
    """Dicts, lists, strings and numbers only: arrays as lists, floats at six significant digits, nan and inf as None.

    >>> plain({"x": (1 / 3, 2.0, float("nan"))})
    {'x': [0.333333, 2.0, None]}
    """
    if isinstance(value, dict):
        if "bdata" in value and "dtype" in value:
            return plain(_unpacked(value))
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") + 0.0 if math.isfinite(value) else None     # + 0.0: no minus zero
    if hasattr(value, "tolist"):        # numpy and torch, arrays and single numbers
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, range)) or hasattr(value, "__iter__"):
        return [plain(v) for v in value]
    return str(value)                   # dates and the like


def _unpacked(packed: dict) -> Any:
    import numpy as np

    array = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"])
    return array.reshape([int(n) for n in str(packed["shape"]).split(",")]) if "shape" in packed else array


def labelled_svg(svg: str, alt: str) -> str:
    """The SVG, its root marked as one image with the text `alt`, alone in a `div` that keeps it inside the page.

    >>> labelled_svg('<svg role="x" style="color:red"></svg>', "a < b")
    '<div class="minimoe-figure"><svg role="img" aria-label="a &lt; b" style="color:red"></svg></div>'
    """
    start = re.search(r"<svg\b[^>]*>", svg)
    if start is None:
        raise TypeError("the text to show is not an SVG: it has no <svg …> element")
    root = re.sub(r"\s(role|aria-label)=(\"[^\"]*\"|'[^']*')", "", start.group())
    style = "" if " style=" in root else ' style="max-width:100%;height:auto"'
    label = f'<svg role="img" aria-label="{escape(alt)}"{style}'
    return f'<div class="minimoe-figure">{root.replace("<svg", label, 1)}{svg[start.end():].strip()}</div>'


def _svg_of(figure: Any) -> str:
    for name in ("svg", "_repr_svg_"):
        if callable(getattr(figure, name, None)):
            return getattr(figure, name)()
    if isinstance(figure, str):
        return figure
    raise TypeError(f"show takes a plotly figure, an SVG string or an object with svg(), not {type(figure).__name__}")
