"""Rows out to hosts and back, with hosts in this process: who gets which rows, and in which order answers are added."""

import time

import numpy as np
import pytest
import torch

from pregate.base.errors import HostLostError, PregateError
from pregate.cluster.placement import place
from pregate.kernels import reference
from pregate.model.checkpoint import CheckpointReader
from pregate.model.gates import Choice
from pregate.model.paths import Paths
from pregate.router.engine.channel_exchange import ChannelExchange
from pregate.router.engine.members import Members
from pregate.router.engine.shared_experts import SharedExperts
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import GroupKey
from tests.router.serving import units_of

#: Sizes of tests/random_checkpoints.py's models, and the tokens of a step.
LAYERS, ROUTED, HIDDEN, TOKENS = 3, 5, 64, 4
#: Experts of each token in layer 0; the third visits one only, the last none.
IDS_TK = np.array([[0, 3, 4], [1, 2, 3], [4, -1, -1], [-1, -1, -1]], dtype=np.int16)
PLACEMENTS = {1: "linear", 2: "linear", 3: "round_robin"}


class WatchedClient(InProcessClient):
    """A host in this process that notes the rows it is sent."""

    def __init__(self, host: ExpertHost) -> None:
        super().__init__(host)
        self.sent: dict[GroupKey, torch.Tensor] = {}

    def send_group(self, key, rows_ND, index=None):
        self.sent[key] = rows_ND
        super().send_group(key, rows_ND, index)


class GivenShared(SharedExperts):
    """Shared experts whose output is given."""

    out_TD: torch.Tensor

    def run(self, layer, x_TD):
        return self.out_TD


def exchange_of(path, num_hosts: int, shared_TD: torch.Tensor | None = None) -> ChannelExchange:
    """An exchange with that many hosts, each with its own units."""
    reader = CheckpointReader(path)
    hosts_of = place([ROUTED] * LAYERS, num_hosts, PLACEMENTS[num_hosts]).hosts_of
    options = [HostOptions(host_id=n, expert_ffn="loop") for n in range(num_hosts)]
    clients = [WatchedClient(ExpertHost(reader, units_of(hosts_of, o.host_id), o)) for o in options]
    shared = GivenShared(reader.config, torch.device("cpu"), torch.float32)
    shared.out_TD = random(2) if shared_TD is None else shared_TD
    exchange = ChannelExchange("engine", Members(clients, hosts_of[..., None]), shared)
    for client in clients:
        terms = {"dtype": torch.float32, "width": HIDDEN, "max_rows": 64}
        client.hello(engine="engine", fingerprint=reader.fingerprint, **terms)
    return exchange


def random(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)) * scale


def paths(ids_TK: np.ndarray = IDS_TK, weights: np.ndarray | None = None) -> Paths:
    """Paths with the same experts in every layer."""
    return Paths(np.repeat(ids_TK[:, None], LAYERS, axis=1), weights)


def step(exchange: ChannelExchange, given: Paths, layer: int = 0) -> torch.Tensor:
    exchange.begin_step(1, TOKENS, given)
    return exchange.combine(exchange.dispatch(layer, random(1)))


def one_by_one(path, layer: int, out_TD: torch.Tensor, descending: bool = False) -> torch.Tensor:
    """`out_TD` and then a token's experts, one after the other, by the same kernel; [T, D]."""
    columns = np.arange(IDS_TK.shape[1])
    for column in columns[::-1] if descending else columns:
        one = np.full_like(IDS_TK, -1)
        one[:, 0] = IDS_TK[:, column]
        out_TD = step(exchange_of(path, 1, out_TD), paths(one), layer)
    return out_TD


@pytest.mark.parametrize("num_hosts", PLACEMENTS)
def test_the_shared_output_is_first_and_experts_ascend_wherever_they_live(layerwise_checkpoint, num_hosts):
    """To the last bit: sums of floating-point numbers depend on their order, and must not on the placement."""
    shared_TD = random(2, scale=100.0)
    found = step(exchange_of(layerwise_checkpoint, num_hosts, shared_TD), paths(), layer=2)
    alone = step(exchange_of(layerwise_checkpoint, 1, shared_TD), paths(), layer=2)
    assert torch.equal(found, alone)
    torch.testing.assert_close(found, one_by_one(layerwise_checkpoint, 2, shared_TD), rtol=0, atol=1e-4)
    assert torch.equal(found[3], shared_TD[3]), "a token without experts keeps its shared output"


