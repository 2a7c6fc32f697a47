"""Weights that are products of something small, computed so that every machine gets the same bits.

A checkpoint's `factors.safetensors` keeps what some of its tensors were made of: a table of the path router that is the
parent's embedding times a projection, and low-rank changes of weights (LoRA). So an adapter can carry the factors in
place of the product. Sums are exact, or taken in one order, one operation at a time: no library's blocking or number of
threads bears on them.

    NAME.projection [D, C]  NAME.mean [D]  NAME.scale []     NAME is what `projected` gives of the embedding
    NAME.up.N [(R,) A, K]   NAME.down.N [(R,) K, B]          NAME was changed by up @ down in its Nth tuning
    NAME.int8 [V, C]        NAME.scale [V]                   in adapters: NAME is what `dequantised` gives

Shape letters: V vocabulary, D the parent's hidden width, C router width, R experts of a stack, A rows, B columns, K
rank.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from pregate.model.shard_file import FACTORS, ShardFile

#: Numbers of the table go up to 2 ** this, in units of its standard deviation; beyond it they are cut.
_MAGNITUDE_BITS = 6
#: Whole numbers up to 2 ** this are exact in float64.
_EXACT_BITS = 53
_ROWS = 4096
#: The path router's table of tokens.
TABLE = "path_router.embedding.weight"


def projected(
    table_VD: torch.Tensor, projection: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """(table - mean) * scale @ projection [V, C], float32.

    Both factors are rounded to whole numbers of so few bits (for a width of 4096 to 2 ** -14 of the table's deviation)
    that every product and every sum of them is exact in float64, in whatever order a library adds.
    """
    bits = (_EXACT_BITS - math.ceil(math.log2(max(2, table_VD.shape[1])))) // 2
    largest = float(projection.abs().max())
    shift = bits - (math.frexp(largest)[1] if largest else 0)
    whole_DC = torch.round(projection.double() * 2.0**shift)
    limit, fraction, parts = 2.0**bits, bits - _MAGNITUDE_BITS, []
    for rows in table_VD.split(_ROWS):
        whole = torch.round((rows.double() - mean.double()) * scale.double() * 2.0**fraction)
        product = whole.clamp(-limit, limit) @ whole_DC
        parts.append((product * 2.0 ** (-shift - fraction)).float())
    return torch.cat(parts)


def low_rank_change(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """up @ down [(R,) A, B] in float32: one product and one sum at a time, in the order of K."""
    up, down = up.float(), down.float()
    total = up.new_zeros(*up.shape[:-1], down.shape[-1])
    for k in range(up.shape[-1]):
        total += up[..., k : k + 1] * down[..., k : k + 1, :]
    return total


def changed(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`weight` as it is after a tuning by low-rank change, in its own type."""
    return (weight.float() + low_rank_change(up, down)).to(weight.dtype)


def quantised(table_VC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table in int8, and the float32 scale of every row [V]."""
    scale_V = table_VC.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return torch.round(table_VC / scale_V[:, None]).clamp(-127, 127).to(torch.int8), scale_V


def dequantised(table_VC: torch.Tensor, scale_V: torch.Tensor) -> torch.Tensor:
    """Undo `quantised`, but for the rounding."""
    return table_VC.float() * scale_V[:, None]


def read_factors(folder: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of what its tensors were made of; empty where it keeps nothing."""
    path = folder / FACTORS
    if not path.is_file():
        return {}
    shard = ShardFile(path)
    return {name: shard.read(name) for name in shard.tensors}
