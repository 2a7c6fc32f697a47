"""Plans kept on either side of a channel: a host's are soft state, whose loss costs one NEED_PLAN."""

from __future__ import annotations

import threading
from collections import OrderedDict

from pregate.base.errors import PregateError, ProtocolError
from pregate.workers.prepared import PreparedPlan
from pregate.workers.protocol import GroupKey, HostPlan

#: Plans of this many engines are kept; the one heard of least recently goes first.
MAX_ENGINES = 16
#: Plans a client keeps to answer NEED_PLAN with.
NUM_SENT_PLANS = 4


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


class SentPlans:
    """The last plans a client sent, to send again to a host that lost them."""

    def __init__(self) -> None:
        self._plans: OrderedDict[int, HostPlan] = OrderedDict()

    def put(self, plan: HostPlan) -> None:
        self._plans[plan.step] = plan
        while len(self._plans) > NUM_SENT_PLANS:
            self._plans.popitem(last=False)

    def get(self, step: int) -> HostPlan:
        """Return the plan of `step`; ProtocolError if none was sent lately."""
        if step not in self._plans:
            raise ProtocolError(f"the host needs the plan of step {step}, which was not sent")
        return self._plans[step]
