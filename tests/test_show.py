"""`show` labels every figure and stores nothing that another run would store differently."""
import json

import numpy as np
import pytest
import torch

from minimoe.course import show
from minimoe.course.show import PLOTLY, labelled_svg, plain, plotly_json

ALT = "Two lines over five steps, one of which grows with the square of the step"
go = pytest.importorskip("plotly.graph_objects")


@pytest.fixture
def shown(monkeypatch):
    import IPython.display

    bundles = []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def test_a_plotly_figure_is_stored_as_rounded_lists_with_its_text(shown):
    x = np.arange(5)
    figure = go.Figure([go.Scatter(x=x, y=x / 3), go.Bar(y=torch.ones(2, dtype=torch.float64).numpy() / 7)])
    show(figure, alt=ALT)
    spec, hidden = shown[0][PLOTLY], shown[1]["text/html"]
    assert spec["data"][0]["y"] == [0.0, 0.333333, 0.666667, 1.0, 1.33333] and spec["data"][1]["y"] == [0.142857] * 2
    assert "bdata" not in json.dumps(spec)
    assert spec["layout"]["meta"]["alt"] == ALT and ALT in hidden and "aria-label" in hidden
    assert spec["layout"]["template"]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)" and spec["layout"]["height"] == 400


def test_what_the_figure_says_itself_stays(shown):
    figure = go.Figure(go.Scatter(y=[1]), layout={"height": 300, "title": {"text": "T"}, "meta": {"k": 1}})
    layout = plotly_json(figure, ALT)["layout"]
    assert layout["height"] == 300 and layout["title"] == {"text": "T"} and layout["meta"] == {"k": 1, "alt": ALT}


def test_lines_and_bars_differ_by_more_than_color():
    data = plotly_json(go.Figure(), ALT)["layout"]["template"]["data"]
    assert len({t["line"]["dash"] for t in data["scatter"]}) == 8
    assert len({t["marker"]["symbol"] for t in data["scatter"]}) == 8
    assert len({t["marker"]["pattern"]["shape"] for t in data["bar"]}) == 8


def test_plain_takes_what_plotly_packs():
    import base64

    packed = {"dtype": "f4", "bdata": base64.b64encode(np.array([[1 / 3, 2]], dtype="f4").tobytes()).decode(),
              "shape": "1, 2"}
    assert plain({"z": packed}) == {"z": [[0.333333, 2.0]]}
    odd = [np.float32(0.1), torch.tensor(2), float("inf"), -0.0, (1, "a"), None, True]
    assert plain(odd) == [0.1, 2, None, 0.0, [1, "a"], None, True]
    assert str(plain(-0.0)) == "0.0"


def test_an_svg_is_one_image_with_a_label(shown):
    show('<?xml version="1.0"?><svg role="none" width="9" style="color:red"><rect/></svg>', alt=ALT + ' "and" more')
    html = shown[0]["text/html"]
    assert html.startswith('<div class="minimoe-figure"><svg role="img" aria-label="Two lines')
    assert "&quot;and&quot; more" in html
    assert html.count("role=") == 1 and html.count("style=") == 1 and html.endswith("<rect/></svg></div>")


def test_objects_that_draw_themselves(shown):
    class Drawing:
        def svg(self):
            return "<svg></svg>"

    show(Drawing(), alt=ALT)
    assert shown[0]["text/html"] == labelled_svg("<svg></svg>", ALT)


@pytest.mark.parametrize("figure, alt, error", [
    (None, ALT, TypeError), ("no picture", ALT, TypeError), ("<svg></svg>", "Loss", ValueError),
    ("<svg></svg>", " x " * 30 + "\n" * 50, None)])
def test_what_cannot_be_shown_is_refused(shown, figure, alt, error):
    if error is None:
        return show(figure, alt)
    with pytest.raises(error):
        show(figure, alt)


@pytest.mark.browser
@pytest.mark.slow
def test_the_label_is_there_in_jupyterlab(tmp_path):
    """Lab draws a plotly figure without a name: a screen reader must find one, once, all the same."""
    import nbformat

    from tests.browser import lab_page, run_all

    bar = '<svg viewBox="0 0 9 9" width="9"><rect width="5" height="9"/></svg>'
    line = "import plotly.graph_objects as go\nfrom minimoe.course import show\nshow(go.Figure(go.Scatter(y=[1, 3])), "
    cells = [f"{line}alt='{ALT}')", f"show({bar!r}, alt='{ALT.replace('Two lines', 'Two bars')}')"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nb, tmp_path / "figures.ipynb")
    with lab_page(tmp_path / "figures.ipynb", tmp_path / "lab") as page:
        run_all(page)
        page.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached", timeout=20_000)
        assert page.get_by_role("img", name=ALT).get_attribute("class").count("jp-RenderedPlotly") == 1
        assert page.get_by_role("img", name="Two bars over").count() == 1
        assert page.locator(".minimoe-alt:visible").count() == 0
        assert not page.faults
