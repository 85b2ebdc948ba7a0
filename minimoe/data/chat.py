"""Conversations as training data: one a row of a batch, of which only the assistant's words are learned (chapter 10).

Shapes: N rows of T + 1 tokens. A token that nobody is to learn stands as its complement, ~id, which is below zero:
`mixture.Mixture.batch` gives the id as input, and -100 as target.
"""
from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from minimoe.config import Source
from minimoe.data import docstrings
from minimoe.data.corpora import NAMES, WORLD_NAMES, WORLD_WORDS, held_apart_source, label, parts_of, wanted
from minimoe.data.held_out import HELD_OUT_LIMIT
from minimoe.data.mixture import permutation
from minimoe.data.tokenizer import Tokenizer
from minimoe.settings import need

Messages = tuple[dict[str, str], ...]
OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
TASKS = 6000            # conversations of each kind that are made of the worlds
ROUND = 8               # rows are as long as the longest one, rounded up to this


@dataclass(frozen=True)
class Conversation:
    """Messages of role and content, in one or several wordings of which each epoch takes the next."""

    wordings: tuple[Messages, ...]
    domain: str = "text"

    @property
    def text(self) -> str:
        """The contents, a line each: what stands for it where plain text is wanted."""
        return "\n".join(m["content"] for m in self.wordings[0]) + "\n"


@dataclass(frozen=True)
class Conversations:
    """A named source: what is learned, and what is only measured."""

    name: str
    train: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]


def ask(questions: tuple[str, ...] | str, answer: str, domain: str) -> Conversation:
    """One question, in one or several wordings, and its answer.

    >>> ask("Why?", "Because.", "text").text
    'Why?\\nBecause.\\n'
    """
    questions = (questions,) if isinstance(questions, str) else questions
    return Conversation(tuple(({"role": "user", "content": q}, {"role": "assistant", "content": answer}) for q in questions), domain)


def in_turns(conversations: list[Conversation], turns: int) -> tuple[Conversation, ...]:
    """Each conversation after others of the same list, others for each of its wordings: so that a question is answered whatever
    was said before it.

    >>> [len(c.wordings[0]) for c in in_turns([ask("a?", "A.", ""), ask("b?", "B.", "")], 3)]
    [6, 6]
    """
    result = []
    for i, c in enumerate(conversations):
        wordings = []
        for number, messages in enumerate(c.wordings):
            r = random.Random(f"{i} {number}")
            before = [r.choice(r.choice(conversations).wordings) for _ in range(turns - 1)]
            wordings.append(sum((*before, messages), ()))
        result.append(replace(c, wordings=tuple(wordings)))
    return tuple(result)


def load_conversations(source: Source) -> Conversations:
    """The conversations of `docstrings`, of `worlds`, or those in files or a dataset, where a row is a list of messages with
    role and content (or from and value) in the column `field`, else `messages` or `conversations`.

    Raises ConfigError naming file and remedy, where there are none.

    >>> load_conversations(Source(corpus="docstrings")).train[0].wordings[0][1]["role"]
    'assistant'
    """
    need(not source.streaming, f"{source.corpus}: conversations are read whole; leave streaming out")
    if source.corpus == "docstrings":
        found = Conversations(label(source), in_turns(docstring_questions("train"), 2), tuple(docstring_questions("validation")))
    elif source.corpus == "worlds":
        groups = [[c for c in world_questions("train", TASKS) if c.domain == domain] for domain in ("stories", "arithmetic")]
        found = Conversations(label(source), (*in_turns(groups[0], 2), *in_turns(groups[1], 4)), tuple(world_questions("validation", 64)))
    else:
        need(source.corpus not in NAMES, f"{source.corpus}: holds text and no conversations; of the bundled corpora docstrings and "
                                         "worlds have some")
        found = _split(label(source), list(_read(source)))
    keep = lambda group: tuple(c for c in group if wanted(c.text, c.domain, source))
    found = replace(found, train=keep(found.train), held_out=keep(found.held_out))
    if source.held_out:
        apart, own = tuple(_read(held_apart_source(source))), () if source.corpus in NAMES else found.held_out
        measured = {c.text for c in apart}
        found = replace(found, train=tuple(c for c in (*found.train, *own) if c.text not in measured), held_out=apart)
    need(bool(found.train), f"{source.corpus}: no conversation left by domains={list(source.domains)}, percentage={source.percentage:g}")
    return found


