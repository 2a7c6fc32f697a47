"""How benchmarks name cuts of a model."""

from __future__ import annotations

import re

#: (experts, shared, active), shared ones counted in experts.
Cut = tuple[int, int, int]


def label(cut: Cut | None) -> str:
    """Name a cut, S3A2E8 for 8 experts, 3 of them shared, 2 of the others active; "" for the dense model."""
    return "S{1}A{2}E{0}".format(*cut) if cut else ""


def cut_of(name: str) -> Cut:
    """Return the cut that `label` named; ValueError if it is no name of one."""
    found = re.fullmatch(r"S(\d+)A(\d+)E(\d+)", name)
    if found is None:
        raise ValueError(f"cut {name}: not of the form S3A2E8")
    shared, active, experts = map(int, found.groups())
    return experts, shared, active


def in_order(name: str) -> Cut:
    """Sort key of names in tables: fewer experts first, then more shared ones, then more active ones."""
    experts, shared, active = cut_of(name)
    return experts, -shared, -active
