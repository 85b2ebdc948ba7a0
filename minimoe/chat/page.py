"""The chat in the browser: gradio's ChatInterface, with threads that the browser keeps."""
from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minimoe.chat.service import OutOfTime, Question, Service, paced
from minimoe.chat.terminal import BASE
from minimoe.settings import ConfigError

if TYPE_CHECKING:
    import gradio

CSS = """
.gradio-container { max-width: 1200px !important; }
"""


def import_gradio():
    """gradio, told to send nothing to anybody; ConfigError where it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError:
        raise ConfigError("the chat page needs gradio: pip install minimoe[chat]") from None
    return gradio


def make_page(service: Service) -> gradio.Blocks:
    """The page as gradio's blocks, to be mounted."""
    gr, limits = import_gradio(), service.limits

    def respond(message: str, history: list[dict], model: str, temperature: float, top_k: int, top_p: float,
                length: int) -> Iterator[str]:
        said = [{"role": m["role"], "content": _text(m["content"])} for m in history] + [{"role": "user", "content": message}]
        while len(said) > 1 and sum(len(m["content"]) for m in said) > limits.max_prompt:
            said.pop(0)
        name, _, step = model.rpartition("@")
        text = ""
        try:
            question = Question(messages=tuple(said), run=name, step=int(step) if step else None, max_new_tokens=length,
                                temperature=temperature, top_k=top_k, top_p=top_p, seed=secrets.randbelow(2**31))
            for piece in paced(service.answer(question)):
                text += piece
                yield text
        except OutOfTime as note:
            gr.Info(str(note), title="")
        except ValueError as error:
            raise gr.Error(str(error), title="", print_exception=False) from None

    def models() -> dict[str, dict]:
        return {m["run"]: m for m in service.models()}

    def choices() -> list[tuple[str, str]]:
        found = []
        for name, m in models().items():
            label = f"{name} ({_count(m['active_params'])} of {_count(m['params'])} parameters active)"
            found += [(label, f"{name}@"), *((f"{name}, step {step}", f"{name}@{step}") for step in m["steps"])]
        return found

    def defaults(model: str) -> tuple[float, int, float, int, str]:
        m = models()[model.rpartition("@")[0]]
        g = m["defaults"]
        return (g["temperature"], g["sample_top_k"] or 0, g["top_p"] or 1, min(g["max_new_tokens"], limits.max_tokens),
                "" if m["chat"] else f"{BASE[0].upper()}{BASE[1:]}.")

    first = f"{service.first}@{service.step or ''}"
    temperature, top_k, top_p, length, note = defaults(first)
    with gr.Blocks(title="minimoe chat", fill_height=True, analytics_enabled=False) as page:
        with gr.Sidebar(position="right", open=True, width=300):
            model = gr.Dropdown(choices(), value=first, label="Model")
            about = gr.Markdown(note)
            sliders = [gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0 takes the likeliest token always"),
                       gr.Slider(0, 200, top_k, step=1, label="Top-k", info="0 draws among all tokens"),
                       gr.Slider(0.05, 1, top_p, step=0.05, label="Top-p", info="1 draws among all tokens"),
                       gr.Slider(1, limits.max_tokens, length, step=1, label="Length", info="tokens of an answer at most")]
        chat = gr.ChatInterface(
            respond, chatbot=gr.Chatbot(render_markdown=False, scale=1, show_label=False, buttons=["copy"], layout="bubble",
                                        placeholder="Ask something."),
            additional_inputs=[model, *sliders], save_history=True, concurrency_limit=limits.parallel, api_visibility="private",
            analytics_enabled=False, fill_height=True)
        chat.saved_conversations.storage_key, chat.saved_conversations.secret = "minimoe-chats", "minimoe"
        model.change(defaults, model, [*sliders, about], api_visibility="private", queue=False, show_progress="hidden")
        page.load(lambda: gr.update(choices=choices()), None, model, api_visibility="private", queue=False)
    return page.queue(max_size=limits.waiting, api_open=False, default_concurrency_limit=None)


def _text(content: object) -> str:
    """What a message of gradio's says: a text, or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"
