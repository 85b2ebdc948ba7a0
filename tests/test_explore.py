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

from minimoe.data.tokenizer import Tokenizer
from minimoe.explore import (
    RoutingTrace,
    routing_trace,
    view,
)
from minimoe.explore.text import labels
from tests.explore_runs import CHOICE, CODE, HOSTILE, dropping, make_run


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
