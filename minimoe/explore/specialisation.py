"""Do experts specialize? The mutual information of expert and domain, less what chance alone would give.

N tokens, K choices per token, D documents, L labels (domains), E experts, B bootstrap draws. Information is in bits.

The plug-in estimate of a mutual information is never negative, so on finite data it is positive even where nothing
depends on anything: about (L - 1)(E - 1) / (2 N ln 2) bits for independent tokens (Miller 1955; Cover and Thomas 2006,
section 2.3, define the quantity). Tokens of one document are not independent, so the bias is larger than that formula
says. Hence it is measured here: whole documents swap their labels, and what remains is subtracted.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Specialisation:
    """`mi` as counted; `null`, its mean when documents swap labels; `excess` = mi - null, and its interval, in bits."""

    mi: float
    null: float
    excess: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Excess of the first router minus that of the second, with its interval, in bits; `a` and `b` are the two."""

    difference: float
    low: float
    high: float
    a: Specialisation
    b: Specialisation


def mutual_information(experts: np.ndarray, labels: np.ndarray, n_experts: int, n_labels: int,
                       weights: np.ndarray | None = None) -> float:
    """Plug-in estimate of I(expert; label) in bits from counts (Cover and Thomas 2006, eq. 2.28).

    `experts` (N,) or (N, K), where each choice counts as one; `labels` (N,); `weights`, of the shape of `experts`, let
    a choice count for more or less. Biased upwards: see `permutation_null`.

    >>> mutual_information([0, 0, 1, 1], [0, 0, 1, 1], n_experts=2, n_labels=2)
    1.0
    """
    experts, labels = _per_choice(experts, labels)
    weights = None if weights is None else np.asarray(weights, dtype=float).reshape(-1)
    for name, values, n in (("experts", experts, n_experts), ("labels", labels, n_labels)):
        if values.min() < 0 or values.max() >= n:
            raise ValueError(f"{name} must be in 0 ... {n - 1}, found {values.min()} ... {values.max()}")
    counts = np.bincount(labels * n_experts + experts, weights, minlength=n_labels * n_experts)
    return float(_information(counts.reshape(n_labels, n_experts)))


def permutation_null(experts: np.ndarray, labels: np.ndarray, documents: np.ndarray, n_experts: int | None = None,
                     n: int = 200, seed: int = 0) -> float:
    """Mean mutual information, in bits, over `n` draws in which whole documents swap their labels.

    `experts` (N,) or (N, K), `labels` (N,), `documents` (N,) any ids. Raises ValueError when a document has two labels.

    >>> permutation_null([0, 0, 1, 1], [0, 0, 1, 1], documents=[0, 0, 1, 1], n=10)      # no swap changes that
    1.0
    """
    tables_DE, label_D = document_tables(experts, labels, documents, n_experts)
    return float(_informations(tables_DE, _shuffles(label_D, n, np.random.default_rng(seed))).mean())


def specialisation(experts: np.ndarray, labels: np.ndarray, documents: np.ndarray, n_experts: int | None = None, *,
                   n_boot: int = 500, n_null: int = 200, level: float = 0.95, seed: int = 0) -> Specialisation:
    """How much knowing the expert tells about the domain, beyond chance, with a percentile bootstrap interval.

    `experts` (N,) or (N, K), `labels` (N,), `documents` (N,) any ids. Documents are drawn again with replacement within
    their domain, and the null is measured anew in every draw, copies of a document moving together. Drawing again
    inflates the count as chance does, so the draws are shifted to have the estimate as their mean. Where experts depend
    strongly on the domain the null contains part of that dependence, so the excess is then too small rather than too
    large. Raises ValueError when a document has two labels, or when there are fewer than two documents.

    >>> s = specialisation([0] * 20 + [1] * 20, [0] * 20 + [1] * 20, documents=[i // 4 for i in range(40)])
    >>> s.mi, s.low <= s.excess <= s.high
    (1.0, True)
    """
    return _estimates([document_tables(experts, labels, documents, n_experts)], n_boot, n_null, level, seed)[0][0]


