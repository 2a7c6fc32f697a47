"""How many of its units a host keeps in slots, as `--resident-experts` says. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pregate.base.errors import UserError


def share_in_slots(resident: float | None, coming_bytes: Sequence[int], staying_bytes: Sequence[int]) -> float:
    """`resident_share` of units that take `coming_bytes` each where they come and go, but 1 where all fit as they lie
    that stay. Example: 4 units of 8 bytes, or 6 that stay: 24 -> 1, 20 -> 0.625."""
    return 1.0 if resident_share(resident, staying_bytes) == 1 else resident_share(resident, coming_bytes)


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
