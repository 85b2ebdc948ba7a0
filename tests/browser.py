"""Headless Chromium for the tests: the site from disk with no network, and a real JupyterLab.

    with offline_pages(site) as open_page:            # site: the folder of built HTML
        page, faults = open_page("book/preface.html")

    with lab_page(notebook, tmp_path) as page:        # a copy of the notebook, open in JupyterLab, kernel ready
        run_all(page)
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
# JupyterLab draws only the cells in view, so that the others are not on the page; and it asks whether you want its news
SETTINGS = {
    "notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "apputils-extension/notification.jupyterlab-settings": '{"fetchNews": "false"}',
}


def chromium() -> str:
    """The path of a Chromium; where there is none, the test is skipped, or fails if the variable CI is set."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = "no Chromium or Chrome on the PATH: install one (Debian, Ubuntu: apt-get install chromium)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


@contextmanager
def browser():
    """A running headless Chromium, driven by playwright."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def offline_pages(site: Path, **page_options):
    """Yield `open_page(name) -> (page, faults)` for pages under `site`, opened from disk, all else refused.

    `faults` is a list of strings that goes on growing while the page lives: refused and failed requests, errors and
    warnings of the console, uncaught exceptions.
    """
    site = site.resolve()
    with browser() as running:

        def open_page(name: str):
            page, faults = running.new_page(viewport={"width": 1300, "height": 1000}, **page_options), []

            def gate(route):
                url = route.request.url
                if url.startswith((site.as_uri() + "/", "data:", "blob:")):
                    return route.continue_()
                faults.append(f"refused: {url}")
                route.abort()

            page.route("**/*", gate)
            page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
            page.on("console", lambda m: m.type in ("error", "warning") and faults.append(f"{m.type}: {m.text}"))
            page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
            page.goto(f"{site.as_uri()}/{name}", wait_until="load")
            return page, faults

        yield open_page


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def lab_server(folder: Path, home: Path):
    """A JupyterLab on `folder` with its own configuration, data and settings under `home`; yields its address."""
    settings = home / "settings" / "@jupyterlab"
    for name, text in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(text, encoding="utf-8")
    port, log = free_port(), home / "server.log"
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password="]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.news_url="]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    env = os.environ | {f"JUPYTER_{key}": str(home / name) for key, name in places.items()}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    with open(log, "w", encoding="utf-8") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            for _ in range(240):
                if server.poll() is not None:
                    pytest.fail(f"JupyterLab ended at once:\n{log.read_text(encoding='utf-8')[-3000:]}")
                try:
                    urllib.request.urlopen(f"{address}/api/status", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                pytest.fail(f"JupyterLab did not answer within two minutes:\n{log.read_text(encoding='utf-8')[-3000:]}")
            yield address
        finally:
            server.terminate()
            server.wait(20)


@contextmanager
def lab_page(notebook: Path, tmp: Path):
    """A copy of `notebook`, made in `tmp`, open in a real JupyterLab with its kernel ready; yields playwright's page.

    `page.faults` lists uncaught exceptions and requests to any other address; `page.may_fail` the places, among the code
    cells that are not empty, of those tagged `raises-exception`.
    """
    code = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" and c.source.strip()]
    folder = tmp / "notebooks"
    folder.mkdir(parents=True)
    shutil.copy(notebook, folder / notebook.name)
    shutil.copytree(Path(__file__).parents[1] / "benchmarks", tmp / "benchmarks")     # chapters run their recorded experiments
    chromium()  # skip before a server is started
    with lab_server(folder, tmp / "jupyter") as address, browser() as running:
        page = running.new_page(viewport={"width": 1300, "height": 1000})
        page.faults = []
        page.may_fail = {i for i, c in enumerate(code) if "raises-exception" in c.metadata.get("tags", [])}
        own = (address, address.replace("http", "ws"), "data:", "blob:")
        page.on("pageerror", lambda error: page.faults.append(f"exception: {error}"))
        page.on("request", lambda r: r.url.startswith(own) or page.faults.append(f"outside request: {r.url}"))
        page.goto(f"{address}/lab/tree/{notebook.name}?reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=120_000)
        wait_idle(page)
        yield page


def wait_idle(page, timeout: float = 120_000) -> None:
    """Wait until the kernel has answered: the status bar says Idle (the round indicator says so too early)."""
    page.get_by_text("| Idle").wait_for(timeout=timeout)


def run_all(page, timeout: float = 300_000) -> None:
    """Clear all outputs, run all cells from the menu, and wait until each code cell has a number.

    Raises:
        AssertionError: a cell gave an error; the message holds its text.
    """
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Restart Kernel and Clear Outputs of All Cells").first.click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.wait_for_function(f"() => {CELLS}.every(c => ['[ ]:', ''].includes(c.prompt))", timeout=30_000)
    wait_idle(page)
    for attempt in range(3):  # the first click after a restart is sometimes lost
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.wait_for_function(f"() => {CELLS}.some(c => !['[ ]:', ''].includes(c.prompt))", timeout=20_000)
            break
        except Exception:
            if attempt == 2:
                raise
            page.keyboard.press("Escape")
    end = time.monotonic() + timeout / 1000
    while True:
        cells = page.evaluate(f"() => {CELLS}")
        errors = [c["error"] for i, c in enumerate(cells) if c["error"] and i not in page.may_fail]
        assert not errors, "a cell failed in JupyterLab:\n" + "\n".join(errors)
        left = [i for i, c in enumerate(cells) if not re.fullmatch(r"(\[\d+\]:)?", c["prompt"])]
        if not left:
            wait_idle(page)  # cells whose source is folded away show no number
            return page.wait_for_timeout(1000)  # the last outputs are still being drawn
        assert time.monotonic() < end, f"code cells that did not run: {left} of {len(cells)}"
        page.wait_for_timeout(500)


# JavaScript: each code cell, with what stands before it (nothing where the source is folded away) and the traceback
# below it
CELLS = """[...document.querySelectorAll('.jp-NotebookPanel .jp-CodeCell')]
  .map(c => ({
    prompt: c.querySelector('.jp-InputPrompt').textContent.trim(),
    error: [...c.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]')]
      .map(e => e.innerText).filter(t => t.includes('Traceback (most recent call last)')).join(),
  }))"""
