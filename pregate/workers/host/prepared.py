"""`PreparedPlan`: a step's plan and what the kernels need of it, made for all layers when the plan arrives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pregate.base.telemetry import Span
from pregate.kernels.contract import ExpertFFN
from pregate.kernels.units import GroupRows
from pregate.workers.host.store import UnitStore
from pregate.workers.link.protocol import HostPlan


@dataclass(frozen=True, eq=False)
class PreparedPlan:
    """A plan beside the prepared rows of its layers. A layer is not in `rows` where the plan asks nothing of it or a
    unit of it was not held yet; `versions` int64 [L] are those of the slots that `rows` name. `spans`: one a traced
    request."""

    plan: HostPlan
    rows: dict[int, GroupRows]
    versions: np.ndarray
    spans: tuple[Span, ...] = ()

    def ends(self, layer: int) -> None:
        """The groups of `layer` are computed: with the last one that the plan names its spans end."""
        if self.spans and layer == int(np.flatnonzero(np.diff(self.plan.unit_offsets))[-1]):
            for one in self.spans:
                one.end()

    def rows_of(self, layer: int, store: UnitStore) -> GroupRows | None:
        """Return the rows of `layer`; None if there are none or units have moved to other slots since."""
        rows = self.rows.get(layer)
        return rows if rows is not None and self.versions[layer] == store.versions[layer] else None


def prepare(plan: HostPlan, ffn: ExpertFFN, store: UnitStore) -> PreparedPlan:
    """Find the slots of all units of a (checked) plan at once, and let `ffn` make all that its groups will need.

    Example: layer 0 asks experts 1 and 4 in slots 0 and 1, layer 2 expert 3, which is not held: `rows` has layer 0
    only, and a group of layer 2 is looked up when it comes, which reads the expert.
    """
    if store.tiered:  # units come and go before their layer is reached
        return PreparedPlan(plan, {}, store.versions)
    versions = store.versions.copy()  # before the slots are looked up: a move in between must show
    layer_of_unit = plan.layer_of_unit
    slots = store.slots(layer_of_unit, plan.expert_ids)
    missing = set(layer_of_unit[slots < 0].tolist())
    layers = [layer for layer in np.unique(layer_of_unit).tolist() if layer not in missing]
    slots_of_layer = np.split(slots, plan.unit_offsets[1:-1])
    indexes = [plan.layer(layer) for layer in layers]
    groups = [GroupRows(slots_of_layer[n], i.counts, i.row_index) for n, i in zip(layers, indexes, strict=True)]
    return PreparedPlan(plan, dict(zip(layers, ffn.prepare(groups), strict=True)), versions)
