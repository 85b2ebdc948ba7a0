"""Benchmarks of others: ARC, MMLU, HellaSwag, WinoGrande, GSM8K, HumanEval and what else the Language Model Evaluation
Harness knows, asked and scored by its own definitions (chapter 11).

Its YAML says what is asked and what counts as right; nothing of that is changed here but the place of the data, when they
lie in a folder. Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness (lm_eval 0.4).
"""
from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
from tqdm.auto import tqdm

from minimoe.evaluate.results import Result, Scores
from minimoe.evaluate.run_code import SECONDS, CodeEval
from minimoe.settings import ConfigError, need

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from minimoe.checkpoint import Run

# where the harness keeps the best known ones: to read all its 14,000 names takes six seconds
HOMES = {"arc_easy": "arc", "arc_challenge": "arc", "mmlu": "mmlu/default", "hellaswag": "hellaswag",
         "winogrande": "winogrande", "gsm8k": "gsm8k", "humaneval": "humaneval"}
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
QUICK = 20              # questions of each task
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
TIE = 1e-6              # nats: what the order of additions may change


def run_harness(run: Run | LM, tasks: Sequence[str], *, limit: int | None = None, local: str | Path | None = None, seed: int = 0,
                allow_code: bool = False, quick: bool = False, shots: int | None = None, download: bool = True) -> list[Result]:
    """The scores of a run (or of any model of the harness) in tasks or groups of the harness, for mmlu its four parts too.

    `local` is a folder with the data sets, and then nothing is downloaded: LOCAL/arc_easy/test.jsonl, or a copy of the data
    set's repository such as LOCAL/ai2_arc/ARC-Easy/test-00000-of-00001.parquet. Without it the harness downloads them,
    unless `download` is False.
    `limit` takes the first questions of each task or subject only, `quick` the first 20. `shots` are worked examples before
    each question, where the definition does not fix their number; they are drawn by the harness's own seed, `seed` is that
    of the intervals. Programs that a model wrote are run only with `allow_code`.

    Chance is one over the number of choices, 0 where the answer is written. Raises ConfigError naming the task and the
    remedy for a task that nobody knows, data that cannot be had, or code that must not run.
    """
    need(limit is None or limit >= 1, f"limit={limit}: must be at least 1")
    with _prepared(tasks, local, shots, allow_code, download) as loaded:
        from lm_eval.api.model import LM
        from lm_eval.evaluator import evaluate

        from minimoe.evaluate.harness_model import RunModel

        model = run if isinstance(run, LM) else RunModel(run, seed=seed)
        chats = bool(getattr(model, "chats", False))
        results, limit = [], limit or (QUICK if quick else None)
        for name, found in loaded.items():
            if any(getattr(task, "UNSAFE_CODE", False) for task in found["tasks"].values()):
                print(f"{name}: runs the programs that the model writes, each for at most {SECONDS} s of computing, with no "
                      "wall to the files and the network of this machine", file=sys.stderr)
            out = evaluate(lm=model, task_dict=found, limit=limit, bootstrap_iters=0,
                           apply_chat_template=chats, fewshot_as_multiturn=chats, confirm_run_unsafe_code=allow_code)
            results += _results(out, found, seed, limit)
    return results


def check_harness(tasks: Sequence[str], *, local: str | Path | None, shots: int | None = None, download: bool = True) -> None:
    """Raises now what `run_harness` would raise later."""
    with _prepared(tasks, local, shots, False, download):
        pass


