"""The lint is silent on a chapter that keeps the contract, and names each way of breaking it."""
import copy
import json

import pytest

from minimoe.course import lint
from minimoe.course.chapter import read
from minimoe.course.lint_text import SECTIONS

ALTS = [f"Bars of unequal height for {name} experts, the last of them nearly empty" for name in
        ("two", "three", "four", "five", "six", "seven", "eight", "nine")]


def md(source, **metadata):
    return {"cell_type": "markdown", "metadata": metadata, "source": source}


def code(source, *tags, out=None, count=0, **metadata):
    outputs = [] if out is None else [{"output_type": "stream", "name": "stdout", "text": out}]
    return {"cell_type": "code", "metadata": {"tags": list(tags), **metadata}, "source": source, "outputs": outputs,
            "execution_count": count}


def good():
    """The smallest chapter without a fault."""
    prose = "Plain words about routers that say what happens and why. " * 220
    cells = [
        md("# 4. The router\n\n**Claim.** Content decides.\n\n**Objectives**\n- write one\n- compare two\n- measure "
           "it\n- explain why\n\n"
           "**Time** 90 minutes\n\n**Builds on** chapter 3"),
        md("## Set-up"), code("import torch", "hide-input", jupyter={"source_hidden": True}),
        code('SEED = 0\nDEVICE = "cpu"\nDTYPE = "float32"\nTHREADS = 2', "parameters"),
        md("## A first look\n\n" + prose), code("print(torch.ones(3).sum())", out="7 tokens"),
        md("## Predict\n\nWhat will it be?"),
        md("## The idea\n\nTwo tokens share 0.7 and 0.3 (worked by hand).\n\n$p_i = 0.25$, see section 2.1\n\n| a | b "
           "|\n|---|---|\n| 1 | 2 |"),
        md("## Build it: in one step"), code("def softmax_topk(x):\n    return x * 1"),
        code("print(softmax_topk(2.0))", "check", out="2.5"),
        md("## The library's version"),
        code("from minimoe.router import softmax_topk as theirs\nassert softmax_topk(1.0).grad == theirs(1.0).grad"),
        md("## Experiment"), code('from IPython.display import Markdown, display\ndisplay(Markdown(f"it is {2 / '
                                  '3:.2f}"))', out="it is 0.67"),
        md("## See it"), *[code(f'show(bars({i}), alt="{alt}")') for i, alt in enumerate(ALTS)],
        md("## Break it"), code("1 / 0", "raises-exception"),
        md("## Exercises\n\n[Five cards](../exercises/04_router.ipynb)"),
        md("## Quiz\n\n" + "<details><summary>Why?</summary>\n\nBecause.\n\n</details>\n\n" * 4),
        md("## Summary\n\nThat was it."),
        md("## What real models do\n\n| Switch | 1 expert, 1.25 {cite:p}`fedus2022switch` |"),
        md("## References\n\nFedus and others, Switch Transformers, section 2.1, 1.6 trillion"),
    ]
    error = {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division of 7 by 0", "traceback": []}
    next(c for c in cells if c["source"] == "1 / 0")["outputs"] = [error]
    for number, cell in enumerate((c for c in cells if c["cell_type"] == "code"), 1):
        cell["execution_count"] = number
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def faults(nb, tmp_path, name="04_router"):
    path = tmp_path / f"{name}.ipynb"
    path.write_text(json.dumps(nb), encoding="utf-8")
    return lint.lint(read(path))


def find(nb, start):
    return next(c for c in nb["cells"] if c["source"].startswith(start))


def test_a_good_chapter_has_no_fault(tmp_path):
    assert faults(good(), tmp_path) == []


def replace(start, old, new):
    """A change of one cell's source, which must be a change."""
    def change(nb):
        cell = find(nb, start)
        assert old in cell["source"]
        cell["source"] = cell["source"].replace(old, new)
    return change


def add_prose(text):
    return replace("## Summary", "That was it.", text)


def add_code(source, *tags, **more):
    def change(nb):
        nb["cells"].append(code(source, *tags, **{"count": 99, **more}))
    return change


def update(start, **values):
    return lambda nb: find(nb, start).update(values)


def drop(start):
    return lambda nb: nb["cells"].remove(find(nb, start))


def more_figures(n):
    def change(nb):
        nb["cells"] += [code(f'show(f, alt="{"more " * i} lines that cross in the middle, then part")',
                             count=90 + i) for i in range(n)]
    return change


def output(start, data):
    return update(start, outputs=[{"output_type": "display_data", "metadata": {}, "data": data}])


PLOT = {"application/vnd.plotly.v1+json": {"data": [{"y": [1, 2]}], "layout": {}}}
BROKEN = [      # (rule, words of the message, what is done to the good chapter)
    ("syntax", "line 1", add_code("def")),
    ("opening", "'# 4. Title'", replace("# 4.", "# 4. The", "# The")),
    ("opening", "**Claim.**", replace("# 4.", "**Claim.** ", "")),
    ("opening", "3 items", replace("# 4.", "- write one\n", "")),
    ("opening", "starts with 'the'", replace("# 4.", "- write one", "- the router")),
    ("opening", "**Time**", replace("# 4.", "90 minutes", "long")),
    ("opening", "**Builds on**", replace("# 4.", "**Builds on** chapter 3", "")),
    *[("sections", f"no section '## {s}'", drop(f"## {s}")) for s in SECTIONS],
    ("sections", "no section of the contract", replace("## Summary", "## Summary", "## The end\n\n")),
    ("sections", "inside a cell", replace("## Predict", "What", "## Summary\n\nWhat")),
    ("sections", "twice", lambda nb: nb["cells"].append(md("## Summary"))),
    ("sections", "order", lambda nb: nb["cells"].append(nb["cells"].pop(nb["cells"].index(find(nb, "## Predict"))))),
    ("contents", "hidden cell", drop("import torch")),
    ("contents", "real result", drop("print(torch")),
    ("contents", "by hand", replace("## The idea", " (worked by hand)", "")),
    ("contents", "formula", replace("## The idea", "$", "")),
    ("contents", "table", replace("## The idea", "|", "")),
    ("contents", "outputs and gradients", replace("from minimoe", ".grad", "")),
    ("contents", "minimoe", update("from minimoe", source="assert softmax_topk(1.0).grad == 1")),
    ("contents", "computed into the text", replace("from IPython", "Markdown(f", "Markdown(")),
    ("contents", "nothing to see", lambda nb: [drop("show(")(nb) for _ in ALTS]),
    ("contents", "catch the bug", drop("1 / 0")),
    ("contents", "exercises/04_router.ipynb", replace("## Exercises", "04_router", "05_experts")),
    ("contents", "7 <details>", replace("## Quiz", "## Quiz", "## Quiz\n" + "<details></details>" * 3)),
    ("contents", "cited table", replace("## What real", "{cite:p}", "")),
    ("contents", "is empty", update("## References", source="## References")),
    ("sizes", "words of prose", replace("## A first look", "Plain words about routers", "Routers")),
    ("sizes", "words of prose", add_prose("word " * 1500)),
    ("sizes", "visible lines",
     lambda nb: [add_code("\n".join(f"x{i} = {i}" for i in range(25)))(nb) for _ in range(14)]),
    ("sizes", "26 lines", add_code("\n".join(f"x{i} = {i}" for i in range(26)))),
    ("sizes", "median", replace("def softmax_topk", "    return", "    #\n" * 12 + "    return")),
    ("sizes", "bytes", add_prose("<!--" + "x" * 1_000_000 + "-->")),
    ("numbers", "'0.73'", add_prose("The loss fell to 0.73.")),
    ("numbers", "'5 %'", add_prose("Only 5 % were dropped.")),
    ("numbers", "'20 times'", add_prose("It is 20 times slower.")),
    ("numbers", "three times as", add_prose("It holds three times as many.")),
    ("numbers", "'2x'", add_prose("A 2x gain.\n\nIt is true (worked by hand).")),
    ("parameters", "0 cells", update("SEED", metadata={"tags": []})),
    ("parameters", "THREADS", replace("SEED", "THREADS", "WORKERS")),
    ("parameters", "outside", lambda nb: nb["cells"].append(nb["cells"].pop(nb["cells"].index(find(nb, "SEED"))))),
    ("tags", "'chek'", update("print(softmax", metadata={"tags": ["check", "chek"]})),
    ("tags", "source_hidden", update("import torch", metadata={"tags": ["hide-input"]})),
    ("figures", "7 figures", drop("show(")),
    ("figures", "13 figures", more_figures(5)),
    ("figures", "computed", lambda nb: [replace(f"show(bars({i})", f"bars({i})", "'<svg>'")(nb) for i in range(6)]),
    ("alt", "9 characters", replace("show(bars(1)", ALTS[1], "Some bars")),
    ("alt", "is the title", replace("show(bars(1)", "bars(1)", f'bars(1, title="{ALTS[1]}!")')),
    ("alt", "same alternative text as in cell", replace("show(bars(1)", ALTS[1], ALTS[0].upper())),
    ("alt", "in the call", replace("show(bars(1)", f'alt="{ALTS[1]}"', "alt=text")),
    ("alt", "0 characters", add_prose("![](a.png)")),
    ("alt", "0 characters", add_prose('<img src="a.png">')),
    ("alt", "5 characters", add_prose("```{figure} a.png\n:alt: A bar\n```\n\n![Short](b.png)")),
    ("alt", "plotly figure without", output("show(bars(0)", PLOT)),
    ("alt", "bitmap", output("show(bars(0)", {"image/png": "iVBO"})),
    ("install", "pyproject", add_code("%pip install plotly")),
    ("executed", "never", update("show(bars(2)", execution_count=None)),
    ("executed", "out of order", update("show(bars(2)", execution_count=1)),
    ("skip", "computes", add_code("print(1 + 1)", "nbval-skip")),
    ("errors", "mend it", update("1 / 0", metadata={"tags": ["check"]})),
    ("errors", "raises none", update("1 / 0", outputs=[])),
    ("check", "never checked", replace("print(softmax", "softmax_topk", "other")),
    ("check", "never checked", replace("def softmax", "def softmax_topk", "def mine(): pass\n\ndef softmax_topk")),
    ("shadows", "capacity", add_code("def capacity(x):\n    return x")),
    ("shadows", "softmax_topk", replace("from minimoe", " == theirs(1.0).grad", "")),
    ("compared", "only 0 of", lambda nb: [c.update(outputs=[{"output_type": "stream", "name": "stdout",
                                                             "text": "fine"}])
                                          for c in nb["cells"] if c["cell_type"] == "code" and c["outputs"]]),
]


@pytest.mark.parametrize("rule, words, change", BROKEN, ids=[f"{i}-{r}-{w}" for i, (r, w, _) in enumerate(BROKEN)])
def test_each_fault_is_named(rule, words, change, tmp_path):
    nb = good()
    change(nb)
    assert any(f.rule == rule and words in f.message for f in faults(nb, tmp_path)), faults(nb, tmp_path)


@pytest.mark.parametrize("change", [
    add_prose("The value `0.73`, $x = 0.5$ and\n\n$$\ny = 3.5\n$$\n\n```python\nz = 2.5\n```"),
    add_prose("As in section 3.2, with Python 3.11 and arXiv 2101.03961, in tables 2.1 and 2.2."),
    add_prose("[They say](https://a.org/1.5) 12 layers."),
    add_prose("They measured 3.7 % {cite:p}`fedus2022switch`."),
    add_prose("### By hand (worked by hand)\n\nFirst 0.5.\n\nThen 0.25."),
    add_prose("A table of 2 x 3, run it three times."),
    add_code("def hard_to_shadow(x):\n    return x"),
    add_code("def capacity(factor, tokens, k, n_experts):\n    '''Mine.'''\n    return math.ceil(factor * tokens * k "
             "/ n_experts)"),
    add_code("import torch\nSIZE = 3", "nbval-skip"),
])
def test_what_is_allowed(change, tmp_path):
    nb = good()
    change(nb)
    found = [f for f in faults(nb, tmp_path) if f.rule != "shadows" or "hard_to_shadow" in f.message]
    assert found == []


def test_a_copy_of_the_library_is_no_shadow(tmp_path):
    import inspect

    from minimoe.router import capacity

    nb = good()
    add_code(inspect.getsource(capacity))(nb)
    assert faults(nb, tmp_path) == []


def test_the_start_is_exempt_from_building(tmp_path):
    nb = good()
    for section in ("Build it", "The library's version", "Break it"):
        drop(f"## {section}")(nb)
    replace("# 4.", "# 4.", "# 0.")(nb)
    replace("## Exercises", "04_router", "00_start")(nb)
    assert faults(nb, tmp_path, "00_start") == []
    assert len(faults(nb, tmp_path, "01_norm")) > 3


def share_of(outputs, source="f()", tags=(), clean=()):
    cell = code(source, *tags) | {"outputs": outputs}
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.ipynb"
        path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}),
                        encoding="utf-8")
        return lint.share(read(path), clean)


