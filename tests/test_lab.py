"""Chapter 0 in a real JupyterLab, in a real browser: what a learner does first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from minimoe import load, routing_trace
from tests.browser import lab_page, run_all

START = Path(__file__).parents[1] / "notebooks" / "00_start.ipynb"

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Chapter 0, all of its cells run, in JupyterLab: playwright's page. One for all tests of this file."""
    with lab_page(START, tmp_path_factory.mktemp("lab")) as page:
        started = time.perf_counter()
        run_all(page)
        page.seconds = round(time.perf_counter() - started, 1)
        yield page


def test_chapter_0_runs_from_top_to_bottom(lab, record_property):
    record_property("seconds", lab.seconds)
    assert not lab.faults, "\n".join(lab.faults)


def test_figures_are_drawn(lab):
    lab.locator(".jp-OutputArea .js-plotly-plot .main-svg").first.wait_for(state="attached", timeout=20_000)


def test_explorer_draws_what_the_trace_says(lab, tmp_path):
    """A sentence of one's own, another layer: each token's experts and weights are those of `routing_trace`."""
    sentence = "The for statement counts to 12, then x = y[3] + 4."
    trace = routing_trace(load("shipped"), sentence)
    explorer = lab.locator(".minimoe-explorer", has=lab.locator("textarea:visible")).first
    before = explorer.locator("[data-token]").count()
    explorer.locator("textarea").fill(sentence)
    explorer.get_by_role("button", name="Trace").click()
    explorer.get_by_text(f"{len(trace.tokens)} tokens").wait_for(timeout=30_000)
    for layer in (trace.layers[-1], trace.layers[0]):
        explorer.get_by_role("radio", name=str(layer.index), exact=True).click()
        drawn = explorer.locator("[data-token]").evaluate_all(
            "chips => chips.map(c => [c.dataset.experts, c.dataset.weights, c.querySelector('.mm-band').textContent])")
        assert before != len(drawn) == len(trace.tokens)
        for (experts, weights, shown), want, share in zip(drawn, layer.experts, layer.weights):
            assert tuple(map(int, experts.split(","))) == want
            assert tuple(map(float, weights.split(","))) == pytest.approx(share, abs=1e-4)
            assert shown == "".join(map(str, want[:2]))
    assert len({layer.experts for layer in trace.layers}) > 1          # another layer shows something else
    lab.screenshot(path=tmp_path / "explorer_in_lab.png")
    assert not lab.faults, "\n".join(lab.faults)
