"""RMS norms against their twin, and that against torch's."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pregate.kernels import reference
from pregate.kernels.cpu import norm


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 8), (16, 576), (5, 77)])
def test_norms_are_torchs(rows, width):
    generator = torch.Generator().manual_seed(0)
    x, more = (torch.randn(rows, width, generator=generator) * 3 for _ in range(2))
    weight, out = torch.randn(width, generator=generator), torch.empty(rows, width)
    norm.rms_norm(x.numpy(), weight.numpy(), 1e-5, out.numpy())
    torch.testing.assert_close(out, reference.rms_norm(x, weight, 1e-5))
    torch.testing.assert_close(out, F.rms_norm(x, (width,), weight, 1e-5))
    expected = x + more
    norm.add_rms_norm(x.numpy(), more.numpy(), weight.numpy(), 1e-5, out.numpy())
    assert torch.equal(x, expected)
    torch.testing.assert_close(out, reference.rms_norm(expected, weight, 1e-5))


def test_a_row_that_overflowed_stays_alone():
    x, weight = np.ones((3, 32), np.float32), np.ones(32, np.float32)
    x[1, 4], out = np.nan, np.empty((3, 32), np.float32)
    norm.rms_norm(x, weight, 1e-6, out)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()
