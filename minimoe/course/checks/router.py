"""The checks of chapter 04_router, each for a plain function of tensors.

| check | signature of the learner's function |
|---|---|
| `check_topk_router` | `topk_router(logits_NE, k, normalize) -> (weights_NK, experts_NK)` |
| `check_noisy_topk` | `noisy_topk(logits_NE, k, noise_std, training, generator) -> (weights_NK, experts_NK)` |
| `check_switch_keep` | `switch_keep(experts_NK, row_N, n_experts, capacity) -> kept_NK` |
| `check_sigmoid_bias_router` | `sigmoid_bias_router(logits_NE, bias_E, k) -> (weights_NK, experts_NK)` |
| `check_expert_choice` | `expert_choice(logits_NE, capacity) -> (weights_NE, kept_NE)` |
| `check_predict_router` | `predict_router() -> dict` |
| `check_top1_layer` | `top1_layer(x_ND, router_ED, experts_EDD) -> y_ND` |
"""
from minimoe.course.checks.router_bias import check_sigmoid_bias_router
from minimoe.course.checks.router_capacity import check_switch_keep
from minimoe.course.checks.router_cards import check_predict_router, check_top1_layer
from minimoe.course.checks.router_expert_choice import check_expert_choice
from minimoe.course.checks.router_noise import check_noisy_topk
from minimoe.course.checks.router_topk import check_topk_router

__all__ = ["check_expert_choice", "check_noisy_topk", "check_predict_router", "check_sigmoid_bias_router",
           "check_switch_keep", "check_top1_layer", "check_topk_router"]
