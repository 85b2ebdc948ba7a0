"""What does each stage add, and does LoRA reach what full fine-tuning reaches? (chapters 10 and 11)

    python benchmarks/stages.py                     runs configs/stages.yaml where it has not been run, and measures base, mid
                                                     and sft; writes results/stages.json
    python benchmarks/stages.py --only lora qlora    fine-tunes the same mid checkpoint with adapters, beside the full one
    python benchmarks/stages.py --quick              a few steps of everything, for whether it runs; writes only where --out says

Questions about the library are drawn by seed. `recall`: pairs that were learned, asked in wordings that training never had.
`trained wording`: the same pairs as training asks them. `second turn`: as recall, after another question and its answer.
`never seen`: pairs that no stage has read as question and answer (the library's source, which base and mid read, holds their
docstrings). `sums`: pairs of numbers that no stage has been shown.
"""
from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from engine import store

from minimoe.checkpoint import Run, load
from minimoe.data.chat import Conversation, docstring_questions, world_questions
from minimoe.evaluate.recall import exact_match
from minimoe.stages import ORDER, finished, load_stages, run_stages

ROOT = Path(__file__).parents[1]
RESULT, CONFIG = ROOT / "benchmarks" / "results" / "stages.json", ROOT / "configs" / "stages.yaml"
GOAL_MINUTES, GOAL_BASE, GOAL_SFT, GOAL_LORA = 20, 0.02, 0.60, 0.80
# adapters learn by heart less easily than whole weights: a high rank, on the experts and the head too; AdamW, for Muon leaves
# adapters to it, at a rate that it bears
ADAPTERS = ("sft.train.lora_rank=64", "sft.train.lora_alpha=128", "sft.train.lora_targets=[q, k, v, o, w13, w2, head]",
            "sft.train.optimizer=adamw", "sft.train.lr=0.004", "sft.train.steps=1000")
QUICK = ("model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.expert_hidden=32", "base.train.steps=2", "mid.train.steps=2",
         "sft.train.steps=2", "sft.train.batch_size=4", "base.data.mixture=[pydocs]", "mid.data.mixture=[pydocs]",
         "base.data.tokenizer=bytes")


