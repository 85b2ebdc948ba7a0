"""The chat page in a browser: it streams, stops, keeps and deletes threads, and fits a phone."""

from __future__ import annotations

import json
import threading
import time
import urllib.request

import pytest

from tests.browser import browser
from tests.chat_runs import chat_server, make_talker

pytest.importorskip("gradio", reason="the page needs gradio: pip install minimoe[chat]")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.browser
# the text itself: what is still waited for has a mark of its own
BOT, STOP, SEND = ".bot .message-content .md", "button.stop-button", "button.submit-button"
LONG = 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    top = tmp_path_factory.mktemp("page")
    make_talker(top / "runs" / "talker")
    make_talker(top / "runs" / "other", supervised=False, seed=1)
    with chat_server(top, "runs/talker", "--max-tokens", LONG, "--parallel", 2, "--waiting", 1) as (base, process, log):
        yield base, psutil.Process(process.pid)
        assert "Traceback" not in log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def running():
    with browser() as chromium:
        yield chromium


@pytest.fixture
def open_page(server, running):
    """`open_page(**options of a browser context) -> page`, an own browser each; no fault and no request to elsewhere."""
    base, contexts, faults = server[0], [], []

    def opener(**options):
        contexts.append(running.new_context(**{"viewport": {"width": 1280, "height": 850}} | options))
        page = contexts[-1].new_page()
        page.on("request", lambda r: r.url.startswith((base, "data:", "blob:")) or faults.append(f"request: {r.url}"))
        page.on("console", lambda m: m.type == "error" and faults.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: faults.append(f"exception: {e}"))
        return ready(page, page.goto(base))

    yield opener
    for context in contexts:
        context.close()
    assert not faults


def ready(page, _=None):
    page.wait_for_selector("textarea", timeout=60_000)
    page.wait_for_function("() => document.querySelector('.sidebar .toggle-button')", timeout=60_000)
    page.wait_for_timeout(500)                          # what is done at load: the thread, the runs, the settings
    return page


def ask(page, text, length=None, answered=True):
    if length:
        box = page.get_by_label("number input for Length")
        box.fill(str(length))
        box.press("Enter")
    before = page.locator(BOT).count()
    page.locator("textarea").fill(text)
    page.keyboard.press("Enter")
    if answered:
        page.wait_for_function(f"() => document.querySelectorAll('{BOT}').length > {before}", timeout=60_000)


def bot(page):
    """The text of the newest answer."""
    return page.evaluate(f"() => [...document.querySelectorAll('{BOT}')].at(-1)?.textContent.trim() ?? ''")


def grown(page, beyond=0):
    page.wait_for_function(f"() => ([...document.querySelectorAll('{BOT}')].at(-1)?.textContent ?? '').trim().length > {beyond}",
                           timeout=60_000)
    return len(bot(page))


def idle(page):
    page.wait_for_selector(SEND, timeout=60_000)
    page.wait_for_selector("textarea:enabled")
    page.wait_for_timeout(500)                          # the thread is being kept


def threads(page):
    return page.locator("tr.tr-body").all_inner_texts()


def health(base):
    with urllib.request.urlopen(base + "/health") as answer:
        return json.load(answer)


def writing(base):
    return health(base)["writing"]


def cpu(process):
    return sum(process.cpu_times()[:2])



def test_the_first_token_is_there_before_the_last_and_stop_frees_the_cpu(server, open_page):
    base, process = server
    page = open_page()
    ask(page, "go on for ever", LONG)
    first = grown(page)
    assert first < LONG / 2 and grown(page, first) < LONG / 2       # it goes on growing
    started, before = time.monotonic(), cpu(process)
    while cpu(process) < before + 1:                    # a second of its own, however long that takes on a busy machine
        page.wait_for_timeout(50)
    window = time.monotonic() - started
    assert writing(base) == 1
    page.locator(STOP).click()
    page.wait_for_timeout(1000)
    assert writing(base) == 0
    stopped = len(bot(page))
    before = cpu(process)
    page.wait_for_timeout(1000 * window)
    assert cpu(process) < before + 0.3
    assert len(bot(page)) == stopped > 0
    idle(page)
    ready(page, page.reload())                          # what was stopped is kept too
    assert len(bot(page)) == stopped and len(threads(page)) == 1


def test_closing_the_page_frees_the_cpu(server, open_page):
    base, process = server
    page, other = open_page(), open_page()
    ask(page, "go on for ever", LONG)
    grown(page)
    assert writing(base) == 1
    page.close()
    for _ in range(100):
        other.wait_for_timeout(100)
        if not writing(base):
            return
    pytest.fail("an answer for a page that was closed is still being written")


