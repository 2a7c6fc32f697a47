from __future__ import annotations

import numpy as np
import pytest
import torch

from pregate.convert.cut.ridge import CrossFit, Ridge


def test_ridge_without_penalty_is_least_squares():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)) + 5.0, rng.normal(size=(40, 2))
    weight, bias = Ridge(torch.from_numpy(x), strength=0.0).fit(torch.from_numpy(y))
    expected = np.linalg.lstsq(np.column_stack([x, np.ones(40)]), y, rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), expected[:3].T, atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), expected[3], atol=1e-8)


def test_ridge_with_penalty_is_least_squares_with_extra_rows():
    """The penalty lambda |w|^2 equals rows sqrt(lambda) * identity with target 0, intercept left free."""
    rng = np.random.default_rng(1)
    x, y, strength = rng.normal(size=(30, 4)), rng.normal(size=(30, 1)), 0.3
    weight, bias = Ridge(torch.from_numpy(x), strength=strength).fit(torch.from_numpy(y))
    centred = x - x.mean(axis=0)
    penalty = strength * np.mean(np.sum(centred**2, axis=0))
    rows = np.block([[x, np.ones((30, 1))], [np.sqrt(penalty) * np.eye(4), np.zeros((4, 1))]])
    expected = np.linalg.lstsq(rows, np.concatenate([y, np.zeros((4, 1))]), rcond=None)[0]
    np.testing.assert_allclose(weight.numpy()[0], expected[:4, 0], atol=1e-9)
    assert bias.item() == pytest.approx(expected[4, 0])


def test_ridge_survives_inputs_that_repeat():
    x = torch.ones(10, 4)
    x[:, 0] = torch.arange(10.0)
    weight, bias = Ridge(x).fit(2 * x[:, :1] + 1)
    assert torch.isfinite(weight).all()
    assert torch.allclose(x.double() @ weight.T + bias, 2 * x[:, :1].double() + 1, atol=0.1)


def test_without_intercept_it_goes_through_the_origin():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(40, 3)) + 1.0, rng.normal(size=(40, 2)) + 4.0
    weight, bias = Ridge(torch.from_numpy(x), intercept=False, strength=0.0).fit(torch.from_numpy(y))
    np.testing.assert_allclose(weight.numpy(), np.linalg.lstsq(x, y, rcond=None)[0].T, atol=1e-9)
    assert bias.tolist() == [0.0, 0.0]


def test_cross_fitted_scores_come_from_the_other_half():
    x, y = torch.randn(5001, 4), torch.randn(5001, 2)  # more rows than are taken at a time
    scores = CrossFit(x).scores(y)
    for seen, new in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        weight, bias = Ridge(x[seen]).fit(y[seen])
        torch.testing.assert_close(scores[new].double(), x[new].double() @ weight.T + bias, rtol=1e-4, atol=1e-5)


def test_cross_fitted_scores_do_not_flatter():
    """Targets that have nothing to do with the inputs: a fit explains its own rows, and no others."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 90, generator=generator), torch.randn(200, 1, generator=generator)
    weight, bias = Ridge(x).fit(y)
    own = torch.nn.functional.linear(x.double(), weight, bias)
    assert torch.corrcoef(torch.cat([own, y.double()], dim=1).T)[0, 1] > 0.5
    assert torch.corrcoef(torch.cat([CrossFit(x).scores(y), y], dim=1).T)[0, 1].abs() < 0.2
