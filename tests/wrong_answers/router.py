"""Answers to the exercises of chapter 4 that are wrong, each as a learner could write it and believe in it.

WRONG maps the name of an exercise to pairs (function, name of the mistake that the check must name). Each runs and
gives the right shapes, at least at first sight. `python -m tests.test_checks router` prints the table wrong answer x
message.
"""
import math

import torch

NUMBER = 2                                      # what a notebook leaves lying around
STD = 0.7
LOGITS = torch.linspace(-1, 1, 91).reshape(13, 7)


def spread(weights_NK, normalize):
    return weights_NK / weights_NK.sum(-1, keepdim=True) if normalize else weights_NK


# --- topk_router(logits_NE, k, normalize) -----------------------------------------------------------------------------
def softmax_over_tokens(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(0).topk(k)
    return spread(w, normalize), x


def softmax_after_topk(logits_NE, k, normalize):
    w, x = logits_NE.float().topk(k)
    return w.softmax(-1), x


def always_normalized(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).topk(k)
    return spread(w, True), x


def never_normalized(logits_NE, k, normalize):
    return tuple(logits_NE.float().softmax(-1).topk(k))


def normalized_when_not_asked(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).topk(k)
    return spread(w, not normalize), x


def normalized_by_the_grand_total(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).topk(k)
    return w / w.sum() if normalize else w, x


def logits_as_weights(logits_NE, k, normalize):
    w, x = logits_NE.float().topk(k)
    return spread(w, normalize), x


def log_softmax_as_weights(logits_NE, k, normalize):
    w, x = logits_NE.float().log_softmax(-1).topk(k)
    return spread(w, normalize), x


def sigmoid_instead(logits_NE, k, normalize):
    w, x = logits_NE.float().sigmoid().topk(k)
    return spread(w, normalize), x


def softmax_of_the_softmax(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).softmax(-1).topk(k)
    return spread(w, normalize), x


def softmax_to_renormalize(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).topk(k)
    return w.softmax(-1) if normalize else w, x


def divided_by_root_e(logits_NE, k, normalize):
    w, x = (logits_NE.float() / logits_NE.shape[1] ** 0.5).softmax(-1).topk(k)
    return spread(w, normalize), x


def others_set_to_zero(logits_NE, k, normalize):
    x = logits_NE.topk(k).indices
    mask_NE = torch.zeros_like(logits_NE).scatter(1, x, 1.0)
    return spread((logits_NE * mask_NE).float().softmax(-1).gather(1, x), normalize), x


def one_over_k(logits_NE, k, normalize):
    x = logits_NE.float().softmax(-1).topk(k).indices
    return torch.full(x.shape, 1 / k), x


def ascending(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).sort(-1)
    return spread(w[:, :k], normalize), x[:, :k]


def smallest_last(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).sort(-1)
    return spread(w[:, -k:], normalize), x[:, -k:]


def in_order_of_number(logits_NE, k, normalize):
    p = logits_NE.float().softmax(-1)
    x = p.topk(k).indices.sort(-1).values
    return spread(p.gather(1, x), normalize), x


def by_absolute_value(logits_NE, k, normalize):
    x = logits_NE.abs().topk(k).indices
    return spread(logits_NE.float().softmax(-1).gather(1, x), normalize), x


def always_two(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).topk(2)
    return spread(w, normalize), x


def global_k(logits_NE, k, normalize):
    w, x = logits_NE.float().softmax(-1).topk(NUMBER)
    return spread(w, normalize), x


def global_logits(logits_NE, k, normalize):
    w, x = LOGITS.softmax(-1).topk(k)
    return spread(w, normalize), x


def best_one_k_times(logits_NE, k, normalize):
    p = logits_NE.float().softmax(-1)
    x = torch.stack([p.argmax(-1)] * k, 1)
    return spread(p.gather(1, x), normalize), x


def all_weights(logits_NE, k, normalize):
    p = logits_NE.float().softmax(-1)
    return p, p.topk(k).indices


def above_the_kth(logits_NE, k, normalize):
    p = logits_NE.float().softmax(-1)
    chosen = p >= p.topk(k).values[:, -1:]
    x = chosen.nonzero()[:, 1].view(len(p), k)
    order = p.gather(1, x).argsort(-1, descending=True)
    x = x.gather(1, order)
    return spread(p.gather(1, x), normalize), x


def exp_by_hand(logits_NE, k, normalize):
    e = logits_NE.float().exp()
    w, x = (e / e.sum(-1, keepdim=True)).topk(k)
    return spread(w, normalize), x


def in_bfloat16(logits_NE, k, normalize):
    w, x = logits_NE.softmax(-1).topk(k)
    return spread(w, normalize), x


def converted_too_late(logits_NE, k, normalize):
    w, x = logits_NE.softmax(-1).float().topk(k)
    return spread(w, normalize), x


def detached(logits_NE, k, normalize):
    w, x = logits_NE.detach().float().softmax(-1).topk(k)
    return spread(w, normalize), x


def detached_sum(logits_NE, k, normalize):
    e = (logits_NE.float() - logits_NE.float().amax(-1, keepdim=True)).exp()
    w, x = (e / e.sum(-1, keepdim=True).detach()).topk(k)
    return spread(w, normalize), x


def masks_its_input(logits_NE, k, normalize):
    p, found = logits_NE.float().softmax(-1), []
    for _ in range(k):
        found.append(logits_NE.argmax(-1))
        with torch.no_grad():
            logits_NE[torch.arange(len(p)), found[-1]] = -math.inf
    x = torch.stack(found, 1)
    return spread(p.gather(1, x), normalize), x


# --- noisy_topk(logits_NE, k, noise_std, training, generator) ---------------------------------------------------------
def noisy(add):
    """The right answer around `add(logits, std, generator)`, which makes the noisy logits."""
    def fn(logits_NE, k, noise_std, training, generator):
        if training:
            logits_NE = add(logits_NE, noise_std, generator)
        w, x = logits_NE.topk(k)
        return w.softmax(-1), x
    return fn


def dice(like, generator):
    return torch.randn(like.shape, generator=generator)


def noise_in_evaluation(logits_NE, k, noise_std, training, generator):
    w, x = (logits_NE + noise_std * dice(logits_NE, generator)).topk(k)
    return w.softmax(-1), x


def noise_only_in_evaluation(logits_NE, k, noise_std, training, generator):
    return noisy(lambda h, s, g: h + s * dice(h, g))(logits_NE, k, noise_std, not training, generator)


def noise_after_softmax(logits_NE, k, noise_std, training, generator):
    p = logits_NE.softmax(-1)
    if training:
        p = p + noise_std * dice(p, generator)
    w, x = p.topk(k)
    return spread(w, True), x


def noise_only_chooses(logits_NE, k, noise_std, training, generator):
    noisy_NE = logits_NE + noise_std * dice(logits_NE, generator) if training else logits_NE
    x = noisy_NE.topk(k).indices
    return logits_NE.gather(1, x).softmax(-1), x


def noise_only_weighs(logits_NE, k, noise_std, training, generator):
    noisy_NE = logits_NE + noise_std * dice(logits_NE, generator) if training else logits_NE
    x = logits_NE.topk(k).indices
    return noisy_NE.gather(1, x).softmax(-1), x


def weights_over_all(logits_NE, k, noise_std, training, generator):
    noisy_NE = logits_NE + noise_std * dice(logits_NE, generator) if training else logits_NE
    return tuple(noisy_NE.softmax(-1).topk(k))


def detached_noisy(logits_NE, k, noise_std, training, generator):
    return noisy(lambda h, s, g: (h + s * dice(h, g)).detach())(logits_NE, k, noise_std, training, generator)


def noise_written_into_the_logits(logits_NE, k, noise_std, training, generator):
    if training:
        logits_NE += noise_std * dice(logits_NE, generator)
    w, x = logits_NE.topk(k)
    return w.softmax(-1), x


# --- switch_keep(experts_NK, row_N, n_experts, capacity) --------------------------------------------------------------
def keep(experts_NK, row_N, capacity, place=lambda row, expert, j: (row, expert), backwards=False, by_choice=False):
    """Walks and counts, as the right answer does, with one thing changed."""
    n, k = experts_NK.shape
    walk = [(i, j) for j in range(k) for i in range(n)] if by_choice else [(i, j) for i in range(n) for j in range(k)]
    used, kept = {}, torch.zeros(n, k, dtype=torch.bool)
    for i, j in walk[::-1] if backwards else walk:
        key = place(row_N[i].item(), experts_NK[i, j].item(), j)
        used[key] = used.get(key, 0) + 1
        kept[i, j] = used[key] <= capacity
    return kept


def whole_batch(experts_NK, row_N, n_experts, capacity):
    return keep(experts_NK, row_N, capacity, lambda row, expert, j: expert)


def last_come(experts_NK, row_N, n_experts, capacity):
    return keep(experts_NK, row_N, capacity, backwards=True)


def first_choices_first(experts_NK, row_N, n_experts, capacity):
    return keep(experts_NK, row_N, capacity, by_choice=True)


def counts_first_choices(experts_NK, row_N, n_experts, capacity):
    kept = torch.ones_like(experts_NK, dtype=torch.bool)
    kept[:, :1] = keep(experts_NK[:, :1], row_N, capacity)
    return kept


def apart_by_choice(experts_NK, row_N, n_experts, capacity):
    return torch.cat([keep(column[:, None], row_N, capacity) for column in experts_NK.T], 1)


def one_too_many(experts_NK, row_N, n_experts, capacity):
    one_hot = torch.nn.functional.one_hot(row_N[:, None] * n_experts + experts_NK).flatten(0, 1)
    place = (one_hot.cumsum(0) * one_hot).sum(-1) - 1
    return (place <= capacity).view(experts_NK.shape)


def one_too_few(experts_NK, row_N, n_experts, capacity):
    one_hot = torch.nn.functional.one_hot(row_N[:, None] * n_experts + experts_NK).flatten(0, 1)
    place = (one_hot.cumsum(0) * one_hot).sum(-1)
    return (place < capacity).view(experts_NK.shape)


def places_of_the_sequence(experts_NK, row_N, n_experts, capacity):
    return keep(experts_NK, row_N, capacity, lambda row, expert, j: row)


def whole_token_out(experts_NK, row_N, n_experts, capacity):
    return keep(experts_NK, row_N, capacity).all(1, keepdim=True).expand(experts_NK.shape)


def whole_token_in(experts_NK, row_N, n_experts, capacity):
    return keep(experts_NK, row_N, capacity).any(1, keepdim=True).expand(experts_NK.shape)


def crowded_out(experts_NK, row_N, n_experts, capacity):
    pair = row_N[:, None] * n_experts + experts_NK
    return torch.bincount(pair.flatten())[pair] <= capacity


def dropped(experts_NK, row_N, n_experts, capacity):
    return ~keep(experts_NK, row_N, capacity)


def everyone(experts_NK, row_N, n_experts, capacity):
    return torch.ones_like(experts_NK, dtype=torch.bool)


def keys_of_tensors(experts_NK, row_N, n_experts, capacity):
    """Tensors are told apart by identity: no key is found again."""
    taken, kept = {}, torch.zeros(experts_NK.shape, dtype=torch.bool)
    for n, row in enumerate(row_N):
        for j, expert in enumerate(experts_NK[n]):
            if taken.get((row, expert), 0) < capacity:
                kept[n, j] = True
                taken[row, expert] = taken.get((row, expert), 0) + 1
    return kept


def counts_by_tensor(experts_NK, row_N, n_experts, capacity):
    """A table of counts for each sequence, but the expert is a tensor; counts first and compares then."""
    counts, kept = {row: {} for row in row_N.tolist()}, torch.zeros(experts_NK.shape, dtype=torch.bool)
    for n, row in enumerate(row_N.tolist()):
        for j in range(experts_NK.shape[1]):
            expert = experts_NK[n, j]
            counts[row][expert] = counts[row].get(expert, 0) + 1
            kept[n, j] = counts[row][expert] <= capacity
    return kept


def numbers(experts_NK, row_N, n_experts, capacity):
    return keep(experts_NK, row_N, capacity).long()


def equal_lengths(experts_NK, row_N, n_experts, capacity):
    """Cuts the batch into equal pieces."""
    length = math.ceil(len(row_N) / (row_N.max().item() + 1))
    return keep(experts_NK, torch.arange(len(row_N)) // length, capacity)


def by_lot(experts_NK, row_N, n_experts, capacity):
    order = torch.randperm(len(row_N))
    kept = torch.empty_like(experts_NK, dtype=torch.bool)
    kept[order] = keep(experts_NK[order], row_N[order], capacity)
    return kept


def marks_the_dropped(experts_NK, row_N, n_experts, capacity):
    kept = keep(experts_NK, row_N, capacity)
    experts_NK[~kept] = -1
    return kept


# --- sigmoid_bias_router(logits_NE, bias_E, k) ------------------------------------------------------------------------
def biased(scores, ranks, weigh=lambda w, s: w / w.sum(-1, keepdim=True)):
    """The right answer with its parts exchanged: scores and ranks of (logits, bias), weigh of (chosen, all) scores."""
    def fn(logits_NE, bias_E, k):
        s = scores(logits_NE.float(), bias_E)
        x = ranks(logits_NE.float(), bias_E).topk(k).indices
        return weigh(s.gather(1, x), s), x
    return fn


def sig(h, b):
    return h.sigmoid()


def sig_bias(h, b):
    return h.sigmoid() + b


def sigmoid_in_bfloat16(logits_NE, bias_E, k):
    s = logits_NE.sigmoid().float()
    x = (s + bias_E).topk(k).indices
    w = s.gather(1, x)
    return w / w.sum(-1, keepdim=True), x


def sigmoid_in_place(logits_NE, bias_E, k):
    s = logits_NE.float().sigmoid_()            # .float() of a float32 tensor is that tensor
    x = (s + bias_E).topk(k).indices
    w = s.gather(1, x)
    return w / w.sum(-1, keepdim=True), x


def bias_added_for_good(logits_NE, bias_E, k):
    """Works on the caller's bias."""
    s = logits_NE.float().sigmoid()
    x = bias_E.expand_as(s).add(s).topk(k).indices
    bias_E += 0.001 * (1 - torch.bincount(x.flatten(), minlength=len(bias_E)).sign())
    w = s.gather(1, x)
    return w / w.sum(-1, keepdim=True), x


def exp_over_one_plus_exp(logits_NE, bias_E, k):
    e = logits_NE.float().exp()
    return biased(lambda h, b: e / (1 + e), lambda h, b: e / (1 + e) + b)(logits_NE, bias_E, k)


def detached_sigmoid(logits_NE, bias_E, k):
    return biased(lambda h, b: h.sigmoid().detach(), sig_bias)(logits_NE, bias_E, k)


def detached_divisor(logits_NE, bias_E, k):
    return biased(sig, sig_bias, lambda w, s: w / w.sum(-1, keepdim=True).detach())(logits_NE, bias_E, k)


# --- expert_choice(logits_NE, capacity) -------------------------------------------------------------------------------
def taken(scores, capacity):
    x = scores.topk(min(capacity, len(scores)), dim=0).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, x, True)


def columns_softmax(logits_NE, capacity):
    p = logits_NE.float().softmax(0)
    return p * taken(p, capacity), taken(p, capacity)


def token_choice(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(min(capacity, p.shape[1])).indices, True)
    return p * kept, kept


def like_switch(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    one_hot = torch.nn.functional.one_hot(p.argmax(-1), p.shape[1])
    kept = (one_hot.cumsum(0) <= capacity) & (one_hot == 1)
    return p * kept, kept


def grand_topk(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    best = p.flatten().topk(min(capacity, len(p)) * p.shape[1]).indices
    kept = torch.zeros(p.numel(), dtype=torch.bool).scatter(0, best, True).view(p.shape)
    return p * kept, kept


def chosen_by_logits(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    return p * taken(logits_NE.float(), capacity), taken(logits_NE.float(), capacity)


def choice_ascending(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    return p * taken(-p, capacity), taken(-p, capacity)


def front_rows(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    kept = (torch.arange(len(p))[:, None] < capacity).expand(p.shape)
    return p * kept, kept


def not_masked(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    return p, taken(p, capacity)


def shared_by_token(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    w = p * taken(p, capacity)
    return w / w.sum(-1, keepdim=True).clamp_min(1e-9), taken(p, capacity)


def shared_by_expert(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    w = p * taken(p, capacity)
    return w / w.sum(0, keepdim=True), taken(p, capacity)


def weights_one(logits_NE, capacity):
    kept = taken(logits_NE.float().softmax(-1), capacity)
    return kept.float(), kept


def choice_logits_as_weights(logits_NE, capacity):
    kept = taken(logits_NE.float().softmax(-1), capacity)
    return logits_NE.float() * kept, kept


def choice_by_sigmoid(logits_NE, capacity):
    p = logits_NE.float().sigmoid()
    return p * taken(p, capacity), taken(p, capacity)


def lists_of_tokens(logits_NE, capacity):
    w, x = logits_NE.float().softmax(-1).topk(min(capacity, len(logits_NE)), dim=0)
    return w, x > -1


def turned(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    return (p * taken(p, capacity)).T, taken(p, capacity).T


def too_many_places(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(0, p.topk(capacity, dim=0).indices, True)
    return p * kept, kept


def choice_in_bfloat16(logits_NE, capacity):
    p = logits_NE.softmax(-1).float()
    return p * taken(p, capacity), taken(p, capacity)


def choice_detached(logits_NE, capacity):
    p = logits_NE.float().softmax(-1).detach()
    return p * taken(p, capacity), taken(p, capacity)


def choice_fills_its_input(logits_NE, capacity):
    p = logits_NE.float().softmax(-1)
    kept = taken(p, capacity)
    with torch.no_grad():
        logits_NE.masked_fill_(~kept, -math.inf)
    return p * kept, kept


# --- the other cards --------------------------------------------------------------------------------------------------
def guess(**other):
    right = {"shift": "same", "shift_sigmoid": "smaller", "double": "larger", "more_choices_normalized": "smaller",
             "more_choices": "same", "one_choice_normalized": "same"}
    return lambda: {**right, **other}


def layer(weigh):
    def top1_layer(x_ND, router_ED, experts_EDD):
        logits_NE = x_ND @ router_ED.T
        best_N = logits_NE.argmax(-1)
        return weigh(logits_NE, best_N)[:, None] * torch.einsum("nij,nj->ni", experts_EDD[best_N], x_ND)
    return top1_layer


def best_of(values_NE, best_N):
    return values_NE.gather(1, best_N[:, None])[:, 0]


def layer_softmax_after(x_ND, router_ED, experts_EDD):
    best_N1, experts_N1 = (x_ND @ router_ED.T).topk(1)
    return best_N1.softmax(-1) * torch.einsum("nij,nj->ni", experts_EDD[experts_N1[:, 0]], x_ND)


def layer_dense(x_ND, router_ED, experts_EDD):
    return torch.einsum("ne,eij,nj->ni", (x_ND @ router_ED.T).softmax(-1), experts_EDD, x_ND)


def probability_without_gradient(h, best):
    return best_of(h.softmax(-1), best).detach()


def straight_through(h, best):
    """The value of the probability, the gradient of the raw logit."""
    p, raw = best_of(h.softmax(-1), best), best_of(h, best)
    return raw + (p - raw).detach()


WRONG = {
    "topk_router": [
        (softmax_over_tokens, "softmax over the tokens"), (softmax_after_topk, "always renormalized"),
        (always_normalized, "always renormalized"), (never_normalized, "never renormalized"),
        (normalized_when_not_asked, "normalize upside down"),
        (normalized_by_the_grand_total, "normalized over all tokens"),
        (logits_as_weights, "raw logits as weights"), (log_softmax_as_weights, "log-probabilities as weights"),
        (sigmoid_instead, "sigmoid for softmax"), (softmax_of_the_softmax, "softmax twice"),
        (softmax_to_renormalize, "softmax to renormalize"),
        (divided_by_root_e, "scaled like attention"), (others_set_to_zero, "zero for the others"),
        (one_over_k, "equal weights"), (ascending, "the least probable"), (smallest_last, "right experts, wrong order"),
        (in_order_of_number, "right experts, wrong order"), (by_absolute_value, "top-k of the absolute value"),
        (always_two, "k is not the argument"), (global_k, "k is not the argument"),
        (global_logits, "a global in place of the argument"), (best_one_k_times, "the same expert twice"),
        (all_weights, "all E weights returned"), (above_the_kth, "a threshold instead of a choice"),
        (exp_by_hand, "overflow"), (in_bfloat16, "weights left in bfloat16"),
        (converted_too_late, "probabilities in bfloat16"),
        (detached, "weights cut from the graph"), (detached_sum, "part of the formula is detached"),
        (masks_its_input, "changes its input"),
    ],
    "noisy_topk": [
        (noise_in_evaluation, "noise in evaluation"), (noise_only_in_evaluation, "training upside down"),
        (noisy(lambda h, s, g: h), "no noise at all"),
        (noisy(lambda h, s, g: h + s * torch.randn(len(h), 1, generator=g)), "one number per token"),
        (noisy(lambda h, s, g: h + s * torch.randn(h.shape[1], generator=g)), "one number per expert"),
        (noise_only_chooses, "clean logits weigh"), (noise_only_weighs, "clean logits choose"),
        (noise_after_softmax, "noise after the softmax"),
        (noisy(lambda h, s, g: h * (1 + s * dice(h, g))), "noise as a factor"),
        (noisy(lambda h, s, g: h + s ** 0.5 * dice(h, g)), "noise_std as a variance"),
        (noisy(lambda h, s, g: h + s * s * dice(h, g)), "noise_std squared"),
        (noisy(lambda h, s, g: h + STD * dice(h, g)), "noise_std not used"),
        (noisy(lambda h, s, g: h + s * torch.rand(h.shape, generator=g)), "uniform noise"),
        (noisy(lambda h, s, g: h + s * torch.randn_like(h)), "the generator is not used"),
        (noisy(lambda h, s, g: h + s * dice(h, g.manual_seed(0))), "seeded at each call"),
        (weights_over_all, "weights over all experts"), (detached_noisy, "weights cut from the graph"),
        (noise_written_into_the_logits, "changes its input"),
    ],
    "switch_keep": [
        (whole_batch, "one capacity for the whole batch"), (last_come, "last come, first served"),
        (first_choices_first, "all first choices before the second"),
        (counts_first_choices, "only first choices counted"), (apart_by_choice, "each choice has places of its own"),
        (one_too_many, "one place too many"), (one_too_few, "one place too few"),
        (places_of_the_sequence, "places shared by all experts"), (whole_token_out, "the whole token dropped"),
        (whole_token_in, "the whole token kept"), (crowded_out, "a crowded expert loses everyone"),
        (dropped, "dropped instead of kept"), (everyone, "nothing dropped"),
        (keys_of_tensors, "tensors as keys"), (counts_by_tensor, "tensors as keys"), (numbers, "not booleans"),
        (equal_lengths, "sequences of equal length"), (by_lot, "dropped by chance"),
        (marks_the_dropped, "changes its input"),
    ],
    "sigmoid_bias_router": [
        (biased(sig_bias, sig_bias), "bias in the weights too"), (biased(sig_bias, sig), "bias only in the weights"),
        (biased(sig, sig), "bias not used"), (biased(sig, lambda h, b: h.sigmoid() - b), "bias taken away"),
        (biased(sig, lambda h, b: (h + b).sigmoid()), "bias on the logits"),
        (biased(*[lambda h, b: (h + b).sigmoid()] * 2), "bias on the logits, in the weights too"),
        (biased(sig, lambda h, b: h + b), "bias on the logits"),
        (biased(lambda h, b: h.softmax(-1), lambda h, b: h.softmax(-1) + b), "softmax for sigmoid"),
        (biased(sig, sig_bias, lambda w, s: w), "not renormalized"),
        (biased(sig, sig_bias, lambda w, s: w / s.sum(-1, keepdim=True)), "divided by the sum of all scores"),
        (biased(sig, sig_bias, lambda w, s: w.softmax(-1)), "softmax of the chosen scores"),
        (biased(sig, lambda h, b: -h.sigmoid() - b), "the lowest scores"),
        (lambda logits_NE, bias_E, k: biased(sig, sig_bias)(logits_NE, bias_E, NUMBER), "k is not the argument"),
        (exp_over_one_plus_exp, "overflow in the sigmoid"), (sigmoid_in_bfloat16, "probabilities in bfloat16"),
        (detached_sigmoid, "weights cut from the graph"), (detached_divisor, "part of the formula is detached"),
        (sigmoid_in_place, "changes its input"), (bias_added_for_good, "changes its input"),
    ],
    "expert_choice": [
        (columns_softmax, "softmax over the tokens"), (token_choice, "tokens choose"),
        (like_switch, "tokens choose, experts refuse"), (grand_topk, "one choice over the whole table"),
        (chosen_by_logits, "chosen by raw logits"), (choice_ascending, "the least willing"),
        (front_rows, "the first tokens"),
        (not_masked, "not masked"), (shared_by_token, "renormalized per token"),
        (shared_by_expert, "renormalized per expert"),
        (weights_one, "weights of one"), (choice_logits_as_weights, "raw logits as weights"),
        (choice_by_sigmoid, "sigmoid for softmax"), (lists_of_tokens, "a list of tokens per expert"),
        (turned, "experts down, tokens across"), (too_many_places, "more places than tokens"),
        (choice_in_bfloat16, "probabilities in bfloat16"), (choice_detached, "weights cut from the graph"),
        (choice_fills_its_input, "changes its input"),
    ],
    "predict_router": [(guess(**{q: a}), f"{q}: {a}") for q, a in (
        ("shift", "larger"), ("shift_sigmoid", "same"), ("double", "same"), ("more_choices_normalized", "same"),
        ("more_choices", "smaller"), ("one_choice_normalized", "larger"))] + [
        (guess(shift="it depends"), "no answer"), (lambda: ["same"] * 6, "no answer")],
    "top1_layer": [
        (layer_softmax_after, "weight 1"), (layer(lambda h, best: torch.ones(len(h))), "weight 1"),
        (layer(lambda h, best: best_of(h, best)), "raw logit as weight"),
        (layer(lambda h, best: best_of(h.sigmoid(), best)), "sigmoid for softmax"), (layer_dense, "all experts mixed"),
        (layer(probability_without_gradient), "weights cut from the graph"),
        (layer(straight_through), "part of the formula is detached"),
    ],
}