def shown(mime, value):
    return [{"output_type": "display_data", "metadata": {}, "data": {mime: value}}]


def test_what_counts_as_compared():
    import re

    stream = [{"output_type": "stream", "name": "stdout", "text": ["loss ", "0.73"]}]
    assert share_of(stream) == (1, 1)
    assert share_of(stream, "loss(0.73)") == (0, 1)                         # stands in the source
    assert share_of(stream, tags=["nbval-ignore-output"]) == (0, 1)
    assert share_of(stream, clean=[(re.compile(r"loss [\d.]+"), "LOSS")]) == (0, 1)
    assert share_of(shown("image/png", "77")) == (0, 1)
    assert share_of(shown("application/vnd.jupyter.widget-view+json", {"version_major": 2})) == (0, 1)
    assert share_of(shown("text/html", "<p style='width:7px'>none</p><script>let x = 5</script>")) == (0, 1)
    assert share_of(shown("text/html", "<svg width='9'><rect x='3.5'/></svg>")) == (1, 1)
    plotly, layout = "application/vnd.plotly.v1+json", {"height": 400}
    assert share_of(shown(plotly, {"data": [{"y": [1.5]}], "layout": layout})) == (1, 1)
    assert share_of(shown(plotly, {"data": [], "layout": layout})) == (0, 1)
    assert share_of([{"output_type": "error", "ename": "E", "evalue": "7 rows", "traceback": []}]) == (1, 1)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert lint.main([]) == 2
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "04_router.ipynb"
    nb = good()
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert lint.main([]) == 0
    figures = "words, 21 lines of code, 8 figures (8 computed), 4 of 4 cells with output compared"
    assert figures in capsys.readouterr().out
    broken = copy.deepcopy(nb)
    add_prose("It fell by 3 %.")(broken)
    path.write_text(json.dumps(broken), encoding="utf-8")
    assert lint.main([str(path)]) == 1
    number = broken["cells"].index(find(broken, "## Summary"))
    assert f"{path}: cell {number}: [numbers] '3 %'" in capsys.readouterr().out
    path.write_text("not a notebook", encoding="utf-8")
    assert lint.main([]) == 2
    assert "04_router.ipynb is not a notebook" in capsys.readouterr().err
