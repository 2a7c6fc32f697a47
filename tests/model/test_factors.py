"""Products that come out the same on every machine: exact sums, or one order of them."""

from __future__ import annotations

import torch

from pregate.model.factors import changed, dequantised, low_rank_change, projected, quantised


def test_a_projection_is_the_product_in_any_order():
    """Columns of both factors in another order, and a matrix in pieces: the same bits; and close to the product."""
    generator = torch.Generator().manual_seed(0)
    table, projection = (torch.randn(*shape, generator=generator) for shape in ((300, 64), (64, 12)))
    mean, scale = table.double().mean(dim=0), 1 / table.double().std()
    whole = projected(table, projection, mean, scale)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(projected(table[:, order], projection[order], mean[order], scale), whole)
    assert torch.equal(torch.cat([projected(rows, projection, mean, scale) for rows in table.split(7)]), whole)
    exact = ((table.double() - mean) * scale) @ projection.double()
    torch.testing.assert_close(whole.double(), exact, rtol=0, atol=1e-4)


def test_a_projection_by_hand():
    """[[3, 1]] less [1, 1], doubled, is [4, 0]; times [[0.5], [7]] is 2."""
    found = projected(
        torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5], [7.0]]), torch.tensor([1.0, 1.0]), torch.tensor(2.0)
    )
    assert found.tolist() == [[2.0]]


def test_a_low_rank_change_is_the_product_and_a_units_is_its_part_of_it():
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(3, 6, 4, generator=generator), torch.randn(3, 4, 5, generator=generator)
    change = low_rank_change(up.bfloat16(), down.bfloat16())
    torch.testing.assert_close(change, up.bfloat16().float() @ down.bfloat16().float())
    weight = torch.randn(3, 6, 5, generator=generator).bfloat16()
    whole = changed(weight, up, down)
    assert whole.dtype == torch.bfloat16
    assert torch.equal(changed(weight[1], up[1], down[1]), whole[1])


def test_int8_rows_are_within_half_a_step():
    table = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 20)[:, None]
    table[3] = 0
    int8, scale = quantised(table)
    assert int8.dtype == torch.int8
    assert ((dequantised(int8, scale) - table).abs() <= 0.5001 * scale[:, None]).all()