@contextlib.contextmanager
def _prepared(tasks: Sequence[str], local: str | Path | None, shots: int | None, allow_code: bool, download: bool) -> Iterator[dict]:
    """The harness's tasks with their data, by the names that were asked for, and what it needs around it. All of them before
    the first is asked: what is missing shows at once."""
    need(shots is None or shots >= 0, f"shots={shots}: must not be negative")
    need(local is not None or download, f"{', '.join(tasks)}: nothing is downloaded during training: name the folder that holds the "
                                        "data with local")
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{', '.join(tasks)}: the harness needs {error.name}: pip install minimoe[eval]") from None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, _surroundings():
        manager, loaded = _manager(tasks), {}
        for name in tasks:
            for leaf in _leaves(manager.task_index, name):
                entry = manager.task_index[leaf]
                if entry.cfg.get("unsafe_code") and not allow_code:
                    raise ConfigError(f"{leaf}: runs programs that the model writes; if you want that on this machine, say "
                                      "--allow-code")
                if local is not None and entry.yaml_path.parent != Path(temporary):
                    changed = _from_folder(leaf, entry.cfg, Path(local), shots)
                    changed["dataset_kwargs"]["cache_dir"] = temporary
                    text = json.dumps({"include": str(entry.yaml_path), "task": leaf, **changed})
                    entry.yaml_path = Path(temporary) / f"{leaf}.yaml"
                    entry.yaml_path.write_text(text, encoding="utf-8")
            loaded[name] = _load(manager, name, shots)
        yield loaded


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """What the harness needs around it, and undone after it: our way to run programs, its seeds, silence."""
    import datasets
    import evaluate
    import lm_eval.api.task

    bar = partial(tqdm, disable=None, leave=False)      # one for each of the 57 subjects of mmlu
    load, log, states = evaluate.load, logging.getLogger("lm_eval"), (random.getstate(), np.random.get_state())
    level, bars = log.level, datasets.are_progress_bars_disabled()
    random.seed(0), np.random.seed(1234)                # some tasks shuffle with them; the values are its own
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with mock.patch.object(evaluate, "load", lambda name, *a, **b: CodeEval() if name == "code_eval" else load(name, *a, **b)), \
                mock.patch.object(lm_eval.api.task, "tqdm", bar), mock.patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"}):
            yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _manager(tasks: Sequence[str]) -> TaskManager:
    """The harness's index, of all tasks only where one is not among the best known."""
    import lm_eval.tasks

    top = Path(lm_eval.tasks.__file__).parent
    homes = {HOMES.get(name, HOMES.get(name.partition("_")[0])) for name in tasks} - {None}
    manager = lm_eval.tasks.TaskManager(include_path=[top / home for home in sorted(homes)], include_defaults=False)
    if any(name not in manager.task_index for name in tasks):
        manager = lm_eval.tasks.TaskManager()
    for name in tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.task_index, n=1)
            raise ConfigError(f"no task {name!r} here or in the harness" + (f"; did you mean {near[0]!r}?" if near else
                              f"; the best known are {', '.join(HOMES)}"))
    return manager


def _leaves(index: dict, name: object) -> Iterator[str]:
    """The tasks of a task, group or tag that have a definition of their own."""
    name = name.get("group") or name.get("task") if isinstance(name, dict) else name
    entry = index.get(name) if isinstance(name, str) else None
    if entry is None:                           # spelled out inside the group
        return
    members = (entry.cfg or {}).get("task", sorted(entry.tags)) if entry.cfg is None or "group" in entry.cfg else None
    if members is None:
        yield name
    for member in members or ():
        yield from _leaves(index, member)


def _from_folder(name: str, cfg: dict, local: Path, shots: int | None) -> dict:
    """What changes in a task's definition so that its data come from a folder."""
    path, subset = cfg.get("dataset_path"), cfg.get("dataset_name")
    need(path and "class" not in cfg, f"{name}: the harness makes its data by a program, not from files: leave --local out")
    asked = cfg.get("test_split") or cfg.get("validation_split")
    repository = path.rpartition("/")[2]
    inside = [subset] if subset else ["", "data", repository]
    folders = [local / name, local / name / "data", *(local / at / sub for at in (repository, path) for sub in inside)]
    found = next((files for folder in folders if asked in (files := _splits(folder))), None)
    need(found, f"{name}: no {asked}.jsonl or {asked}*.parquet in {folders[0]} or {folders[2]}; put the split of {path} there, or "
                "leave --local out to download it")
    examples = cfg.get("fewshot_split") or cfg.get("training_split") or cfg.get("validation_split") or asked
    n = cfg.get("num_fewshot") if shots is None or cfg.get("num_fewshot") == 0 else shots
    given = (cfg.get("fewshot_config") or {}).get("samples")
    need(not n or given or examples in found, f"{name}: {n} worked examples before each question come from the split {examples}: "
                                              f"put {examples}.jsonl beside {(found or {}).get(asked, [''])[0]}")
    kind = KINDS[Path(found[asked][0]).suffix]
    found = {split: files for split, files in found.items() if KINDS[Path(files[0]).suffix] == kind}
    return {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": found}} | {
        key: None for key in SPLITS if cfg.get(key) not in (None, *found)}


