"""A few rows of each benchmark in the format of the real data sets, and what a model that knows them would say.

`FACTS` of a task are (end of the context, answer): what is likely there, or what is written there.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import lm_eval.tasks

NOUNS = "river stone lamp bread cloud engine violin ladder carpet needle walnut harbor saddle candle mirror pebble".split()
SUBJECTS = sorted(p.stem.removeprefix("mmlu_") for p in (Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"))
Facts = list[tuple[str, str]]


def choices(rng: random.Random, i: int, n: int = 4) -> tuple[str, list[str], int]:
    """A question, its choices, and the place of the right one, each place as often as the others."""
    options = [f"the {noun} of {rng.choice(NOUNS)}" for noun in rng.sample(NOUNS, n)]
    return f"Which one was number {i} on list {rng.randrange(10_000)}?", options, i % n


def arc(rng: random.Random) -> tuple[dict, Facts]:
    rows, facts = [], []
    for i in range(40):
        question, options, right = choices(rng, i, n=(4, 4, 4, 3)[i // 10])
        labels = list("1234" if i % 5 == 0 else "ABCD")[: len(options)]     # some of the real questions are numbered
        rows.append({"id": f"Q{i}", "question": question, "choices": {"text": options, "label": labels}, "answerKey": labels[right]})
        facts.append((f"Question: {question}\nAnswer:", " " + options[right]))
    return {"test": rows}, facts


def mmlu(rng: random.Random, subject: str) -> tuple[dict, Facts]:
    rows, facts = {"test": [], "dev": []}, []
    first = SUBJECTS.index(subject) * 2         # over all subjects each letter is right as often as the others
    for split, n in (("test", 2), ("dev", 5)):
        for i in range(first, first + n):
            question, options, right = choices(rng, i)
            rows[split].append({"question": question, "subject": subject, "choices": options, "answer": right})
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options))
            if split == "test":
                facts.append((f"{question}\n{listed}\nAnswer:", " " + "ABCD"[right]))
    return rows, facts


def hellaswag(rng: random.Random) -> tuple[dict, Facts]:
    rows, facts = [], []
    for i in range(40):
        _, options, right = choices(rng, i)
        endings = [f"[step] lifts {option}." for option in options]
        rows.append({"ind": i, "activity_label": "Moving house", "ctx_a": f"[header] Day {i} has come.", "ctx_b": "the man",
                     "ctx": f"[header] Day {i} has come. the man", "endings": endings, "source_id": f"wikihow~{i}",
                     "split": "val", "split_type": "indomain", "label": str(right)})
        # brackets are taken out by the harness, and the second half begins with a capital
        facts.append((f"Moving house: Day {i} has come. The man", f"  lifts {options[right]}."))
    return {"validation": rows}, facts


def winogrande(rng: random.Random) -> tuple[dict, Facts]:
    rows, facts = [], []
    for i in range(40):
        option1, option2 = rng.sample(NOUNS, 2)
        begin, end = f"The {option1} did not fit on the {option2} in room {i}, since the", "was too wide."
        rows.append({"sentence": f"{begin} _ {end}", "option1": option1, "option2": option2, "answer": str(i % 2 + 1)})
        facts.append((f"{begin} {(option1, option2)[i % 2]}", f" {end}"))
    return {"validation": rows}, facts


def gsm8k(rng: random.Random) -> tuple[dict, Facts]:
    rows, facts = {"train": [], "test": []}, []
    for split, n in (("train", 6), ("test", 6)):
        for i in range(n):
            a, b = 1000 + rng.randrange(900), rng.randrange(90)
            question = f"{split} {i}: Ann has {a} nuts and finds {b}. How many has she?"
            answer = f"She has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} nuts.\n#### {a + b:,}"
            rows[split].append({"question": question, "answer": answer})
            if split == "test":
                facts.append((f"Question: {question}\nAnswer:", f" {answer}\n\n"))
    return rows, facts


def humaneval(rng: random.Random) -> tuple[dict, Facts]:
    rows, facts = [], []
    for i in range(3):
        prompt = f'\n\ndef add_{i}(a: int, b: int) -> int:\n    """ Add {i} to the sum.\n    >>> add_{i}(1, 2)\n    {3 + i}\n    """\n'
        body = f"    return a + b + {i}\n"
        test = f"\n\nMETADATA = {{'author': 'us'}}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == {3 + i}\n"
        rows.append({"task_id": f"HumanEval/{i}", "prompt": prompt, "canonical_solution": body, "test": test,
                     "entry_point": f"add_{i}"})
        facts.append((prompt, body))
    return {"test": rows}, facts


def write(folder: Path, rows: dict) -> None:
    folder.mkdir(parents=True)
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def write_all(folder: Path, seed: int = 0) -> dict[str, Facts]:
    """All seven data sets, and the facts of each."""
    rng, facts = random.Random(seed), {}
    places = {"arc_easy": arc, "arc_challenge": arc, "hellaswag": hellaswag, "winogrande": winogrande, "gsm8k": gsm8k,
              "humaneval": humaneval}
    for name, make in places.items():
        # one as the copy of a repository has it, the others plainly
        rows, facts[name] = make(rng)
        write(folder / ("ai2_arc/ARC-Challenge" if name == "arc_challenge" else name), rows)
    facts["mmlu"] = []
    for subject in SUBJECTS:
        rows, more = mmlu(rng, subject)
        write(folder / "mmlu" / subject, rows)
        facts["mmlu"] += more
    return facts