def specialisation_difference(a: np.ndarray, b: np.ndarray, labels: np.ndarray, documents: np.ndarray,
                              n_experts: int | None = None, *, n_boot: int = 500, n_null: int = 200,
                              level: float = 0.95, seed: int = 0) -> Difference:
    """Router `a` against router `b` on the same tokens: the difference of their excess, from the same bootstrap draws.

    Pairing takes out what both share, the documents, so the interval is that of the difference and not of two samples.

    >>> labels = [0] * 20 + [1] * 20
    >>> specialisation_difference(labels, [0, 1] * 20, labels, documents=[i // 4 for i in range(40)]).low > 0.5
    True
    """
    tables = [document_tables(experts, labels, documents, n_experts) for experts in (a, b)]
    (one, excess_a), (two, excess_b) = _estimates(tables, n_boot, n_null, level, seed)
    low, high = _interval(excess_a - excess_b, level)
    return Difference(one.excess - two.excess, low, high, one, two)


def token_identity_router(tokens: np.ndarray, labels: np.ndarray, n_experts: int, vocab_size: int, *, restarts: int = 8,
                          steps: int = 50, seed: int = 0) -> np.ndarray:
    """The best router that sees nothing but the token: a map (vocab_size,) from token id to expert.

    Token ids are grouped by the domains they occur in, so that the group tells as much about the domain as a function
    of the id with `n_experts` values can: k-means in Kullback-Leibler divergence (Dhillon, Mallela and Kumar 2003), the
    best of several starts. Ids that do not occur go to the expert with the most tokens.

    On `tokens` themselves this is, up to the search, an upper bound for every router that is a function of the token
    alone; a router that also reads the context may exceed it. On other documents it is no bound: what was fitted to
    rare tokens is partly chance, and another map may do better. So fit it on some documents, measure it on others.

    >>> experts = token_identity_router([5, 6, 5, 6, 1], [0, 1, 0, 1, 0], n_experts=2, vocab_size=8)
    >>> len(experts), bool(experts[5] == experts[1] != experts[6])
    (8, True)
    """
    tokens, labels = _per_choice(np.asarray(tokens).reshape(-1), np.unique(np.asarray(labels), return_inverse=True)[1])
    n_labels = labels.max() + 1
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"token ids must be in 0 ... {vocab_size - 1}, found {tokens.min()} ... {tokens.max()}")
    counts_VL = np.bincount(tokens * n_labels + labels, minlength=vocab_size * n_labels).reshape(-1, n_labels)
    seen = np.flatnonzero(counts_VL.sum(1))
    # ids with the same shares belong together, so they are searched for as one
    shares, group = np.unique(np.round(counts_VL[seen] / counts_VL[seen].sum(1, keepdims=True), 12), axis=0,
                              return_inverse=True)
    mass_G = np.bincount(group.reshape(-1), counts_VL[seen].sum(1))
    rng, best, most = np.random.default_rng(seed), None, -1.0
    for _ in range(restarts):
        cluster_G = _kl_means(shares, mass_G, n_experts, steps, rng)
        joint_EL = np.zeros((n_experts, n_labels))
        np.add.at(joint_EL, cluster_G, shares * mass_G[:, None])
        if (information := float(_information(joint_EL))) > most:
            best, most = cluster_G, information
    expert_of = np.full(vocab_size, np.bincount(best, mass_G).argmax())
    expert_of[seen] = best[group.reshape(-1)]
    return expert_of