def questions(n: int, seed: int) -> dict[str, list[Conversation]]:
    """What all runs are asked, by kind."""
    draw = random.Random(seed)
    recall, trained = docstring_questions("test"), docstring_questions("train")
    picks = draw.sample(range(len(recall)), min(n, len(recall)))
    never = docstring_questions("never seen")
    sums = {c.text: c for c in world_questions("test", 2000) if c.domain == "arithmetic"}
    later = [replace(recall[i], wordings=((*trained[j].wordings[0], *recall[i].wordings[0]),)) for i, j in zip(picks, picks[1:] + picks[:1])]
    return {"recall": [recall[i] for i in picks], "trained wording": [trained[i] for i in picks], "second turn": later,
            "never seen": draw.sample(never, min(n, len(never))), "sums": draw.sample(list(sums.values()), min(n, len(sums)))}


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which also holds at 0 and n."""
    middle, half = successes + z * z / 2, z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def measure(run: Run, asked: dict[str, list[Conversation]]) -> dict:
    """Exact matches with intervals, of never seen pairs also how many words are right, and one answer to read."""
    found = {}
    for kind, conversations in asked.items():
        outcomes, answers = exact_match(run, conversations)
        low, high = wilson(sum(outcomes), len(outcomes))
        wanted = [c.wordings[0][-1]["content"] for c in conversations]
        found[kind] = {"n": len(outcomes), "exact": sum(outcomes), "share": round(sum(outcomes) / len(outcomes), 4),
                       "interval": [round(low, 4), round(high, 4)], "outcomes": "".join(map(str, outcomes)),
                       "words": round(sum(len(a.split()) for a in answers) / len(answers), 2),
                       "examples": [{"question": c.wordings[0][-2]["content"], "answer": a, "wanted": w}
                                    for c, a, w in list(zip(conversations, answers, wanted))[:3]]}
        if kind == "never seen":
            # beside the overlap with another pair's answer, which is what knowing only the manner of docstrings gives
            found[kind] |= {"word_overlap": round(mean(map(overlap, answers, wanted)), 4),
                            "word_overlap_with_another": round(mean(map(overlap, answers, [*wanted[1:], wanted[0]])), 4)}
    return found


def mean(values: object) -> float:
    values = list(values)
    return sum(values) / len(values)


def overlap(a: str, b: str) -> float:
    """F1 of the words of two answers, each counted as often as it stands there."""
    left, right = a.lower().split(), b.lower().split()
    common = sum(min(left.count(w), right.count(w)) for w in set(left))
    return 2 * common / (len(left) + len(right)) if common else 0.0


def train(home: Path, changes: tuple[str, ...], say: object) -> float | None:
    """Runs what is not finished; the CPU minutes of all its threads, None where a part was finished before."""
    config = load_stages(CONFIG, changes)
    fresh = not any(finished(home / name) for name in ORDER)
    started = time.process_time()
    run_stages(config, home, progress=False, say=say)
    note = home / "minutes.json"
    if fresh:
        note.write_text(json.dumps((time.process_time() - started) / 60), encoding="utf-8")
    return json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None


def stages(home: Path, asked: dict, changes: tuple[str, ...], say: object) -> dict:
    minutes = train(home, changes, say)
    rows = {name: measure(load(home / name), asked) for name in ORDER}
    (_, answer), = [exact_match(load(home / "sft"), [c]) for c in docstring_questions("train")
                    if c.wordings[0][0]["content"] == "What does math.sqrt do?"]
    base, sft = rows["base"]["recall"], rows["sft"]["recall"]
    return {"cpu_minutes": None if minutes is None else round(minutes, 2), "runs": rows, "math.sqrt": answer[0],
            "parameters": load(home / "sft").config.model.num_params(),
            "met": {"cpu_minutes": None if minutes is None else minutes <= GOAL_MINUTES, "base": base["share"] < GOAL_BASE,
                    "sft": sft["share"] >= GOAL_SFT, "five_words": sft["words"] >= 5}}


def adapters(method: str, home: Path, asked: dict, changes: tuple[str, ...], say: object) -> dict:
    """The same fine-tuning with adapters, from the same mid checkpoint."""
    changes = (*ADAPTERS, *changes, "base.enabled=false", "mid.enabled=false", f"sft.train.init={home / 'mid'}",
               f"sft.train.method={method}")
    minutes = train(home / method, changes, say)
    found, full = measure(load(home / method / "sft"), asked), measure(load(home / "sft"), {"recall": asked["recall"]})["recall"]
    ratio = found["recall"]["exact"] / max(1, full["exact"])
    return {"cpu_minutes": None if minutes is None else round(minutes, 2), "settings": ADAPTERS, "runs": {method: found},
            "of_full": round(ratio, 4), "met": {"of_full": ratio >= GOAL_LORA}}


def table(part: dict) -> str:
    lines = []
    for name, kinds in part["runs"].items():
        for kind, x in kinds.items():
            extra = f"  words in common {x['word_overlap']:.2f}, with another answer {x['word_overlap_with_another']:.2f}" if "word_overlap" in x else ""
            lines.append(f"{name:<6} {kind:<16} {x['exact']:>4} of {x['n']:<4} {x['interval'][0]:.3f} to {x['interval'][1]:.3f}  "
                         f"{x['words']:.1f} words an answer{extra}")
    lines += [f"{key}: {part[key]}" for key in ("cpu_minutes", "math.sqrt", "of_full", "met") if key in part]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("stages", "lora", "qlora"), nargs="+", default=("stages",))
    parser.add_argument("--dir", type=Path, default=Path("runs/stages"), help="where the runs are or will be: base, mid, sft, lora, qlora")
    parser.add_argument("--n", type=int, default=100, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0, help="which questions")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name} in results/, with --quick nowhere")
    args = parser.parse_args(argv)
    out, asked = args.out or (None if args.quick else RESULT), questions(4 if args.quick else args.n, args.seed)
    changes, say = QUICK if args.quick else (), lambda line: print(line, file=sys.stderr, flush=True)
    about = {"date": datetime.date.today().isoformat(), "command": shlex.join(["python", "benchmarks/stages.py", *argv]), "seed": args.seed}
    for name in args.only:
        part = stages(args.dir, asked, changes, say) if name == "stages" else adapters(name, args.dir, asked, changes, say)
        if out:
            store(out, "cpu", name, about | part, __doc__.split("\n")[0])
        print(table(part))


if __name__ == "__main__":
    main(sys.argv[1:])
