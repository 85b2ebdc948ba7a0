"""The stepper shows what the library computes, is worked by keyboard alone, and takes any text as text."""
from __future__ import annotations

import pytest
import torch

from minimoe.explore.stepper import Example, stepper, token_example
from minimoe.router import softmax_topk
from tests.browser import offline_pages

LOGITS = (2.0, -1.5, 0.25, 1.75, -0.5, 0.0, 1.25)
HOSTILE = Example('</script><img src=x onerror="window.hit=1">', (0.0, 1.0, 3.0, 2.0, -1.0, 0.5, 0.25),
                  "<b>before</b> ", '"><script>window.hit=1</script>', " \u202eafter", "<i>where</i>")
NUMBERS = """() => [...document.querySelectorAll('.mm-steps tbody tr')].map(row =>
    [...row.querySelectorAll('[data-value]')].map(cell => +cell.dataset.value))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepper")
    stepper([Example("by hand", LOGITS), HOSTILE], seed=3).save_html(folder / "stepper.html", "A <stepper>")
    with offline_pages(folder) as open_page:
        page, faults = open_page("stepper.html")
        yield page
        assert not faults


def expected(logits, k, temperature, noise, normalize):
    """Rows (score, probability, rank of the choice or -1, weight or 0), from the library."""
    dice = torch.tensor(stepper([Example("", LOGITS)], seed=3).dice)
    scores = (torch.tensor(logits) + noise * dice) / temperature
    r = softmax_topk(scores[None], k, normalize)
    experts, weights = r.experts[0].tolist(), r.weights[0].tolist()
    return [[scores[e].item(), r.probs[0, e].item(), experts.index(e) if e in experts else -1,
             weights[experts.index(e)] if e in experts else 0.0] for e in range(len(logits))]


def set_slider(page, name, value):
    page.locator(f"input[name={name}]").evaluate("(el, v) => { el.value = v; el.dispatchEvent(new Event('input')) }", value)


def same(page, rows):
    torch.testing.assert_close(torch.tensor(page.evaluate(NUMBERS), dtype=torch.float64),
                               torch.tensor(rows, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.browser
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k, temperature, noise", [(1, 1.0, 0.0), (2, 0.1, 0.0), (3, 2.5, 0.7), (7, 4.0, 3.0)])
def test_numbers_are_those_of_the_library(page, k, temperature, noise, normalize):
    page.get_by_role("button", name="Reset").click()
    for name, value in (("k", k), ("temperature", temperature), ("noise", noise)):
        set_slider(page, name, value)
    page.get_by_label("Renormalize the weights").set_checked(normalize)
    rows = expected(LOGITS, k, temperature, noise, normalize)
    same(page, rows)
    # what is read is what is stored: rounded weights, and their sum below
    shown = page.locator(".mm-steps tbody .mm-weight .mm-digits").all_inner_texts()
    assert shown == [f"{row[3]:.3f}" if row[2] >= 0 else "–" for row in rows]
    total = page.locator(".mm-steps tfoot .mm-weight .mm-digits").inner_text()
    assert total == f"{sum(row[3] for row in rows):.3f}"


@pytest.mark.browser
def test_keyboard_alone(page):
    """Tab reaches every control in order, the arrow keys move it, and what changed is spoken."""
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Token", exact=True).focus()
    names = []
    for _ in range(5 + len(LOGITS)):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.name || document.activeElement.getAttribute('aria-label') "
                                   "|| document.activeElement.textContent"))
        if names[-1] == "k":
            page.keyboard.press("ArrowRight")
        if names[-1] == "normalize":
            page.keyboard.press("Space")
        if names[-1] == "Logit of expert 4":
            page.keyboard.press("Control+A")
            page.keyboard.type("2.5")
    assert names == ["Reset", "k", "temperature", "noise", "normalize", *(f"Logit of expert {e}" for e in range(7))]
    same(page, expected((*LOGITS[:4], 2.5, *LOGITS[5:]), 3, 1.0, 0.0, False))
    assert "expert 4" in page.get_by_role("status").inner_text()
    page.get_by_role("button", name="Reset").press("Enter")
    same(page, expected(LOGITS, 2, 1.0, 0.0, True))


@pytest.mark.browser
def test_half_typed_and_impossible_logits_are_left_alone(page):
    page.get_by_role("button", name="Reset").click()
    before = page.evaluate(NUMBERS)
    field = page.get_by_label("Logit of expert 0")
    for type_it in (lambda: field.fill(""), lambda: field.press_sequentially("-"), lambda: field.fill("1e9")):
        type_it()
        assert page.evaluate(NUMBERS) == before
    page.get_by_role("button", name="Reset").click()


@pytest.mark.browser
def test_hostile_text_stays_text(page):
    page.get_by_label("Token", exact=True).select_option(index=1)
    same(page, expected(HOSTILE.logits, 2, 1.0, 0.0, True))
    context = page.locator(".mm-context")
    assert context.locator("mark").inner_text() == HOSTILE.token
    assert context.locator("b, i, img, script").count() == 0
    assert page.get_by_label("Token", exact=True).locator("option").nth(1).inner_text() == HOSTILE.name
    assert page.evaluate("window.hit") is None
    page.get_by_label("Token", exact=True).select_option(index=0)


@pytest.mark.browser
def test_without_scripts_a_table_stands_in(page, tmp_path):
    path = stepper([Example("<by hand>", LOGITS)], k=3, normalize=False).save_html(tmp_path / "plain.html")
    plain = page.context.browser.new_page(java_script_enabled=False)
    plain.goto(path.as_uri())
    table = plain.get_by_role("table", name="One token through a router with 7 experts")
    cells = table.locator("tr").nth(1).locator("td").all_inner_texts()
    _, prob, rank, weight = expected(LOGITS, 3, 1.0, 0.0, False)[0]
    assert cells == ["2.00", f"{prob:.3f}", str(rank + 1), f"{weight:.3f}"]
    assert table.locator("caption").inner_text() == "<by hand>"
    plain.close()


def test_bundle_holds_widget_and_page_and_both_the_same_module():
    view = stepper([HOSTILE])
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/html"] == view.html() and "<img" not in view.html()
    assert view.widget()._esm.strip().splitlines()[-2] in view.html()
    assert view.widget().state["examples"][0]["token"] == HOSTILE.token


def test_alt_text_says_where_the_token_goes():
    assert "expert 0 with weight 0.56, expert 3 with weight 0.44" in stepper([Example("x", LOGITS)]).figure_alt


def test_token_example_takes_the_logits_of_one_token(tiny_run):
    run = tiny_run
    ids = torch.tensor([run.tokenizer.encode("a\nb c")])
    logits = run.model.eval()(ids).routing[1].logits
    run.model.train()
    example = token_example(run, "a\nb c", at=2, layer=1)
    assert example.logits == tuple(round(x, 3) for x in logits[2].tolist())
    assert (example.before, example.token, example.after) == ("a↵", "b", " c")
    assert run.model.training
    assert token_example(run, "a\nb c").token == "c"
    with pytest.raises(IndexError):
        token_example(run, "abc", at=3)
    with pytest.raises(ValueError, match="layer 7 has no router"):
        token_example(run, "abc", layer=7)


@pytest.fixture
def tiny_run():
    from types import SimpleNamespace

    from minimoe.config import ModelConfig
    from minimoe.data.tokenizer import Tokenizer
    from minimoe.model import MoETransformer

    torch.manual_seed(0)
    tokenizer = Tokenizer.bytes()
    cfg = ModelConfig(vocab_size=tokenizer.vocab_size, dim=16, n_layers=2, n_heads=2, n_experts=4, expert_hidden=8)
    return SimpleNamespace(model=MoETransformer(cfg), tokenizer=tokenizer)


@pytest.mark.parametrize("examples, options, message", [
    ([], {}, "at least one"),
    ([Example("a", (0.0, 1.0)), Example("b", (0.0, 1.0, 2.0))], {}, r"examples with \[2, 3\] experts"),
    ([Example("a", (0.0, float("nan")))], {}, "not finite"),
    ([Example("a", (0.0, 1.0))], {"k": 3}, "k from 1 to 2"),
    ([Example("a", (0.0, 1.0))], {"temperature": 0.0}, "temperature above 0"),
])  # fmt: skip
def test_what_cannot_be_shown_is_refused(examples, options, message):
    with pytest.raises(ValueError, match=message):
        stepper(examples, **options)
