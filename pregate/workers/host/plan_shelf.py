"""`PlanShelf`: the plans a host keeps. They are soft state, whose loss costs one NEED_PLAN."""

from __future__ import annotations

import threading
from collections import OrderedDict

from pregate.base.errors import PregateError
from pregate.workers.host.prepared import PreparedPlan
from pregate.workers.link.protocol import GroupKey

#: Plans of this many engines are kept; the one heard of least recently goes first.
MAX_ENGINES = 16


class NeedPlanError(PregateError):
    """A group carries no index and its step's plan is not here (never sent, or forgotten)."""


class PlanShelf:
    """The last `num_plans` plans of each engine, by step. The compute thread puts and gets, the I/O thread forgets."""

    def __init__(self, num_plans: int) -> None:
        self._num_plans = num_plans
        self._lock = threading.Lock()
        self._plans: OrderedDict[str, OrderedDict[int, PreparedPlan]] = OrderedDict()

    def put(self, engine: str, prepared: PreparedPlan) -> None:
        with self._lock:
            steps = self._plans.setdefault(engine, OrderedDict())
            steps[prepared.plan.step] = prepared
            self._plans.move_to_end(engine)
            while len(steps) > self._num_plans:
                steps.popitem(last=False)
            while len(self._plans) > MAX_ENGINES:
                self._plans.popitem(last=False)

    def get(self, key: GroupKey) -> PreparedPlan:
        """Return the plan of the group's step; NeedPlanError without one."""
        with self._lock:
            prepared = self._plans.get(key.engine, {}).get(key.step)
        if prepared is None:
            raise NeedPlanError(f"no plan for step {key.step}")
        return prepared

    def forget(self, engine: str) -> None:
        with self._lock:
            self._plans.pop(engine, None)
