"""Routing policies to compare a real router with: random choice, the oracle, every expert on; and a static
mask, which is no routing at all.

Set a policy as `RoutedForCausalLM.routing_policy`. Shape letters: T tokens, D hidden width, R routed experts, K active,
M expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from pregate.convert.files.skeleton import with_forward
from pregate.convert.measure.overlap import distinct_neurons
from pregate.kernels.reference import above, top_k
from pregate.model.gates import Choice
from pregate.model.layers import RoutedMLP, SharedExpert, weighted_mass
from pregate.model.modeling import RoutedForCausalLM


class RandomPolicy:
    """Each token and layer gets `num_active` experts at random, the same for the same seed and order of calls."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        scores_TR = torch.rand(x_TD.shape[0], mlp.cut.num_routed, generator=self._generator)
        return Choice(top_k(scores_TR.to(x_TD.device), mlp.cut.num_active))


class OraclePolicy:
    """The experts of greatest contribution mass, which no router can know without computing them all.

    It chooses as the layer does: a fixed number of experts, or those above the mass that made their mean number
    `num_active` on the calibration text. With `fixed_number` always the former.
    """

    def __init__(self, fixed_number: bool = False) -> None:
        self._fixed_number = fixed_number

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        mass_TR = weighted_mass(mlp, x_TD)
        if mlp.selection == "threshold" and not self._fixed_number:
            return Choice(above(mass_TR, mlp.mass_threshold))
        return Choice(top_k(mass_TR, mlp.cut.num_active))


class AllPolicy:
    """Every routed expert, weights 1: the dense model again, where the cut is a partition of its neurons."""

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        return Choice(torch.arange(mlp.cut.num_routed, device=x_TD.device).expand(x_TD.shape[0], -1))


@contextmanager
def static_mask(model: RoutedForCausalLM) -> Iterator[None]:
    """Within the block every FFN is its own neurons of greatest mean contribution, (S + A) * M of them, always on.

    That is what pruning gives at the same active share, by the scores kept from the calibration text.
    """
    with ExitStack() as stack:
        for mlp in model.routed_mlps:  # made when it runs: a layer may be read only then
            stack.enter_context(with_forward(mlp, lambda x, mlp=mlp: _pruned(mlp)(x)))
        yield


def _pruned(mlp: RoutedMLP) -> SharedExpert:
    """The best neurons of `mlp` as one FFN, in row order; of a neuron that several experts hold, the first row."""
    cut = mlp.cut
    width = (cut.num_shared + cut.num_active) * cut.expert_width
    rows = distinct_neurons(mlp.neuron_index.long())[1].sort().values
    best = torch.argsort(mlp.neuron_score[rows], descending=True, stable=True)[:width]
    kept = rows[best].sort().values
    width = len(kept)  # fewer where experts that overlap hold fewer neurons than their widths add up to
    gate_up, down = mlp.dense_weights()
    pruned = SharedExpert(mlp.hidden_size, width, mlp.act_name).to(down)
    gate, up = gate_up.chunk(2)
    pruned.gate_up_proj.data = torch.cat([gate[kept], up[kept]])
    pruned.down_proj.data = down[:, kept]
    return pruned.requires_grad_(False)
