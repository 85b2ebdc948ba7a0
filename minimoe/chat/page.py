"""The chat in the browser: gradio's ChatInterface, with threads that the browser keeps."""
from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from minimoe.chat.service import Question, Service, paced
from minimoe.chat.terminal import BASE
from minimoe.settings import ConfigError

if TYPE_CHECKING:
    import gradio

EMPTY = "Ask something, or begin a text that the model goes on with."
EXAMPLES = ("What does math.sqrt do?", "The for statement", "def mean(values):")
CSS = """
.message-content, .message-content .md { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.row:has(.bubble-wrap) > .column:first-child { min-width: 160px !important; }
.tr-body div { overflow-wrap: anywhere; }
.placeholder-content { padding: 0 1rem; text-align: center; }
@media (max-width: 700px) {     /* the threads above, in a list that scrolls; the chat takes the rest */
  .row:has(.bubble-wrap) { flex-direction: column; flex-wrap: nowrap; }
  .row:has(.bubble-wrap) > .column:first-child { flex: none !important; max-height: 25vh; overflow-y: auto; padding-right: 1.5rem; }
}
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
            for piece in paced(service.answer(question), per_character=1e-5):
                text += piece
                yield text
        except ValueError as error:                     # gr.Error would leave the page without its button to send
            gr.Warning(escape(str(error)), title="")

    def models() -> dict[str, dict]:
        return {m["run"]: m for m in service.models()}

    def choices() -> list[tuple[str, str]]:
        found = []
        for name, m in models().items():
            found += [(name, f"{name}@"), *((f"{name}, step {step}", f"{name}@{step}") for step in m["steps"])]
        return found

    def defaults(model: str) -> tuple[float, int, float, int, str]:
        m = models()[model.rpartition("@")[0]]
        g = m["defaults"]
        return (min(g["temperature"], 2), min(g["sample_top_k"] or 0, 1000), max(g["top_p"] or 1, 0.01),
                min(g["max_new_tokens"], limits.max_tokens),
                f"{_count(m['params'])} parameters, {_count(m['active_params'])} active per token."
                + ("" if m["chat"] else f" {BASE[0].upper()}{BASE[1:]}."))

    def again(shown: list | None, threads: list) -> tuple:
        index = shown[0] if shown else None
        thread = threads[index] if index is not None and index < len(threads or []) else []
        return index if thread else None, thread, thread, thread

    first = f"{service.first}@{service.step or ''}"
    temperature, top_k, top_p, length, note = defaults(first)
    with gr.Blocks(title="minimoe chat", fill_height=True, analytics_enabled=False) as page:
        shown = gr.BrowserState(None, storage_key="minimoe-shown", secret="minimoe")
        with gr.Sidebar(position="right", open=False, width=300):       # on a phone it would hide the page
            model = gr.Dropdown(choices(), value=first, label="Model")
            about = gr.Markdown(note)
            sliders = [gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: always the likeliest token"),
                       gr.Slider(0, 1000, top_k, step=1, label="Top-k", info="0: among all tokens"),
                       gr.Slider(0.01, 1, top_p, step=0.01, label="Top-p", info="1: among all tokens"),
                       gr.Slider(1, limits.max_tokens, length, step=1, label="Length", info="most tokens of an answer")]
            gr.HTML('<a href="/programs">For programs</a>')
        chat = gr.ChatInterface(
            respond, chatbot=gr.Chatbot(render_markdown=False, scale=1, show_label=False, buttons=["copy"], placeholder=EMPTY),
            examples=[[text] for text in EXAMPLES], run_examples_on_click=False, additional_inputs=[model, *sliders], save_history=True,
            concurrency_limit=None, api_visibility="private", analytics_enabled=False, fill_height=True)
        # gradio would lock them with a new secret at each start, and lose them
        chat.saved_conversations.storage_key, chat.saved_conversations.secret = "minimoe-chats", "minimoe"
        quiet = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        model.input(defaults, model, [*sliders, about], **quiet)
        page.load(lambda: gr.update(choices=choices()), None, model, **quiet)
        page.load(None, js="() => { if (innerWidth >= 900) document.querySelector('.sidebar .toggle-button')?.click() }")
        keep = {"fn": lambda index: [index], "inputs": chat.conversation_id, "outputs": shown, **quiet}
        gr.on([chat.saved_conversations.change, chat.chatbot_value.change], **keep)
        page.load(again, [shown, chat.saved_conversations],
                  [chat.conversation_id, chat.chatbot, chat.chatbot_state, chat.chatbot_value], **quiet).then(**keep)
    # how many are answered at once is the service's to say, in words: gradio's full queue would leave a page without its button
    return page.queue(api_open=False, default_concurrency_limit=None)


def _text(content: object) -> str:
    """What a message of gradio's says: a text, or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"