def document_tables(experts: np.ndarray, labels: np.ndarray, documents: np.ndarray,
                    n_experts: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Counts of experts per document (D, E), and the label of each document (D,): all that the estimates need.

    >>> document_tables([0, 1, 1], ["code", "code", "prose"], documents=[7, 7, 9])[0].tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    flat, label_of_choice = _per_choice(experts, np.unique(np.asarray(labels), return_inverse=True)[1])
    _, document_of_choice = _per_choice(experts, np.unique(np.asarray(documents), return_inverse=True)[1])
    n_documents, n_experts = document_of_choice.max() + 1, max(n_experts or 0, int(flat.max()) + 1)
    label_D = np.zeros(n_documents, dtype=int)
    label_D[document_of_choice] = label_of_choice
    if (label_D[document_of_choice] != label_of_choice).any():
        at = int((label_D[document_of_choice] != label_of_choice).argmax())
        name = np.unique(np.asarray(documents))[document_of_choice[at]]
        raise ValueError(f"document {name} holds tokens of two labels: give each document one label")
    if n_documents < 2:
        raise ValueError("one document cannot show specialization: give at least two")
    table = np.bincount(document_of_choice * n_experts + flat, minlength=n_documents * n_experts)
    return table.reshape(n_documents, n_experts).astype(float), label_D


def _per_choice(experts: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    experts, labels = np.asarray(experts), np.asarray(labels).reshape(-1)
    if not experts.size or len(experts) != len(labels):
        raise ValueError(f"{len(experts)} tokens with {len(labels)} labels or documents: give one to each token")
    return experts.reshape(-1).astype(int), np.repeat(labels, experts.size // len(experts))


def _information(counts: np.ndarray) -> np.ndarray:
    """Mutual information in bits of tables (..., L, E) of counts."""
    joint = counts / counts.sum((-2, -1), keepdims=True)
    rows, columns = joint.sum(-1, keepdims=True), joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, rows * columns, out=np.ones_like(joint), where=joint > 0)
    return np.maximum((joint * np.log2(ratio)).sum((-2, -1)), 0.0)


def _one_hot(label_PD: np.ndarray) -> np.ndarray:
    """(P, D) labels as (P, L, D) zeros and ones: times a table (D, E) they give the counts per label and expert."""
    return (label_PD[:, None, :] == np.arange(label_PD.max() + 1)[:, None]).astype(float)


def _shuffles(label_D: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return _one_hot(rng.permuted(np.tile(label_D, (n, 1)), axis=1))


def _informations(table_DE: np.ndarray, hot_PLD: np.ndarray) -> np.ndarray:
    """Information (P,) of one table of documents under each of P labelings."""
    p, l, d = hot_PLD.shape
    return _information((hot_PLD.reshape(p * l, d) @ table_DE).reshape(p, l, -1))


def _estimates(tables: list[tuple[np.ndarray, np.ndarray]], n_boot: int, n_null: int, level: float,
               seed: int) -> list[tuple[Specialisation, np.ndarray]]:
    """For each table the estimate and its excess in every bootstrap draw (B,); draws and shuffles are shared."""
    label_D, rng = tables[0][1], np.random.default_rng(seed)
    copies_BD = np.zeros((n_boot, len(label_D)))
    for label in range(label_D.max() + 1):
        members = np.flatnonzero(label_D == label)
        copies_BD[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n_boot)
    hot = np.concatenate([_one_hot(label_D[None]), _shuffles(label_D, n_null, rng)])     # first the labels as they are
    few = hot[:2 + n_null // 4]                    # a draw's null needs less precision than the estimate's own
    less_null = lambda information_P: information_P[0] - information_P[1:].mean()
    results = []
    for tables_DE, _ in tables:
        information_P = _informations(tables_DE, hot)
        mi, null = float(information_P[0]), float(information_P[1:].mean())
        excess_B = np.array([less_null(_informations(copies_D[:, None] * tables_DE, few)) for copies_D in copies_BD])
        excess_B += mi - null - excess_B.mean()
        low, high = _interval(excess_B, level)
        results.append((Specialisation(mi, null, mi - null, low, high), excess_B))
    return results


def _interval(values_B: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _kl_means(shares_GL: np.ndarray, mass_G: np.ndarray, n_clusters: int, steps: int,
              rng: np.random.Generator) -> np.ndarray:
    """Clusters (G,) of distributions: each goes to the center it diverges from least; centers are weighted means."""
    tiny = 1e-12
    entropy_G = (shares_GL * np.log(shares_GL + tiny)).sum(1)
    # as in k-means++: each further center is drawn with the chance of what it would still gain
    centers, loss_G = [], None
    for _ in range(min(n_clusters, len(shares_GL))):
        chance = mass_G if loss_G is None else np.maximum(loss_G, 0) * mass_G
        pick = rng.choice(len(shares_GL), p=chance / chance.sum()) if chance.sum() > 0 else rng.integers(len(shares_GL))
        centers.append(0.99 * shares_GL[pick] + 0.01 / shares_GL.shape[1])      # no zeros: every divergence is finite
        new = entropy_G - shares_GL @ np.log(centers[-1])
        loss_G = new if loss_G is None else np.minimum(loss_G, new)
    centers_CL, cluster_G = np.array(centers), None
    for _ in range(steps):
        divergence_GC = entropy_G[:, None] - shares_GL @ np.log(centers_CL + tiny).T
        moved = divergence_GC.argmin(1)
        if cluster_G is not None and (moved == cluster_G).all():
            break
        cluster_G = moved
        for c in range(len(centers_CL)):
            inside = cluster_G == c
            if inside.any():
                centers_CL[c] = np.average(shares_GL[inside], axis=0, weights=mass_G[inside])
    return cluster_G
