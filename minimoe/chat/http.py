"""The server: the chat page at /, and for programs /health, /models, /generate and their description at /programs."""
from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from html import escape
from pathlib import Path

from minimoe.chat.page import CSS, import_gradio, make_page
from minimoe.chat.service import Busy, NotThere, OutOfTime, Question, Service, paced
from minimoe.settings import ConfigError, from_dict

PAGE_BYTES = 8 << 20        # of a request of the page, which may send all threads that the browser keeps


class Guard:
    """Refuses what is too long before it is in memory, uploads, which the page does not use, and what breaks gradio."""

    def __init__(self, app: Callable, service: Service):
        self.app, self.own_bytes = app, 12 * service.limits.max_prompt + 65536      # 12: a character as JSON spells it at worst

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.responses import JSONResponse

        most, read, started = self.own_bytes if scope["path"] == "/generate" else PAGE_BYTES, 0, False
        too_long = f"a request may have {most:,} bytes"
        refuse = lambda status, text: JSONResponse({"error": text}, status)(scope, receive, send)

        async def counted() -> dict:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise _Refused(413, too_long)
            return message

        async def watched(message: dict) -> None:
            nonlocal started
            if message.get("status") == 500 and scope["path"].startswith("/gradio_api/"):
                raise _Refused(400, "not a request that the page makes")
            started = True
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if scope["path"].startswith("/gradio_api/upload"):
            return await refuse(404, "nothing can be uploaded here")
        if length.isdigit() and int(length) > most:
            left = PAGE_BYTES                   # read up to here, or who is still sending would not see the answer
            while left > 0 and (message := await receive()).get("more_body"):
                left -= len(message["body"])
            return await refuse(413, too_long)
        try:
            await self.app(scope, counted, watched)
        except _Refused as refused:
            if not started:
                await refuse(*refused.args)


class _Refused(Exception):
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
        return JSONResponse({"status": "ok", "writing": service.writing, "waiting": service.waiting})

    async def models(request):
        return JSONResponse({"models": await run_in_threadpool(service.models)})

    async def programs(request):
        text = Path(__file__).with_name("programs.html").read_text(encoding="utf-8")
        for name, value in (("BASE", escape(str(request.base_url).rstrip("/"))), ("TOKENS", limits.max_tokens),
                            ("CHARACTERS", limits.max_prompt), ("SECONDS", f"{limits.max_seconds:g}")):
            text = text.replace(name, str(value))
        return HTMLResponse(text)

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
