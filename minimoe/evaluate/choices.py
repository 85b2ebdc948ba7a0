"""Multiple choice by likelihood: which of four answers does the model find likeliest? (chapter 11)

Questions come in groups of four that share their four answers, in the same order, and each answer is right for one of the
four. Whoever does not read the question but likes an answer for its place, its length or its words is right once in each
group: such a model scores chance, exactly. This is what "balanced by construction" means here.
"""
from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minimoe.data.held_out import Document
from minimoe.evaluate.benchmark import Measured
from minimoe.evaluate.likelihood import encode_pair, token_scores, tokenizer_of
from minimoe.evaluate.results import Scores
from minimoe.evaluate.text import held_out
from minimoe.settings import need

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

GROUP = 4               # questions that share their answers, and answers of a question
BEFORE, NEAR = 200, 20  # characters of context at most, and at least
AFTER = 40              # characters of a continuation, at least
TRIES = 50              # draws for each question, until the text is held to be too short
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Question:
    """A context, the possible answers, and the place of the right one."""

    context: str
    answers: tuple[str, ...]
    right: int


def choice_scores(run: Run, questions: Sequence[Question], note: str = "") -> Measured:
    """Two metrics of the same questions: the answer with the largest summed log-likelihood (`accuracy`), and that with the
    largest per character (`acc_norm`, as the Language Model Evaluation Harness has it), which does not favor short ones. Where
    several answers are equally likely, each takes its share."""
    tokenizer = tokenizer_of(run)
    pairs = [encode_pair(tokenizer, q.context, answer) for q in questions for answer in q.answers]
    nats = iter([logprob_A.double().sum().item() for logprob_A, _ in token_scores(run.model, pairs)])
    sums = [[next(nats) for _ in q.answers] for q in questions]
    norms = [[s / len(a) for s, a in zip(row, q.answers)] for row, q in zip(sums, questions)]
    if all(len({*map(len, q.answers)}) == 1 for q in questions):
        note = "; ".join(filter(None, [note, "all answers of a question have as many characters, so acc_norm is the accuracy"]))
    chance = float(np.mean([1 / len(q.answers) for q in questions]))
    samples = [{"context": q.context, "answers": [*q.answers], "right": q.right, "chosen": int(np.argmax(row))}
               for q, row in zip(questions[:5], sums)]
    return Measured(scores=[Scores(metric=name, values=[credit(row, q.right) for row, q in zip(table, questions)], chance=chance)
                            for name, table in (("accuracy", sums), ("acc_norm", norms))], samples=samples, note=note)


def credit(row: Sequence[float], right: int) -> float:
    """1 for the largest, 0 for any other, and of several that are largest each its share.

    >>> credit([-1.0, -2.0], 0), credit([-1.0, -2.0], 1), credit([-1.0, -1.0], 1)
    (1.0, 0.0, 0.5)
    """
    best = max(row)
    return float(row[right] == best) / sum(value == best for value in row)


def group(contexts: Sequence[str], answers: Sequence[str]) -> list[Question]:
    """One question for each context, whose right answer is the one at its own place; all have the same answers.

    >>> [q.right for q in group(["2 + 2 =", "2 + 3 ="], [" 4", " 5"])]
    [0, 1]
    """
    need(len(contexts) == len(answers) == len(set(answers)), f"{len(contexts)} contexts with {len(set(answers))} different answers")
    return [Question(context, tuple(answers), i) for i, context in enumerate(contexts)]


def continuation(run: Run, rng: random.Random, n: int) -> Measured:
    """Which of four passages follows this one? All four from the held-out text of one corpus and domain."""
    cuts = {key: [(d.text, at) for d in documents for at in _starts(d.text)] for key, documents in _by_domain(run).items()}
    return choice_scores(run, _from_cuts(cuts, _passage, rng, n), "passages of the held-out text, each of 200 characters and "
                         "followed by about 40 more; the wrong answers are those of three other passages of the same domain")


def next_word(run: Run, rng: random.Random, n: int) -> Measured:
    """Which of four words of the same length stands next in this text?"""
    cuts: dict[tuple, list] = {}
    for key, documents in _by_domain(run).items():
        for d in documents:
            for found in re.finditer(r"(?<=[ \n])[^\W\d_]{3,}\b", d.text):
                if found.start() >= NEAR:
                    cuts.setdefault((*key, len(found[0])), []).append((d.text, found.start()))
    return choice_scores(run, _from_cuts(cuts, _word, rng, n), "words of three letters or more in the held-out text after 200 "
                         "characters; the wrong answers have as many letters and stand elsewhere in the same domain")


def _by_domain(run: Run) -> dict[tuple[str, str], list[Document]]:
    found: dict[tuple[str, str], list[Document]] = {}
    for corpus in held_out(run):
        for d in corpus.held_out:
            found.setdefault((corpus.name, d.domain), []).append(d)
    return found


def _starts(text: str) -> Iterator[int]:
    """Where words begin that have some text before them and enough after them, so far apart that no passage is in another."""
    last = 0
    for found in re.finditer(r"(?<=\s)\S", text):
        if max(NEAR, last + 2 * AFTER) <= found.start() < len(text) - AFTER:
            last = found.start()
            yield last


def _passage(text: str, at: int) -> str:
    """The text from there on, to the end of the word in which it has its length."""
    return text[at:re.compile(r"\S*").match(text, at + AFTER).end()].rstrip()


def _word(text: str, at: int) -> str:
    return re.compile(r"\w+").match(text, at)[0]


def _from_cuts(cuts: dict[tuple, list[tuple[str, int]]], answer: Callable[[str, int], str], rng: random.Random, n: int) -> list[Question]:
    """About n questions, each group from the places of one kind; no place is taken twice, and no answer of a group is another's."""
    cuts = {key: rng.sample(places, len(places)) for key, places in cuts.items() if len(places) >= GROUP}
    need(cuts, "the held-out text is too short for questions about it: give a longer one with --text-file, or text=")
    keys, weights, questions = [*cuts], [len(places) for places in cuts.values()], []
    for _ in range(TRIES * n):
        if len(questions) >= n or not any(len(p) >= GROUP for p in cuts.values()):
            break
        places = cuts[rng.choices(keys, weights)[0]]
        if len(places) < GROUP:
            continue
        taken = [places.pop() for _ in range(GROUP)]
        contexts, answers = [_before(*cut) for cut in taken], [answer(*cut) for cut in taken]
        apart = all(a is not b or abs(i - j) > BEFORE + 2 * AFTER for (a, i), (b, j) in itertools.combinations(taken, 2))
        # text does not say a word twice running, and a model that only repeats would find the wrong answers by that
        echo = {(_WORD.findall(c) or [""])[-1] for c in contexts} & {_WORD.match(a)[0] for a in answers}
        if apart and not echo and len(set(answers)) == len(set(contexts)) == GROUP:
            questions += group(contexts, answers)
    need(questions, "the held-out text repeats itself too much for questions about it: give another with --text-file, or text=")
    return questions[:n - n % GROUP or GROUP]


def _before(text: str, at: int) -> str:
    """What stands before a place, from the beginning of a word."""
    start = max(0, at - BEFORE)
    return text[start:at] if start == 0 else re.sub(r"^\S*\s", "", text[start:at], count=1)
