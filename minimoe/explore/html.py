"""The explorer on a page without a kernel: the same module as in JupyterLab, inlined, with nothing to fetch."""
from __future__ import annotations

import html
import json
from pathlib import Path

# What anywidget's model gives the module, as far as the module uses it. The script is a classic one, since
# document.currentScript, by which it finds its own place on the page, is null inside a module.
_HOST = """
const state = JSON.parse(host.querySelector("script[type='application/json']").textContent);
const model = { get: name => state[name], on() {}, off() {}, send() {} };
widget.render({ model, el: host.querySelector(".mm-slot") });
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 74rem; padding: 2rem 1.25rem 3rem; background: light-dark(#f3f4f6, #0f1216);
  color: light-dark(#1b2027, #e7eaef);
  font-family: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }}
h1 {{ margin: 0 0 1rem; font-size: 1.35rem; font-weight: 600; letter-spacing: -.01em; }}
@media (max-width: 30rem) {{ body {{ padding: 1rem .5rem 2rem; }} h1 {{ margin-left: .5rem; }} }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{fragment}
</main>
</body>
</html>
"""


def source(name: str) -> str:
    """The text of a file of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def fragment(state: dict, fallback: str = "", module: str = "explorer.js",
             styles: tuple[str, ...] = ("explorer.css",)) -> str:
    """A piece of HTML that draws itself where it stands; `fallback` is shown where scripts do not run.

    Inside a script element only "<" can end or reopen it, so none is left in the data.

    >>> "</b>" in fragment({"text": "</b>"})
    False
    """
    data = json.dumps({"state": state}, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    script, style = source(module).replace("export default", "const widget ="), "".join(map(source, styles))
    return (f'<div class="mm-host"><style>{style}</style><div class="mm-slot">{fallback}</div>'
            f'<script type="application/json">{data}</script>'
            f"<script>(function () {{ const host = document.currentScript.parentElement;\n{script}{_HOST}}})();"
            "</script></div>")


def page(content: str, title: str) -> str:
    """A whole HTML document around a fragment; its security policy forbids it to load anything."""
    return _PAGE.format(title=html.escape(title), fragment=content)
