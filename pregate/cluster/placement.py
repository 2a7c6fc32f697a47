"""Which hosts hold which units. Pure: a snapshot in, a frozen placement out, and a checker of its invariants.

Letters: L layers, R the largest number of routed experts in a layer, C the largest number of copies of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pregate.base.errors import UserError
from pregate.cluster.balanced import NO_HOST, balanced

STRATEGIES = ("linear", "round_robin", "balanced")


@dataclass(frozen=True)
class Placement:
    """Who holds what. `copies` int16 [L, R, C]: the hosts that hold unit (layer, expert), its home first, then -1.

    Worked example, homes of two layers of 5 and 2 experts (R = 5) on two hosts, with -1 where no unit is:

        linear       [[0, 0, 0, 1, 1], [0, 1, -1, -1, -1]]
        round_robin  [[0, 1, 0, 1, 0], [1, 0, -1, -1, -1]]
    """

    version: int
    num_hosts: int
    copies: NDArray[np.int16]

    @property
    def hosts_of(self) -> NDArray[np.int16]:
        """Each unit's home host [L, R], -1 where no unit is."""
        return self.copies[:, :, 0]

    def units_of(self, host: int) -> list[tuple[int, int]]:
        """Units of which `host` holds a copy, as (layer, expert), layers first."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere((self.copies == host).any(axis=2))]


def place(
    num_routed: Sequence[int],
    num_hosts: int,
    strategy: str = "linear",
    version: int = 1,
    one_index: bool = False,
    *,
    load_LR: NDArray[np.float64] | None = None,
    replicas: float = 0.0,
    node_of_host: Sequence[str] | Sequence[int] | None = None,
) -> Placement:
    """Give every routed expert of every layer a home host.

    `num_routed`: routed experts of each layer, 0 for a dense layer. `linear` gives each host one contiguous block
    of a layer's experts; `round_robin` deals them like cards; `balanced` evens out load, with a share `replicas` of
    spare copies (see `balanced`, which has the other arguments too; `load_LR` None says that all units are used alike).
    Where a layer's experts do not come out even, the hosts with one more are those whose turn it is, layer after layer:
    else the first hosts would have more in every layer. With `one_index`, where a token visits the experts of one
    number in every layer (Read-ME), nobody takes turns, so that such experts have one host.
    UserError when a layer would leave a host without experts, or the strategy is unknown.
    """
    check_request(num_routed, num_hosts, strategy, replicas)
    shape = (len(num_routed), max(num_routed))
    if strategy == "balanced":
        load_LR = np.ones(shape) if load_LR is None else load_LR
        assert load_LR.shape == shape, f"load {load_LR.shape}, units {shape}"
        placed = balanced(num_routed, load_LR, num_hosts, replicas, one_index, node_of_host)
        return Placement(version, num_hosts, placed)
    copies = np.full((*shape, 1), NO_HOST, dtype=np.int16)
    deal, turn = _cards if strategy == "round_robin" else _blocks, 0
    for layer, count in enumerate(num_routed):
        copies[layer, :count, 0] = deal(count, num_hosts, turn)
        turn = 0 if one_index else (turn + count) % num_hosts
    return Placement(version, num_hosts, copies)


def check_request(num_routed: Sequence[int], num_hosts: int, strategy: str, replicas: float = 0.0) -> None:
    """Refuse what `place` cannot do, naming the command line's options. UserError."""
    if strategy not in STRATEGIES:
        raise UserError.of("--placement", strategy, f"allowed: {', '.join(STRATEGIES)}")
    if replicas and strategy != "balanced":
        raise UserError.of("--replicas", replicas, f"{strategy} places no copies; allowed: with --placement balanced")
    routed_layers = [count for count in num_routed if count > 0]
    if not routed_layers:
        raise UserError.of("--hosts", num_hosts, "the model has no routed experts to place")
    most, why = min(routed_layers), "each host needs an expert in every layer"
    if strategy == "balanced":
        most, why = sum(routed_layers), "each host needs an expert"
    if not 1 <= num_hosts <= most:
        raise UserError.of("--hosts", num_hosts, f"allowed: 0 to {most} ({why})")


def check(
    placement: Placement, num_routed: Sequence[int], one_index: bool = False, max_units: int | None = None
) -> None:
    """Hold the invariants of a placement; AssertionError says which is broken.

    Every unit has a home, none has two copies on one host, nothing is held where no unit is, and the hosts' shares
    differ by at most one copy in every layer, and without `one_index` in all. With `max_units`, for placements that
    hosts were lost of or that are on their way to another, shares need not be even, only no larger than that.
    """
    copies, num_hosts = placement.copies, placement.num_hosts
    assert copies.shape[:2] == (len(num_routed), max(num_routed, default=0)), f"shape {copies.shape}"
    held = np.sort(copies, axis=2)
    assert not ((held[..., 1:] == held[..., :-1]) & (held[..., 1:] != NO_HOST)).any(), "a host has two copies of a unit"
    for layer, count in enumerate(num_routed):
        homes, rest = copies[layer, :count, 0], copies[layer, count:]
        assert (rest == NO_HOST).all(), f"layer {layer}: a home beyond its {count} experts"
        assert ((homes >= 0) & (homes < num_hosts)).all(), f"layer {layer}: an expert without a home"
        assert (copies[layer] < num_hosts).all(), f"layer {layer}: a copy on a host that is not there"
        if max_units is None:
            _check_even(f"layer {layer}", copies[layer], num_hosts)
    if max_units is not None:
        shares = np.bincount(copies[copies != NO_HOST], minlength=num_hosts)
        assert shares.max() <= max_units, f"shares {shares.tolist()}, a host has room for {max_units}"
    elif not one_index:
        _check_even("all layers", copies, num_hosts)


def _check_even(where: str, copies: NDArray[np.int16], num_hosts: int) -> None:
    shares = np.bincount(copies[copies != NO_HOST], minlength=num_hosts)
    assert shares.max() - shares.min() <= 1, f"{where}: shares {shares.tolist()} differ by more than one"


def _blocks(count: int, num_hosts: int, turn: int) -> NDArray[np.int64]:
    """Hosts of `count` experts in contiguous blocks: 5 on 2 hosts -> [0, 0, 0, 1, 1], or at turn 1 [0, 0, 1, 1, 1]."""
    hosts = np.arange(num_hosts)
    return np.repeat(hosts, count // num_hosts + ((hosts - turn) % num_hosts < count % num_hosts))


def _cards(count: int, num_hosts: int, turn: int) -> NDArray[np.int64]:
    """Hosts of `count` experts dealt one by one: 5 on 2 hosts -> [0, 1, 0, 1, 0], or at turn 1 [1, 0, 1, 0, 1]."""
    return (turn + np.arange(count)) % num_hosts
