"""The explorer in a browser: what is drawn is the trace, a keyboard is enough, every text can be read."""

from __future__ import annotations

import re

import numpy as np
import pytest

from minimoe.explore import (
    routing_trace,
    view,
)
from minimoe.explore.html import source
from minimoe.explore.text import labels
from tests.browser import browser
from tests.explore_runs import CHOICE, CODE, HOSTILE, dropping, heavy, make_run


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def trace(run):
    return routing_trace(run, CODE)


# --- the page in a browser -------------------------------------------------------------------------------------------
CHIPS = """() => [...document.querySelectorAll('.minimoe-explorer [data-token]')].map(c =>
  [c.dataset.token, c.dataset.experts, c.dataset.weights, c.dataset.kept, c.querySelector('.mm-text').textContent,
   [...c.querySelectorAll('.mm-band span')].map(n => n.textContent).join(',')])"""
# contrast (WCAG 2, 1.4.3) of every text with the nearest background painted behind it; color() and rgb() both occur
CONTRAST = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number), unit = text.startsWith('color') ? 1 : 255;
    return { rgb: n.slice(0, 3).map(v => v / unit), alpha: n.length > 3 ? n[3] : 1 }; };
  const light = rgb => { const [r, g, b] = rgb.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = node => { for (; node; node = node.parentElement) {
    const c = parse(getComputedStyle(node).backgroundColor); if (c.alpha > 0.99) return c.rgb; } return [1, 1, 1]; };
  const out = [], root = document.querySelector('.minimoe-explorer');
  for (const node of root.querySelectorAll('*')) {
    const written = [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
    if (!written || node.closest('.mm-hidden, [hidden]')) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color).rgb), light(behind(node))].sort((x, y) => y - x);
    out.push([(a + 0.05) / (b + 0.05), node.className || node.tagName, node.textContent.slice(0, 20)]);
  }
  return out; }"""


@pytest.fixture(scope="module")
def site(tmp_path_factory, trace, run):
    folder = tmp_path_factory.mktemp("explorer")
    second = routing_trace(run, "return prices")
    view(trace, {"Code": trace, "Second": second}, layer=1).save_html(folder / "code.html")
    view(routing_trace(make_run(max_seq_len=512), HOSTILE)).save_html(folder / "hostile.html")
    view(heavy()).save_html(folder / "heavy.html")
    view(dropping()).save_html(folder / "dropping.html")
    view(routing_trace(make_run(n_experts=64, top_k=8), CODE)).save_html(folder / "many.html")
    chooser = make_run(**CHOICE)
    view(routing_trace(chooser, CODE)).save_html(folder / "choice.html")
    return folder


@pytest.fixture(scope="module")
def running():
    with browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def open_page(site, running):
    """`open_page(name, **options of a browser context) -> (page, faults)`, from disk."""
    def opener(name, **options):
        page, faults = running.new_context(**{"viewport": {"width": 1200, "height": 900}} | options).new_page(), []
        page.on("request", lambda r: r.url.startswith("file:") or faults.append(f"request: {r.url}"))
        page.on("console", lambda m: m.type in ("error", "warning") and faults.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: faults.append(f"exception: {e}"))
        page.goto((site / f"{name}.html").as_uri())
        return page, faults

    return opener


def drawn(trace, layer):
    """What CHIPS must find, from the trace."""
    choices = [layer.taken(t) for t in range(len(trace.tokens))]
    text = labels(trace)
    return [[str(t), ",".join(str(e) for e, _, _ in c), ",".join(f"{w:g}" for _, w, _ in c),
             ",".join(str(int(k)) for _, _, k in c), text[t], ",".join(str(e) for e, _, _ in c[:2]) or "–"]
            for t, c in enumerate(choices)]


@pytest.mark.browser
def test_page_draws_the_trace_in_every_layer_and_for_every_example(open_page, trace, run):
    page, faults = open_page("code")
    assert page.locator(".mm-layer[aria-checked=true]").inner_text() == "1"
    for row, layer in enumerate(trace.layers):
        page.locator(".mm-layer").nth(row).click()
        assert page.evaluate(CHIPS) == drawn(trace, layer)
        load = page.evaluate("() => [...document.querySelectorAll('[data-load]')].map(b => +b.dataset.load)")
        assert load == list(layer.load)
        cells = page.locator(".mm-row").nth(row).locator(".mm-cell").all_inner_texts()
        assert cells == [str(e[0]) for e in layer.experts]
        table = page.evaluate("""() => [...document.querySelectorAll('.mm-table tbody tr')].map(r =>
            [...r.cells].map(c => c.textContent))""")
        assert [r[2:7] for r in table] == [[str(layer.index), str(e[0]), f"{w[0]:.3f}", str(e[1]), f"{w[1]:.3f}"]
                                           for e, w in zip(layer.experts, layer.weights)]
    page.locator("select").select_option(label="Second")
    second = routing_trace(run, "return prices")
    assert page.evaluate(CHIPS) == drawn(second, second.layers[1])
    assert not page.locator("textarea").is_visible()
    assert not faults


@pytest.mark.browser
@pytest.mark.parametrize("name", ["many", "choice", "dropping"])
def test_page_draws_other_routers(open_page, name):
    page, faults = open_page(name)
    trace = {"many": lambda: routing_trace(make_run(n_experts=64, top_k=8), CODE), "dropping": dropping,
             "choice": lambda: routing_trace(make_run(**CHOICE), CODE)}[name]()
    assert page.evaluate(CHIPS) == drawn(trace, trace.layers[0])
    page.locator("[data-token='3']").click()
    panel = page.locator(".mm-panel").inner_text()
    taken = trace.layers[0].taken(3)
    assert len(page.locator(".mm-panel .mm-column").all()) == trace.n_experts
    assert [f"weight {w:.3f}" for _, w, _ in taken] == re.findall(r"weight [\d.]+", panel)
    if name == "dropping":
        assert "by expert 1, which was full" in panel
        assert page.locator("[data-token='3'] .mm-lost").count() == 1
        style = "() => [...document.querySelectorAll('.mm-token')].map(c => c.style.getPropertyValue('--w'))"
        assert page.evaluate(style) == ["1", "1", "0", "0"]          # a dropped choice stays pale
    assert not faults


@pytest.mark.browser
def test_hostile_text_stays_text(open_page):
    page, faults = open_page("hostile")
    trace = routing_trace(make_run(max_seq_len=512), HOSTILE)
    assert page.title() == "Routing explorer" and page.locator(".minimoe-explorer img").count() == 0
    assert page.evaluate(CHIPS) == drawn(trace, trace.layers[0])
    page.locator("[data-token='0']").click()
    page.locator("[data-expert='1']").click()
    assert not faults


@pytest.mark.browser
def test_an_expert_shows_its_tokens(open_page, trace):
    page, _ = open_page("code")
    layer = trace.layers[1]
    busiest = int(np.argmax(layer.load))
    page.locator(f"[data-expert='{busiest}']").click()
    mine = [t for t, e in enumerate(layer.experts) if busiest in e]
    lit = page.evaluate("() => [...document.querySelectorAll('.mm-took')].map(c => +c.dataset.token)")
    assert lit == mine
    assert f"took {len(mine)} of {len(trace.tokens)} tokens" in page.locator(".mm-list").inner_text()
    counts = {t: sum(labels(trace)[m] == t for m in mine) for t in {labels(trace)[m] for m in mine}}
    listed = dict((item.split(" × ") + ["1"])[:2] for item in page.locator(".mm-tokens li").all_inner_texts())
    assert {k: int(v) for k, v in listed.items()} == counts
    page.locator(f"[data-expert='{busiest}']").click()
    assert page.locator(".mm-took").count() == 0


@pytest.mark.browser
def test_keyboard_alone_reaches_everything(open_page, trace):
    page, _ = open_page("code")
    active = lambda script: page.evaluate(f"() => document.activeElement{script}")
    press = page.keyboard.press
    assert "Mean over the text" in page.locator(".mm-panel").inner_text()
    press("Tab")
    assert active(".tagName") == "SELECT"
    press("Tab")
    assert active(".getAttribute('role')") == "radio" and active(".textContent") == "1"
    press("ArrowRight")
    assert page.locator(".mm-layer[aria-checked=true]").inner_text() == "2" == active(".textContent")
    assert page.evaluate(CHIPS) == drawn(trace, trace.layers[2])
    press("Tab")
    assert active(".dataset.token") == "0"
    assert active(".matches(':focus-visible')") and page.evaluate(
        "() => parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    first = page.locator(".mm-panel").inner_text()
    press("ArrowRight")
    assert active(".dataset.token") == "1" and page.locator(".mm-panel").inner_text() != first
    layer = trace.layers[2]
    said = page.locator("[aria-live=polite].mm-hidden").inner_text()
    assert f"expert {layer.experts[1][0]} weight {layer.weights[1][0]:.2f}" in said and "Dropped no" in said
    top = lambda: page.evaluate("() => document.activeElement.getBoundingClientRect().top")
    at = top()
    press("ArrowDown")
    assert top() > at
    press("ArrowUp")
    assert active(".dataset.token") == "1"
    press("End")
    assert active(".dataset.token") == str(len(trace.tokens) - 1)
    press("Tab")
    assert active(".dataset.expert") == "0"
    press("ArrowRight")
    press("Enter")
    assert active(".getAttribute('aria-pressed')") == "true"
    assert page.locator(".mm-took").count() == sum(1 in e for e in layer.experts)
    press("Shift+Tab")
    press("Shift+Tab")
    press("ArrowLeft")                                      # the chosen expert stays chosen in another layer
    assert page.locator(".mm-took").count() == sum(1 in e for e in trace.layers[1].experts)
    press("Escape")
    assert page.locator(".mm-took").count() == 0 == page.locator("[aria-selected=true]").count()
    stops = []
    for _ in range(12):
        press("Tab")
        stops.append(active(".className || document.activeElement.tagName"))
    assert {"mm-strip", "SUMMARY"} <= set(stops)


@pytest.mark.browser
def test_every_stop_of_the_keyboard_keeps_jupyterlabs_shortcuts_off(open_page):
    page, _ = open_page("code")
    bare = page.evaluate("""() => [...document.querySelectorAll(
        '.minimoe-explorer :is(button, select, textarea, input, summary, a, [tabindex])')]
        .filter(e => e.dataset.lmSuppressShortcuts !== 'true').map(e => e.outerHTML.slice(0, 80))""")
    assert not bare


@pytest.mark.browser
@pytest.mark.parametrize("where", ["system light", "system dark", "book light", "book dark", "lab light", "lab dark"])
def test_text_contrast_meets_wcag_aa(open_page, where):
    place, scheme = where.split()
    system = scheme if place == "system" else {"dark": "light", "light": "dark"}[scheme]   # the host has the last word
    page, _ = open_page("heavy", color_scheme=system)
    if place == "book":
        page.evaluate(f"() => document.documentElement.dataset.theme = '{scheme}'")
    if place == "lab":
        page.evaluate(f"() => document.body.dataset.jpThemeLight = '{str(scheme == 'light').lower()}'")
    paper = page.evaluate("() => getComputedStyle(document.querySelector('.minimoe-explorer')).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    page.locator("summary").click()
    page.locator("[data-token='6']").click()
    worst = sorted(page.evaluate(CONTRAST))
    assert len(worst) > 100
    assert worst[0][0] >= 4.5, worst[:3]
    page.locator("[data-expert='6']").click()
    page.locator("[data-expert='6']").hover()
    assert min(page.evaluate(CONTRAST))[0] >= 4.5


@pytest.mark.browser
@pytest.mark.parametrize("name", ["code", "many", "hostile"])
def test_fits_a_phone(open_page, name):
    page, _ = open_page(name, viewport={"width": 390, "height": 800})
    page.locator("[data-token='2']").click()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert not page.evaluate("""() => [...document.querySelectorAll('.mm-token, .mm-panel, .mm-columns')]
        .filter(e => e.getBoundingClientRect().right > 390).length""")


@pytest.mark.browser
def test_where_no_script_runs_the_figure_is_shown(open_page):
    page, _ = open_page("code", java_script_enabled=False)
    assert page.get_by_role("img").first.get_attribute("aria-label").startswith("Routing of")
    assert page.get_by_role("img").first.bounding_box()["width"] > 600


@pytest.mark.browser
def test_the_module_of_the_page_is_the_module_of_the_widget(running, trace, run):
    """The ES module as anywidget loads it, with a model that answers like a kernel."""
    state = view(trace, run=run).widget().state
    page = running.new_page()
    page.evaluate("""async ([code, state]) => {
      const module = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
      const heard = {}, values = { state };
      window.sent = [];
      window.put = next => { values.state = next; heard["change:state"](); };
      window.tell = message => heard["msg:custom"](message);
      const model = { get: name => values[name], send: m => sent.push(m),
        on: (name, f) => { heard[name] = f; }, off: name => { delete heard[name]; } };
      window.end = module.default.render({ el: document.body, model });
      window.heard = heard; }""", [source("explorer.js"), state])
    page.locator("textarea").fill("x = 1")
    page.keyboard.press("Control+Enter")
    assert page.evaluate("sent") == [{"text": "x = 1"}]
    assert page.locator(".mm-status").inner_text() == "Tracing …"
    page.evaluate("() => tell({ error: 'the text is empty' })")
    assert page.locator(".mm-status").inner_text() == "the text is empty"
    second = routing_trace(run, "x = 1")
    own = {**state, "items": [{"name": "Your text", "trace": second.to_dict(), "labels": labels(second), "alt": "x"}]}
    page.evaluate("next => put(next)", own)
    assert page.evaluate(CHIPS) == drawn(second, second.layers[0])
    assert page.locator("textarea").input_value() == "x = 1"
    page.evaluate("end()")
    assert page.evaluate("Object.keys(heard)") == []