def _read(source: Source) -> Iterator[Conversation]:
    for name, read in parts_of(source):
        for number, piece in enumerate(read(None), 1):
            need(piece.messages is not None, f"{source.corpus}: {name}, row {number}, is a text and no conversation (a list of role "
                                             "and content); name the column of the messages in field, or leave supervised out")
            messages = tuple({"role": OTHER_NAMES.get(m["role"], m["role"]), "content": m["content"]} for m in piece.messages)
            roles = [m["role"] for m in messages]
            need("assistant" in roles, f"{source.corpus}: {name}, row {number}: nobody is the assistant; roles are "
                                       f"{', '.join(map(str, roles)) or 'none'}")
            yield Conversation((messages,), piece.domain)


def _split(name: str, found: list[Conversation]) -> Conversations:
    """About a tenth is held out, by a hash of the text, so that the same conversation twice is on one side; of few at least one."""
    need(len(found) > 1, f"{name}: {len(found)} conversation; two at least are needed, for one is held out")
    is_held, size = [], 0
    for c in found:
        is_held.append(zlib.crc32(c.text.encode()) % 10 == 0 and size + len(c.text) <= HELD_OUT_LIMIT)
        size += len(c.text) * is_held[-1]
    held = {c.text for c, h in zip(found, is_held) if h}
    if not held or len(held) == len({c.text for c in found}):
        held = {found[-1].text}
    return Conversations(name, tuple(c for c in found if c.text not in held), tuple(c for c in found if c.text in held))


# --- the bundled ones --------------------------------------------------------------------------------------------------
def docstring_questions(group: str) -> list[Conversation]:
    """Questions about the library. `train` is learned; `validation` and `test` are the same pairs in wordings that training
    does not have; `never seen` are other pairs, in the wordings of the test."""
    never, wordings = group == "never seen", "test" if group == "never seen" else group
    result = []
    for pair in docstrings.pairs():
        if pair.never_seen == never:
            questions = pair.questions(wordings)
            if group != "train":
                questions = questions[zlib.crc32(pair.answer.encode()) % len(questions)]
            result.append(ask(questions, pair.answer, "docstrings"))
    return result


def world_questions(group: str, n: int, seed: int = 0) -> list[Conversation]:
    """Questions about small stories and sums, `n` of each. Who found what, and the two numbers of a sum, are held out together:
    one pair in twenty is asked about in `validation` only, and one in `test`.

    >>> world_questions("train", 2)[1].wordings[0][1]["content"]
    '46 + 36 = 82'
    """
    made = []
    for i in range(n):
        r = random.Random(f"{group} {seed} {i}")
        made += [_story_question(r, group), _sum_question(r, group)]
    return made


def _group_of(*parts: object) -> str:
    return {0: "validation", 10: "test"}.get(zlib.crc32(" ".join(map(str, parts)).encode()) % 20, "train")


def _story_question(r: random.Random, group: str) -> Conversation:
    asked = r.randrange(4)
    while True:
        people, things = r.sample(WORLD_NAMES, 4), r.sample(WORLD_WORDS, 4)
        if all(_group_of(*pair) == (group if i == asked else "train") for i, pair in enumerate(zip(people, things))):
            break
    name, thing = people[asked], things[asked]
    story = f"{people[0]} found the {things[0]}, " + ", ".join(f"{p} the {t}" for p, t in zip(people[1:], things[1:]))
    question = r.choice((f"Who found the {thing}?", f"What did {name} find?"))
    return ask(f"{story}. {question}", f"{name} found the {thing}.", "stories")


def _sum_question(r: random.Random, group: str) -> Conversation:
    while True:
        a, b = r.randrange(2, 50), r.randrange(2, 50)
        if _group_of(a, b) == group:
            return ask(f"What is {a} + {b}?", f"{a} + {b} = {a + b}", "arithmetic")


