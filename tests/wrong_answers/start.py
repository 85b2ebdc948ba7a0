"""Answers to the exercises of chapter 0 that are wrong, each as a learner could write it and believe in it.

WRONG maps the name of an exercise to pairs (function, name of the mistake that the check must name). Each runs and gives
a number, a list or a dict, at least at first sight.
"""
import torch

MODEL = (4, 8, 2, 12288, 100000)                # what a notebook leaves lying around


# --- active_share(n_layers, n_experts, top_k, expert_params, other_params) ---------------------------------------------
def share_of_the_experts(n_layers, n_experts, top_k, expert_params, other_params):
    return top_k / n_experts


def share_of_the_expert_parameters(n_layers, n_experts, top_k, expert_params, other_params):
    active = n_layers * top_k * expert_params
    return active / (n_layers * n_experts * expert_params)


def rest_is_not_active(n_layers, n_experts, top_k, expert_params, other_params):
    return n_layers * top_k * expert_params / (other_params + n_layers * n_experts * expert_params)


def rest_is_not_stored(n_layers, n_experts, top_k, expert_params, other_params):
    return (other_params + n_layers * top_k * expert_params) / (n_layers * n_experts * expert_params)


def layers_forgotten(n_layers, n_experts, top_k, expert_params, other_params):
    return (other_params + top_k * expert_params) / (other_params + n_experts * expert_params)


def rest_in_every_layer(n_layers, n_experts, top_k, expert_params, other_params):
    active, total = (n_layers * (other_params + e * expert_params) for e in (top_k, n_experts))
    return active / total


def total_over_active(n_layers, n_experts, top_k, expert_params, other_params):
    return (other_params + n_layers * n_experts * expert_params) / (other_params + n_layers * top_k * expert_params)


def idle_share(n_layers, n_experts, top_k, expert_params, other_params):
    return n_layers * (n_experts - top_k) * expert_params / (other_params + n_layers * n_experts * expert_params)


def active_over_idle(n_layers, n_experts, top_k, expert_params, other_params):
    idle = n_layers * (n_experts - top_k) * expert_params
    return (other_params + n_layers * top_k * expert_params) / idle if idle else 0.0


def right_share(n_layers, n_experts, top_k, expert_params, other_params):
    return (other_params + n_layers * top_k * expert_params) / (other_params + n_layers * n_experts * expert_params)


def in_percent(*model):
    return 100 * right_share(*model)


def to_two_digits(*model):
    return round(right_share(*model), 2)


def always_one_expert(n_layers, n_experts, top_k, expert_params, other_params):
    return right_share(n_layers, n_experts, 1, expert_params, other_params)


def active_parameters(n_layers, n_experts, top_k, expert_params, other_params):
    return other_params + n_layers * top_k * expert_params


def floor_division(n_layers, n_experts, top_k, expert_params, other_params):
    total = other_params + n_layers * n_experts * expert_params
    return active_parameters(n_layers, n_experts, top_k, expert_params, other_params) // total


def of_one_global_model(n_layers, n_experts, top_k, expert_params, other_params):
    return right_share(*MODEL)


# --- load_shares(experts_NK, n_experts) --------------------------------------------------------------------------------
def counts(experts_NK, n_experts):
    return [sum(e in row for row in experts_NK) for e in range(n_experts)]


def right_loads(experts_NK, n_experts):
    total = sum(len(row) for row in experts_NK)
    return [c / total for c in counts(experts_NK, n_experts)]


def first_choices(experts_NK, n_experts):
    return right_loads([row[:1] for row in experts_NK], n_experts)


def last_choices(experts_NK, n_experts):
    return right_loads([row[-1:] for row in experts_NK], n_experts)


def over_tokens(experts_NK, n_experts):
    return [c / len(experts_NK) for c in counts(experts_NK, n_experts)]


def over_experts(experts_NK, n_experts):
    return [c / n_experts for c in counts(experts_NK, n_experts)]


def loads_in_percent(experts_NK, n_experts):
    return [100 * x for x in right_loads(experts_NK, n_experts)]


def of_the_even_share(experts_NK, n_experts):
    return [n_experts * x for x in right_loads(experts_NK, n_experts)]


def of_the_busiest(experts_NK, n_experts):
    most = max(counts(experts_NK, n_experts))
    return [c / most for c in counts(experts_NK, n_experts)]


