"""Answers to the exercises of chapter 4 that are right, each in its own way: the checks must let all of them pass.

CORRECT maps the name of an exercise to its functions. `python -m pytest tests/test_checks.py` tries them at 20 seeds.
"""
import math

import torch

from minimoe import router


# --- topk_router ------------------------------------------------------------------------------------------------------
def topk_by_topk(logits_NE, k, normalize):
    weights_NK, experts_NK = torch.softmax(logits_NE.float(), dim=-1).topk(k)
    return (weights_NK / weights_NK.sum(-1, keepdim=True) if normalize else weights_NK), experts_NK


def topk_by_sorting(logits_NE, k, normalize):
    """Chooses by the logits; the weights by exp and logsumexp."""
    logits_NE = logits_NE.to(torch.float32)
    experts_NK = logits_NE.argsort(dim=1, descending=True)[:, :k]
    chosen_NK = torch.gather(logits_NE, 1, experts_NK)
    over_NE = chosen_NK if normalize else logits_NE
    return torch.exp(chosen_NK - torch.logsumexp(over_NE, dim=1)[:, None]), experts_NK


def topk_one_by_one(logits_NE, k, normalize):
    """k times argmax, the expert just taken put out of the race; of tied experts the last one."""
    p_NE = (logits_NE.float() - logits_NE.float().amax(1, keepdim=True)).exp()
    p_NE = p_NE / p_NE.sum(1, keepdim=True)
    left_NE, experts = p_NE.detach().flip(1), []
    for _ in range(k):
        best_N = left_NE.argmax(1)
        left_NE = left_NE.scatter(1, best_N[:, None], -math.inf)
        experts.append(p_NE.shape[1] - 1 - best_N)
    experts_NK = torch.stack(experts, 1)
    weights_NK = torch.stack([p_NE[i, es] for i, es in enumerate(experts_NK)])
    return (weights_NK / weights_NK.sum(1)[:, None] if normalize else weights_NK), experts_NK


def topk_of_the_library(logits_NE, k, normalize):
    r = router.softmax_topk(logits_NE, k, normalize)
    return r.weights, r.experts


# --- noisy_topk -------------------------------------------------------------------------------------------------------
def noisy_by_randn(logits_NE, k, noise_std, training, generator):
    if training:
        logits_NE = logits_NE + noise_std * torch.randn(logits_NE.shape, generator=generator)
    chosen_NK, experts_NK = logits_NE.float().topk(k)
    return chosen_NK.softmax(-1), experts_NK


def noisy_by_normal(logits_NE, k, noise_std, training, generator):
    """Expert by expert from a matrix drawn the other way round; renormalized after the softmax."""
    noise_EN = torch.empty(logits_NE.shape[::-1]).normal_(0.0, noise_std, generator=generator)
    p_NE = (logits_NE + noise_EN.T * training).softmax(-1)
    experts_NK = p_NE.argsort(-1, descending=True)[:, :k]
    weights_NK = p_NE.gather(1, experts_NK)
    return weights_NK / weights_NK.sum(-1, keepdim=True), experts_NK


# --- switch_keep ------------------------------------------------------------------------------------------------------
def keep_by_walking(experts_NK, row_N, n_experts, capacity):
    used, kept_NK = {}, torch.zeros_like(experts_NK, dtype=torch.bool)
    for i, (row, experts) in enumerate(zip(row_N.tolist(), experts_NK.tolist())):
        for j, expert in enumerate(experts):
            used[row, expert] = used.get((row, expert), 0) + 1
            kept_NK[i, j] = used[row, expert] <= capacity
    return kept_NK


def keep_by_counting(experts_NK, row_N, n_experts, capacity):
    """The place of a choice is the number of equal (sequence, expert) pairs before it."""
    pair_P = (row_N[:, None] * n_experts + experts_NK).flatten()
    place_P = torch.tril(pair_P[:, None] == pair_P[None, :], diagonal=-1).sum(1)
    return (place_P < capacity).view(experts_NK.shape)


