"""Training experts that overlap as the one dense FFN they were cut from: a row that several hold is one weight.

(Read-ME's released code trains the dense matrix under 0/1 masks, which is the same.) Within `tied_rows` a layer's
routed experts are a gather from their distinct rows; so a shared row gets the sum of its experts' gradients, and all
its copies stay equal bit for bit.

Shape letters: R routed experts, M expert width, U distinct rows, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from pregate.convert.measure.overlap import distinct_neurons
from pregate.model.layers import RoutedMLP


class _Gather(nn.Module):
    """A layer's experts from its distinct rows; `slots_RM` int64 says which one each expert's row is."""

    slots_RM: torch.Tensor
    first_U: torch.Tensor

    def __init__(self, neurons_RM: torch.Tensor) -> None:
        super().__init__()
        slots_RM, first_U = distinct_neurons(neurons_RM)
        self.register_buffer("slots_RM", slots_RM)
        self.register_buffer("first_U", first_U)

    def _distinct(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, M, ...] to [U, ...]: of equal rows the first."""
        return rows.flatten(0, 1)[self.first_U]


class _GatherGateUp(_Gather):
    """[U, 2, D] to [R, 2M, D], gate rows first."""

    def forward(self, distinct: torch.Tensor) -> torch.Tensor:
        return distinct[self.slots_RM].transpose(1, 2).flatten(1, 2)

    def right_inverse(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._distinct(gate_up.unflatten(1, (2, -1)).transpose(1, 2))


class _GatherDown(_Gather):
    """[U, D] to [R, D, M]."""

    def forward(self, distinct: torch.Tensor) -> torch.Tensor:
        return distinct[self.slots_RM].transpose(1, 2).contiguous()

    def right_inverse(self, down: torch.Tensor) -> torch.Tensor:
        return self._distinct(down.transpose(1, 2))


_GATHERS = {"gate_up_proj": _GatherGateUp, "down_proj": _GatherDown}


@contextmanager
def tied_rows(mlps: Sequence[RoutedMLP]) -> Iterator[None]:
    """Within the block, rows of one layer's routed experts that hold the same parent neuron are one parameter.

    The parameters' names and shapes differ within; make an optimizer after entering. On leaving they are as before,
    with the values learned.
    """
    held: list[nn.Module] = []
    for mlp in mlps:
        if mlp.experts is None:
            continue
        neurons_RM = mlp.routed_neurons.long()
        for name, gather in _GATHERS.items():
            parametrize.register_parametrization(mlp.experts, name, gather(neurons_RM))
        held.append(mlp.experts)
    try:
        yield
    finally:
        for experts in held:
            for name in _GATHERS:
                parametrize.remove_parametrizations(experts, name)
