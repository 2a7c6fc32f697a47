"""What a path router or a read network costs: floating-point operations per token, to judge it by its backbone's."""

from __future__ import annotations

from collections.abc import Sequence

from pregate.model.config import LayerCut, PathRouterConfig, ReadNetworkConfig
from pregate.model.path_heads import head_sizes

#: What a path router may cost of its backbone before that is worth a warning.
MAX_SHARE = 0.01


def router_flops(config: PathRouterConfig, cuts: Sequence[LayerCut], selection: str = "top_k") -> int:
    """Operations per token of all matrix products, a multiply and an add as two, with a full window.

    Norms, activations, the choice itself and the embedding's look-up are left out. Example: dim 128, one block,
    window 64 and 32 layers of 8 experts: 24 * 128**2 in the block's weights, 4 * 64 * 128 over its window, and
    2 * 128 * 256 in the heads: 491,520.
    """
    block = 24 * config.dim**2 + 4 * config.window * config.dim
    return config.num_blocks * block + _head_flops(config, [n for n in head_sizes(config, cuts, selection) if n])


def read_flops(config: ReadNetworkConfig, hidden_size: int, cuts: Sequence[LayerCut]) -> int:
    """The same of a read network. Example: dim 64 after the first of 3 layers of 6 experts, hidden size 64: 2 * 64 * 64
    and 2 * 64 * 12, together 9,728."""
    return 2 * config.dim * (hidden_size + sum(c.num_routed for c in cuts[config.layer :]))


def _head_flops(config: PathRouterConfig, sizes: Sequence[int]) -> int:
    if config.heads == "single":
        return 2 * config.dim * max(sizes, default=0)
    cells = 6 * config.dim**2 * (1 + len(sizes)) if config.heads == "recurrent" else 0
    return cells + 2 * config.dim * sum(sizes)


def backbone_flops(num_parameters: int) -> int:
    """Operations per token of a dense model of that many parameters, embeddings left out: two for each."""
    return 2 * num_parameters
