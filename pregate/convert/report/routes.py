"""What the paths of a text show: load per expert, flow between layers, repeats along a text. Pure NumPy.

Data on its way: per layer bool [T, R], who visits what -> counts -> figures. Tokens of a document follow one another;
`starts` [T] is True at each document's first.

Shape letters: T tokens, P pairs of neighbouring tokens, L layers, R routed experts, M expert width.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pregate.convert.measure.overlap import overlaps
from pregate.convert.report.figures import Flow, LayerLoad, LayerRepeats, Repeats


def layer_load(layer: int, visits_TR: np.ndarray) -> LayerLoad:
    """Share of tokens that visit each expert.

    `effective_experts` is exp of the entropy of the visits: R when even, 1 when all go to one.

    Example: visits [[1, 0], [1, 0], [1, 1], [1, 0]]: shares (1.0, 0.25), 1.25 experts a token, largest / mean 1.6.
    """
    shares_R = visits_TR.mean(axis=0)
    mean = shares_R.mean()
    return LayerLoad(
        layer,
        tuple(shares_R.tolist()),
        float(shares_R.sum()),
        float(1 - visits_TR.any(axis=1).mean()),
        float(shares_R.max() / mean) if mean else 0.0,
        float(np.exp(_entropy(shares_R / shares_R.sum()))) if mean else 0.0,
    )


def flow(first: int, second: int, first_TR: np.ndarray, second_TR: np.ndarray) -> Flow:
    """How the experts of one layer foretell those of another, over the tokens that visit some expert in both.

    All is that of one visit of each layer, drawn at random from the token's, so that it means the same for one expert a
    token and for several, and tokens with many do not seem to lead everywhere. From the information is taken what the
    same layers show with the second's tokens in random order (seed 0), and no less than 0 is left.

    Example: two tokens, experts 0 then 1 and 1 then 0: probabilities ((0, 1), (1, 0)), base (0.5, 0.5), entropy ln 2.
    """
    both_T = first_TR.any(axis=1) & second_TR.any(axis=1)
    # The probability that a visit drawn at random from each token's goes to each expert.
    a_TR, b_TR = (v / v.sum(axis=1, keepdims=True) for v in (first_TR[both_T], second_TR[both_T]))
    joint_RR = a_TR.T @ b_TR / max(1, len(a_TR))
    shuffled_RR = a_TR.T @ b_TR[np.random.default_rng(0).permutation(len(b_TR))] / max(1, len(a_TR))
    p_i, p_j = joint_RR.sum(axis=1), joint_RR.sum(axis=0)
    return Flow(
        first,
        second,
        tuple(map(tuple, (joint_RR / np.where(p_i > 0, p_i, 1)[:, None]).tolist())),
        tuple(p_j.tolist()),
        max(0.0, _entropy(shuffled_RR.ravel()) - _entropy(joint_RR.ravel())),
        _entropy(p_j),
    )


def repeats(
    visits: dict[int, np.ndarray], starts_T: np.ndarray, row_bytes: int, neurons: dict[int, np.ndarray]
) -> Repeats:
    """How each token's path follows its predecessor's in the same document.

    `visits` maps layer to bool [T, R]; `neurons` layer to the parent neurons of its experts [R, M]; `row_bytes` are
    those of one neuron (gate, up and down together).
    """
    sets = {layer: set_ids(v_TR) for layer, v_TR in visits.items()}
    path_T = np.unique(np.stack(list(sets.values()), axis=1), axis=0, return_inverse=True)[1].ravel()
    later = np.flatnonzero(~starts_T)
    shares = np.bincount(path_T) / max(1, len(path_T))
    layers = [
        _layer_repeats(layer, v_TR, sets[layer], later, row_bytes, neurons[layer]) for layer, v_TR in visits.items()
    ]
    return Repeats(
        num_pairs=len(later),
        same_path=_mean(path_T[later] == path_T[later - 1]),
        same_by_chance=float((shares**2).sum()),
        num_tokens=len(path_T),
        num_paths=len(shares),
        commonest_path=float(shares.max(initial=0)),
        layers=tuple(layers),
    )


def set_ids(visits_TR: np.ndarray) -> np.ndarray:
    """A number for each token's set of experts [T]; equal sets have equal numbers, from 0 without gaps."""
    packed = np.packbits(visits_TR, axis=1)
    return np.unique(packed, axis=0, return_inverse=True)[1].ravel()


def _layer_repeats(
    layer: int, visits_TR: np.ndarray, sets_T: np.ndarray, later: np.ndarray, row_bytes: int, neurons_RM: np.ndarray
) -> LayerRepeats:
    now_PR, before_PR = visits_TR[later], visits_TR[later - 1]
    shares = np.bincount(sets_T) / max(1, len(sets_T))
    new, width = _mean((now_PR & ~before_PR).sum(axis=1)), neurons_RM.shape[1]
    new_rows = new * width
    if overlaps(neurons_RM):
        moves, counts = np.unique(np.stack([before_PR, now_PR], axis=1), axis=0, return_counts=True)
        sizes = [len(np.setdiff1d(neurons_RM[now], neurons_RM[before])) for before, now in moves]
        new_rows = float(counts @ sizes) / max(1, len(now_PR))
    return LayerRepeats(
        layer=layer,
        same_set=_mean(sets_T[later] == sets_T[later - 1]),
        same_by_chance=float((shares**2).sum()),
        num_sets=len(shares),
        num_experts=_mean(now_PR.sum(axis=1)),
        new_experts=new,
        new_by_chance=float((visits_TR.mean(axis=0) * (1 - visits_TR.mean(axis=0))).sum()),
        new_bytes=new * width * row_bytes,
        new_row_bytes=new_rows * row_bytes,
    )


def _entropy(p: np.ndarray) -> float:
    """Entropy in nats of probabilities that sum to 1."""
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def routed_flows(visits: dict[int, np.ndarray]) -> tuple[Flow, ...]:
    """The flow between each two neighbouring layers of `visits`, dense layers in between passed over."""
    return tuple(flow(a, b, visits[a], visits[b]) for a, b in pairwise(visits))