def _splits(folder: Path) -> dict[str, list[str]]:
    """The data files of a folder by the split in their name: test.jsonl, test-00000-of-00001.parquet."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*")):
        if file.suffix in KINDS:
            found.setdefault(re.split("[-.]", file.name)[0], []).append(str(file.resolve()))
    return found


def _load(manager: TaskManager, name: str, shots: int | None) -> dict:
    """The tasks with their data."""
    try:
        loaded = manager.load([name])
    except ImportError as error:
        raise ConfigError(f"{name}: this task needs {error.name or error}: install it") from None
    except Exception as error:          # of datasets, huggingface_hub, jinja2, the network, and what a row lacks
        raise ConfigError(f"{name}: its data cannot be had or do not fit ({type(error).__name__}: {_short(error)}); they are "
                          "downloaded where there is a network, else give --local FOLDER") from None
    for task in loaded["tasks"].values():
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1234)        # the harness's own
    return loaded


def _results(out: dict, loaded: dict, seed: int, limit: int | None) -> list[Result]:
    """One for each metric of each group that has a score of its own, and of each task in none of these."""
    groups = {name: [t.task_name for t in loaded["groups"][name].get_all_tasks()] for name in out.get("groups", {})}
    alone = [name for name in loaded["tasks"] if not any(name in members for members in groups.values())]
    results = []
    for name, members in [*reversed(groups.items()), *((name, [name]) for name in alone)]:
        task = loaded["tasks"][members[0]]
        samples = [(loaded["tasks"][member], sample) for member in members for sample in out["samples"][member]]
        filters = {sample["filter"] for _, sample in samples}
        for key, value in out["results"][name].items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            rows = [(t, sample) for t, sample in samples if sample["filter"] == rule]
            tied = sum(_tied(t, sample, metric) for t, sample in rows)
            note = f"lm_eval {version('lm_eval')}, task version {task.VERSION}, {task.get_config('num_fewshot') or 0} worked examples"
            note += f", the first {limit:,} of each task only" if limit else ""
            note += f"; in {tied} of {len(rows)} questions the best answers are equally likely, and the harness takes the first" if tied else ""
            results.append(_result(task, name, f"{metric}, {rule}" if len(filters) > 1 else metric,
                                   [sample[metric] for _, sample in rows], value, _chance(metric, rows), seed, note))
    return results


def _result(task: Task, name: str, metric: str, values: list, value: float, chance: float | None, seed: int, note: str) -> Result:
    """A score with its interval; the value is always the harness's own."""
    key = metric.partition(",")[0]
    how = getattr(task.aggregation().get(key), "__name__", "mean")
    about = {"metric": metric, "chance": chance, "better": "higher" if task.higher_is_better().get(key, True) else "lower"}
    if how in ("mean", "perplexity", "weighted_perplexity", "bits_per_byte"):
        parts = np.array(values, float)
        if how != "mean":                       # sums of nats, beside numbers of words or bytes
            parts = parts * (-1.0 if parts.ndim == 1 else [-1.0, 1.0])
        turn = {"mean": None, "bits_per_byte": lambda x: x / math.log(2)}.get(how, np.exp)
        result = Scores(**about, values=parts, transform=turn).result(name, seed, note=note)
        if math.isclose(result.value, value, rel_tol=1e-6, abs_tol=1e-9):
            return result
    return Result(**about, task=name, value=value, low=None, high=None, n=len(values), details={"note": note})


def _chance(metric: str, rows: list[tuple[Task, dict]]) -> float | None:
    """What guessing gives: one over the number of choices, or 0 for what is written; None where that is not known."""
    task = rows[0][0]
    if getattr(task, "OUTPUT_TYPE", None) == "multiple_choice" and task.config.process_results is None and metric.startswith("acc"):
        golds = [len(s["target"]) if isinstance(s["target"], list) else 1 for _, s in rows]
        return float(np.mean([gold / len(t.doc_to_choice(s["doc"])) for gold, (t, s) in zip(golds, rows)]))
    return 0.0 if metric in ("acc", "exact_match") or metric.startswith("pass@") else None


def _tied(task: Task, sample: dict, metric: str) -> bool:
    """Whether two answers have the best score, so that their order decides."""
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice" or metric not in ("acc", "acc_norm"):
        return False
    choices = task.doc_to_choice(sample["doc"])
    sums = [answer[0] / (len(choice) if metric == "acc_norm" else 1) for answer, choice in zip(sample["filtered_resps"], choices)]
    second, first = sorted(sums)[-2:]
    return first - second < TIE


def _short(error: object) -> str:
    return " ".join(str(error).split())[:120]
