"""What host processes say they hold reaches the batcher, and decides which of a unit's copies serves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.lookahead import used_units
from pregate.workers.client.host_client import ChannelClient
from pregate.workers.link.protocol import Expected, GroupIndex, GroupKey
from tests.equality import reference_texts
from tests.router.running import wait_for
from tests.router.serving import engine_of, expert_hosts, hold

PROMPTS = [[1, *range(30, 30 + n)] for n in (3, 40)] + [[7, *range(90, 150, 2)]]


@pytest.fixture(scope="module")
def deployment(tiny_path_checkpoint, tmp_path_factory):
    """An engine over two host processes that both serve every unit and hold half of them."""
    num_routed = [cut.num_routed for cut in CheckpointReader(tiny_path_checkpoint).config.cuts]
    copies_LRC = np.full((len(num_routed), max(num_routed), 2), -1, dtype=np.int16)
    for layer, count in enumerate(num_routed):
        copies_LRC[layer, :count] = [0, 1]
    options = {"copies_LRC": copies_LRC, "resident_experts": 0.5}
    with expert_hosts(tiny_path_checkpoint, 2, tmp_path_factory.mktemp("ipc"), **options) as addresses:
        clients = [ChannelClient(address) for address in addresses]
        with engine_of(tiny_path_checkpoint, clients, copies_LRC=copies_LRC, batching="path", step_tokens=40) as engine:
            yield engine, clients


def settled(engine, clients):
    """Wait until all hosts have said anew what they hold, nothing on its way; return that, bool [H, L, R]."""
    engine.idle()
    before = [client.last_heartbeat for client in clients]

    def heard():
        engine.idle()
        new = all(client.last_heartbeat is not beat for client, beat in zip(clients, before, strict=True))
        return new and all(c.held_LR is not None and c.held_LR.sum() == c.cache.num_units for c in clients)

    wait_for(heard, what="a heartbeat of every host")
    return np.array([client.held_LR for client in clients])


def test_the_batcher_knows_what_hosts_hold_and_the_text_is_the_references(deployment, tiny_path_checkpoint):
    engine, clients = deployment
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).eval()
    hold(engine, "half held, two copies", reference_texts(model, PROMPTS, 8), together=(True,))
    held_HLR, batcher = settled(engine, clients), engine.scheduler.batcher
    assert [held.sum() for held in held_HLR] == [9, 9], "of 18 units"
    assert np.array_equal(engine.exchange.held_LR(), held_HLR.any(axis=0))
    engine.step()
    layout = batcher.layout
    assert np.array_equal(batcher.resident_U, np.logical_or(*held_HLR)[layout.layer_U, layout.expert_U])


def test_of_two_copies_the_one_that_is_held_serves_and_is_told_ahead(deployment):
    engine, clients = deployment
    members = engine.exchange.members
    for host, experts in ((0, (0, 1)), (1, (3, 4))):  # of the last layer, which neither held at first
        index = GroupIndex(*(np.array(v, dtype=np.int32) for v in (experts, (1, 1), (0, 0))))
        key = GroupKey(engine.exchange.engine, 1 << 20, 2, host, 0)
        clients[host].send_group(key, torch.zeros(1, engine.config.text_config.hidden_size), index)
        assert clients[host].receive(key, 20).shape[0] == 2
    held_HLR = settled(engine, clients)
    only_1_LR = held_HLR[1] & ~held_HLR[0]
    assert held_HLR[0, 2, [0, 1]].all()
    assert held_HLR[1, 2, [3, 4]].all()
    assert only_1_LR.any(), "one host has what the other lacks"
    assert np.array_equal(members.first_LR() == 1, only_1_LR)
    for layer, expert in np.argwhere(held_HLR.any(axis=0)).tolist():
        ids_TLK = np.full((4, 3, 1), -1, dtype=np.int16)
        ids_TLK[:, layer] = expert
        hosts = set(members.hosts_for(ids_TLK)[:, layer, 0].tolist())
        assert all(held_HLR[host, layer, expert] for host in hosts), "nobody loads what another holds"
    sent = {host: clients[host].stats.plan_bytes for host in (0, 1)}
    engine.exchange.expect(Expected(1 << 20, used_units(ids_TLK, only_1_LR.shape[1])[None], only_1_LR.astype(np.uint8)))
    assert all(clients[host].stats.plan_bytes > sent[host] for host in (0, 1))


def test_a_host_that_speaks_of_another_models_units_is_lost(deployment):
    engine, clients = deployment
    settled(engine, clients)
    clients[1].last_heartbeat = replace(clients[1].last_heartbeat, held_LR=np.ones((2, 2), dtype=bool))
    assert engine.exchange.members.held_LRC().shape == (3, 6, 2)
    assert not engine.exchange.lost, "who asks only reads"
    engine.idle()
    assert "units" in engine.exchange.lost[1]
    wait_for(lambda: engine.idle() or not engine.exchange.lost, what="the host back")