def test_the_order_of_addition_is_that_of_the_ids(layerwise_checkpoint):
    """With answers set by hand: 1 does not show beside the large ones, only once they have cancelled out."""
    big = 2.0**30
    exchange = exchange_of(layerwise_checkpoint, 3, torch.full((TOKENS, HIDDEN), -big))
    of_expert = {0: big, 1: 1.0, 2: big, 3: 1.0, 4: 1.0}
    for client in exchange.clients:
        client.receive = _constant_answers(client, of_expert)
    found = step(exchange, paths())
    # ((-big + big) + 1) + 1; ((-big + 1) + big) + 1; -big + 1; -big
    assert found[:, 0].tolist() == [2.0, 1.0, -big, -big]


def _constant_answers(client, of_expert):
    """A host that was asked answers for each pair with its expert's number."""

    def receive(key, timeout_s):
        index = client._plans.get(key.step).layer(key.layer)
        values = [of_expert[e] for e in np.repeat(index.expert_ids, index.counts).tolist()]
        return torch.tensor(values)[:, None].expand(-1, HIDDEN)

    return receive


@pytest.mark.parametrize("planned", [True, False])
def test_what_is_added_is_what_the_experts_say_weighed(layerwise_checkpoint, planned):
    """By a plan of paths with weights, or by what a gate chose for every token."""
    exchange, reader = exchange_of(layerwise_checkpoint, 2), CheckpointReader(layerwise_checkpoint)
    ids_TK = np.where(IDS_TK < 0, [0, 1, 2], IDS_TK)
    ids_TK.sort(axis=1)
    weights_TK = torch.tensor([[0.5, 2.0, 1.0]]).expand(TOKENS, -1) * torch.tensor([[1.0], [-1.0], [3.0], [0.0]])
    weights_TLK = weights_TK.numpy()[:, None].repeat(LAYERS, axis=1)
    exchange.begin_step(1, TOKENS, paths(ids_TK, weights_TLK) if planned else None)
    choice = None if planned else Choice(torch.from_numpy(ids_TK.astype(np.int64)), weights_TK)
    found = exchange.combine(exchange.dispatch(1, random(1), choice))
    units = [reader.read_unit(1, expert) for expert in range(ROUTED)]
    wanted = random(2)
    for token, column in np.ndindex(ids_TK.shape):
        unit = units[ids_TK[token, column]]
        act = reference.activation(reader.hidden_act)
        wanted[token] += weights_TK[token, column] * reference.expert_ffn(random(1)[token : token + 1], *unit, act)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_a_receipt_names_who_was_sent_what(layerwise_checkpoint):
    exchange = exchange_of(layerwise_checkpoint, 3)  # in layer 0: experts 0 and 3, 1 and 4, 2
    exchange.begin_step(5, TOKENS, paths())
    receipt = exchange.dispatch(0, random(1))
    assert receipt.layer == 0 and torch.equal(receipt.out_TD, random(2))
    assert [(g.host, g.key) for g in receipt.groups] == [(n, GroupKey("engine", 5, 0, n)) for n in range(3)]
    for client, rows in zip(exchange.clients, ([0, 1], [0, 1, 2], [1]), strict=True):
        assert isinstance(client, WatchedClient)
        assert [torch.equal(sent, random(1)[rows]) for sent in client.sent.values()] == [True]
    # Answers end to end: (0: 0), (3: 0, 1), (1: 1), (4: 0, 2), (2: 1), and one row of zeros.
    assert receipt.slots_TK is not None
    assert receipt.slots_TK.tolist() == [[0, 1, 4], [3, 6, 2], [5, 7, 7], [7, 7, 7]]


def test_layers_may_be_away_at_once(layerwise_checkpoint):
    exchange = exchange_of(layerwise_checkpoint, 2)
    exchange.begin_step(1, TOKENS, paths())
    first, second = (exchange.dispatch(layer, random(1)) for layer in (0, 1))
    late, early = exchange.combine(second), exchange.combine(first)
    for layer, found in enumerate((early, late)):
        assert torch.equal(found, step(exchange_of(layerwise_checkpoint, 2), paths(), layer))
    assert not torch.equal(early, late)


