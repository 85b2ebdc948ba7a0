"""The explorer as a Jupyter widget. Imported only when a view is shown, since anywidget is an extra."""
from __future__ import annotations

from collections.abc import Callable

import anywidget
import traitlets

from minimoe.explore.html import source


class ExplorerWidget(anywidget.AnyWidget):
    """Shows `state`; a text that is typed goes through `trace_text(text) -> state`, errors come back as a line."""

    _esm = source("explorer.js")
    _css = source("explorer.css")
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, state: dict, trace_text: Callable[[str], dict] | None = None):
        super().__init__(state=state)
        if trace_text is not None:
            self.on_msg(lambda _, content, buffers: self.answer(trace_text, content))

    def answer(self, trace_text: Callable[[str], dict], content: object) -> None:
        """Replaces the state by that of the asked-for text, or sends one line that says why not."""
        error = ""
        try:
            self.state = trace_text(content["text"])
        except ValueError as e:
            error = str(e)
        except Exception as e:              # the reader sees no traceback of the kernel's: say at least what it was
            error = f"{type(e).__name__}: {e}"
        self.send({"error": " ".join(error.split())})
