"""How many hosts there should be, by how much of the time those that there are compute. Pure, no clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

#: More hosts when that many were wanted for `UP_S` in a row, fewer for `DOWN_S`: starting one costs seconds, and a load
#: that went may come back.
UP_S, DOWN_S = 10.0, 60.0
#: Fewer only where the hosts that are left would then have this share of the target at most.
SLACK = 0.8
#: What hosts computed is looked at over so long: some answer late.
OVER_S = 5.0


class HostLoad:
    """Wants as many hosts, `least` to `most`, as keep each computing for the share `target` of the time.

    Example with target 0.5: two hosts that compute 0.9 of the time for ten seconds want 2 x 0.9 / 0.5, four; four that
    compute 0.15 of it for a minute want two, which compute 0.3 then.
    """

    def __init__(self, least: int, most: int, target: float) -> None:
        self._least, self._most, self._target = least, most, target
        #: The share of the time that hosts computed lately.
        self.busy = 0.0
        self._looks: deque[tuple[float, dict[str, float]]] = deque()  # when, and how long each process had computed
        self._wants: deque[tuple[float, int, int]] = deque()  # when, and how many would do to go up, and down

    def want(self, compute_s: Sequence[tuple[str, float]], now_s: float) -> int | None:
        """Take in each host's process and for how many seconds it has computed; returns how many hosts there should
        be, None for as many as there are. To be called every second or so."""
        num_hosts, now = len(compute_s), dict(compute_s)
        if self._looks and (not now or self._looks[-1][1].keys() != now.keys()):
            self._looks.clear()  # hosts have just come, or come back
            self._wants.clear()
        self._looks.append((now_s, now))
        while now_s - self._looks[0][0] > OVER_S:
            self._looks.popleft()
        since_s, before = self._looks[0]
        if not now or now_s <= since_s:
            return None
        busy = sum(now[process] - before[process] for process in now) / (now_s - since_s)
        self.busy = busy / num_hosts
        up, down = (math.ceil(busy / share - 1e-9) for share in (self._target, self._target * SLACK))
        self._wants.append((now_s, max(self._least, min(self._most, up)), max(self._least, min(self._most, down))))
        while now_s - self._wants[0][0] > DOWN_S + 5:
            self._wants.popleft()
        known_s = now_s - self._wants[0][0]
        least_up = min(up for at_s, up, _ in self._wants if now_s - at_s <= UP_S)
        most_down = max(down for at_s, _, down in self._wants if now_s - at_s <= DOWN_S)
        if least_up > num_hosts and (known_s >= UP_S or num_hosts < self._least):
            wanted = least_up
        elif most_down < num_hosts and (known_s >= DOWN_S or num_hosts > self._most):
            wanted = most_down
        else:
            return None
        self._wants.clear()
        return wanted