def test_a_host_without_rows_is_sent_nothing(layerwise_checkpoint):
    exchange = exchange_of(layerwise_checkpoint, 2)
    exchange.members.hosts_of_LR = place(
        [ROUTED] * LAYERS, 2, "linear", one_index=True
    ).hosts_of  # experts 3 and 4 on the last
    exchange.begin_step(1, TOKENS, paths(np.array([[0, 2]] * TOKENS, dtype=np.int16)))
    for layer in range(LAYERS):
        exchange.combine(exchange.dispatch(layer, random(1)))
    used, unused = (client.stats for client in exchange.clients)
    assert (used.plans, used.groups, unused.plans, unused.groups) == (1, LAYERS, 0, 0)
    assert exchange.end_step().tolist() == [[2 * LAYERS, 0]] * TOKENS
    exchange.begin_step(2, TOKENS, paths(np.full((TOKENS, 2), -1, dtype=np.int16)))
    receipt = exchange.dispatch(0, random(1))
    assert receipt.groups == ()
    assert torch.equal(exchange.combine(receipt), random(2))
    assert exchange.end_step().tolist() == [[0, 0]] * TOKENS


def test_pairs_are_counted_by_host(layerwise_checkpoint):
    exchange = exchange_of(layerwise_checkpoint, 2)
    exchange.members.hosts_of_LR = place(
        [ROUTED] * LAYERS, 2, "linear", one_index=True
    ).hosts_of  # experts 3 and 4 on the last
    exchange.begin_step(1, TOKENS, paths())
    assert exchange.end_step().tolist() == [[LAYERS, 2 * LAYERS], [2 * LAYERS, LAYERS], [0, LAYERS], [0, 0]]
    exchange.begin_step(2, TOKENS, None)
    for layer in range(2):  # a gate decides layer by layer
        choice = Choice(torch.tensor([[0, 1 + 2 * layer]] * TOKENS))
        exchange.combine(exchange.dispatch(layer, random(1), choice))
    assert exchange.end_step().tolist() == [[3, 1]] * TOKENS


def test_a_step_that_failed_leaves_nothing_behind(layerwise_checkpoint):
    exchange = exchange_of(layerwise_checkpoint, 2)
    exchange.begin_step(1, TOKENS, paths())
    receipt = exchange.dispatch(0, random(1)[:, :5])  # of no width a host knows
    with pytest.raises(PregateError, match="width"):
        exchange.combine(receipt)
    exchange.begin_step(2, TOKENS, paths())
    assert all(isinstance(c, WatchedClient) and not c._groups for c in exchange.clients)
    found = step(exchange, paths())
    assert torch.equal(found, step(exchange_of(layerwise_checkpoint, 2), paths()))


LOST = HostLostError(0, "it is gone")


class LostClient(WatchedClient):
    """Falls silent after `num_answers` answers, and takes no rows once it is known to be lost."""

    num_answers = 0

    def receive(self, key, timeout_s):
        if self.num_answers <= 0:
            raise LOST
        self.num_answers -= 1
        return super().receive(key, timeout_s)

    def returned(self):
        return False


def with_lost(exchange: ChannelExchange, num_answers: int = 0, host: int = 0) -> LostClient:
    lost = LostClient(exchange.clients[host]._host)  # type: ignore[attr-defined]
    lost.num_answers = num_answers
    lost._engine = "engine"
    exchange.members.clients[host] = lost
    return lost


@pytest.mark.parametrize("num_answers", range(4))
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("num_hosts", [2, 3])
def test_what_a_lost_host_had_is_answered_by_the_others_to_the_last_bit(
    layerwise_checkpoint, planned, num_hosts, num_answers
):
    """Lost before the first layer's answer, or a later one's; those who live are home to none of its units."""
    given = None if planned else Choice(torch.from_numpy(IDS_TK.repeat(2, axis=0)[:TOKENS].astype(np.int64)))
    ids = paths() if planned else None

    def layers(exchange: ChannelExchange, number: int) -> list[torch.Tensor]:
        exchange.begin_step(number, TOKENS, ids)
        found = []
        for layer in range(LAYERS):
            found.append(exchange.combine(exchange.dispatch(layer, random(layer), given)))
        return found

    wanted = layers(exchange_of(layerwise_checkpoint, num_hosts), 1)
    exchange = exchange_of(layerwise_checkpoint, num_hosts)
    lost = with_lost(exchange, num_answers)
    assert all(map(torch.equal, layers(exchange, 1), wanted))
    assert (exchange.lost == {0: LOST.reason}) == (num_answers < LAYERS)
    num_groups, num_plans = lost.stats.groups, lost.stats.plans
    assert all(map(torch.equal, layers(exchange, 2), wanted))
    if num_answers < LAYERS:
        assert (lost.stats.groups, lost.stats.plans) == (num_groups, num_plans), "a lost host is sent nothing"
        stats = [client._host.status() for client in exchange.clients[1:]]  # type: ignore[attr-defined]
        homes = sum(int((exchange.members.copies_LRC == host).sum()) for host in range(1, num_hosts))
        assert sum(host["units_read"] for host in stats) > homes, "who lives has read what the lost one had"


