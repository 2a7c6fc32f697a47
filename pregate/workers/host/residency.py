"""How many of its units a host keeps in slots, as `--resident-experts` says. Reads nothing but the checkpoint's header
files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from pregate.base.errors import UserError
from pregate.base.sizes import written

if TYPE_CHECKING:
    import torch

    from pregate.model.checkpoint import CheckpointReader


def held_share(
    reader: CheckpointReader,
    layers: Iterable[int],
    resident: float | None,
    expert_ffn: str,
    device: torch.device,
    dtype: torch.dtype,
    fits_fp16: Callable[[], bool],
) -> tuple[float, bool, int]:
    """Return which share of a host's units, by their `layers`, has slots, whether they lie as those that come and go,
    and the bytes that all of them take so. Layers that the checkpoint lacks do not count.

    `expert_ffn`, the implementation by name, and what follows it as for `value_bytes`.
    """
    from pregate.kernels.expert_ffn import value_bytes  # and torch, which whoever reads configs has no use for

    cuts, hidden = reader.config.cuts, reader.hidden_size
    widths = (hidden, *(cut.expert_width for cut in cuts if cut.num_routed))
    chosen = expert_ffn, device, dtype, reader.hidden_act, widths, reader.unit_dtype
    coming, staying = value_bytes(*chosen, fits_fp16)
    values = [3 * hidden * cuts[layer].expert_width for layer in layers if 0 <= layer < len(cuts)]
    share, passing = share_in_slots(resident, [coming * n for n in values], [staying * n for n in values])
    return share, passing, (coming if passing else staying) * sum(values)


def share_in_slots(
    resident: float | None, coming_bytes: Sequence[int], staying_bytes: Sequence[int]
) -> tuple[float, bool]:
    """`resident_share` of units that take `coming_bytes` each where they come and go, and whether they lie so.

    All stay as those lie that do, `staying_bytes` each, where there is room for that. Example: 4 units of 8 bytes, or 6
    that stay: 24 -> 1 and False, 20 -> 0.625 and True; of 8, or 16 that stay: 32 -> 1 and True.
    """
    total = len(staying_bytes)
    if resident is None or resident == total or (resident > total and resident >= sum(staying_bytes)):
        return 1.0, False
    return resident_share(resident, coming_bytes), True


def resident_share(resident: float | None, unit_bytes: Sequence[int]) -> float:
    """Return which share of a host's units there are slots for; 1 is all.

    `resident`: None for all; a count, below 1 a share, above their number bytes. `unit_bytes` has one entry per unit. A
    share of them is at least two; UserError for a count or bytes that are less, in what was given.
    Example: 4 units of 10 bytes each: 3 -> 0.75, 0.1 -> 0.5, 30 -> 0.75.
    """
    total = len(unit_bytes)
    if resident is None or not total:
        return 1.0
    least, num_bytes = min(2, total), sum(unit_bytes)
    least_bytes = -(-least * num_bytes // total)
    if resident > total and resident < least_bytes:
        allowed = f"allowed: {least_bytes} bytes or more, room for {least} of a host's {total} experts"
        raise UserError.of("--resident-experts", written(resident), allowed)
    if 1 <= resident < least:
        allowed = f"allowed: {least} or more of a host's {total} experts, below 1 a share, or bytes"
        raise UserError.of("--resident-experts", f"{resident:g}", allowed)
    share = resident / num_bytes if resident > total else resident / total if resident >= 1 else resident
    return min(1.0, max(share, least / total))
