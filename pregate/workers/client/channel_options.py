"""What a channel to a host is asked, and what it counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pregate.base.errors import UserError
from pregate.workers.link.transport import CurveKeys


@dataclass
class ChannelStats:
    """Counters of one client. Bytes are whole messages as sent; an in-process client moves none. `renewals`: times
    both sockets were made anew. `wait_s` were spent waiting for answers."""

    plans: int = 0
    groups: int = 0
    plan_bytes: int = 0
    group_bytes: int = 0
    reply_bytes: int = 0
    indexed_groups: int = 0
    resent_groups: int = 0
    discarded_answers: int = 0
    renewals: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True)
class ChannelOptions:
    """`host_timeout_s` without a sign of life and a host counts as lost, and so it does when its connection is cut
    and does not come back for `cut_timeout_s`. A greeting has `hello_timeout_s`, connections included. `keys` are
    needed where the server has a public key."""

    host_timeout_s: float = 3.0
    cut_timeout_s: float = 0.5
    hello_timeout_s: float = 10.0
    keys: CurveKeys | None = None

    def __post_init__(self) -> None:
        if self.host_timeout_s <= 0 or self.hello_timeout_s <= 0:
            raise UserError.of("channel options", asdict(self), "host_timeout_s and hello_timeout_s must be above 0")
