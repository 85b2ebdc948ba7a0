"""What the model writes: sums and letter counts, compared whole, and samples to read (chapter 11).

All questions are made from a seed, in greater number than anyone could learn by heart, and none stands in `worlds`: there no
term of a sum is above 49, and all words are of a short list.
"""
from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Callable
from typing import TYPE_CHECKING

from minimoe.evaluate.benchmark import Measured
from minimoe.evaluate.choices import GROUP, Question, choice_scores, group
from minimoe.evaluate.likelihood import beginning, tokenizer_of
from minimoe.evaluate.results import Scores
from minimoe.evaluate.text import held_out
from minimoe.generate import generate
from minimoe.settings import ConfigError

if TYPE_CHECKING:
    from minimoe.checkpoint import Run

SHOTS = 3               # solved examples before each question
BATCH = 50              # prompts written on together
SAMPLE_TOKENS = 80


def sum_of(rng: random.Random) -> tuple[str, str, str]:
    """A sum as a line that ends before its result, the result, and as a question: two digits everywhere, and every result from
    60 to 99 equally often.

    >>> sum_of(random.Random(0))
    ('74 + 10 =', ' 84', 'What is 74 + 10?')
    """
    total = rng.randrange(60, 100)
    a = rng.randrange(50, total - 9)
    return f"{a} + {total - a} =", f" {total}", f"What is {a} + {total - a}?"


def letters_of(rng: random.Random) -> tuple[str, str, str]:
    """A letter that stands one to four times among eight, how often, and as a question; all four counts are equally frequent.

    >>> letters_of(random.Random(0))
    ('in yynbiyyq the letter y stands', ' 4 times', 'How many times does the letter y stand in yynbiyyq?')
    """
    return counted_letters(rng, rng.randrange(1, 5))


def counted_letters(rng: random.Random, times: int) -> tuple[str, str, str]:
    """The same for a given count."""
    letter = rng.choice(string.ascii_lowercase)
    word = [letter] * times + [rng.choice(string.ascii_lowercase.replace(letter, "")) for _ in range(8 - times)]
    rng.shuffle(word)
    word = "".join(word)
    return f"in {word} the letter {letter} stands", f" {times} times", f"How many times does the letter {letter} stand in {word}?"


def arithmetic(run: Run, rng: random.Random, n: int) -> Measured:
    """Sums of two numbers of two digits, answered in writing."""
    return _answered(run, sum_of, 1 / 40, rng, n)


def letters(run: Run, rng: random.Random, n: int) -> Measured:
    """How often a letter stands among eight, answered in writing."""
    return _answered(run, letters_of, 1 / 4, rng, n)


def arithmetic_choice(run: Run, rng: random.Random, n: int) -> Measured:
    """The same sums as multiple choice: which of four results, each right for one sum of its group?"""
    questions: list[Question] = []
    while len(questions) < max(n - n % GROUP, GROUP):
        found = {answer: context for context, answer, _ in (sum_of(rng) for _ in range(GROUP))}
        if len(found) == GROUP:
            questions += group([_shots(sum_of, rng) + context for context in found.values()], [*found])
    return choice_scores(run, questions, _form(False))


def letters_choice(run: Run, rng: random.Random, n: int) -> Measured:
    """The same counts as multiple choice: one, two, three or four times, each right once in a group."""
    questions: list[Question] = []
    for _ in range(max(1, n // GROUP)):
        made = [counted_letters(rng, times) for times in rng.sample(range(1, 5), GROUP)]
        questions += group([_shots(letters_of, rng) + context for context, _, _ in made], [answer for _, answer, _ in made])
    return choice_scores(run, questions, _form(False))


def samples(run: Run, rng: random.Random, n: int) -> Measured:
    """What the model writes after the run's `sample_prompts`, else after the beginnings of held-out documents; beside it the
    share of its pairs of tokens that are different (after distinct-2 of Li et al. 2016, section 5.1): a model that goes round
    in circles has few."""
    chat, prompts = run.config.data.supervised, list(run.config.evaluate.sample_prompts)
    if not prompts:
        prompts = _beginnings(run, rng, min(n, 8))
    texts = _write(run, [_chat(run, p) if chat else run.encode(p) for p in prompts], SAMPLE_TOKENS,
                   temperature=run.config.generate.temperature, seed=rng.randrange(2**31))
    pairs = [[*zip(ids, ids[1:])] for ids in map(tokenizer_of(run).encode, texts)]
    values = [(len(set(p)), len(p)) for p in pairs if p]
    if not values:
        raise ConfigError("samples: the model writes less than two tokens after every prompt; give others in sample_prompts")
    shown = [{"prompt": p, "written": t} for p, t in zip(prompts, texts)]
    return Measured(scores=[Scores(metric="distinct pairs", values=values)], samples=shown, note=(
        f"at most {SAMPLE_TOKENS} tokens each, at temperature {run.config.generate.temperature:g}" + ", as a chat" * chat))


def _beginnings(run: Run, rng: random.Random, n: int) -> list[str]:
    drawn = [rng.sample(c.held_out, min(n, len(c.held_out))) for c in held_out(run)]
    texts = [d.text for turn in itertools.zip_longest(*drawn) for d in turn if d is not None]       # of each corpus in turn
    return [text[:60].rsplit(" ", 1)[0] for text in texts[:n]]


def _answered(run: Run, make: Callable, chance: float, rng: random.Random, n: int) -> Measured:
    """Right is the first number of what is written on, or the last one of a chat's reply."""
    chat = run.config.data.supervised
    made = [make(rng) for _ in range(n)]
    prompts = [question if chat else _shots(make, rng) + line for line, _, question in made]
    tokenizer = tokenizer_of(run)
    ids = [_chat(run, p) if chat else [*beginning(tokenizer), *tokenizer.encode(p)] for p in prompts]
    texts = _write(run, ids, 32 if chat else len(tokenizer.encode(made[0][1])) + 4)
    right = [re.search(r"\d+", answer)[0] for _, answer, _ in made]
    given = [re.findall(r"\d+", t) if chat else re.findall(r"^\s*(\d+)", t) for t in texts]
    values = [float(bool(g) and g[-1] == r) for g, r in zip(given, right)]
    shown = [{"prompt": p, "written": t, "right": r} for p, t, r in zip(prompts[:5], texts, right)]
    return Measured(scores=[Scores(metric="exact match", values=values, chance=chance)], samples=shown,
                    note=_form(chat) + "; chance is that of naming one of the possible answers")


def _form(chat: bool) -> str:
    return "asked as a chat, without examples" if chat else f"after {SHOTS} solved examples"


def _shots(make: Callable, rng: random.Random) -> str:
    return "".join(line + answer + "\n" for line, answer, _ in (make(rng) for _ in range(SHOTS)))


def _chat(run: Run, question: str) -> list[int]:
    return tokenizer_of(run).chat([{"role": "user", "content": question}], reply=True)[0]


def _write(run: Run, prompts: list[list[int]], most: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """What the model writes after each prompt, to the end of the text or of its turn."""
    tokenizer, g = tokenizer_of(run), run.config.generate
    stops = tuple(i for i in (tokenizer.end_of_text, tokenizer.inner.token_to_id("<|end|>")) if i is not None)
    written: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        written += generate(run.model, prompts[start:start + BATCH], most, temperature=temperature, top_k=g.sample_top_k,
                            top_p=g.top_p, seed=seed, stop_ids=stops)
    return [tokenizer.decode(ids) for ids in written]
