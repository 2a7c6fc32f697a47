"""Ridge regression in closed form, with many right-hand sides for one set of inputs.

Shape letters: T rows, D inputs, R outputs.
"""

from __future__ import annotations

import torch

#: Ridge strength relative to the mean diagonal of the inputs' covariance.
STRENGTH = 1e-3
#: Rows turned into float64 at a time.
CHUNK_ROWS = 2048


class Ridge:
    """Least squares from `x_TD` with a penalty on the slopes of `strength` times the mean variance of the inputs.

    The inputs' covariance is factored once, in float64. With `intercept` inputs and outputs are centred first.
    """

    def __init__(self, x_TD: torch.Tensor, intercept: bool = True, strength: float = STRENGTH) -> None:
        self._x_TD = x_TD
        mean_D = torch.zeros(x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
        if intercept:
            mean_D = sum((rows.double().sum(dim=0) for rows in x_TD.split(CHUNK_ROWS)), mean_D) / len(x_TD)
        self._intercept, self._mean_D = intercept, mean_D
        gram_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64, device=x_TD.device)
        for rows in x_TD.split(CHUNK_ROWS):
            centred = rows.double() - mean_D
            gram_DD += centred.T @ centred
        # Inputs that are all zero leave nothing to fit: any positive diagonal gives slopes of zero.
        gram_DD.diagonal().add_((strength * gram_DD.diagonal().mean()).clamp_min(1e-30))
        self._factor_DD = torch.linalg.cholesky(gram_DD)

    def fit(self, y_TR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [R, D] and bias [R] (0 without intercept), float64."""
        y_mean = y_TR.double().mean(dim=0) if self._intercept else torch.zeros_like(y_TR[0], dtype=torch.float64)
        products = torch.zeros(len(self._mean_D), y_TR.shape[1], dtype=torch.float64, device=y_TR.device)
        for rows, targets in zip(self._x_TD.split(CHUNK_ROWS), y_TR.split(CHUNK_ROWS), strict=True):
            products += (rows.double() - self._mean_D).T @ (targets.double() - y_mean)
        weight_RD = torch.cholesky_solve(products, self._factor_DD).T
        return weight_RD, y_mean - weight_RD @ self._mean_D


class CrossFit:
    """Two fits, each on every other row, that speak for the rows they have not seen.

    A fit with as many inputs as rows would repeat what it has seen, and say nothing of how a gate does on new text.
    """

    def __init__(self, x_TD: torch.Tensor, intercept: bool = True) -> None:
        self.x_TD = x_TD
        folds = (slice(0, None, 2), slice(1, None, 2))
        self._folds = [(seen, Ridge(x_TD[seen], intercept), new) for seen, new in (folds, folds[::-1])]

    def scores(self, y_TR: torch.Tensor) -> torch.Tensor:
        """What is said of `y_TR` [T, R], row by row without that row, in the inputs' type."""
        scores_TR = torch.empty(y_TR.shape, dtype=self.x_TD.dtype, device=self.x_TD.device)
        for seen, ridge, new in self._folds:
            weight_RD, bias_R = (t.to(scores_TR.dtype) for t in ridge.fit(y_TR[seen]))
            scores_TR[new] = torch.nn.functional.linear(self.x_TD[new], weight_RD, bias_R)
        return scores_TR
