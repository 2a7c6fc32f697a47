"""`ShareControl`: keeps a path router's mean active share on text that its thresholds were not set on.

A threshold set on one domain lets more or fewer experts run on another. So each token's thresholds are moved by an
offset that follows from how many experts the tokens *before* it in its text would have had at each of a few offsets:
the one at which their mean, with that of the calibration text as `PRIOR_TOKENS` tokens before the first, is the number
asked for. Counts are whole numbers, so whole, in chunks or token by token the offsets are the same, bit for bit.

Shape letters: N tokens, S the routed experts of all layers side by side, L layers, J offsets.
"""

from __future__ import annotations

import torch
from torch import nn

from pregate.kernels.reference import threshold_for

#: Shares of the number asked for at which the offsets lie on the calibration text; 1 is the offset 0.
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
#: Tokens of calibration text that a text is thought to begin with: the first tokens say little.
PRIOR_TOKENS = 16
#: How far the offset goes beyond what would have been right for the tokens before: what ran too much of is made up
#: for, and a text whose beginning is unlike its end is not always behind. (1 leaves GSM8K's test text 1.0 points above
#: the share asked for, 1.2 at most 0.6, 1.5 leaves WikiText-2's 1.1 below: docs/measurements.md.)
GAIN = 1.2
#: Tokens that offsets are set on, at most.
MOST_CALIBRATED = 32_768


class ShareControl(nn.Module):
    """What thresholds are lowered by, from counts of the tokens before; buffers, all [J] but `wanted`.

    `offsets`: ascending, in units of scores. `means`: experts of a token at each on the calibration text, of all layers
    together; `wanted` of them are asked for.
    """

    offsets: torch.Tensor
    means: torch.Tensor
    wanted: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("offsets", "means"):
            self.register_buffer(name, torch.arange(len(SHARES), dtype=torch.float32))
        self.register_buffer("wanted", torch.zeros(()))

    @torch.no_grad()
    def calibrate(self, margins_TS: torch.Tensor, wanted: float) -> None:
        """Set offsets and means from margins, scores less their layer's threshold, of calibration text."""
        margins_TS = margins_TS[:: 1 + len(margins_TS) // MOST_CALIBRATED]
        most = float(margins_TS.isfinite().sum(dim=-1).float().mean())
        numbers = [min(wanted * share, most - 1e-3) for share in SHARES]
        self.offsets.copy_(torch.stack([-threshold_for(margins_TS, n) for n in numbers]))
        self.means.copy_(self._counts(margins_TS, self.offsets).double().mean(dim=0))
        self.wanted.fill_(wanted)

    @staticmethod
    def _counts(margins_NS: torch.Tensor, offsets_J: torch.Tensor) -> torch.Tensor:
        return torch.stack([(margins_NS >= -offset).sum(dim=-1) for offset in offsets_J], dim=-1)

    def counts(self, margins_NS: torch.Tensor) -> torch.Tensor:
        """What to add up of each token for those after it, int64 [N, J + 1]: experts at each offset, and itself."""
        counts_NJ = self._counts(margins_NS, self.offsets.to(margins_NS.dtype))
        return torch.cat([counts_NJ, torch.ones_like(counts_NJ[:, :1])], dim=-1)

    def offset(self, seen_NJ1: torch.Tensor) -> torch.Tensor:
        """Each token's offset, float64 [N], from the sums of `counts` over the tokens before it.

        Between two offsets the mean is taken for linear; beyond the outermost nothing is gained.
        """
        offsets_J, means_J = self.offsets.double(), self.means.double()
        sums_NJ = seen_NJ1[:, :-1].double() + PRIOR_TOKENS * means_J
        means_NJ = sums_NJ / (seen_NJ1[:, -1:].double() + PRIOR_TOKENS)
        wanted, here = self.wanted.double(), SHARES.index(1.0)
        wanted_N1 = wanted + (GAIN - 1) * (wanted - means_NJ[:, here : here + 1])
        short_NJ = wanted_N1 - means_NJ  # descending
        above_N = (short_NJ > 0).sum(dim=-1).clamp(1, len(SHARES) - 1)[:, None]
        left_N, right_N = (short_NJ.gather(-1, above_N - 1 + n)[:, 0] for n in (0, 1))
        share_N = (left_N / (left_N - right_N).clamp_min(1e-9)).clamp(0, 1)
        low_N, high_N = (offsets_J[above_N[:, 0] - 1 + n] for n in (0, 1))
        return low_N + share_N * (high_N - low_N)
