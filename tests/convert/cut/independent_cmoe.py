"""CMoE (arXiv 2502.04416), written again from our notes on the paper and its code, in plain NumPy and SciPy.

Nothing of pregate is imported here and nothing here is fast: the recipe under test is held to this text, so it is
written by the notes' table, row by row. `RELEASED` is the column of the released code, `PAPER` the paper's own text.

Shape suffixes: T tokens, D hidden size, H FFN width, Q routed neurons, R routed experts, K active experts.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import distance as spatial


@dataclass(frozen=True)
class Column:
    """One column of the notes' table: what the paper's text and the released code do differently."""

    unit_profile: bool  # profile on unit-length tokens and weight rows instead of the raw hidden state
    distance: str  # of a neuron's column to a centroid: "cityblock" (L1) or "euclidean" (L2)
    num_iterations: int  # assignments, each followed by one mean
    unit_router: bool  # the representative's rows at unit length
    magnitude_router: bool  # the absolute value of the product


RELEASED = Column(unit_profile=True, distance="cityblock", num_iterations=1, unit_router=True, magnitude_router=True)
PAPER = Column(unit_profile=False, distance="euclidean", num_iterations=20, unit_router=False, magnitude_router=False)


@dataclass(frozen=True)
class Split:
    """What was decided about one layer: which neurons are shared, which expert has which, and who stands for it."""

    rates_H: np.ndarray
    shared: np.ndarray  # ids of the shared neurons, ascending
    routed: np.ndarray  # ids of the others, ascending
    labels_Q: np.ndarray  # the expert of routed[q]
    cost: float  # of the last assignment: summed distance of every neuron to its expert's centroid then
    centroids_RT: np.ndarray  # means after the last assignment
    representatives_R: np.ndarray  # neuron ids

    def members(self, expert: int) -> np.ndarray:
        """The ascending neuron ids of one routed expert."""
        return self.routed[self.labels_Q == expert]


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1.0 + np.exp(-values))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows * rows).sum(axis=1, keepdims=True))


def profile(tokens_TD: np.ndarray, gate_HD: np.ndarray, up_HD: np.ndarray, column: Column) -> np.ndarray:
    """The hidden state [T, H] whose largest entries are marked."""
    if column.unit_profile:
        tokens_TD, gate_HD, up_HD = unit_rows(tokens_TD), unit_rows(gate_HD), unit_rows(up_HD)
    return silu(tokens_TD @ gate_HD.T) * (tokens_TD @ up_HD.T)


def mark(hidden_TH: np.ndarray, num_marked: int) -> np.ndarray:
    """A [T, H] of 0 and 1: per token a 1 at the `num_marked` largest absolute values."""
    marks_TH = np.zeros_like(hidden_TH)
    for token in range(len(hidden_TH)):
        largest = np.argsort(-np.abs(hidden_TH[token]), kind="stable")[:num_marked]
        marks_TH[token, largest] = 1.0
    return marks_TH


def distances(columns_NT: np.ndarray, centroids_RT: np.ndarray, metric: str) -> np.ndarray:
    """[N, R]: `metric` as `Column.distance` names it."""
    known = {"cityblock": spatial.cityblock, "euclidean": spatial.euclidean}
    return np.array([[known[metric](column, centroid) for centroid in centroids_RT] for column in columns_NT])


def by_rate(rates: np.ndarray) -> np.ndarray:
    """Positions from the highest rate to the lowest, the lower position first where they are equal."""
    return np.argsort(-rates, kind="stable")


def assign(columns_QT: np.ndarray, centroids_RT: np.ndarray, distance: str) -> tuple[np.ndarray, float]:
    """The cheapest assignment that gives every centroid the same number of columns: labels [Q] and its cost.

    As in the released code: each centroid's cost column is repeated as often as it has places, which makes the
    matrix square and the problem an ordinary linear assignment.
    """
    places = len(columns_QT) // len(centroids_RT)
    cost_QR = distances(columns_QT, centroids_RT, distance)
    rows, slots = linear_sum_assignment(np.repeat(cost_QR, places, axis=1))
    labels_Q = np.empty(len(columns_QT), dtype=int)
    labels_Q[rows] = slots // places
    return labels_Q, float(cost_QR[np.arange(len(labels_Q)), labels_Q].sum())


def split_marks(marks_TH: np.ndarray, num_experts: int, num_shared: int, column: Column) -> Split:
    """Cut the columns of the marks into `num_experts` of one width; `num_shared` of them are the shared expert."""
    width = marks_TH.shape[1] // num_experts
    num_routed = num_experts - num_shared
    rates_H = marks_TH.mean(axis=0)
    shared = np.sort(by_rate(rates_H)[: num_shared * width])
    routed = np.setdiff1d(np.arange(marks_TH.shape[1]), shared)
    columns_QT = marks_TH[:, routed].T
    centroids_RT = columns_QT[by_rate(rates_H[routed])[:num_routed]]
    labels_Q, cost = np.zeros(len(routed), dtype=int), 0.0
    for _ in range(column.num_iterations):
        labels_Q, cost = assign(columns_QT, centroids_RT, column.distance)
        centroids_RT = means(columns_QT, labels_Q, num_routed)
    representatives_R = represent(columns_QT, labels_Q, centroids_RT, routed, column.distance)
    return Split(rates_H, shared, routed, labels_Q, cost, centroids_RT, representatives_R)


def means(columns_QT: np.ndarray, labels_Q: np.ndarray, num_routed: int) -> np.ndarray:
    return np.stack([columns_QT[labels_Q == expert].mean(axis=0) for expert in range(num_routed)])


def represent(
    columns_QT: np.ndarray, labels_Q: np.ndarray, centroids_RT: np.ndarray, routed: np.ndarray, distance: str
) -> np.ndarray:
    """Per expert the id of the member nearest to its mean, the lowest id where several are."""
    chosen = []
    for expert, centroid_T in enumerate(centroids_RT):
        members = np.flatnonzero(labels_Q == expert)
        away = distances(columns_QT[members], centroid_T[None], distance)[:, 0]
        chosen.append(routed[members[int(away.argmin())]])
    return np.array(chosen)


def router_scores(
    tokens_TD: np.ndarray, gate_HD: np.ndarray, up_HD: np.ndarray, representatives_R: np.ndarray, column: Column
) -> np.ndarray:
    """What one neuron says about its expert: raw scores [T, R] of the raw token."""
    gate_RD, up_RD = gate_HD[representatives_R], up_HD[representatives_R]
    if column.unit_router:
        gate_RD, up_RD = unit_rows(gate_RD), unit_rows(up_RD)
    scores_TR = silu(tokens_TD @ gate_RD.T) * (tokens_TD @ up_RD.T)
    return np.abs(scores_TR) if column.magnitude_router else scores_TR


def softmax(scores_TR: np.ndarray) -> np.ndarray:
    raised = np.exp(scores_TR - scores_TR.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def choose(scores_TR: np.ndarray, num_active: int, bias_R: np.ndarray, scale_R: np.ndarray):
    """The chosen experts' weights [T, R]: `1 + s' u` for the `num_active` largest of `s' + b`, 0 for the others."""
    probabilities_TR = softmax(scores_TR)
    weights_TR = np.zeros_like(probabilities_TR)
    for token, ranked_R in enumerate(probabilities_TR + bias_R):
        for expert in np.argsort(-ranked_R, kind="stable")[:num_active]:
            weights_TR[token, expert] = 1.0 + probabilities_TR[token, expert] * scale_R[expert]
    return weights_TR


def neurons(
    tokens_TD: np.ndarray, gate_HD: np.ndarray, up_HD: np.ndarray, down_DH: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """The gated FFN [T, D] of some neurons alone: rows of gate and up, columns of down."""
    return (silu(tokens_TD @ gate_HD[ids].T) * (tokens_TD @ up_HD[ids].T)) @ down_DH[:, ids].T


def layer_output(tokens_TD, gate_HD, up_HD, down_DH, split: Split, weights_TR: np.ndarray) -> np.ndarray:
    """`shared(x) + sum of g_i E_i(x)` [T, D]."""
    output_TD = neurons(tokens_TD, gate_HD, up_HD, down_DH, split.shared)
    for expert in range(weights_TR.shape[1]):
        expert_TD = neurons(tokens_TD, gate_HD, up_HD, down_DH, split.members(expert))
        output_TD = output_TD + weights_TR[:, expert, None] * expert_TD
    return output_TD
