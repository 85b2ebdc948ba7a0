"""Answers to the exercises of chapter 0 that are right, each in its own way: the checks must let all of them pass.

CORRECT maps the name of an exercise to its functions. `python -m pytest tests/test_checks.py` tries them at 20 seeds.
"""
from collections import Counter

import torch


def share_by_formula(n_layers, n_experts, top_k, expert_params, other_params):
    active = other_params + n_layers * top_k * expert_params
    return active / (other_params + n_layers * n_experts * expert_params)


def share_by_what_is_idle(n_layers, n_experts, top_k, expert_params, other_params):
    total = other_params + sum(expert_params for _ in range(n_layers) for _ in range(n_experts))
    return 1 - n_layers * (n_experts - top_k) * expert_params / total


def loads_by_counter(experts_NK, n_experts):
    found = Counter(e for row in experts_NK for e in row)
    return [found[e] / found.total() for e in range(n_experts)]


def loads_by_bincount(experts_NK, n_experts):
    found = torch.bincount(torch.tensor(experts_NK).flatten(), minlength=n_experts)
    return found / found.sum()


def loads_by_walking(experts_NK, n_experts):
    loads = [0.0] * n_experts
    for row in experts_NK:
        for e in row:
            loads[e] += 1 / (len(experts_NK) * len(row))
    return tuple(loads)


def predictions():
    return {"experts_stored": "larger", "experts_work": "same", "experts_load": "smaller", "choices_stored": "same",
            "choices_work": "larger", "finer_work": "same"}


def name_in_prose_and_code():
    return " name", 3, "The function returns a list of names.", "for name in names: print(name)"


def end_of_a_sentence_and_of_a_sum():
    return ["\n", 3, "Ann went to the garden.\n", "12 + 30 = 42\n"]


CORRECT = {
    "active_share": [share_by_formula, share_by_what_is_idle],
    "load_shares": [loads_by_counter, loads_by_bincount, loads_by_walking],
    "predict_start": [predictions, lambda: {**predictions(), "note": "a dict may hold more"}],
    "two_contexts": [name_in_prose_and_code, end_of_a_sentence_and_of_a_sum],
}
