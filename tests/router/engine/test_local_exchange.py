"""Whole layers in the engine's process: the sums of the channel, a host's counters, and when they are not offered."""

import numpy as np
import pytest
import torch

from pregate.kernels import reference
from pregate.model.checkpoint import CheckpointReader
from pregate.model.gates import Choice
from pregate.model.paths import Paths
from pregate.router.engine.channel_exchange import ChannelExchange
from pregate.router.engine.exchange import Exchange
from pregate.router.engine.local_exchange import LocalExchange
from pregate.router.engine.members import Members
from pregate.router.engine.shared_experts import SharedExperts
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.client.local import LocalUnits
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from tests.int8 import needs_int8

WIDTH, CPU = 512, torch.device("cpu")
UNITS = [(0, n) for n in range(6)] + [(2, n) for n in range(5)]
#: 6 routed experts in layer 0, none in layer 1, 5 in layer 2.
HOSTS_OF = np.array([[0] * 6, [-1] * 6, [0] * 5 + [-1]])


@pytest.fixture
def reader(unit_checkpoint) -> CheckpointReader:
    return CheckpointReader(unit_checkpoint)


def make_host(reader: CheckpointReader, units=UNITS, **options) -> ExpertHost:
    return ExpertHost(reader, units, HostOptions(**options))


class ThousandFold(SharedExperts):
    """What stands for shared experts: large beside the routed, so that the order of the sum is seen in its bits."""

    def of(self, layer):
        return lambda x_TD: x_TD * 1000

    def run(self, layer, x_TD):
        return x_TD * 1000


def exchange_of(host: ExpertHost, reader: CheckpointReader, local: bool = True) -> Exchange:
    """An engine's exchange with the one host in its process."""
    client = InProcessClient(host)
    client.hello(engine="e", fingerprint=reader.fingerprint, dtype=torch.float32, width=WIDTH, max_rows=64)
    shared = ThousandFold(reader.config, CPU, torch.float32)
    if not local:
        return ChannelExchange("e", Members([client], HOSTS_OF[..., None]), shared)
    units = client.local_units(CPU, torch.float32)
    assert isinstance(units, LocalUnits)
    return LocalExchange("e", client, units, shared)


def step(exchange: Exchange, x_TD: torch.Tensor, given: Paths, gated: bool = False) -> dict[int, torch.Tensor]:
    """The outputs of all three layers, by paths or, layer by layer, as gates choose."""
    exchange.begin_step(1, len(x_TD), None if gated else given)
    found = {}
    for layer in range(3):
        weights = None if given.weights is None else torch.from_numpy(given.weights[:, layer])
        choice = (
            Choice(torch.from_numpy(given.ids[:, layer].astype(np.int64)), weights) if gated and layer != 1 else None
        )
        found[layer] = exchange.combine(exchange.dispatch(layer, x_TD, choice))
    return found


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


@pytest.mark.parametrize("implementation", ["loop", "grouped", "packed", pytest.param("int8", marks=needs_int8)])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_is_bit_for_bit_what_the_channel_adds_up(reader, implementation, num_tokens, weighted, gated):
    ids_TLK, x_TD = paths(num_tokens), rows(num_tokens)
    weights_TLK = np.random.default_rng(5).uniform(0.2, 3, size=ids_TLK.shape).astype(np.float32) if weighted else None
    given = Paths(ids_TLK, weights_TLK)
    channel = exchange_of(make_host(reader, expert_ffn=implementation), reader, local=False)
    wanted = step(channel, x_TD, given)
    assert torch.equal(wanted[1], x_TD * 1000), "a layer without routed experts is its shared one"
    local = exchange_of(make_host(reader, expert_ffn=implementation), reader)
    for layer, found in step(local, x_TD, given, gated).items():
        assert torch.equal(found, wanted[layer])
    assert np.array_equal(local.end_step(), channel.end_step())


def test_a_layer_equals_float64_expert_by_expert(reader):
    ids_TLK, x_TD = paths(9), rows(9)
    found = step(exchange_of(make_host(reader), reader), x_TD, Paths(ids_TLK))[2]
    act = reference.activation(reader.hidden_act)
    wanted = x_TD.double() * 1000
    for token, ids in enumerate(ids_TLK[:, 2].tolist()):
        for expert in [n for n in ids if n >= 0]:
            gate_up, down = (part.double() for part in reader.read_unit(2, expert))
            wanted[token] += reference.expert_ffn(x_TD[token, None].double(), gate_up, down, act)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_a_unit_that_is_missing_is_waited_for(reader, gated):
    """The exchange stays local; what it reads it keeps."""
    host, given = make_host(reader, UNITS[3:8]), Paths(paths(9))
    found = step(exchange_of(host, reader), rows(9), given, gated)
    wanted = step(exchange_of(make_host(reader), reader), rows(9), given, gated)
    assert all(torch.equal(found[layer], wanted[layer]) for layer in found)
    assert 0 < host.status()["misses"] <= len(UNITS) - 5


@pytest.mark.parametrize("gated", [False, True])
def test_the_host_counts_what_ran(reader, gated):
    host = make_host(reader)
    exchange = exchange_of(host, reader)
    step(exchange, rows(9), Paths(paths(9)), gated)
    exchange.end_step()
    status = host.status()
    pairs = int((paths(9) >= 0).sum())
    assert (status["num_groups"], status["num_rows"], status["num_pairs"]) == (2, 18, pairs)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda reader: make_host(reader).local_units(CPU, torch.float16), "on cpu in float32"),
    ],
)
def test_why_they_are_not_offered(reader, make, reason):
    assert reason in make(reader)
