"""The checks of chapter 00_start, each for a function of plain numbers and lists.

| check | signature of the learner's function |
|---|---|
| `check_active_share` | `active_share(n_layers, n_experts, top_k, expert_params, other_params) -> float` |
| `check_load_shares` | `load_shares(experts_NK, n_experts) -> list of floats` |
| `check_predict_start` | `predict_start() -> dict` |
| `check_two_contexts` | `two_contexts() -> (token, layer, text_a, text_b)` |
"""
from minimoe.course.checks.start_cards import check_predict_start, check_two_contexts
from minimoe.course.checks.start_numbers import check_active_share, check_load_shares

__all__ = ["check_active_share", "check_load_shares", "check_predict_start", "check_two_contexts"]