def busiest_first(experts_NK, n_experts):
    return sorted(right_loads(experts_NK, n_experts), reverse=True)


def only_the_used(experts_NK, n_experts):
    used = sorted({e for row in experts_NK for e in row})
    return [right_loads(experts_NK, n_experts)[e] for e in used]


def short_bincount(experts_NK, n_experts):
    found = torch.bincount(torch.tensor(experts_NK).flatten())
    return (found / found.sum()).tolist()


def as_dict(experts_NK, n_experts):
    return dict(enumerate(right_loads(experts_NK, n_experts)))


def as_they_come(experts_NK, n_experts):
    seen = {}
    for row in experts_NK:
        for e in row:
            seen[e] = seen.get(e, 0) + 1
    seen = {**seen, **{e: 0 for e in range(n_experts) if e not in seen}}
    return [c / sum(seen.values()) for c in seen.values()]


def numbered_from_one(experts_NK, n_experts):
    loads = right_loads(experts_NK, n_experts)
    return [loads[e - 1] if e else 0.0 for e in range(n_experts)]


def softmax_of_counts(experts_NK, n_experts):
    return torch.tensor(counts(experts_NK, n_experts)).float().softmax(0)


def sorts_its_input(experts_NK, n_experts):
    for row in experts_NK:
        row.sort()
    return right_loads(experts_NK, n_experts)


# --- predict_start() ---------------------------------------------------------------------------------------------------
PREDICTIONS = {"experts_stored": "larger", "experts_work": "same", "experts_load": "smaller", "choices_stored": "same",
               "choices_work": "larger", "finer_work": "same"}


def guess(**changed):
    return lambda: {**PREDICTIONS, **changed}


# --- two_contexts() ----------------------------------------------------------------------------------------------------
def one_text_twice():
    return " the", 0, "In the morning", "In the morning"


def without_the_space():
    return "the", 0, "Ann went to the river", "the letter e"


def not_in_the_text():
    return " zipper", 0, "Ann went to the river", "Ben went to the garden"


def different_only_later():
    return "In", 0, "In the morning", "In a garden"


def in_a_layer_too_low():
    return " name", 1, "The function returns a list of names.", "for name in names: print(name)"


def mentioned_by_its_word():
    return "name", 3, "The function returns a list of names.", "for name in names: print(name)"


WRONG = {
    "active_share": [
        (share_of_the_experts, "top_k over n_experts"), (share_of_the_expert_parameters, "top_k over n_experts"),
        (rest_is_not_active, "the rest not counted as active"), (rest_is_not_stored, "the rest not counted in the total"),
        (layers_forgotten, "one layer only"), (rest_in_every_layer, "one layer only"), (total_over_active, "upside down"),
        (idle_share, "the idle share"), (active_over_idle, "active over idle"), (in_percent, "percent"),
        (to_two_digits, "rounded"), (always_one_expert, "one expert per token"),
        (active_parameters, "a number, not a share"), (floor_division, "whole-number division"),
        (of_one_global_model, "not the arguments"),
    ],
    "load_shares": [
        (first_choices, "first choices only"), (last_choices, "last choices only"), (over_tokens, "divided by the tokens"),
        (counts, "counts, not shares"), (loads_in_percent, "percent"), (of_the_even_share, "divided by the even share"),
        (of_the_busiest, "divided by the busiest"), (over_experts, "divided by the experts"),
        (busiest_first, "sorted by load"), (as_they_come, "in order of appearance"), (numbered_from_one, "counted from 1"),
        (softmax_of_counts, "softmax of the counts"), (only_the_used, "experts without tokens left out"),
        (short_bincount, "experts without tokens left out"), (as_dict, "a dict"), (sorts_its_input, "changes its input"),
    ],
    "predict_start": [(guess(**{q: a}), f"{q}: {a}") for q, a in (
        ("experts_stored", "same"), ("experts_work", "larger"), ("experts_load", "same"), ("choices_stored", "larger"),
        ("choices_work", "same"), ("finer_work", "larger"))] + [
        (guess(experts_work="it depends"), "no answer"), (lambda: ["same"] * 6, "no answer")],
    "two_contexts": [
        (one_text_twice, "the same text"), (without_the_space, "not a token of the text"),
        (not_in_the_text, "not a token of the text"), (different_only_later, "the same text"),
        (in_a_layer_too_low, "the same expert"), (mentioned_by_its_word, "not a token of the text"),
    ],
}
