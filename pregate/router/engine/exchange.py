"""The exchange: what an MLP of the backbone calls. Dispatch returns a receipt, combine takes it back.

Two siblings behind one protocol: `LocalExchange` runs whole layers in this process, `ChannelExchange` sends rows to
hosts. Both add a layer's shared expert first, then each token's routed experts in ascending id, so that the sum does
not depend on where they live.

Shape letters: T tokens, D hidden width, K experts per token, H hosts, N rows of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pregate.model.gates import Choice
from pregate.model.paths import Paths
from pregate.workers.client.host_client import HostClient
from pregate.workers.link.protocol import Expected, GroupIndex, GroupKey


class SentGroup(NamedTuple):
    """Rows that are away: whom to ask for them under which key, and all it takes to send them to other hosts.

    `parts`: where they were sent to others after all, of these the places of their answers in the group's, [P] each.
    """

    host: int
    key: GroupKey
    rows_ND: torch.Tensor
    index: GroupIndex
    parts: tuple[tuple[np.ndarray, SentGroup], ...] = ()


class Receipt(NamedTuple):
    """One layer after dispatch: the part of its sum made so far, [T, D], and what is away.

    `slots_TK` int64: the row of the groups' answers, laid end to end, that each token's experts come back in; past the
    last one where a token has fewer than K. They weigh `weights_TK`, 1 where None.
    """

    layer: int
    out_TD: torch.Tensor
    groups: tuple[SentGroup, ...] = ()
    slots_TK: torch.Tensor | None = None
    weights_TK: torch.Tensor | None = None


class Exchange(Protocol):
    """Runs the FFNs of a step, layer after layer, for one engine thread, on tensors that are on its device."""

    engine: str

    @property
    def clients(self) -> Sequence[HostClient]:
        """The hosts, in order."""
        ...

    #: The traceparents of the requests in the next step, for its plans.
    traces: str

    @property
    def placement(self) -> list[list[int]]:
        """Who is each routed expert's home now, layer by layer; -1 past a layer's last."""
        ...

    @property
    def rows_LR(self) -> np.ndarray:  # noqa: N802
        """How many rows each routed unit was asked for, int64 [L, R]; nothing where one host has them all."""
        ...

    @property
    def lost(self) -> Mapping[int, str]:
        """Hosts that do not answer, and why they are held for lost; others serve their units meanwhile."""
        ...

    @property
    def lost_at_s(self) -> Mapping[int, float]:
        """And since when (monotonic)."""
        ...

    def replace(self, host: int, client: HostClient) -> None:
        """Let another process be a host, or the next one; it serves from when it has answered a greeting."""
        ...

    def place(self, copies_LRC: np.ndarray, num_hosts: int) -> None:
        """Let so many hosts serve these units, int16 [L, R, C], from the next step on; hosts beyond are left."""
        ...

    @property
    def wants_lookahead(self) -> bool:
        """Whether a host fetches ahead what it is expected to be asked for."""
        ...

    def expect(self, expected: Expected) -> None:
        """Say what later steps are expected to use; every host is sent what it will be asked for."""
        ...

    def foretell(self, ids: Mapping[int, np.ndarray]) -> None:
        """Say what layers to come of the step that runs will ask for, ids [T, K] by layer, where gates know it."""
        ...

    def held_LR(self) -> np.ndarray | None:  # noqa: N802
        """Which units some host has in a slot or is loading, bool [L, R], as hosts last said; None where all are."""
        ...

    def hold_shared(self, layer: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Take a layer's shared expert, stored as one FFN: `gate_up` [2 S M, D] and `down` [D, S M]; it is copied."""
        ...

    def warm_up(self, step_tokens: int) -> None:
        """Compile what steps of up to `step_tokens` tokens would else compile; after all shared experts are held."""
        ...

    def begin_step(self, number: int, num_tokens: int, paths: Paths | None) -> None:
        """Open step `number`. Exact `paths` of its tokens fix all layers now; with None each is given its choice."""
        ...

    def dispatch(self, layer: int, x_TD: torch.Tensor, choice: Choice | None = None) -> Receipt:
        """Start `layer` on its input. `choice` is its gate's; None where paths decide or no expert is active."""
        ...

    def combine(self, receipt: Receipt) -> torch.Tensor:
        """Return the layer's output [T, D]; what a lost host had is sent to others.

        Raises HostLostError where there are no others, and what a host failed with.
        """
        ...

    def end_step(self) -> np.ndarray:
        """Close the step; return how many (token, expert) pairs of each token each host served [T, H]."""
        ...

    def poll(self) -> None:
        """Take in heartbeats of every host, without blocking; HostLostError while no host answers."""
        ...
