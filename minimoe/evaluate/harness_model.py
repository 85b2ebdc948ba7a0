"""A run as the Language Model Evaluation Harness sees a model. Imported only where it is used: lm_eval is an extra.

What is a token and what is cut off is decided as in the harness's own `hf` model, so that a run and its export to
transformers get the same scores: an end-of-text token stands before an empty context, and before a whole text; the
beginning of what is too long is left out; spaces at the end of a context belong to the answer.
Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/models/huggingface.py.
"""
from __future__ import annotations

import json
import re

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm.auto import tqdm

from minimoe.checkpoint import Run
from minimoe.data.tokenizer import ASSISTANT, END, USER
from minimoe.evaluate.likelihood import encode_pair, rolling_windows, token_scores, tokenizer_of
from minimoe.generate import stream
from minimoe.settings import need


class RunModel(TemplateLM):
    """What `lm_eval.simple_evaluate(model=RunModel(run), …)` takes. A run that learned conversations is asked in their
    template, and marks of turns in a text are then marks, as in transformers; `seed` is that of tasks that draw.

    >>> from minimoe.checkpoint import load
    >>> model = RunModel(load("shipped"))
    >>> ask = [Instance("loglikelihood", {}, ("import", answer), 0) for answer in (" sys", " tree")]
    >>> (sys, _), (tree, _) = model.loglikelihood(ask)
    >>> sys > tree
    True
    """

    def __init__(self, run: Run, batch_size: int = 16, seed: int = 0):
        super().__init__()
        self.run, self.own, self.batch_size, self.seed = run, tokenizer_of(run), batch_size, seed
        self.chats = run.config.data.supervised
        self._device = run.model.embedding.weight.device
        if run.model.cfg.router == "expert_choice":         # sees who else is in the batch: each alone
            self.batch_size = 1

    @property
    def eot_token_id(self) -> int:
        need(self.own.end_of_text is not None, "this tokenizer has no end-of-text token, which the harness puts before a text: "
                                               "evaluate a model whose tokenizer has one")
        return self.own.end_of_text

    @property
    def max_length(self) -> int:
        return self.run.model.cfg.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return self.own.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """The tokens, with what the tokenizer.json itself puts before a text: nothing, in those made here."""
        if self.chats:
            marks = {mark: self.own.inner.token_to_id(mark) for mark in (USER, ASSISTANT, END)}
            parts = re.split(f"({'|'.join(map(re.escape, marks))})", string)
            return [i for part in parts for i in ([marks[part]] if part in marks else self.own.encode(part))]
        if add_special_tokens is False or self.own.inner.post_processor is None:
            return self.own.encode(string)
        return self.own.inner.encode(string).ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.run.config.generate.chat_template if self.chats else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a text of which `tok_encode` makes what `Tokenizer.chat` makes of the conversation. Without
        `add_generation_prompt` its last turn is left open."""
        text = system = ""
        for message in chat_history:
            content = message["content"]
            if message["role"] == "system":
                system += content + "\n\n"
                continue
            if message["role"] == "user":
                content, system = system + content, ""
            text += (USER if message["role"] == "user" else ASSISTANT) + content + END
        return text + ASSISTANT if add_generation_prompt else text.removesuffix(END)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[tuple], **kwargs: object) -> list[tuple[float, bool]]:
        # where a token spans context and answer the harness leaves one of them empty: that token is the answer's
        pairs = [(ids, answer) if ids and answer else encode_pair(self.own, *texts) for texts, ids, answer in requests]
        return [(logprob_A.double().sum().item(), bool(hit_A.all())) for logprob_A, hit_A in token_scores(self.run.model, pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of each whole text, in windows as long as the model reads, in which every token is counted once."""
        windows = [(i, pair) for i, request in enumerate(requests) for pair in rolling_windows(
            self.tok_encode(request.args[0]), [self.eot_token_id], self.max_length)]
        sums = [0.0] * len(requests)
        for (i, _), (logprob_A, _) in zip(windows, token_scores(self.run.model, [pair for _, pair in windows])):
            sums[i] += logprob_A.double().sum().item()
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to the first of the task's stop texts; greedy unless the task draws.
        Where a task asks for more tokens than half of `max_seq_len`, the last half of the context is kept, and the window
        moves on while it writes."""
        found, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):          # one batch has one temperature and one list of stop texts
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), unit="answer", disable=None, leave=False) as bar:
            for members in groups.values():
                options = normalize_gen_kwargs(requests[members[0]].args[1])
                room = self.max_length - min(options["max_gen_toks"], self.max_length // 2)
                prompts = {i: self.tok_encode(requests[i].args[0])[-room:] or [self.eot_token_id] for i in members}
                members.sort(key=lambda i: -len(prompts[i]))        # the longest first: memory that is short shows at once
                for at in range(0, len(members), self.batch_size):
                    batch = members[at:at + self.batch_size]
                    for i, text in zip(batch, self._write([prompts[i] for i in batch], options, self.seed + at)):
                        found[i] = text
                    bar.update(len(batch))
        return found

    def _write(self, prompts: list[list[int]], options: dict, seed: int) -> list[str]:
        until = [text for text in options["until"] if text]
        ends = {self.own.end_of_text, self.own.inner.token_to_id(END) if self.chats else None} - {None}
        tail = 4 * max(map(len, until), default=0) + 4      # tokens that hold a stop text, at four bytes a character
        rows, writing = [[] for _ in prompts], set(range(len(prompts)))
        for step in stream(self.run.model, prompts, options["max_gen_toks"], stop_ids=tuple(ends), seed=seed,
                           temperature=options.get("temperature", 1.0) if options["do_sample"] else 0.0,
                           top_k=options.get("top_k") or None, top_p=options.get("top_p")):
            for i in tuple(writing):
                if step[i] is not None:
                    rows[i].append(step[i])
                if step[i] is None or any(text in self.own.decode(rows[i][-tail:]) for text in until):
                    writing.remove(i)
            if not writing:
                break
        return [postprocess_generated_text(self.own.decode(row), until, None) for row in rows]
