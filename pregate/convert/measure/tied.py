"""Whether experts that overlap still hold equal weights where they hold the same parent neuron.

Shape letter: U distinct rows.
"""

from __future__ import annotations

import torch

from pregate.model.layers import RoutedMLP


def rows_are_tied(mlp: RoutedMLP) -> bool:
    """Whether rows of one layer that hold the same parent neuron have equal weights, bit for bit."""
    slots, first_U = distinct_neurons(mlp.neuron_index.long())
    gate_up, down = mlp.dense_weights()
    return all(torch.equal(rows, rows[first_U[slots]]) for rows in (*gate_up.chunk(2), down.T))


def distinct_neurons(neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which distinct neuron each row holds, in the shape of `neurons`, and the first row (flat) of each of them [U]."""
    distinct_U, slots = neurons.unique(return_inverse=True)
    first_U = torch.full_like(distinct_U, slots.numel())
    return slots, first_U.scatter_reduce_(0, slots.flatten(), torch.arange(slots.numel()).to(slots), "amin")
