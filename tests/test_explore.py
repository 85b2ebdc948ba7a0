"""The routing explorer: the trace is what the model did, the three views draw the trace, and a keyboard is enough."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.data.tokenizer import Tokenizer
from minimoe.explore import (
    RoutingTrace,
    load_figure,
    mutual_information,
    permutation_null,
    routing_trace,
    specialisation,
    specialisation_difference,
    token_identity_router,
    view,
)
from minimoe.explore.html import source
from minimoe.explore.text import labels
from minimoe.explore.trace import LayerTrace, trace_layer
from minimoe.model import MoETransformer
from minimoe.router import softmax_topk, within_capacity
from tests.browser import browser

CODE = "def total(prices):\n    return sum(prices)\n\nna\u00efve \u2192 \U0001f642 end"
CHOICE = dict(router="expert_choice", balance="none", n_experts=6, top_k=1)
HOSTILE = ("</script><img src=x onerror=\"document.title='broken'\"><!--<script> & \"'\n"
           "e\u0301 \u0301 \u200b\u202e\ufe0f \U0001f469\u200d\U0001f4bb \u2028 \x07 {} ${1} `")


def make_run(tokenizer=None, **options):
    """A small random model whose routers are decided (weights far from even), with a tokenizer."""
    tokenizer = tokenizer or Tokenizer.bpe([CODE * 3], 290)
    torch.manual_seed(options.pop("seed", 0))
    base = dict(vocab_size=tokenizer.vocab_size, dim=24, n_layers=3, n_heads=2, max_seq_len=96, n_experts=5, top_k=2,
                expert_hidden=16)
    model = MoETransformer(ModelConfig(**base | options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("router.weight"):
                p.mul_(20)
    return SimpleNamespace(model=model.eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def trace(run):
    return routing_trace(run, CODE)


# --- the trace -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    {}, {"moe_every": 2}, {"router": "sigmoid", "balance": "bias"}, {"router": "hash", "balance": "none"},
    {"norm_topk": False, "top_k": 1, "capacity_factor": 0.5, "router_noise": 1.0},
    {"n_dense_first": 2, "n_experts": 12},
], ids=str)
def test_trace_is_the_models_own_routing(options):
    run = make_run(**options)
    run.model.train()                          # tracing must not use training's noise and capacity, nor leave its mark
    trace = routing_trace(run, CODE)
    assert run.model.training
    with torch.no_grad():
        routings = run.model.eval()(torch.tensor([run.tokenizer.encode(CODE)])).routing
    assert [layer.index for layer in trace.layers] == list(run.model.cfg.moe_layers)
    assert trace.ids == tuple(run.tokenizer.encode(CODE))
    for layer, routing in zip(trace.layers, routings, strict=True):
        assert layer.experts == tuple(map(tuple, routing.experts.tolist()))
        assert layer.kept == tuple(map(tuple, routing.kept.tolist()))
        np.testing.assert_allclose(layer.weights, routing.weights, atol=5.1e-5)
        np.testing.assert_allclose(layer.probs, routing.probs, atol=5.1e-5)
        n_experts = run.model.cfg.n_experts
        load = np.bincount(routing.experts.flatten(), minlength=n_experts) / routing.experts.numel()
        np.testing.assert_allclose(layer.load, load, atol=5.1e-5)
        probs = routing.probs.double().numpy()
        np.testing.assert_allclose(layer.entropy, -(probs * np.log2(np.maximum(probs, 1e-300))).sum(1), atol=1e-4)


def test_expert_choice_lists_only_the_experts_that_took_the_token():
    run = make_run(**CHOICE)
    trace = routing_trace(run, CODE)
    routing = run.model(torch.tensor([run.tokenizer.encode(CODE)])).routing[1]
    layer, nobody = trace.layers[1], 0
    for t, kept in enumerate(routing.kept):
        taken = layer.taken(t)
        assert {e for e, _, _ in taken} == set(kept.nonzero().flatten().tolist())
        assert [w for _, w, _ in taken] == sorted((w for _, w, _ in taken), reverse=True)
        nobody += not taken
    assert nobody, "the case of a token that no expert takes must be in this test"
    np.testing.assert_allclose(layer.load, 1 / 6, atol=1e-4)
    assert view(trace).svg().count("data-token") == len(trace.tokens)


def test_json_round_trip_is_exact_and_plain(trace):
    plain = json.loads(json.dumps(trace.to_dict()))
    assert plain == trace.to_dict() and RoutingTrace.from_dict(plain) == trace
    numbers = re.findall(r"\d\.(\d+)", json.dumps(plain))
    assert max(map(len, numbers)) <= 4
    with pytest.raises(ValueError, match="missing or unknown extra"):
        RoutingTrace.from_dict({**plain, "extra": 1})
    with pytest.raises(ValueError, match="missing or unknown ids"):
        RoutingTrace.from_dict({k: v for k, v in plain.items() if k != "ids"})


@pytest.mark.parametrize("text", [CODE, HOSTILE, " ", "\n\n", "\U0001f642", "\ufffd\ufffd", "<|end_of_text|>"])
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_tokens_joined_are_the_text(text, kind):
    trace = routing_trace(make_run(Tokenizer.bytes() if kind == "bytes" else None, max_seq_len=512), text)
    assert "".join(trace.tokens) == trace.text == text
    assert trace.left_out == 0
    for shown in labels(trace):
        assert shown and shown.isprintable() and "\u202e" not in shown


def test_a_character_of_several_tokens_is_named_with_its_parts():
    trace = routing_trace(make_run(Tokenizer.bytes()), "a\U0001f642\u00e9!")
    assert trace.parts == ("", "1/4", "2/4", "3/4", "4/4", "1/2", "2/2", "")
    assert labels(trace)[4:] == ["‹\U0001f642 4/4›", "‹é 1/2›", "‹é 2/2›", "!"]


def test_long_text_is_cropped_and_says_so(run):
    long = routing_trace(run, "total " * 300)
    assert len(long.tokens) == 96 and long.left_out == len(run.tokenizer.encode("total " * 300)) - 96 > 0
    assert len(routing_trace(run, CODE, max_tokens=7).tokens) == 7
    cut = routing_trace(make_run(Tokenizer.bytes()), "ab\U0001f642", max_tokens=4)
    assert (cut.tokens, cut.parts, cut.left_out) == (("a", "b", "\U0001f642", ""), ("", "", "1/4", "2/4"), 2)


@pytest.mark.parametrize("change, message", [
    (dict(text=""), "the text is empty"), (dict(text=b"x"), "must be a string"), (dict(text="a\ud800"), "character 1"),
    (dict(max_tokens=0), "at least one token"), (dict(dense=True), "dense"), (dict(tokenizer=None), "no tokenizer"),
])
def test_errors_are_one_line_and_name_the_remedy(run, change, message):
    change = {"text": "x", "max_tokens": 9, "dense": False, "tokenizer": run.tokenizer} | change
    model = make_run(n_experts=1, top_k=1, balance="none").model if change["dense"] else run.model
    with pytest.raises(ValueError, match=message) as error:
        routing_trace(SimpleNamespace(model=model, tokenizer=change["tokenizer"]), change["text"],
                      max_tokens=change["max_tokens"])
    assert "\n" not in str(error.value)


# --- the figure and the page, as text --------------------------------------------------------------------------------
def made(layers, tokens, n_experts, top_k, router="softmax"):
    tokens = tuple(tokens)
    return RoutingTrace("".join(tokens), tokens, ("",) * len(tokens), tuple(range(len(tokens))), 0, n_experts, top_k,
                        router, len(layers), tuple(layers))


def dropping():
    """Four tokens that all want expert 1, which has two places."""
    routing = softmax_topk(torch.tensor([[0.0, 3.0, 0.0]] * 4), k=1)
    return made([trace_layer(0, within_capacity(routing, 2, torch.zeros(4, dtype=torch.long)))], "abcd", 3, 1)


def heavy(n_experts=16):
    """One token an expert, each with all the weight: the deepest colors that there are."""
    eye = tuple(tuple(map(float, row)) for row in np.eye(n_experts))
    ids = tuple((e, (e + 5) % n_experts) for e in range(n_experts))
    full = ((1.0, 1.0),) * n_experts
    layer = LayerTrace(0, ids, full, ((True, True),) * n_experts, eye, (0.0,) * n_experts, (1 / n_experts,) * n_experts)
    return made([layer], [" word"] * n_experts, n_experts, 2)


@pytest.mark.parametrize("n_experts", [5, 16, 64])
def test_figure_draws_the_trace_and_every_expert(n_experts):
    trace = routing_trace(make_run(n_experts=n_experts), CODE)
    root = ElementTree.fromstring(view(trace).svg(layer=2))
    drawn = {int(g.get("data-token")): g for g in root.iter() if g.get("data-token")}
    assert len(drawn) == len(trace.tokens)
    for t, group in drawn.items():
        assert group.get("data-experts") == ",".join(map(str, trace.layers[2].experts[t]))
        assert [float(w) for w in group.get("data-weights").split(",")] == list(trace.layers[2].weights[t])
    bars = {int(g.get("data-expert")): g for g in root.iter() if g.get("data-expert")}
    assert set(bars) == set(range(n_experts))
    assert all(str(e) in [text.text for text in bar.iter() if text.tag.endswith("text")] for e, bar in bars.items())
    assert root.get("role") == "img"
    assert [child.tag.split("}")[1] for child in root][:2] == ["title", "desc"]


def test_alternative_text_says_what_the_figure_shows(trace):
    load = trace.layers[1].load
    alt, other = view(trace, layer=1).figure_alt, view(trace).alt(2)
    assert f"expert {int(np.argmax(load))} takes the most" in alt and f"{len(trace.tokens)} tokens in layer 1" in alt
    assert len(alt) >= 40 and alt != other
    assert f'aria-label="{alt}"' in view(trace, layer=1).svg()
    assert ElementTree.fromstring(load_figure(trace, 1)).get("aria-label") == alt
    with pytest.raises(ValueError, match="layer 7 has no router: this trace holds layers 0, 1, 2"):
        view(trace).svg(7)


def test_dropped_tokens_are_marked_in_the_figure():
    texts = [text.text for text in ElementTree.fromstring(view(dropping()).svg()).iter() if text.tag.endswith("text")]
    assert texts.count("1 full") == 2


def test_page_asks_for_nothing_from_outside(trace, tmp_path):
    examples = {"hostile": routing_trace(make_run(max_seq_len=512), HOSTILE)}
    page = view(trace, examples).save_html(tmp_path / "a" / "x.html")
    text = page.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    data = re.search(r'<script type="application/json">(.*?)</script>', text, re.S).group(1)
    assert "<" not in data and len(json.loads(data)["state"]["items"]) == 2
    rest = text.replace(data, "")
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|<link|\bsrc=|fetch\(|XMLHttp", rest)
    assert rest.count("</script>") == 2


def test_import_needs_neither_anywidget_nor_plotly():
    code = ("import sys, minimoe.explore; "
            "print(sorted({'anywidget', 'plotly', 'ipywidgets', 'IPython'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_anywidget_the_page_is_shown_and_the_text_box_says_what_is_missing(trace, run, monkeypatch):
    monkeypatch.delitem(sys.modules, "minimoe.explore.widget", raising=False)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    data, _ = view(trace)._repr_mimebundle_()
    assert set(data) == {"text/plain", "text/html"}
    with pytest.raises(ModuleNotFoundError, match=r"anywidget: pip install minimoe\[course\]"):
        view(trace, run=run)._repr_mimebundle_()


def test_view_refuses_what_is_no_trace(trace):
    with pytest.raises(TypeError, match="Code: expected a RoutingTrace .* found str"):
        view(trace, {"Code": "def f(): pass"})


def test_widget_traces_the_readers_text_and_answers_errors_in_one_line(trace, run):
    shown = view(trace, {"Code": trace}, run=run)
    data, _ = shown._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(data)
    assert '"live":false' in data["text/html"]
    widget, sent = shown.widget(), []
    widget.send = sent.append
    assert widget.state["live"] and [item["name"] for item in widget.state["items"]] == ["Code"]
    widget._handle_custom_msg({"text": "own text"}, [])
    assert [item["name"] for item in widget.state["items"]] == ["Your text", "Code"]
    assert widget.state["items"][0]["trace"] == routing_trace(run, "own text").to_dict()
    widget._handle_custom_msg({"text": ""}, [])
    assert sent == [{"error": ""}, {"error": "the text is empty: give at least one character to trace"}]
    assert widget.state["items"][0]["name"] == "Your text"


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


# --- specialisation --------------------------------------------------------------------------------------------------
def documents(rng, n_documents, n_labels, tokens):
    ids = np.repeat(np.arange(n_documents), tokens)
    return ids, ids % n_labels


def test_mutual_information_of_known_tables():
    assert mutual_information([0, 1, 2], [0, 1, 2], 3, 3) == pytest.approx(np.log2(3))
    assert mutual_information([0, 0, 1, 1], [0, 1, 0, 1], 2, 2) == 0
    # joint (3, 1; 1, 3) / 8: 1 - H(1/4), counted by hand
    h = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert mutual_information([0, 0, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1], 2, 2) == pytest.approx(1 - h)
    # two choices a token, and weights: half the weight on expert 0 everywhere is half the information
    assert mutual_information([[0, 1], [0, 2]], [0, 1], 3, 2) == pytest.approx(0.5)
    assert mutual_information([[0, 1], [0, 2]], [0, 1], 3, 2, weights=[[0, 1], [0, 1]]) == pytest.approx(1)
    with pytest.raises(ValueError, match="experts must be in 0 ... 1, found 0 ... 2"):
        mutual_information([0, 2], [0, 1], 2, 2)


def test_independent_routing_has_no_excess():
    covered, excess = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ids, domain = documents(rng, 30, 3, 60)
        habits = rng.dirichlet(np.full(8, 3.0), 30)           # each document has its own taste, whatever its domain
        experts = np.array([rng.choice(8, p=habits[d]) for d in ids])
        s = specialisation(experts, domain, ids, n_boot=200, n_null=100, seed=seed)
        assert s.low <= s.excess <= s.high and s.excess == pytest.approx(s.mi - s.null)
        covered += s.low <= 0 <= s.high
        excess.append(s.excess)
        assert s.null > 0.01                                  # chance alone, with so few documents, looks like this
    assert covered >= 36
    assert abs(np.mean(excess)) < 0.005


def test_perfect_specialisation_is_the_entropy_of_the_domains():
    ids, domain = documents(None, 30, 3, 20)
    s = specialisation(domain, domain, ids, n_experts=3)
    assert s.mi == pytest.approx(np.log2(3)) and s.null > 0
    assert s.null == pytest.approx(permutation_null(domain, domain, ids, n=400, seed=5), abs=0.02)
    assert s.excess == pytest.approx(np.log2(3) - s.null)
    assert s == specialisation(torch.tensor(domain), torch.tensor(domain), torch.tensor(ids), n_experts=3)


def test_null_falls_with_the_number_of_documents():
    rng = np.random.default_rng(0)
    nulls = []
    for n in (6, 60, 600):
        ids, domain = documents(rng, n, 3, 10)
        nulls.append(permutation_null(rng.integers(0, 8, (len(ids), 2)), domain, ids))
    assert nulls[0] > 3 * nulls[1] > 9 * nulls[2] > 0


def test_paired_difference_is_narrower_than_two_separate_intervals():
    rng = np.random.default_rng(1)
    ids, domain = documents(rng, 60, 3, 40)
    habits = rng.dirichlet(np.full(3, 1.0), 60)
    shared = np.where(rng.random(len(ids)) < 0.5, domain, [rng.choice(3, p=habits[d]) for d in ids])
    a, b = np.where(rng.random(len(ids)) < 0.9, shared, domain), shared
    d = specialisation_difference(a, b, domain, ids)
    assert d.difference == pytest.approx(d.a.excess - d.b.excess) and 0 < d.low < d.difference < d.high
    assert d.high - d.low < (d.a.high - d.a.low + d.b.high - d.b.low) / 2
    same = specialisation_difference(a, a, domain, ids)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_specialisation_refuses_what_cannot_be_measured():
    with pytest.raises(ValueError, match="document 7 holds tokens of two labels"):
        specialisation([0, 1, 0], [0, 1, 0], [7, 7, 8])
    with pytest.raises(ValueError, match="at least two"):
        specialisation([0, 1], [0, 0], [1, 1])
    with pytest.raises(ValueError, match="give one to each token"):
        specialisation([0, 1], [0], [1, 2])


def test_identity_router_recovers_a_planted_map():
    rng = np.random.default_rng(3)
    vocab, n_domains = 300, 4
    planted = rng.integers(0, n_domains, vocab)
    chances = np.full((n_domains, vocab), 0.2)
    chances[planted, np.arange(vocab)] = 3.0
    draw = lambda n: (domains := rng.integers(0, n_domains, n), np.array(
        [rng.choice(vocab - 20, p=chances[d, :-20] / chances[d, :-20].sum()) for d in domains]))
    domain, tokens = draw(20_000)
    experts = token_identity_router(tokens, domain, n_domains, vocab)
    pairs = set(zip(planted[:-20], experts[:-20]))
    assert len(pairs) == n_domains                            # a renaming of the planted groups, not one token wrong
    assert len(set(experts[-20:])) == 1                       # ids that were never seen go to one expert
    fitted = mutual_information(experts[tokens], domain, n_domains, n_domains)
    assert fitted >= mutual_information(planted[tokens], domain, n_domains, n_domains) - 1e-9
    fresh_domain, fresh = draw(5_000)
    assert mutual_information(experts[fresh], fresh_domain, n_domains, n_domains) > 0.9 * fitted


def test_identity_router_bounds_other_maps_on_its_own_tokens():
    rng = np.random.default_rng(4)
    domain = rng.integers(0, 3, 3000)
    tokens = np.minimum(rng.geometric(0.05 + 0.05 * domain), 60)
    best = mutual_information(token_identity_router(tokens, domain, 4, 64)[tokens], domain, 4, 3)
    for _ in range(200):
        assert mutual_information(rng.integers(0, 4, 64)[tokens], domain, 4, 3) < best
    assert best <= mutual_information(tokens, domain, 64, 3)
