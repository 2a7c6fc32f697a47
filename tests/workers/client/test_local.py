"""Whole layers in the engine's process: the sums of the exchange, a host's counters, and when they are not offered."""

import numpy as np
import pytest
import torch

from pregate.kernels import reference
from pregate.model.checkpoint import CheckpointReader
from pregate.model.paths import Paths
from pregate.router.engine.exchange import Exchange
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.client.local import LocalLayers
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import GroupIndex, GroupKey
from tests.int8 import needs_int8

WIDTH, CPU = 512, torch.device("cpu")
UNITS = [(0, n) for n in range(6)] + [(2, n) for n in range(5)]
#: 6 routed experts in layer 0, none in layer 1, 5 in layer 2.
HOSTS_OF = np.array([[0] * 6, [-1] * 6, [0] * 5 + [-1]])


def make_host(reader: CheckpointReader, units=UNITS, **options) -> ExpertHost:
    return ExpertHost(reader, units, HostOptions(**options))


def local_of(host: ExpertHost) -> LocalLayers:
    local = InProcessClient(host).local_layers(CPU, torch.float32)
    assert isinstance(local, LocalLayers)
    return local


def paths(num_tokens: int) -> np.ndarray:
    """Ids int16 [T, 3, 3]: 0 to 3 experts in layer 0, 2 in layer 2."""
    rng = np.random.default_rng(num_tokens)
    ids = np.full((num_tokens, 3, 3), -1, dtype=np.int16)
    for token in ids:
        for layer, num_routed, k in ((0, 6, int(rng.integers(0, 4))), (2, 5, 2)):
            token[layer, :k] = np.sort(rng.permutation(num_routed)[:k])
    return ids


def rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows))


def shared_of(x_TD: torch.Tensor) -> torch.Tensor:
    """What stands for a shared expert: large beside the experts, so that the order of the sum is seen in its bits."""
    return x_TD * 1000


@pytest.mark.parametrize("implementation", ["loop", "grouped", "packed", pytest.param("int8", marks=needs_int8)])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_layer_is_bit_for_bit_what_the_exchange_adds_up(reader, implementation, num_tokens, weighted):
    ids_TLK, x_TD = paths(num_tokens), rows(num_tokens)
    weights_TLK = np.random.default_rng(5).uniform(0.2, 3, size=ids_TLK.shape).astype(np.float32) if weighted else None
    client = InProcessClient(make_host(reader, expert_ffn=implementation))
    client.hello(engine="e", fingerprint=reader.fingerprint, dtype=torch.float32, width=WIDTH, max_rows=64)
    exchange = Exchange("e", [client], HOSTS_OF)
    exchange.begin_step(1, num_tokens, Paths(ids_TLK, weights_TLK))
    wanted = {n: exchange.combine(exchange.dispatch(n, x_TD, None), shared_of(x_TD)) for n in (0, 2)}
    counts_TH = exchange.end_step()
    local = exchange.local = local_of(make_host(reader, expert_ffn=implementation))
    for layer in (0, 2):
        local.join_shared(layer, shared_of)
    exchange.begin_step(2, num_tokens, Paths(ids_TLK, weights_TLK))
    for layer in (0, 2):
        assert torch.equal(local.run(layer, x_TD), wanted[layer])
    assert np.array_equal(exchange.end_step(), counts_TH)


def test_a_layer_equals_float64_expert_by_expert(reader):
    ids_TLK, x_TD = paths(9), rows(9)
    local = local_of(make_host(reader))
    local.begin(ids_TLK)
    act = reference.activation(reader.hidden_act)
    wanted = torch.zeros(9, WIDTH, dtype=torch.float64)
    for token, ids in enumerate(ids_TLK[:, 2].tolist()):
        for expert in [n for n in ids if n >= 0]:
            gate_up, down = (part.double() for part in reader.read_unit(2, expert))
            wanted[token] += reference.expert_ffn(x_TD[token, None].double(), gate_up, down, act)[0]
    torch.testing.assert_close(local.run(2, x_TD).double(), wanted, rtol=0, atol=1e-4)


def test_the_host_counts_what_ran(reader):
    host = make_host(reader)
    local = local_of(host)
    local.begin(paths(9))
    local.run(0, rows(9))
    status = host.status()
    pairs = int((paths(9)[:, 0] >= 0).sum())
    assert (status["num_groups"], status["num_rows"], status["num_pairs"]) == (1, 9, pairs)


def test_shared_units_come_first_in_the_stack_and_are_not_counted(reader):
    host = make_host(reader, expert_ffn="loop")
    index = GroupIndex(*(np.array(values, dtype=np.int32) for values in ([1, 4], [2, 2], [0, 2, 0, 1])))
    key = GroupKey("e", 0, 0, 0)
    before = host.compute(key, rows(3), index)
    host._store.hold_shared(0, [(torch.ones(512, WIDTH), torch.ones(WIDTH, 256))] * 3)
    assert host._store.unit_slots(0).tolist() == list(range(9))
    assert host._store.slots(0, np.arange(7)).tolist() == [3, 4, 5, 6, 7, 8, -1]
    assert host._store.units() == UNITS
    assert host.status()["num_units"] == len(UNITS)
    assert torch.equal(host.compute(key, rows(3), index), before)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda reader: make_host(reader, UNITS[1:]).local_layers(CPU, torch.float32), "does not hold every unit"),
        (lambda reader: make_host(reader).local_layers(CPU, torch.float16), "on cpu in float32"),
    ],
)
def test_why_they_are_not_offered(reader, make, reason):
    assert reason in make(reader)
