"""The routing of a text in numbers: load, repetition, pairs and the router's confidence, each beside chance.

Section 5 of the paper, for any number of experts E and of choices k. Everything here is a function of the choices
(N, k), first choice first, or of the probabilities (N, E) of one layer.
"""

import math
from typing import Any

import numpy as np

from tinymoe.analysis.observe import Observed

Array = np.ndarray
Z = 1.959964  # the normal distribution's 97.5 % point: 95 % intervals
LEAST_DOCUMENTS = 20  # with fewer of them, runs of tokens are the blocks
RUN = 64  # tokens
MOST_SETS = 2048  # different sets of experts that are compared each with each


# Load.


def blocks(document: Array, window: Array) -> Array:
    """Return the number (N,) of the block that each token is in, from 0; blocks are what an interval counts as apart.

    Parameters
    ----------
    document
        (N,) numbers; the document is the block if there are at least 20.
    window
        (N,) numbers, equal for neighbours only. With fewer documents, 64 consecutive tokens of a window are a block.
    """
    numbers, of_token = np.unique(document, return_inverse=True)
    if len(numbers) >= LEAST_DOCUMENTS:
        return of_token
    _, first, of_token = np.unique(window, return_index=True, return_inverse=True)
    run = (np.arange(len(window)) - first[of_token]) // RUN
    return np.unique(np.stack([of_token, run]), axis=1, return_inverse=True)[1].ravel()


def tally(values: Array, block: Array, size: int) -> Array:
    """Return how often each value from 0 to ``size`` − 1 occurs in each block, (blocks, size).

    ``values`` is (N,), or (N, k) for k values a token.
    """
    values = values.reshape(len(block), -1)
    cells = (block[:, None] * size + values).ravel()
    return np.bincount(cells, minlength=(block.max(initial=-1) + 1) * size).reshape(-1, size)


def shares(counts: Array) -> tuple[Array, Array, Array]:
    """Return each value's share of all counts (B, C) and its 95 % confidence interval: share, low, high, (C,).

    Neighbouring tokens go to the same expert more often than not, so N of them say less than N independent ones
    would. How much less is the design effect, estimated from how far blocks differ: with p the shares, n_b the counts
    of block b and n = Σ n_b,

        d = Σ_c V_c / Σ_c p_c (1 − p_c)/n,    V_c = B/(B − 1) · Σ_b (counts_bc − p_c n_b)² / n²,

    pooled over the values, and never below 1. The interval is Wilson's at n/d observations: it stays between 0 and 1,
    and has a width even for an expert without a token. If all counts are of one value, blocks tell nothing and each
    stands for one observation; with a single block the interval is all of [0, 1].

    Parameters
    ----------
    counts
        (B, C) integers, from `tally`; at least one count.

    Notes
    -----
    V is the variance of a ratio of two sums over clusters (Cochran, Sampling Techniques, 1977, chapter 11); dividing
    counts by a mean design effect is Rao and Scott's first correction (JASA 76, 1981).
    """
    counts = counts[counts.sum(axis=1) > 0]
    of_block = counts.sum(axis=1, keepdims=True)  # (B, 1)
    B, n = len(counts), counts.sum()
    p = counts.sum(axis=0) / n  # (C,)
    if B < 2:
        return p, np.zeros_like(p), np.ones_like(p)
    independent = (p * (1 - p)).sum() / n
    if independent > 0:
        variance = B / (B - 1) * ((counts - p * of_block) ** 2).sum(axis=0) / n**2  # (C,)
        observations = n / max(1, variance.sum() / independent)
    else:
        observations = B
    low, high = wilson(p, observations)
    return p, low, high


def wilson(share: Array, observations: float) -> tuple[Array, Array]:
    """Return Wilson's 95 % interval (low, high) for shares seen in so many independent observations."""
    shrink = 1 + Z**2 / observations
    centre = (share + Z**2 / (2 * observations)) / shrink
    half = Z * np.sqrt(share * (1 - share) / observations + (Z / (2 * observations)) ** 2) / shrink
    return np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)  # but for rounding, never past it


# Repetition.


def repetition_by_chance(num_experts: int, top_k: int) -> float:
    """Return the probability that two tokens share one of k experts if all sets of k among E are equally likely.

    1 − C(E − k, k) / C(E, k): 1/E for k = 1; 46.4 % for 2 of 8, the paper's 1 − (6/8)(5/7).
    """
    return 1 - math.comb(num_experts - top_k, top_k) / math.comb(num_experts, top_k)


def repetition_by_load(experts: Array, num_experts: int) -> float:
    """Return the probability that two tokens, drawn independently from these, have an expert in common.

    An uneven load alone makes tokens repeat: for k = 1 this is Σ_e share_e², which is least, 1/E, for an even load.

    Parameters
    ----------
    experts
        (N, k). Of more than 2,048 different sets, as many tokens are taken, evenly spread, to stand for all.
    """
    chosen = np.zeros((len(experts), num_experts), bool)
    chosen[np.arange(len(experts))[:, None], experts] = True
    packed = np.packbits(chosen, axis=1)  # so that E bits sort as few bytes
    _, index, count = np.unique(packed, axis=0, return_index=True, return_counts=True)
    p = count / len(experts)
    if len(index) > MOST_SETS:
        index = np.linspace(0, len(experts), MOST_SETS, endpoint=False).astype(int)
        p = np.full(MOST_SETS, 1 / MOST_SETS)
    sets = chosen[index].astype(np.float32)  # (U, E)
    return float(p @ (sets @ sets.T > 0) @ p)


