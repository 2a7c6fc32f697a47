"""Read-ME's cut (arXiv 2410.19123, section 3.1): one expert per domain, the channels that fire most on it.

Experts overlap: a channel that many domains use is in many experts, and one that none uses is dropped. What every
domain uses can be a part of its own, the permanent expert.

Shape letters: R domains and so routed experts, I channels of the dense FFN, W channels a token runs, M expert width,
S shared experts.
"""

from __future__ import annotations

import numpy as np

from pregate.convert.cut.cmoe import NeuronSplit
from pregate.convert.measure.overlap import permanent_channels
from pregate.model.config import LayerCut


def active_width(width: int, active_share: float) -> int:
    """W, the channels that a token runs of a layer's `width`: exactly so many, 1 at least.

    Example: 0.5 of 11008 is 5504.
    """
    return max(1, round(active_share * width))


def strongest(scores_RI: np.ndarray, num_active: int) -> np.ndarray:
    """Each domain's `num_active` channels of greatest score, ascending [R, W]; ties go to the lower channel.

    Example: scores [[1, 3, 3, 2], [5, 0, 0, 0]], 2 active: [[1, 2], [0, 1]].
    """
    order_RI = np.argsort(-scores_RI, axis=1, kind="stable")
    return np.sort(order_RI[:, :num_active], axis=1)


def domain_cut(scores_RI: np.ndarray, num_active: int, permanent: str) -> tuple[LayerCut, NeuronSplit]:
    """One layer's experts from the domains' scores of its channels; one expert per token, and the same function for
    either `permanent`.

    "fused": expert i is all of domain i's `num_active` channels, no shared expert (what the released code converts
    to). "separate": what all domains chose is the shared expert. A checkpoint's shared expert is a multiple of the
    experts' width, so of M = W / (S + 1) the largest S is taken whose S * M channels there are: those of greatest mean
    score over domains; the rest stays in every expert.

    Example: 8 active, five of them chosen by all domains: S 1, M 4 (three parts of four would need 6 in common), the
    four best of the five are shared, and the fifth stays in each expert beside three channels of its own.
    """
    chosen_RW = strongest(scores_RI, num_active)
    common = permanent_channels(chosen_RW) if permanent == "separate" else np.empty(0, dtype=np.int64)
    parts = (n for n in range(num_active, 0, -1) if num_active % n == 0)
    num_shared = next(n - 1 for n in parts if num_active // n * (n - 1) <= len(common))
    width = num_active // (num_shared + 1)
    by_score = common[np.argsort(-scores_RI[:, common].mean(axis=0), kind="stable")]
    shared = np.sort(by_score[: num_shared * width])
    routed_RM = np.stack([np.setdiff1d(chosen_W, shared) for chosen_W in chosen_RW])
    return LayerCut(len(scores_RI), num_shared, 1, width), NeuronSplit(shared, routed_RM)
