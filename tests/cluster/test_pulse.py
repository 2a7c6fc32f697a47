"""An actor's life as Ray tells of it."""

import asyncio
from typing import Any

import ray.exceptions

from pregate.cluster import pulse
from pregate.cluster.pulse import MOST_UNAVAILABLE, Pulse, look


class Unreachable:
    """An actor that Ray calls unavailable so many times; then it answers."""

    def __init__(self, num_times: int) -> None:
        self.num_asked, self._num_times, self.status = 0, num_times, self

    async def remote(self) -> dict[str, Any]:
        self.num_asked += 1
        if self.num_asked <= self._num_times:
            raise ray.exceptions.ActorUnavailableError("the network is gone", None)
        return {"pid": 7}


async def lost(actor: Unreachable) -> Pulse:
    found = Pulse(actor)
    for _ in range(3):
        await look([found])
    return found


def test_an_actor_that_stays_unavailable_is_lost_and_one_that_comes_back_is_not(monkeypatch):
    """Asked as often as that, and no more: nobody would end the question."""
    monkeypatch.setattr(pulse.asyncio, "sleep", lambda seconds, sleep=asyncio.sleep: sleep(0))
    gone, back = Unreachable(1 << 30), Unreachable(MOST_UNAVAILABLE - 1)
    assert asyncio.run(lost(back)).lost == "" and back.num_asked > MOST_UNAVAILABLE - 1
    assert asyncio.run(lost(gone)).lost == "Ray cannot reach it"
    assert gone.num_asked % MOST_UNAVAILABLE == 0
