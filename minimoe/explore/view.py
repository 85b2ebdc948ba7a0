"""One object, three views of a routing: a widget in JupyterLab, a page that stands alone, a static figure."""
from __future__ import annotations

from pathlib import Path

from minimoe.explore import html, svg
from minimoe.explore.text import labels
from minimoe.explore.trace import RoutingTrace, routing_trace


class RoutingView:
    """A routing ready to be shown; the last expression of a notebook cell shows itself. Made by `view`."""

    def __init__(self, trace: RoutingTrace, examples: dict[str, RoutingTrace], run: object | None, layer: int | None):
        self.trace, self.examples, self.run = trace, examples, run
        self.layer = trace.layer(layer).index
        self._widget = None

    def __repr__(self) -> str:
        t = self.trace
        return f"RoutingView({len(t.tokens)} tokens, {len(t.layers)} layers, {t.n_experts} experts)"

    @property
    def figure_alt(self) -> str:
        """What the figure of the shown layer shows, in words; `alt(layer)` gives another layer's."""
        return self.alt(self.layer)

    def alt(self, layer: int | None = None) -> str:
        """Alternative text for the figure of one layer (index in the model)."""
        return svg.alt_text(self.trace, self.layer if layer is None else layer)

    def svg(self, layer: int | None = None) -> str:
        """The static figure of one layer (index in the model; default: the shown one). ValueError: it has no router."""
        return svg.routing_svg(self.trace, self.layer if layer is None else layer)

    def html(self) -> str:
        """A piece of HTML with everything inside: no kernel, no network; the figure stands in where no script runs."""
        return html.fragment(self._state(self.trace), self.svg())

    def save_html(self, path: str | Path, title: str = "Routing explorer") -> Path:
        """Writes a page that stands alone, and returns its path; missing folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html.page(self.html(), title), encoding="utf-8")
        return path

    def widget(self) -> object:
        """The Jupyter widget, with a box for the reader's own text when the view was given a run.

        Raises ModuleNotFoundError that names the remedy when anywidget is not installed.
        """
        if self._widget is None:
            try:
                from minimoe.explore.widget import ExplorerWidget
            except ModuleNotFoundError as e:
                raise ModuleNotFoundError(f"the explorer's widget needs {e.name}: pip install minimoe[course]",
                                          name=e.name) from None
            live = self.run is not None
            own = lambda text: self._state(routing_trace(self.run, text), "Your text", live=True)
            self._widget = ExplorerWidget(self._state(self.trace, live=live), own if live else None)
        return self._widget

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        """The widget for JupyterLab, and text/html for the site and for readers without a kernel."""
        data = {"text/plain": repr(self), "text/html": self.html()}
        try:
            bundle = self.widget()._repr_mimebundle_()
        except ModuleNotFoundError:
            if self.run is not None:                # the text box would be missing: that must not pass unseen
                raise
            return data, {}
        shown, meta = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**shown, **data}, meta

    def _state(self, first: RoutingTrace, name: str | None = None, live: bool = False) -> dict:
        """What the module draws: the first text, then the others, and whether a kernel can trace more."""
        known = {other: trace for other, trace in self.examples.items() if trace != first}
        if name is None:
            name = next((other for other, trace in self.examples.items() if trace == first), "This text")
        elif self.trace not in self.examples.values():
            known = {"This text": self.trace, **known}
        return {"items": [_item(name, first)] + [_item(other, trace) for other, trace in known.items()],
                "layer": self.layer, "palette": list(svg.PALETTE), "live": live}


def view(trace: RoutingTrace, examples: dict[str, RoutingTrace] | None = None, run: object | None = None,
         layer: int | None = None) -> RoutingView:
    """Shows a routing. `examples` (name -> trace) can be chosen beside it; with a `run`, JupyterLab has a text box.

    `layer` is the index of the layer to begin with (default: the first that has a router). Raises ValueError for a
    layer without one, TypeError for what is no trace.

    >>> from minimoe.explore.trace import LayerTrace
    >>> layer = LayerTrace(0, ((1,),), ((0.75,),), ((True,),), ((0.25, 0.75),), (0.8113,), (0.0, 1.0))
    >>> view(RoutingTrace("hi", ("hi",), ("",), (7,), 0, 2, 1, "softmax", 1, (layer,)))
    RoutingView(1 tokens, 1 layers, 2 experts)
    """
    for name, value in {"trace": trace, **(examples or {})}.items():
        if not isinstance(value, RoutingTrace):
            raise TypeError(f"{name}: expected a RoutingTrace (see routing_trace), found {type(value).__name__}")
    return RoutingView(trace, dict(examples or {}), run, layer)


def _item(name: str, trace: RoutingTrace) -> dict:
    return {"name": name, "trace": trace.to_dict(), "labels": labels(trace), "alt": svg.alt_text(trace)}
