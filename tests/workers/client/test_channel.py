import os
import threading
import time

import numpy as np
import pytest
import torch

from benchmarks.echo import EchoHost
from pregate.base.errors import HostLostError, PregateError, ProtocolError, UserError
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import GroupIndex, GroupKey, HostAddress, HostPlan
from pregate.workers.link.transport import SEND_QUEUE

WIDTH = 512
KEY = GroupKey("e", 5, 0, 0)


def i32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def rows(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def plan_of(step: int) -> HostPlan:
    """Layer 0: three rows, experts 1 and 4 take two each; layer 1: dense; layer 2: expert 0 takes both rows."""
    return HostPlan(
        step, i32(3, 0, 2), i32(0, 2, 2, 3), i32(1, 4, 0), i32(2, 2, 2), i32(0, 4, 4, 6), i32(0, 2, 0, 1, 0, 1)
    )


class SlowHost(EchoHost):
    """Takes `pause_s` for a group."""

    def __init__(self, pause_s: float) -> None:
        super().__init__(HostOptions())
        self.pause_s = pause_s

    def compute(self, key, rows_ND, index):
        time.sleep(self.pause_s)
        return super().compute(key, rows_ND, index)


class BrokenHost(EchoHost):
    """Has a defect that shows at layer 1."""

    def compute(self, key, rows_ND, index):
        return super().compute(key, rows_ND / (1 // (1 - key.layer)), index)


def poll_for(client, duration_s: float) -> None:
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        time.sleep(0.05)
        client.poll()


def greet_in_process(host) -> InProcessClient:
    client = InProcessClient(host)
    client.hello(engine="e", fingerprint=host.fingerprint, dtype=torch.float32, width=WIDTH, max_rows=64)
    return client


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_travel_bit_for_bit(serve, dtype):
    client = serve(EchoHost(HostOptions())).client(dtype=dtype)
    for number, num_rows in enumerate((1, 0, 64, 3)):
        key = KEY._replace(group=number)
        x_ND = rows(num_rows).to(dtype)
        client.send_group(key, x_ND)
        assert torch.equal(client.receive(key, 5.0), x_ND)
    strided = rows(8).to(dtype)[::2]
    client.send_group(KEY, strided)
    assert torch.equal(client.receive(KEY, 5.0), strided)


def test_the_channel_answers_what_the_call_answers(serve, reader):
    units = [(0, 1), (0, 4), (2, 0)]
    here = greet_in_process(ExpertHost(reader, units, HostOptions()))
    there = serve(ExpertHost(reader, units, HostOptions())).client()
    answers = []
    for client in (here, there):
        client.send_plan(plan_of(5))
        client.send_group(KEY, rows(3))
        client.send_group(KEY._replace(layer=2), rows(2))
        client.send_group(KEY._replace(layer=2, group=1), rows(2), GroupIndex(i32(0), i32(1), i32(1)))
        answers.append([client.receive(KEY._replace(layer=2, group=1), 5.0), client.receive(KEY, 5.0)])
        answers[-1].append(client.receive(KEY._replace(layer=2), 5.0))
    for ours, theirs in zip(*answers, strict=True):
        assert torch.equal(ours, theirs)
    assert [a.shape[0] for a in answers[0]] == [1, 4, 2]
    for client in (here, there):
        assert (client.stats.plans, client.stats.groups, client.stats.indexed_groups) == (1, 3, 1)
    assert 7 * WIDTH * 4 < there.stats.group_bytes < 7 * WIDTH * 4 + 2000
    assert 7 * WIDTH * 4 < there.stats.reply_bytes < 7 * WIDTH * 4 + 2000
    assert there.stats.plan_bytes > 4 * (3 + 4 + 3 + 3 + 4 + 6)
    assert here.stats.group_bytes == 0


@pytest.mark.parametrize("remote", [True, False])
def test_a_host_that_lost_the_plan_gets_it_again(serve, reader, remote):
    host = ExpertHost(reader, [(0, 1), (0, 4)], HostOptions())
    client = serve(host).client() if remote else greet_in_process(host)
    client.send_plan(plan_of(5))
    client.send_group(KEY, rows(3))
    first = client.receive(KEY, 5.0)
    host.forget("e")
    client.send_group(KEY, rows(3))
    assert torch.equal(client.receive(KEY, 5.0), first)
    assert client.stats.resent_groups == 1
    client.send_group(KEY._replace(step=9), rows(3))
    with pytest.raises(ProtocolError, match="step 9, which was not sent"):
        client.receive(KEY._replace(step=9), 5.0)


def test_what_a_host_fails_with_arrives_and_the_channel_lives_on(serve, reader):
    client = serve(ExpertHost(reader, [(0, 1)], HostOptions())).client()
    client.send_group(KEY, rows(1), GroupIndex(i32(6), i32(1), i32(0)))
    with pytest.raises(UserError, match=r"expert host 0: unit \(0, 6\): not in this checkpoint"):
        client.receive(KEY, 5.0)
    client.send_group(KEY, rows(1), GroupIndex(i32(1), i32(1), i32(1)))
    with pytest.raises(PregateError, match="row the group does not have"):
        client.receive(KEY, 5.0)
    client.send_group(KEY, rows(1), GroupIndex(i32(1), i32(1), i32(0)))
    assert client.receive(KEY, 5.0).shape == (1, WIDTH)


def test_a_defect_in_one_group_ends_that_group_only(serve):
    client = serve(BrokenHost(HostOptions())).client()
    client.send_group(KEY._replace(layer=1), rows(1))
    with pytest.raises(PregateError, match="ZeroDivisionError") as caught:
        client.receive(KEY._replace(layer=1), 5.0)
    assert caught.value.code == "INTERNAL"
    client.send_group(KEY, rows(1))
    assert torch.equal(client.receive(KEY, 5.0), rows(1))


def test_a_host_without_memory_fails_that_group_and_serves_the_next(serve):
    class Hungry(EchoHost):
        def compute(self, key, rows_ND, index):
            return torch.empty(1 << 50) if key.layer else super().compute(key, rows_ND, index)

    for client in (serve(Hungry(HostOptions())).client(), greet_in_process(Hungry(HostOptions()))):
        client.send_group(KEY._replace(layer=1), rows(1))
        with pytest.raises(PregateError, match=r"expert host 0: RuntimeError: .*allocate memory") as caught:
            client.receive(KEY._replace(layer=1), 5.0)
        assert not isinstance(caught.value, HostLostError)
        client.send_group(KEY, rows(1))
        assert torch.equal(client.receive(KEY, 5.0), rows(1))


def test_groups_of_a_failed_step_are_abandoned(serve):
    client = serve(EchoHost(HostOptions())).client()
    client.send_group(KEY, rows(1))
    client.abandon()
    client.send_group(KEY._replace(step=6), rows(1))
    assert torch.equal(client.receive(KEY._replace(step=6), 5.0), rows(1))
    assert client.stats.discarded_answers == 1


def test_a_refusal_names_the_reason(serve, reader):
    served = serve(ExpertHost(reader, [(0, 1)], HostOptions(host_id=2)))
    client = served.client(hello=False)
    with pytest.raises(UserError, match="expert host 2 refused: width 64: host 2 has hidden width 512"):
        client.hello(engine="e", fingerprint=reader.fingerprint, dtype=torch.float32, width=64, max_rows=8)
    with pytest.raises(UserError, match="refused: checkpoint"):
        client.hello(engine="e", fingerprint="other", dtype=torch.float32, width=WIDTH, max_rows=8)
    assert served.server.num_clients == 0
    ack = client.hello(engine="e", fingerprint=reader.fingerprint, dtype=torch.float32, width=WIDTH, max_rows=8)
    assert (ack.host_id, ack.max_rows, ack.num_units) == (2, 8, 1)
    with pytest.raises(ProtocolError, match="at most 8"):
        client.send_group(KEY, rows(9))
    with pytest.raises(ProtocolError, match="agreed"):
        client.send_group(KEY, rows(1).double())


def test_no_answer_in_time_names_what_the_host_is_at_and_a_late_one_is_discarded(serve):
    client = serve(SlowHost(0.6), heartbeat_s=0.05).client()
    client.send_group(KEY, rows(1))
    with pytest.raises(HostLostError, match=r"expert host 0 is lost: no answer .* busy with step 5 layer 0, 1 rows"):
        client.receive(KEY, 0.2)
    again = KEY.next_attempt()
    client.send_group(again, rows(1, seed=1))
    assert torch.equal(client.receive(again, 5.0), rows(1, seed=1))
    assert client.stats.discarded_answers == 1


def test_a_busy_host_is_not_a_lost_host(serve):
    """The compute thread is away for three times the timeout; the I/O thread goes on beating."""
    client = serve(SlowHost(1.5), heartbeat_s=0.1).client(host_timeout_s=0.5)
    client.send_group(KEY, rows(1))
    assert torch.equal(client.receive(KEY, 10.0), rows(1))


def test_heartbeats_tell_progress(serve):
    client = serve(EchoHost(HostOptions()), heartbeat_s=0.05).client()
    for number in range(3):
        client.send_group(KEY._replace(group=number), rows(1))
        client.receive(KEY._replace(group=number), 5.0)
    deadline_s = time.monotonic() + 5
    while (client.last_heartbeat is None or client.last_heartbeat.progress < 3) and time.monotonic() < deadline_s:
        time.sleep(0.05)
        client.poll()
    assert client.last_heartbeat is not None
    assert (client.last_heartbeat.progress, client.last_heartbeat.busy_with) == (3, "")


def test_heartbeats_are_taken_in_between_answers(serve):
    """An engine that never polls, because answers come without a pause, hears of the host all the same."""
    client = serve(EchoHost(HostOptions()), heartbeat_s=0.05).client()
    end_s = time.monotonic() + 1.2
    number = 0
    while time.monotonic() < end_s:
        number += 1
        client.send_group(KEY._replace(step=number), rows(1))
        client.receive(KEY._replace(step=number), 5.0)
    assert client.last_heartbeat is not None
    assert client.last_heartbeat.progress > 0


def test_an_engine_hears_at_once_of_units_that_come_and_go(serve):
    """Long before the next heartbeat: it plans by what hosts hold."""

    class MovingHost(EchoHost):
        steady = False
        held_LR = np.eye(2, 3, dtype=bool)

        def held_units(self):
            return self.held_LR

    host = MovingHost(HostOptions())
    served = serve(host, heartbeat_s=60.0)
    client = served.client()
    quiet = served.client()  # another engine, that sends nothing
    for number, held_LR in enumerate((~host.held_LR, host.held_LR, ~host.held_LR)):
        client.send_group(KEY._replace(step=number), rows(1))
        client.receive(KEY._replace(step=number), 5.0)
        host.held_LR, give_up_s = held_LR, time.monotonic() + 20
        while client.held_LR is None or not np.array_equal(client.held_LR, held_LR):
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
            client.poll()
    quiet.poll()
    assert quiet.last_heartbeat is None, "it may be long before it reads"


def test_an_engine_that_was_away_does_not_blame_the_host(serve):
    """Nobody looks for twice the timeout while nothing arrives: the host is asked before it counts as lost."""
    served = serve(EchoHost(HostOptions()), heartbeat_s=60.0)
    client = served.client(host_timeout_s=0.4)
    client.poll()
    time.sleep(0.8)
    poll_for(client, 1.5)


def test_unsent_messages_are_bounded(tmp_path):
    """Nobody reads at the other end: the client says so instead of waiting or piling up without end."""
    address = HostAddress(0, f"ipc://{tmp_path}/nobody", "h1", os.getpid(), "127.0.0.1")
    client = ChannelClient(address)
    client._connection.open_data(f"ipc://{tmp_path}/nobody.d")
    plan = plan_of(1)
    with pytest.raises(HostLostError, match="1000 messages to it are unsent"):
        send_plans(client, plan, 1100)
    assert client.stats.plans == 1000
    client.close()


def send_plans(client, plan: HostPlan, num_plans: int) -> None:
    for _ in range(num_plans):
        client.send_plan(plan)


def test_groups_before_hello_are_a_mistake_of_ours(serve):
    client = serve(EchoHost(HostOptions())).client(hello=False)
    with pytest.raises(ProtocolError, match="say hello first"):
        client.send_plan(plan_of(1))


def test_a_client_has_no_thread_of_its_own(serve):
    served = serve(EchoHost(HostOptions()))
    before = threading.active_count()
    client = served.client()
    client.send_group(KEY, rows(64))
    client.receive(KEY, 5.0)
    assert threading.active_count() == before


def test_a_host_that_hangs_is_not_taken_back_before_it_gets_on(serve):
    """Its I/O thread answers greetings all the while."""
    client = serve(SlowHost(1.5), heartbeat_s=0.05).client()
    client.send_group(KEY, rows(1))
    with pytest.raises(HostLostError, match="no answer"):
        client.receive(KEY, 0.3)
    client.fence()
    end_s = time.monotonic() + 0.7
    while time.monotonic() < end_s:
        assert not client.returned()
        time.sleep(0.02)
    while not client.returned():
        assert time.monotonic() < end_s + 30, "the host was never taken back"
        time.sleep(0.02)
    again = KEY._replace(step=6)
    client.send_group(again, rows(1, seed=1))
    assert torch.equal(client.receive(again, 10.0), rows(1, seed=1))


def test_a_host_that_gets_on_has_its_time_again(serve):
    """Four groups of 0.3 s each, with 0.5 s for one: the last is answered after 1.2 s."""
    client = serve(SlowHost(0.3), heartbeat_s=0.05).client()
    keys = [KEY._replace(group=n) for n in range(4)]
    for key in keys:
        client.send_group(key, rows(1))
    assert torch.equal(client.receive(keys[-1], 0.5), rows(1))


def test_a_host_may_be_dead_for_as_long_as_it_likes(serve):
    """More greetings than its queue takes (about eight minutes of them) are no error of the others'."""
    host = serve(EchoHost(HostOptions()))
    client = host.client()
    host.server.stop()
    client.fence()
    client._greet_every_s = 0.0
    assert not any(client.returned() for _ in range(2 * SEND_QUEUE))