# --- rows --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """A stream (see `mixture`) of conversations: a row of T + 1 tokens each, which an epoch takes in another order and in
    the next of its wordings. Of several sources in a mixture the shares are those of rows."""

    name: str
    rows: tuple[tuple[np.ndarray, ...], ...]
    seq_len: int
    padding: int = 0

    @property
    def size(self) -> int:
        return len(self.rows) * self.seq_len

    def windows(self, indices: np.ndarray, seq_len: int, seed: int) -> np.ndarray:
        """The rows with these numbers, (len(indices), T + 1), padded with what nobody learns.

        >>> rows = Rows("r", ((np.array([5, ~6]), np.array([7])), (np.array([8]),)), 2)
        >>> sorted(rows.windows(np.arange(2), 2, seed=0).tolist()), sorted(rows.windows(np.arange(2, 4), 2, seed=0).tolist())
        ([[5, -7, -1], [8, -1, -1]], [[7, -1, -1], [8, -1, -1]])
        """
        result = []
        for index in indices.tolist():
            epoch, place = divmod(index, len(self.rows))
            number = int(permutation(len(self.rows), (seed, epoch, *self.name.encode()))[place])
            wordings = self.rows[number]
            result.append(_padded(wordings[(epoch + number) % len(wordings)], seq_len, self.padding))
        return np.stack(result)

    def state(self) -> dict:
        """By what a run that goes on knows the conversations again."""
        tokens = np.concatenate([tokens for wordings in self.rows for tokens in wordings])
        return {"size": self.size, "crc": zlib.crc32(tokens.tobytes())}

    def restore(self, state: dict) -> None:
        need(state == self.state(), f"{self.name}: other conversations than when this run began; put them back, or start another run")


def encode(conversation: Conversation, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
    """Of each wording the tokens (n,) int32 by the chat template, complements where nothing is to be learned."""
    result = []
    for messages in conversation.wordings:
        ids, mask = (np.array(x) for x in tokenizer.chat(messages))
        result.append(np.where(mask, ids, ~ids).astype(np.int32))
    return tuple(result)


def make_rows(sources: list[Conversations], tokenizer: Tokenizer, most: int | None = None) -> tuple[
        list[Rows], dict[str, tuple[np.ndarray, int]], tuple[str, ...]]:
    """The training rows of every source; by name the held-out rows (N, T + 1) and the bytes of their answers; and what is to
    be said. T is that of the longest conversation, or `most`: what is longer is cut, and left out where no answer is left."""
    encoded = [[[encode(c, tokenizer) for c in group] for group in (s.train, s.held_out)] for s in sources]
    lengths = [max(map(len, wordings)) - 1 for groups in encoded for group in groups for wordings in group]
    seq_len = -(-max(lengths) // ROUND) * ROUND
    seq_len = min(seq_len, most or seq_len)
    streams, held, gone = [], {}, 0
    for s, (train, held_out) in zip(sources, encoded):
        answered = [tuple(tokens for tokens in wordings if (tokens[1:seq_len + 1] >= 0).any()) for wordings in train]
        kept = tuple(wordings for wordings in answered if wordings)
        need(bool(kept), f"{s.name}: no answer begins within {seq_len} tokens; raise seq_len, or max_seq_len of the model")
        gone += len(answered) - len(kept)
        streams.append(Rows(s.name, kept, seq_len, tokenizer.end_of_text or 0))
        if held_out:
            answers = [m["content"] for c in s.held_out for m in c.wordings[0] if m["role"] == "assistant"]
            rows = [_padded(wordings[0], seq_len, streams[-1].padding) for wordings in held_out]
            held[s.name] = np.stack(rows), len("".join(answers).encode())
    notes = [f"conversations: {sum(len(r.rows) for r in streams):,} to learn and {sum(len(rows) for rows, _ in held.values()):,} to "
             f"measure, a row of {seq_len} tokens each; shares of a mixture are counted in rows"]
    if cut := sum(n > seq_len for n in lengths):
        notes.append(f"{cut:,} of {len(lengths):,} conversations are longer than {seq_len} tokens and are cut there"
                     + (f"; {gone:,}, of which no answer is left, are left out" if gone else ""))
    return streams, held, tuple(notes)


def _padded(tokens: np.ndarray, seq_len: int, padding: int) -> np.ndarray:
    row = np.full(seq_len + 1, ~padding, np.int64)
    row[:min(len(tokens), seq_len + 1)] = tokens[:seq_len + 1]
    return row
