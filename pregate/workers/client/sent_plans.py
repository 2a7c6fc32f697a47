"""`SentPlans`: what an engine sent to a host, kept to be sent again."""

from __future__ import annotations

from collections import OrderedDict

from pregate.base.errors import ProtocolError
from pregate.workers.link.protocol import HostPlan

#: Plans a client keeps to answer NEED_PLAN with.
NUM_SENT_PLANS = 4


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
