"""Mutual information of experts and domains, its null, its interval, and the router that knows the token only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minimoe.explore import (
    mutual_information,
    permutation_null,
    specialisation,
    specialisation_difference,
    token_identity_router,
)


# --- specialisation --------------------------------------------------------------------------------------------------
def documents(rng, n_documents, n_labels, tokens):
    ids = np.repeat(np.arange(n_documents), tokens)
    return ids, ids % n_labels


def test_mutual_information_of_known_tables():
    assert mutual_information([0, 1, 2], [0, 1, 2], 3, 3) == pytest.approx(np.log2(3))
    assert mutual_information([0, 0, 1, 1], [0, 1, 0, 1], 2, 2) == 0
    # joint (3, 1; 1, 3) / 8: 1 - H(1/4), counted by hand
    h = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert mutual_information([0, 0, 0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1], 2, 2) == pytest.approx(1 - h)
    # two choices a token, and weights: half the weight on expert 0 everywhere is half the information
    assert mutual_information([[0, 1], [0, 2]], [0, 1], 3, 2) == pytest.approx(0.5)
    assert mutual_information([[0, 1], [0, 2]], [0, 1], 3, 2, weights=[[0, 1], [0, 1]]) == pytest.approx(1)
    with pytest.raises(ValueError, match="experts must be in 0 ... 1, found 0 ... 2"):
        mutual_information([0, 2], [0, 1], 2, 2)


def test_independent_routing_has_no_excess():
    covered, excess = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ids, domain = documents(rng, 30, 3, 60)
        habits = rng.dirichlet(np.full(8, 3.0), 30)           # each document has its own taste, whatever its domain
        experts = np.array([rng.choice(8, p=habits[d]) for d in ids])
        s = specialisation(experts, domain, ids, n_boot=200, n_null=100, seed=seed)
        assert s.low <= s.excess <= s.high and s.excess == pytest.approx(s.mi - s.null)
        covered += s.low <= 0 <= s.high
        excess.append(s.excess)
        assert s.null > 0.01                                  # chance alone, with so few documents, looks like this
    assert covered >= 36
    assert abs(np.mean(excess)) < 0.005


def test_perfect_specialisation_is_the_entropy_of_the_domains():
    ids, domain = documents(None, 30, 3, 20)
    s = specialisation(domain, domain, ids, n_experts=3)
    assert s.mi == pytest.approx(np.log2(3)) and s.null > 0
    assert s.null == pytest.approx(permutation_null(domain, domain, ids, n=400, seed=5), abs=0.02)
    assert s.excess == pytest.approx(np.log2(3) - s.null)
    assert s == specialisation(torch.tensor(domain), torch.tensor(domain), torch.tensor(ids), n_experts=3)


def test_null_falls_with_the_number_of_documents():
    rng = np.random.default_rng(0)
    nulls = []
    for n in (6, 60, 600):
        ids, domain = documents(rng, n, 3, 10)
        nulls.append(permutation_null(rng.integers(0, 8, (len(ids), 2)), domain, ids))
    assert nulls[0] > 3 * nulls[1] > 9 * nulls[2] > 0


def test_paired_difference_is_narrower_than_two_separate_intervals():
    rng = np.random.default_rng(1)
    ids, domain = documents(rng, 60, 3, 40)
    habits = rng.dirichlet(np.full(3, 1.0), 60)
    shared = np.where(rng.random(len(ids)) < 0.5, domain, [rng.choice(3, p=habits[d]) for d in ids])
    a, b = np.where(rng.random(len(ids)) < 0.9, shared, domain), shared
    d = specialisation_difference(a, b, domain, ids)
    assert d.difference == pytest.approx(d.a.excess - d.b.excess) and 0 < d.low < d.difference < d.high
    assert d.high - d.low < (d.a.high - d.a.low + d.b.high - d.b.low) / 2
    same = specialisation_difference(a, a, domain, ids)
    assert (same.difference, same.low, same.high) == (0, 0, 0)


def test_specialisation_refuses_what_cannot_be_measured():
    with pytest.raises(ValueError, match="document 7 holds tokens of two labels"):
        specialisation([0, 1, 0], [0, 1, 0], [7, 7, 8])
    with pytest.raises(ValueError, match="at least two"):
        specialisation([0, 1], [0, 0], [1, 1])
    with pytest.raises(ValueError, match="give one to each token"):
        specialisation([0, 1], [0], [1, 2])


def test_identity_router_recovers_a_planted_map():
    rng = np.random.default_rng(3)
    vocab, n_domains = 300, 4
    planted = rng.integers(0, n_domains, vocab)
    chances = np.full((n_domains, vocab), 0.2)
    chances[planted, np.arange(vocab)] = 3.0
    draw = lambda n: (domains := rng.integers(0, n_domains, n), np.array(
        [rng.choice(vocab - 20, p=chances[d, :-20] / chances[d, :-20].sum()) for d in domains]))
    domain, tokens = draw(20_000)
    experts = token_identity_router(tokens, domain, n_domains, vocab)
    pairs = set(zip(planted[:-20], experts[:-20]))
    assert len(pairs) == n_domains                            # a renaming of the planted groups, not one token wrong
    assert len(set(experts[-20:])) == 1                       # ids that were never seen go to one expert
    fitted = mutual_information(experts[tokens], domain, n_domains, n_domains)
    assert fitted >= mutual_information(planted[tokens], domain, n_domains, n_domains) - 1e-9
    fresh_domain, fresh = draw(5_000)
    assert mutual_information(experts[fresh], fresh_domain, n_domains, n_domains) > 0.9 * fitted


def test_identity_router_bounds_other_maps_on_its_own_tokens():
    rng = np.random.default_rng(4)
    domain = rng.integers(0, 3, 3000)
    tokens = np.minimum(rng.geometric(0.05 + 0.05 * domain), 60)
    best = mutual_information(token_identity_router(tokens, domain, 4, 64)[tokens], domain, 4, 3)
    for _ in range(200):
        assert mutual_information(rng.integers(0, 4, 64)[tokens], domain, 4, 3) < best
    assert best <= mutual_information(tokens, domain, 64, 3)
