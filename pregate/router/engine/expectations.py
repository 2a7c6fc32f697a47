"""`Expectations`: what hosts are told that they will be asked for, each of what it serves now.

Shape letters: H steps, L layers, R routed experts.
"""

from __future__ import annotations

import numpy as np

from pregate.model.paths import Paths
from pregate.router.engine.lookahead import used_units
from pregate.router.engine.members import Members
from pregate.workers.link.protocol import SURE, Expected


class Expectations:
    """`always`: hosts fetch ahead what they are told. Else all hold what they are home to, and those alone are told who
    serve units of one that is lost: they load them before anybody asks, what is needed first at first."""

    def __init__(self, members: Members, always: bool) -> None:
        self._members, self._always = members, always
        self._last: Expected | None = None
        self._told, self._told_version = set[int](), 0

    @property
    def wanted(self) -> bool:
        """Whether some host has use for them now."""
        return self._always or self._members.catching_up

    def tell(self, expected: Expected) -> None:
        """Send every host its part; one that serves for nobody any more, too, for it need not go on."""
        members, first_LR = self._members, self._members.first_LR()
        told = set(range(len(members.clients)) if self._always else members.adopted)
        for host, client in enumerate(members.clients):
            if host in told | self._told and host not in members.lost:
                here_LR, likely_LR = first_LR == host, expected.likely_LR
                if client.held_LR is None:  # where units stay all are loaded in time
                    likely_LR = np.maximum(likely_LR, 1)
                client.expect(Expected(expected.step, expected.known_HLR & here_LR, likely_LR * here_LR))
        self._last, self._told, self._told_version = expected, told, members.version

    def tell_anew(self, number: int, paths: Paths | None = None, layer: int = 0) -> None:
        """Where hosts have gone or come since, say it to those who serve now. Step `number` is the last that began; of
        its `paths`, while it runs, layers from `layer` on are to come. Then comes what was expected last, or, where
        nobody looks ahead, what was asked for most so far. Of steps below 0, which are measured, nothing is said."""
        if self._told_version == self._members.version or number < 0:
            return
        rows_LR, expected = self._members.rows_LR, self._last
        if expected is None or expected.step < number:
            likely_LR = np.ceil(SURE * (rows_LR / max(1, rows_LR.max()))).astype(np.uint8)
            expected = Expected(number + 1, np.zeros((0, *rows_LR.shape), dtype=bool), likely_LR)
        if paths is not None:
            now_1LR = used_units(paths.ids, expected.likely_LR.shape[1])[None]
            now_1LR[:, :layer] = False
            later_HLR = expected.known_HLR[max(0, number + 1 - expected.step) :]
            expected = Expected(number, np.concatenate([now_1LR, later_HLR]), expected.likely_LR)
        self.tell(expected)
