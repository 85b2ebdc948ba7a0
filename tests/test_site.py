"""The site builds without a warning, and every page works from disk, in a browser, with no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import offline_pages

ROOT = Path(__file__).parents[1]
MAX_BYTES = 3_000_000  # of a page; the drawing libraries are files of the site, loaded once

# JavaScript: pictures and drawings that a screen reader would have nothing to say about
NAMELESS = """() => {
  const hidden = e => e.closest('[aria-hidden=true]'), article = document.querySelector('article') || document.body;
  const named = e => (e.getAttribute('aria-label') || '').trim()
    || (e.getAttribute('aria-labelledby') || '').split(/\\s+/).some(id => document.getElementById(id)?.textContent.trim())
    || e.querySelector(':scope > title')?.textContent.trim();
  const images = [...document.images].filter(i => !i.alt.trim() && !hidden(i));
  const svgs = [...article.querySelectorAll('svg[role=img]')].filter(s => !hidden(s) && !named(s) && !s.closest('.book-plotly'));
  const figures = [...article.querySelectorAll('.book-plotly')].filter(f => !named(f));
  return [...images, ...svgs, ...figures].map(e => e.outerHTML.slice(0, 200));
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site's folder. Built from a copy, as nothing shall depend on what else lies in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("book", "notebooks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, source / name)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-W", "--keep-going", "--path-output", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, encoding="utf-8", env=os.environ | {"NO_COLOR": "1"})
    faults = [line for line in (done.stdout + done.stderr).splitlines() if re.search(r"WARNING|ERROR|Error", line)]
    assert done.returncode == 0, "\n".join(faults) or (done.stdout + done.stderr)[-3000:]
    return out / "_build" / "html"


@pytest.fixture(scope="module")
def pages(site) -> list[str]:
    """The names of all pages that the table of contents leads to."""
    found = sorted(path.relative_to(site).as_posix() for folder in ("book", "notebooks") for path in (site / folder).rglob("*.html"))
    assert found, "the site has no pages"
    return found


@pytest.fixture(scope="module")
def open_page(site):
    with offline_pages(site) as opener:
        yield opener


def test_every_chapter_is_a_page(pages):
    chapters = {f"notebooks/{path.stem}.html" for path in ROOT.glob("notebooks/*.ipynb")}
    assert chapters, "there are no chapters"
    assert chapters <= set(pages), f"not in _toc.yml: {chapters - set(pages)}"


def test_pages_are_small(site, pages, record_property):
    sizes = {name: (site / name).stat().st_size for name in pages}
    record_property("largest page, kB", max(sizes.values()) // 1000)
    assert not {name: size for name, size in sizes.items() if size > MAX_BYTES}


@pytest.mark.browser
@pytest.mark.slow
def test_every_page_works_from_disk(open_page, pages):
    wrong = {}
    for name in pages:
        page, faults = open_page(name)
        settle(page)
        faults += [f"no alternative text: {html}" for html in page.evaluate(NAMELESS)]
        faults += [f"not drawn: {what}" for what in undrawn(page)]
        wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        faults += [f"the page is {wide} px wider than the window"] if wide > 0 else []
        if faults:
            wrong[name] = faults
        page.close()
    assert not wrong, "\n".join(f"{name}: {fault}" for name, faults in wrong.items() for fault in faults)


@pytest.mark.browser
def test_chapters_show_formulas_and_figures(open_page, pages):
    """What `undrawn` finds nothing wrong with must also be there."""
    formulas = figures = 0
    for name in (name for name in pages if name.startswith("notebooks/")):
        page, _ = open_page(name)
        settle(page)
        formulas += page.locator("mjx-container").count()
        figures += page.locator(".js-plotly-plot .main-svg").count()
        page.close()
    assert formulas > 0 and figures > 0, f"{formulas} formulas, {figures} figures"


@pytest.mark.browser
def test_dark_theme_recolors_figures(open_page, pages):
    """After a switch to the dark theme the text of a figure is light, on a ground that lets the page shine through."""
    for name in (name for name in pages if name.startswith("notebooks/")):
        page, _ = open_page(name)
        settle(page)
        if page.locator(".js-plotly-plot .main-svg").count():
            break
        page.close()
    else:
        pytest.fail("no page has a figure")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_timeout(500)
    fill = page.evaluate("() => getComputedStyle(document.querySelector('.book-plotly .xtick text')).fill")
    ground = page.evaluate("() => document.querySelector('.book-plotly .js-plotly-plot').layout.paper_bgcolor")
    page.close()
    assert sum(map(int, re.findall(r"\d+", fill)[:3])) > 3 * 180, f"tick labels are {fill} in the dark theme"
    assert ground == "rgba(0,0,0,0)"


@pytest.mark.browser
def test_widgets_react_to_the_keyboard_alone(open_page, pages):
    """Each widget of a chapter is reached by Tab, and a key changes what it says, without a kernel."""
    seen, deaf = 0, []
    for name in (name for name in pages if name.startswith("notebooks/")):
        page, _ = open_page(name)
        settle(page)
        for number in range(page.locator(".minimoe-widget").count()):
            seen += 1
            if not reacts(page, number):
                deaf.append(f"{name}: widget {number}")
        page.close()
    assert seen, "no page has a routing explorer"
    assert not deaf, deaf


@pytest.mark.browser
def test_search_works_from_disk(open_page):
    page, faults = open_page("search.html?q=router")
    page.wait_for_selector("#search-results li", timeout=60_000)
    titles = " ".join(page.locator("#search-results li").all_inner_texts())
    page.close()
    assert "Glossary" in titles and not faults, (titles, faults)


def settle(page) -> None:
    """Wait until formulas and figures are drawn, or long enough to say that they are not."""
    page.wait_for_function("() => !window.MathJax || MathJax.startup?.promise", timeout=60_000)
    page.evaluate("() => window.MathJax?.startup?.promise")
    try:
        figures = "[...document.querySelectorAll('.book-plotly')]"
        page.wait_for_function(f"() => {figures}.every(f => f.querySelector('.main-svg'))", timeout=60_000)
    except Exception:
        pass  # `undrawn` names them
    page.wait_for_timeout(300)


def undrawn(page) -> list[str]:
    """Formulas that still stand as TeX, figures without a drawing, formulas that MathJax refused."""
    return page.evaluate("""() => [
      ...[...document.querySelectorAll('article .math')].filter(e => !e.querySelector('mjx-container')),
      ...document.querySelectorAll('mjx-merror, [data-mjx-error]'),
      ...[...document.querySelectorAll('.book-plotly')].filter(e => !e.querySelector('.main-svg')),
    ].map(e => e.textContent.slice(0, 80))""")


def reacts(page, number: int, controls: int = 12) -> bool:
    """Whether a key, pressed on one of the first controls that Tab reaches in widget `number`, changes its text."""
    widget = page.locator(".minimoe-widget").nth(number)
    widget.scroll_into_view_if_needed()
    # the place to start from: an element just before the widget
    widget.evaluate("w => { const s = document.createElement('span'); s.tabIndex = 0; w.before(s); s.focus(); }")
    for _ in range(controls):
        page.keyboard.press("Tab")
        if not widget.evaluate("w => w.contains(document.activeElement)"):
            return False
        for key in ("ArrowRight", "ArrowDown", "Enter"):
            before = widget.inner_text()
            page.keyboard.press(key)
            page.wait_for_timeout(150)
            if widget.inner_text() != before:
                return True
    return False