def test_threads_are_kept_shown_again_and_deleted(open_page):
    page = open_page()
    ask(page, "first thread", 20)
    idle(page)
    answer = bot(page)
    assert len(answer) == 20
    ask(page, "and more of it", 20)
    idle(page)
    page.get_by_role("button", name="New chat").click()
    page.wait_for_function(f"() => !document.querySelector('{BOT}')")
    ask(page, "second thread", 20)
    idle(page)
    page.wait_for_function("() => document.querySelectorAll('tr.tr-body').length == 2")
    for _ in range(2):
        ready(page, page.reload())
        assert threads(page) == ["second thread", "first thread"] and page.locator(BOT).count() == 1
    page.get_by_role("gridcell", name="first thread").click()
    page.wait_for_function(f"() => document.querySelectorAll('{BOT}').length == 2")
    assert page.locator(BOT).first.inner_text().strip() == answer
    page.get_by_role("button", name="Clear").click()
    page.wait_for_function("() => document.querySelectorAll('tr.tr-body').length == 1")
    idle(page)
    ready(page, page.reload())
    assert threads(page) == ["second thread"] and page.locator(BOT).count() == 0


def test_two_chats_at_once_both_stream(server, open_page):
    pages = [open_page(), open_page()]
    for page in pages:
        ask(page, "go on for ever", LONG)
    for _ in range(2):
        lengths = [grown(page, len(bot(page))) for page in pages]
    assert writing(server[0]) == 2 and max(lengths) < LONG / 2
    for page in pages:
        page.locator(STOP).click()
        idle(page)


def test_who_finds_no_place_is_told_so_and_can_ask_again(server, open_page):
    base, _ = server
    page = open_page()
    body = json.dumps({"prompt": "hi", "max_new_tokens": LONG}).encode()
    request = urllib.request.Request(base + "/generate", body, {"Content-Type": "application/json"})
    both = [urllib.request.urlopen(request) for _ in range(2)]
    third = threading.Thread(target=lambda: urllib.request.urlopen(request).close())
    third.start()
    while health(base)["waiting"] < 1:
        page.wait_for_timeout(50)
    ask(page, "hi", 20, answered=False)
    page.get_by_text("please try again in a moment").first.wait_for(timeout=30_000)
    for answer in both:
        answer.close()
    third.join()
    idle(page)
    ask(page, "hi", 20)
    idle(page)
    assert len(bot(page)) == 20


def test_another_run_brings_its_own_text(server, open_page):
    page = open_page()
    assert "base model" not in page.locator(".sidebar").inner_text()
    ask(page, "hi", 20)
    idle(page)
    before = bot(page)
    page.get_by_label("Model").click()
    page.get_by_role("option", name="runs/other").click()
    page.get_by_text("base model").wait_for()
    page.get_by_role("button", name="New chat").click()
    page.wait_for_function(f"() => !document.querySelector('{BOT}')")
    ask(page, "hi", 20)
    idle(page)
    assert len(bot(page)) == 20 and bot(page) != before


def test_an_error_is_said_kindly_and_the_chat_goes_on(open_page):
    page = open_page()
    ask(page, "\u2603", 20, answered=False)                             # not among the characters that the run knows
    page.get_by_text("is not in this tokenizer's vocabulary").first.wait_for(timeout=30_000)
    idle(page)
    page.get_by_role("button", name="New chat").click()
    ask(page, "hi", 20)
    page.wait_for_function(f"() => ([...document.querySelectorAll('{BOT}')].at(-1)?.textContent ?? '').trim().length == 20")


@pytest.mark.parametrize("scheme, width", [("light", 390), ("dark", 1280)])
def test_light_and_dark_wide_and_narrow(open_page, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 844})
    ask(page, "a" * 90)
    idle(page)
    back, text = (page.evaluate(f"() => getComputedStyle(document.querySelector('{BOT}')).{name}").removeprefix("rgb(").rstrip(")")
                  for name in ("backgroundColor", "color"))
    body = page.evaluate("() => getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
    assert (int(body) > 200) == (scheme == "light") and (int(text.split(",")[0]) < 100) == (scheme == "light"), (back, text, body)
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    assert page.evaluate("""() => [...document.querySelectorAll('.message, textarea')].every(n => {
        const box = n.getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth; })""")
    chat = page.locator(".bubble-wrap").bounding_box()
    assert chat["height"] > 300 and (width == 1280) == (page.get_by_label("Model").bounding_box()["x"] < width)
    if width == 390:
        page.get_by_role("button", name="Toggle Sidebar").click()
        page.wait_for_timeout(500)
        box = page.get_by_label("Model").bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
