"""Does a model answer in exactly the words that are wanted? (chapter 11)"""
from __future__ import annotations

import random
from collections.abc import Sequence

from minimoe.checkpoint import Run
from minimoe.data.chat import Conversation, docstring_questions
from minimoe.data.tokenizer import END
from minimoe.evaluate.benchmark import Measured
from minimoe.evaluate.results import Scores
from minimoe.generate import generate
from minimoe.settings import need


def exact_match(run: Run, conversations: Sequence[Conversation], max_new_tokens: int = 64, batch_size: int = 50
                ) -> tuple[list[int], list[str]]:
    """Of each conversation whether the last answer comes out word for word, 1 or 0, and what came out.

    The likeliest token is taken always; an answer ends with its turn or its line, and is compared whole. Of several
    wordings of a conversation the first is asked.

    >>> from minimoe.checkpoint import load
    >>> from minimoe.data.chat import ask
    >>> exact_match(load("shipped"), [ask("What is 2 + 2?", "4", "arithmetic")], max_new_tokens=4)[0]
    [0]
    """
    need(run.tokenizer is not None, "this run has no tokenizer.json, so it cannot be asked: add a tokenizer")
    stops = tuple(i for i in (run.tokenizer.inner.token_to_id(END), run.tokenizer.end_of_text) if i is not None)
    outcomes, answers = [], []
    for start in range(0, len(conversations), batch_size):
        asked = [c.wordings[0] for c in conversations[start:start + batch_size]]
        prompts = [run.tokenizer.chat(messages[:-1], reply=True)[0] for messages in asked]
        for messages, ids in zip(asked, generate(run.model, prompts, max_new_tokens, temperature=0, stop_ids=stops)):
            answers.append(run.tokenizer.decode(ids).strip().split("\n")[0].strip())
            outcomes.append(int(answers[-1] == messages[-1]["content"].strip()))
    return outcomes, answers


def docstrings(run: Run, rng: random.Random, n: int) -> Measured:
    """What a name of the library does: pairs that a run has learned, asked in wordings that it has not. ConfigError for a run
    that learned none."""
    need(run.config.data.supervised and any(s.corpus == "docstrings" for s in run.config.data.mixture),
         f"{run.folder or 'this run'}: has not learned questions about docstrings; minimoe stages trains a run that has")
    known = docstring_questions("test")
    asked = rng.sample(known, min(n, len(known)))
    outcomes, answers = exact_match(run, asked)
    shown = [{"prompt": f"{c.wordings[0][-2]['content']} ", "written": answer, "right": c.wordings[0][-1]["content"]}
             for c, answer in zip(asked[:5], answers)]
    return Measured(scores=[Scores(metric="exact match", values=outcomes, chance=0.0)], samples=shown,
                    note="pairs of a name and the first sentence of its docstring that fine-tuning has shown, in other wordings of the question")