def test_two_of_three_hosts_may_go_at_once_and_come_back(layerwise_checkpoint):
    wanted = step(exchange_of(layerwise_checkpoint, 3), paths())
    exchange = exchange_of(layerwise_checkpoint, 3)
    gone = [with_lost(exchange, host=host) for host in (0, 2)]
    assert torch.equal(step(exchange, paths()), wanted)
    assert sorted(exchange.lost) == [0, 2]
    for client in gone:
        client.num_answers = 100
        client.returned = lambda: True  # type: ignore[method-assign]
    time.sleep(0.3)
    assert torch.equal(step(exchange, paths()), wanted)
    assert not exchange.lost and all(client.num_answers == 99 for client in gone)


def test_without_a_living_host_the_step_is_lost_and_can_be_tried_again(layerwise_checkpoint):
    wanted = step(exchange_of(layerwise_checkpoint, 2), paths())
    exchange = exchange_of(layerwise_checkpoint, 2)
    gone = [with_lost(exchange, host=host) for host in (0, 1)]
    with pytest.raises(HostLostError, match=r"expert host [01] is lost: it is gone; so is host [01]: it is gone"):
        step(exchange, paths())
    with pytest.raises(HostLostError):
        exchange.poll()
    gone[1].num_answers, gone[1].returned = 100, lambda: True  # type: ignore[method-assign]
    time.sleep(0.3)
    assert torch.equal(step(exchange, paths()), wanted)
    assert sorted(exchange.lost) == [0]


def test_a_host_that_is_lost_again_and_again_waits_longer_each_time():
    members = Members([InProcessClient.__new__(InProcessClient) for _ in range(2)], np.array([[[0], [1]]]))
    pauses = []
    for _ in range(10):
        members.lose(0, LOST)
        pauses.append(members._pause_s[0])
        members.lost_at_s[0] -= pauses[-1]
        members.look_after_lost()
        assert not members.lost
    assert pauses == [min(0.25 * 2**n, 30.0) for n in range(10)]


@pytest.mark.parametrize("planned", [True, False])
def test_copies_share_the_rows_and_the_sum_is_the_same(layerwise_checkpoint, planned):
    """Many rows of one expert that two hosts hold go to both; where one of them is lost, to the other."""
    many = 40
    ids_TK = np.zeros((many, 1), dtype=np.int16)
    x_TD = torch.randn(many, HIDDEN, generator=torch.Generator().manual_seed(5))
    given = None if planned else Choice(torch.from_numpy(ids_TK.astype(np.int64)))

    def run(exchange: ChannelExchange) -> torch.Tensor:
        exchange.begin_step(1, many, Paths(np.repeat(ids_TK[:, None], LAYERS, axis=1)) if planned else None)
        return exchange.combine(exchange.dispatch(0, x_TD, given))

    shared_TD = torch.zeros(many, HIDDEN)
    wanted = run(exchange_of(layerwise_checkpoint, 2, shared_TD))
    exchange = exchange_of(layerwise_checkpoint, 2, shared_TD)
    homes_LR = exchange.members.hosts_of_LR
    members = Members(exchange.clients, np.stack([homes_LR, 1 - homes_LR], axis=2))
    exchange = ChannelExchange("engine", members, exchange.shared, check_plans=True)
    torch.testing.assert_close(run(exchange), wanted)
    rows = [sum(len(sent) for sent in client.sent.values()) for client in exchange.clients]  # type: ignore[attr-defined]
    assert rows == [many // 2, many // 2]
    members.lose(0, LOST)
    torch.testing.assert_close(run(exchange), wanted)


def test_parts_of_groups_that_are_sent_again_have_names_of_their_own(layerwise_checkpoint):
    """Two hosts lost one after the other in one layer: the third is asked for parts of both, no two called the same."""
    exchange = exchange_of(layerwise_checkpoint, 3)
    wanted = step(exchange_of(layerwise_checkpoint, 3), paths())
    for host in (0, 1):
        with_lost(exchange, host=host)
    assert torch.equal(step(exchange, paths()), wanted)
    keys = list(exchange.clients[2].sent)  # type: ignore[attr-defined]
    assert len(keys) > 2 and len({(key.step, key.layer, key.group) for key in keys}) == len(keys)
