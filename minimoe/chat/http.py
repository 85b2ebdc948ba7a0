"""The server: the chat page at /, and for programs /health, /models, /generate and their description at /programs."""
from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from html import escape

from minimoe.chat.page import CSS, import_gradio, make_page
from minimoe.chat.service import Busy, NotThere, OutOfTime, Question, Service, paced
from minimoe.settings import ConfigError, from_dict

PAGE_BYTES = 8 << 20        # of a request of the page, which may send all threads that the browser keeps

HEALTH = "curl -s {base}/health"
MODELS = "curl -s {base}/models"
CURL = """curl -sN {base}/generate -H 'Content-Type: application/json' \\
  -d '{{"prompt": "The for statement", "max_new_tokens": 40}}'"""
PYTHON = """import json
from urllib.request import Request, urlopen

question = {{"messages": [{{"role": "user", "content": "What does math.sqrt do?"}}], "max_new_tokens": 40}}
request = Request("{base}/generate", json.dumps(question).encode(), {{"Content-Type": "application/json"}})
with urlopen(request) as answer:
    for line in answer:
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            print(event.get("text", ""), end="", flush=True)
print()"""
PROGRAMS = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>minimoe for programs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark }} body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto;
padding: 0 1rem }} pre {{ overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: .5rem }}</style></head><body>
<h1>For programs</h1><p>What the <a href="/">chat page</a> can do, over HTTP.</p>
<h2>GET /health</h2><p>Whether the server answers, and how many questions wait.</p><pre>{health}</pre>
<h2>GET /models</h2><p>The runs with their kept steps, sizes and default options; <code>chat</code> says whether one knows turns.</p>
<pre>{models}</pre>
<h2>POST /generate</h2><p>A JSON object with either <code>prompt</code>, a text to go on from, or <code>messages</code>, a list of
{{"role": user, assistant or system, "content": text}}; and if you like <code>run</code> and <code>step</code> (from /models),
<code>max_new_tokens</code> (at most {tokens}), <code>temperature</code> (0 takes the likeliest token always), <code>top_k</code>,
<code>top_p</code>, <code>stop</code> (a list of texts) and <code>seed</code>. At most {characters} characters.</p>
<p>The answer is a stream of server-sent events: <code>data: {{"text": …}}</code> for each piece, at last
<code>data: {{"done": true}}</code>, with a <code>note</code> where the time of {seconds} s was over. What cannot be answered gets one
line <code>{{"error": …}}</code> with the status 400, 404 (no such run), 413, 415 or 429 (too many at once).</p>
<h3>curl</h3><pre>{curl}</pre><h3>Python</h3><pre>{python}</pre></body></html>"""


class Guard:
    """Refuses what is too long before it is in memory, and uploads, which the page does not use."""

    def __init__(self, app: Callable, service: Service):
        self.app, self.own_bytes = app, 12 * service.limits.max_prompt + 65536      # 12: a character as JSON spells it at worst

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.responses import JSONResponse

        most, read, started = self.own_bytes if scope["path"] == "/generate" else PAGE_BYTES, 0, False
        refuse = lambda status, text: JSONResponse({"error": text}, status)(scope, receive, send)

        async def counted() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise _TooLong
            return message

        async def watched(message: dict) -> None:
            nonlocal started
            started = True
            await send(message)

        if scope["path"].startswith("/gradio_api/upload"):
            return await refuse(404, "nothing can be uploaded here")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            return await refuse(413, f"{int(length):,} bytes: a request may have {most:,}")
        try:
            await self.app(scope, counted, watched)
        except _TooLong:
            if not started:
                await refuse(413, f"a request may have {most:,} bytes")


class _TooLong(Exception):
    pass


def make_app(service: Service, host: str = "127.0.0.1", port: int = 7860):
    """The whole server as an ASGI application."""
    gr = import_gradio()
    from fastapi import FastAPI
    from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

    app, limits = FastAPI(openapi_url=None), service.limits

    async def health(request):
        return JSONResponse({"status": "ok", "waiting": service.waiting})

    async def models(request):
        return JSONResponse({"models": await run_in_threadpool(service.models)})

    async def programs(request):
        base = str(request.base_url).rstrip("/")
        parts = {name: escape(text.format(base=base), quote=False)
                 for name, text in (("health", HEALTH), ("models", MODELS), ("curl", CURL), ("python", PYTHON))}
        return HTMLResponse(PROGRAMS.format(**parts, tokens=limits.max_tokens, characters=f"{limits.max_prompt:,}",
                                            seconds=f"{limits.max_seconds:g}"))

    async def generate(request):
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return JSONResponse({"error": "send JSON, with Content-Type: application/json"}, 415)
        try:
            pieces = paced(service.answer(_question(await request.body())))
            first = await run_in_threadpool(next, pieces, "")
        except ClientDisconnect:
            return Response(status_code=400)
        except ValueError as error:
            status = 404 if isinstance(error, NotThere) else 429 if isinstance(error, Busy) else 400
            return JSONResponse({"error": " ".join(str(error).split())}, status)

        async def events() -> AsyncIterator[str]:
            with closing(pieces):
                try:
                    yield _event(text=first)
                    async for piece in iterate_in_threadpool(pieces):
                        yield _event(text=piece)
                    yield _event(done=True)
                except OutOfTime as note:
                    yield _event(done=True, note=str(note))
                except Exception:
                    logging.getLogger("uvicorn.error").exception("an answer failed")
                    yield _event(error="the server failed; its log says why")

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    for path, handler, method in (("/health", health, "GET"), ("/models", models, "GET"), ("/programs", programs, "GET"),
                                  ("/generate", generate, "POST")):
        app.add_route(path, handler, methods=[method])
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(app, make_page(service), path="/", server_name=host, server_port=port, ssr_mode=False, run_history=False,
                        theme=theme, css=CSS, footer_links=["settings"])
    app.add_middleware(Guard, service=service)
    return app


def serve(service: Service, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves until Ctrl-C. Port 0 takes a free one; ConfigError where the address cannot be had."""
    import_gradio()
    import uvicorn

    service.load()
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}, port {port}: {getattr(error, 'strerror', None) or error}; name another --port or --host") from None
    port = listening.getsockname()[1]
    app = make_app(service, host, port)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listening])


def _question(body: bytes) -> Question:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ConfigError("the request is not JSON") from None
    return from_dict(Question, values, "request")


def _event(**values: object) -> str:
    return f"data: {json.dumps(values)}\n\n"