def keep_of_the_library(experts_NK, row_N, n_experts, capacity):
    probs_NE = torch.zeros(len(row_N), n_experts)
    r = router.Routing(experts_NK.float(), experts_NK, probs_NE, probs_NE,
                       torch.ones_like(experts_NK, dtype=torch.bool))
    return router.within_capacity(r, capacity, row_N).kept


# --- sigmoid_bias_router ----------------------------------------------------------------------------------------------
def bias_by_gather(logits_NE, bias_E, k):
    scores_NE = torch.sigmoid(logits_NE.float())
    experts_NK = (scores_NE + bias_E).topk(k).indices
    weights_NK = scores_NE.gather(1, experts_NK)
    return weights_NK / weights_NK.sum(1, keepdim=True), experts_NK


def bias_by_mask(logits_NE, bias_E, k):
    """Experts in the order of their numbers; logits through the hyperbolic tangent."""
    scores_NE = 0.5 * (1 + torch.tanh(logits_NE.float() / 2))
    order_NE = torch.argsort(scores_NE.detach() + bias_E[None, :], dim=1, descending=True)
    experts_NK = order_NE[:, :k].sort(dim=1).values
    mask_NE = torch.zeros_like(scores_NE).scatter(1, experts_NK, 1.0)
    shares_NE = scores_NE * mask_NE / (scores_NE * mask_NE).sum(1, keepdim=True)
    return shares_NE.gather(1, experts_NK), experts_NK


def bias_of_the_library(logits_NE, bias_E, k):
    r = router.sigmoid_topk(logits_NE, k, bias_E)
    return r.weights, r.experts


# --- expert_choice ----------------------------------------------------------------------------------------------------
def choice_by_topk(logits_NE, capacity):
    probs_NE = logits_NE.float().softmax(-1)
    tokens_CE = probs_NE.topk(min(capacity, len(probs_NE)), dim=0).indices
    kept_NE = torch.zeros_like(probs_NE, dtype=torch.bool).scatter(0, tokens_CE, True)
    return probs_NE * kept_NE, kept_NE


def choice_by_rank(logits_NE, capacity):
    """A token's rank at an expert is the place that the expert gives it, counted column by column."""
    probs_NE = torch.softmax(logits_NE.to(torch.float32), 1)
    kept_NE = torch.stack([column.argsort(descending=True).argsort() < capacity for column in probs_NE.T], dim=1)
    return probs_NE.masked_fill(~kept_NE, 0.0), kept_NE


def choice_of_the_library(logits_NE, capacity):
    r = router.expert_choice(logits_NE, capacity)
    return r.weights * r.kept, r.kept


# --- the other cards --------------------------------------------------------------------------------------------------
def predictions():
    return {"shift": "same", "shift_sigmoid": "smaller", "double": "larger", "more_choices_normalized": "smaller",
            "more_choices": "same", "one_choice_normalized": "same"}


def layer_by_gather(x_ND, router_ED, experts_EDD):
    weights_N1, experts_N1 = (x_ND @ router_ED.T).softmax(-1).topk(1)
    return weights_N1 * torch.einsum("nij,nj->ni", experts_EDD[experts_N1[:, 0]], x_ND)


def layer_by_loop(x_ND, router_ED, experts_EDD):
    probs_NE = torch.softmax(x_ND @ router_ED.T, dim=1)
    best_N, y_ND = probs_NE.argmax(1), torch.zeros_like(x_ND)
    for e, expert_DD in enumerate(experts_EDD.unbind(0)):
        at = (best_N == e).nonzero()[:, 0]
        y_ND = y_ND.index_add(0, at, probs_NE[at, e, None] * (x_ND[at] @ expert_DD.T))
    return y_ND


CORRECT = {
    "topk_router": [topk_by_topk, topk_by_sorting, topk_one_by_one, topk_of_the_library],
    "noisy_topk": [noisy_by_randn, noisy_by_normal],
    "switch_keep": [keep_by_walking, keep_by_counting, keep_of_the_library],
    "sigmoid_bias_router": [bias_by_gather, bias_by_mask, bias_of_the_library],
    "expert_choice": [choice_by_topk, choice_by_rank, choice_of_the_library],
    "predict_router": [predictions, lambda: {**predictions(), "note": "a dict may hold more"}],
    "top1_layer": [layer_by_gather, layer_by_loop],
}
