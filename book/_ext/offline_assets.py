"""Local Sphinx extension: what the pages need to work with no network.

plotly.min.js is copied from the installed Python package, and only next to pages that exist. sphinx-thebe's scripts are
dropped: Jupyter Book 1 always loads them, and a constant of theirs is emitted twice, an error on every page.
"""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_plotly(app, exception):
    """Put plotly.min.js beside book.js, which loads it on the pages that hold a figure."""
    if exception or app.builder.format != "html":
        return
    import plotly

    source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    shutil.copyfile(source, Path(app.outdir) / "_static" / "plotly.min.js")


def drop_thebe(app, pagename, templatename, context, doctree):
    """Take sphinx-thebe's scripts off the page."""

    def is_thebe(script):
        body = getattr(script, "attributes", {}).get("body", "")
        return "thebe" in str(getattr(script, "filename", script)).lower() or "THEBE_JS_URL" in str(body)

    context["script_files"] = [script for script in context.get("script_files", []) if not is_thebe(script)]


def setup(app):
    app.connect("build-finished", copy_plotly)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
