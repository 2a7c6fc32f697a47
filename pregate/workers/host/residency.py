"""How many of its units a host keeps in slots, as `--resident-experts` says. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pregate.base.errors import UserError


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
    share of them is at least two; UserError for a count or bytes that are less.
    Example: 4 units of 10 bytes each: 3 -> 0.75, 0.1 -> 0.5, 30 -> 0.75.
    """
    total = len(unit_bytes)
    if resident is None or not total:
        return 1.0
    if resident > total:  # bytes
        resident = total * min(1.0, resident / sum(unit_bytes))
    elif resident < 1:
        resident = max(2.0, resident * total)
    if resident >= total:
        return 1.0
    if resident < min(2, total):
        allowed = f"allowed: room for 2 experts or more, of {total} on this host"
        raise UserError.of("--resident-experts", f"{resident:g} experts", allowed)
    return resident / total
