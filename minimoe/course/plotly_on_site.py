"""A plotly figure in a notebook becomes, on the site, a `div` that `book/_static/book.js` draws.

myst-nb does not know plotly's mime type and would show nothing. The figure's data goes into the page as JSON and the
drawing library is one file of the site, so a page needs no network and stays small.
"""

from __future__ import annotations

import json
from html import escape

MIME = "application/vnd.plotly.v1+json"


class PlotlyMime:
    """myst-nb's render plugin (entry point `myst_nb.mime_renderers`) for `application/vnd.plotly.v1+json`."""

    mime_priority_overrides = [("html", MIME, 5)]

    @staticmethod
    def handle_mime(renderer, data, inline: bool):
        """Return docutils nodes for a plotly output of a cell, or None for any other output."""
        if inline or data.mime_type != MIME:
            return None
        from docutils import nodes

        figure = data.content if isinstance(data.content, dict) else json.loads(data.content)
        alt = data.output_metadata.get("alt") or data.output_metadata.get(MIME, {}).get("alt") or alt_of(figure)
        return [nodes.raw(text=page_html(figure, alt), format="html", classes=["output"])]


def alt_of(figure: dict) -> str:
    """The alternative text that a figure carries in `layout.meta`, itself a string or a dict with the key `alt`.

    >>> alt_of({"layout": {"meta": {"alt": "two bars of equal height"}}})
    'two bars of equal height'
    """
    meta = figure.get("layout", {}).get("meta", "")
    return meta.get("alt", "") if isinstance(meta, dict) else str(meta)


def page_html(figure: dict, alt: str) -> str:
    """The HTML of one figure: a labelled `div` of the figure's height, the figure inside as JSON.

    >>> page_html({"data": []}, 'a "yes" and a "no"')[:74]
    '<div class="book-plotly" role="img" aria-label="a &quot;yes&quot; and a &q'
    """
    height = figure.get("layout", {}).get("height", 450)
    body = json.dumps(figure).replace("</", "<\\/")  # a closing tag inside a string would end the script
    return (
        f'<div class="book-plotly" role="img" aria-label="{escape(alt)}" style="height:{height}px">'
        f'<script type="application/json">{body}</script></div>'
    )