def repeats(experts: Array, window: Array) -> tuple[Array, Array]:
    """Return for every pair of neighbours whether they share their expert, (P,), and the first token's index, (P,).

    Neighbours are in the same window, so no pair reaches over the end of a document.

    Parameters
    ----------
    experts
        (N, k): with k = 1 the question of the paper's "first choice", with k = 2 of "first or second choice".
    window
        (N,) numbers, equal for neighbours only.
    """
    first = np.flatnonzero(window[1:] == window[:-1])
    common = experts[first, :, None] == experts[first + 1, None, :]  # (P, k, k)
    return common.any(axis=(1, 2)), first


# Pairs.


def pair_counts(experts: Array, num_experts: int) -> Array:
    """Return how often expert i was the first and j the second choice, (E, E), from choices (N, k), k ≥ 2."""
    cells = experts[:, 0] * num_experts + experts[:, 1]
    return np.bincount(cells, minlength=num_experts**2).reshape(num_experts, num_experts)


def expected_pairs(counts: Array, rounds: int = 500) -> Array:
    """Return the pairs (E, E) to expect if the second choice did not depend on the first, but for being another.

    That is a_i b_j off the diagonal and 0 on it, with a and b such that every expert is first, and second, as often
    as it was: quasi-independence (Goodman, JASA 63, 1968), by proportional fitting. Plain independence would put
    pairs on the diagonal, where none can be, and every real pair would look attracted.
    """
    fitted = 1.0 - np.eye(len(counts))
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    for _ in range(rounds):
        fitted *= _ratio(rows, fitted.sum(axis=1))[:, None]
        fitted *= _ratio(columns, fitted.sum(axis=0))
        if np.abs(fitted.sum(axis=1) - rows).max(initial=0) <= 1e-9 * counts.sum():
            break
    return fitted


def _ratio(wanted: Array, present: Array) -> Array:
    return np.divide(wanted, present, out=np.zeros(len(wanted)), where=present > 0)


# Confidence.


def entropy(probs: Array) -> float:
    """Return the mean over tokens of −Σ_e p_e ln p_e in nats, from probabilities (N, E): 0 to ln E."""
    logs = np.log(probs, out=np.zeros_like(probs), where=probs > 0)
    return float(-np.vecdot(probs, logs).mean(dtype=np.float64))


def margin(probs: Array, rank: int) -> float | None:
    """Return by how much the ``rank``-th largest probability exceeds the next on average; None if there is none."""
    if rank >= probs.shape[1]:
        return None
    ranked = np.sort(probs, axis=1)
    return float((ranked[:, -rank] - ranked[:, -rank - 1]).mean(dtype=np.float64))


# All of it.


def summarise(observed: Observed) -> dict[str, Any]:
    """Return the numbers of one text as plain JSON.

    Keys: ``tokens``, ``pairs`` (of neighbours), ``blocks``, and ``layers``, one dict for each that has experts:
    ``first`` and ``chosen``, the share of each expert among first choices and among all k; ``repeat_first`` and
    ``repeat_chosen``, how often neighbours have the first choice, or any choice, in common; all with ``share``,
    ``low`` and ``high``, the latter two also ``by_load``; ``entropy``; ``margin_first`` from the first probability to
    the second, and ``margin_chosen`` from the k-th to the one after; ``pairs`` and ``expected_pairs`` of first and
    second choice. None: undefined.
    """
    block = blocks(observed.document, observed.window)
    layers = []
    for experts, probs in zip(observed.experts, observed.probs):
        E, top_k = probs.shape[1], experts.shape[1]
        pairs = pair_counts(experts, E) if top_k > 1 else None
        layers.append(
            {
                "first": _listed(tally(experts[:, 0], block, E)),
                "chosen": _listed(tally(experts, block, E)),
                "repeat_first": _repetition(experts[:, :1], observed.window, block, E),
                "repeat_chosen": _repetition(experts, observed.window, block, E),
                "entropy": entropy(probs),
                "margin_first": margin(probs, 1),
                "margin_chosen": margin(probs, top_k),
                "pairs": None if pairs is None else pairs.tolist(),
                "expected_pairs": None if pairs is None else expected_pairs(pairs).round(3).tolist(),
            }
        )
    neighbours = int(np.count_nonzero(observed.window[1:] == observed.window[:-1]))
    return {"tokens": len(block), "pairs": neighbours, "blocks": int(block.max()) + 1, "layers": layers}


def _listed(counts: Array) -> dict[str, list[float]]:
    return dict(zip(("share", "low", "high"), (numbers.tolist() for numbers in shares(counts))))


def _repetition(experts: Array, window: Array, block: Array, num_experts: int) -> dict[str, float | None]:
    repeated, first = repeats(experts, window)
    by_load = repetition_by_load(experts, num_experts)
    if not len(repeated):
        return {"share": None, "low": None, "high": None, "by_load": by_load}
    share, low, high = (float(of[1]) for of in shares(tally(repeated.astype(int), block[first], 2)))
    return {"share": share, "low": low, "high": high, "by_load": by_load}
