"""Questions and answers out of the docstrings of the interpreter's own library: "What does math.sqrt do?", answered by the
first sentence of what its docstring says. For fine-tuning that can be scored word by word (chapter 10).

What a name's question is, which names are learned and which are never seen, is decided by hashes of the names. The
text itself, and with it the number of pairs, differs between Python versions.
"""
from __future__ import annotations

import ast
import importlib
import re
import sysconfig
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LIMIT = 1700            # pairs: learning more by heart only takes longer
LETTERS = 28            # of a name at most
WORDS = range(5, 15)    # of an answer
# one of the first group in each epoch; what a run measures is asked in the second, what a benchmark measures in the third
PHRASINGS = {
    "train": ("What does {} do?", "What is {} for?", "Explain {} in one sentence.", "Tell me what {} does.", "Describe {}.",
              "How would you describe {} to a colleague?", "I found {} in some code, what is its purpose?", "Please explain {}.",
              "What can {} be used for?", "When would I use {}?", "What do the docs say about {}?", "Do you know {}?",
              "I have never used {}. What is it?", "In Python, what is {}?", "My program calls {}. Why?",
              "Which task is {} made for?", "Remind me what {} is about.", "Somebody mentioned {} to me. What should I know?",
              "How does {} help me?", "We talked about {} yesterday. What was it?", "The name {} tells me nothing. What is behind it?",
              "Look up {} for me.", "What happens in {}?", "Is {} useful, and what for?", "Define {}.", "Where does {} come in handy?",
              "I must teach {} tomorrow. What do I tell them?", "Why would anyone call {}?", "They use {}, but why?", "Once more: {}?",
              "So {} is a mystery to me. Can you clear it up?", "Let me hear about {}, if you can."),
    "validation": ("A word or two on {} would help.",),
    "test": ("Give me a short summary of {}, please.", "In the library reference, which words stand under {}?")}
# what stands round a training question where it leaves room, so that an answer hangs on the name and on no other word
OPENERS = ("", "", "", "Hello. ", "One question: ", "I am reading code. ", "Can you help me? ", "Good morning! ", "Just curious: ",
           "For my homework: ", "This is new to me. ", "A friend asked: ", "We are in a hurry. ", "Let us go on. ", "Next one. ",
           "My test fails. ", "No long talk now: ")
CLOSERS = ("", "", "", "", " Thanks.", " Be brief.", " One line will do.", " I forgot.", " It matters to me.", " No example needed.",
           " Take your time.")
ROOM = 90               # letters of question and answer: with more of them nothing stands round
COMPILED = ("builtins", "math", "cmath", "itertools", "time", "array", "binascii", "zlib", "unicodedata", "gc", "io", "functools",
            "collections", "sys")
APART = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data",
         "encodings", "distutils", "tkinter", "turtle", "idle_test")


@dataclass(frozen=True)
class Pair:
    """A name of the library and the first sentence of its docstring."""

    name: str
    answer: str

    @property
    def never_seen(self) -> bool:
        """Whether the pair is held out entirely: about a tenth is."""
        return zlib.crc32(self.name.encode()) % 10 == 0

    def questions(self, group: str = "train") -> tuple[str, ...]:
        """Every question of a group of phrasings: train, validation or test. The first of them is as it stands.

        >>> Pair("len", "Return the number of items in a container.").questions()[:2]
        ('What does len do?', 'What is len for?')
        """
        first, *others = (phrasing.format(self.name) for phrasing in PHRASINGS[group])
        return (first, *map(self._dressed, others)) if group == "train" else (first, *others)

    def _dressed(self, question: str) -> str:
        chosen = zlib.crc32(question.encode())
        dressed = OPENERS[chosen % len(OPENERS)] + question + CLOSERS[chosen // 32 % len(CLOSERS)]
        return dressed if len(dressed) + len(self.answer) <= ROOM else question


@cache
def pairs() -> tuple[Pair, ...]:
    """All pairs, by name; every name once, so no question has two answers.

    >>> next(p for p in pairs() if p.name == "math.sqrt")
    Pair(name='math.sqrt', answer='Return the square root of x.')
    """
    found = _compiled()
    known = set(found)
    for name, answer in _written().items():
        found.setdefault(name, answer)
    order = sorted(found, key=lambda name: (name not in known, zlib.crc32(f"chosen {name}".encode())))
    return tuple(Pair(name, found[name]) for name in sorted(order[:LIMIT]))


def first_sentence(doc: object) -> str | None:
    """The first sentence of a docstring in one line; None where it is no plain sentence of 5 to 14 words and at most
    68 letters.

    >>> first_sentence("Return the sum of a\\n    and b.  Both must be numbers.")
    'Return the sum of a and b.'
    >>> first_sentence("sum(a, b) -> number, of both of them."), first_sentence("Too short.")
    (None, None)
    """
    if not isinstance(doc, str):
        return None
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    end = re.search(r"(?<![a-z]\.[a-z])(?<! etc)(?<! vs)\.(?=\s|$)", paragraph)
    text = paragraph[:end.end()] if end else ""
    plain = text.isascii() and text.isprintable() and "..." not in text and not re.match(r"[\w.]*[([]", text)
    return text if plain and len(text.split()) in WORDS and len(text) <= 68 else None


def _compiled() -> dict[str, str]:
    """Of modules written in C, which are imported; names of `builtins` stand alone."""
    found: dict[str, str] = {}
    for module_name in COMPILED:
        module = importlib.import_module(module_name)
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or not callable(thing) or getattr(thing, "__module__", module_name) not in (module_name, None):
                continue
            full = name if module_name == "builtins" else f"{module_name}.{name}"
            methods = sorted(vars(thing).items()) if isinstance(thing, type) else []
            for where, item in [(full, thing), *((f"{full}.{n}", m) for n, m in methods if callable(m) and not n.startswith("_"))]:
                if answer := first_sentence(getattr(item, "__doc__", None)):
                    found.setdefault(where, answer)
    return found


def _written() -> dict[str, str]:
    """Of modules written in Python, which are read and not imported."""
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or len(parts) > 2 or set(parts) & set(APART) or any(p.startswith("_") or not p.isidentifier() for p in parts):
            continue
        try:
            module = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):           # a sample of bad source
            continue
        _walk(module, ".".join(parts), found)
    return found


def _walk(node: ast.Module | ast.ClassDef, where: str, found: dict[str, str]) -> None:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            name = f"{where}.{child.name}"
            if (answer := first_sentence(ast.get_docstring(child))) and len(name) <= LETTERS:
                found.setdefault(name, answer)
            if isinstance(child, ast.ClassDef):
                _walk(child, name, found)
