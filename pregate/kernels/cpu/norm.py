"""RMS norms on a CPU in fp32, compiled by numba: one pass over a row where torch takes six operations.

Shape letters: T rows, D width.
"""

from __future__ import annotations

import numpy as np

from pregate.base.compiled import ANY_ORDER, compiled, inlined

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined(ANY_ORDER)
def _norm_row(x_D, weight_D, eps, out_D):  # noqa: ANN001, ANN202
    width = len(x_D)
    squares = _ZERO
    for d in range(width):
        squares += x_D[d] * x_D[d]
    scale = _ONE / np.sqrt(squares / np.float32(width) + np.float32(eps))
    for d in range(width):
        out_D[d] = x_D[d] * scale * weight_D[d]


@compiled("void(f4[:,::1], f4[::1], f8, f4[:,::1])", ANY_ORDER)
def rms_norm(x_TD, weight_D, eps, out_TD):  # noqa: ANN001, ANN201
    """out = x / rms(x) * weight."""
    for t in range(len(x_TD)):
        _norm_row(x_TD[t], weight_D, eps, out_TD[t])


@compiled("void(f4[:,::1], f4[:,::1], f4[::1], f8, f4[:,::1])", ANY_ORDER)
def add_rms_norm(x_TD, more_TD, weight_D, eps, out_TD):  # noqa: ANN001, ANN201
    """x += more, then out = x / rms(x) * weight."""
    for t in range(len(x_TD)):
        x_D, more_D = x_TD[t], more_TD[t]
        for d in range(len(x_D)):
            x_D[d] += more_D[d]
        _norm_row(x_D, weight_D, eps, out_TD[t])
