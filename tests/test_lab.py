"""Chapter 0 in a real JupyterLab, in a real browser: what a learner does first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

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
