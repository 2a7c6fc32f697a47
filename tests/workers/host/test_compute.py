"""The thread that computes, over its real socket: order, one group's failure beside others, stop, progress."""

import threading
import time

import numpy as np
import pytest
import torch
import zmq

from pregate.kernels import reference
from pregate.workers.host.compute import ComputeThread
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.link import transport
from pregate.workers.link.protocol import (
    Bye,
    Failure,
    GroupIndex,
    GroupKey,
    GroupMessage,
    HostPlan,
    NeedHello,
    NeedPlan,
    PlanMessage,
    RowsMessage,
)
from pregate.workers.link.rows import from_rows, to_rows
from pregate.workers.link.wire import decode, encode

WIDTH = 512
WAIT_S = 20.0
DEFECT_STEP, HELD_STEP = 13, 14


def i32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


#: Both rows visit expert 1 of layer 0.
INDEX = GroupIndex(i32(1), i32(2), i32(0, 1))


class TouchyHost(ExpertHost):
    """An expert host that has a defect at one step and is held up at another until `go_on` is set."""

    go_on = threading.Event()

    def compute(self, key, rows_ND, index):
        if key.step == DEFECT_STEP:
            raise IndexError("a defect")
        if key.step == HELD_STEP:
            assert self.go_on.wait(WAIT_S)
        return super().compute(key, rows_ND, index)


class Bench:
    """A compute thread with expert 1 of layer 0, and one client of it by the id `us`."""

    def __init__(self, reader) -> None:
        self.host = TouchyHost(reader, [(0, 1)], HostOptions(expert_ffn="loop", max_rows=4))
        self.host.go_on = threading.Event()
        self._context = zmq.Context()
        router = transport.open_socket(self._context, zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.bind("inproc://data")
        self.clients = {b"us": "e"}
        self.thread = ComputeThread(self.host, router, self.clients)
        self._socket = transport.open_socket(self._context, zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, transport.data_id(b"us"))
        self._socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        self._socket.connect("inproc://data")
        self.thread.start()

    def send(self, message) -> None:
        self._socket.send_multipart(message if isinstance(message, list) else encode(message))

    def take(self):
        return decode([frame.buffer for frame in self._socket.recv_multipart(copy=False)])

    def close(self) -> None:
        self.host.go_on.set()
        self.thread.stop(WAIT_S)
        self._context.destroy(linger=0)


@pytest.fixture
def bench(reader):
    made = Bench(reader)
    yield made
    made.close()


def group(step: int, num_rows: int = 2, index: GroupIndex | None = INDEX) -> GroupMessage:
    return GroupMessage(GroupKey("e", step, 0, 0), to_rows(torch.full((num_rows, WIDTH), step / 10)), index)


def wait_until(condition) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_answers_come_in_the_order_of_the_groups_and_hold_their_rows(bench, reader):
    plan = HostPlan(7, i32(2, 0, 0), i32(0, 1, 1, 1), i32(1), i32(2), i32(0, 2, 2, 2), i32(0, 1))
    for message in (group(3), PlanMessage("e", plan), group(7, index=None), group(5)):
        bench.send(message)
    gate_up, down = reader.read_unit(0, 1)
    for step in (3, 7, 5):
        answer = bench.take()
        assert isinstance(answer, RowsMessage)
        assert (answer.key, answer.incarnation) == (GroupKey("e", step, 0, 0), bench.host.incarnation)
        act = reference.activation(reader.hidden_act)
        wanted = reference.expert_ffn(torch.full((2, WIDTH), step / 10), gate_up, down, act)
        torch.testing.assert_close(from_rows(answer.rows), wanted, rtol=0, atol=1e-4)
    wait_until(lambda: bench.thread.heartbeat().progress == 4)
    beat = bench.thread.heartbeat()
    assert (beat.incarnation, beat.busy_with, beat.busy_since_s) == (bench.host.incarnation, "", 0.0)
    wait_until(lambda: bench.thread.quiet)


def test_what_fails_is_answered_and_its_neighbours_served(bench):
    unknown = GroupIndex(i32(6), i32(2), i32(0, 1))
    damaged = [bytes(frame) for frame in encode(group(4))]
    damaged[1] = bytes(len(damaged[1]))
    bad = [group(2, num_rows=5), group(3, index=unknown), damaged, group(DEFECT_STEP), Bye("e")]
    for message in (group(1), *bad, group(9)):
        bench.send(message)
    first, *failed, last = [bench.take() for _ in range(7)]
    assert isinstance(first, RowsMessage)
    assert isinstance(last, RowsMessage)
    assert (first.key.step, last.key.step) == (1, 9)
    assert all(isinstance(answer, Failure) for answer in failed)
    assert [(f.key.step if f.key else None, f.code) for f in failed] == [
        (2, "INTERNAL"),
        (3, "INVALID_ARGUMENT"),
        (None, "DATA_LOSS"),
        (DEFECT_STEP, "INTERNAL"),
        (None, "INTERNAL"),
    ]
    texts = ["5", "not in this checkpoint", "checksum", "IndexError: a defect", "takes no Bye"]
    for failure, text in zip(failed, texts, strict=True):
        assert text in failure.text
    wait_until(lambda: bench.thread.heartbeat().progress == 7)


def test_a_plan_or_a_client_it_does_not_know_is_asked_for(bench):
    bench.send(group(1, index=None))
    assert bench.take() == NeedPlan(GroupKey("e", 1, 0, 0), bench.host.incarnation)
    bench.clients.clear()
    bench.send(group(2))
    assert bench.take() == NeedHello(GroupKey("e", 2, 0, 0), bench.host.incarnation)
    assert bench.host.status()["num_groups"] == 0, "nothing is computed for a stranger"


def test_it_says_what_it_is_at_and_stops_after_it(bench):
    bench.send(group(1))
    bench.take()
    bench.send(group(HELD_STEP))
    bench.send(group(2))
    wait_until(lambda: bench.thread.heartbeat().busy_with == f"step {HELD_STEP} layer 0, 2 rows")
    beat = bench.thread.heartbeat()
    assert (beat.progress, bench.thread.quiet) == (1, False)
    wait_until(lambda: bench.thread.heartbeat().busy_since_s > beat.busy_since_s)
    assert not bench.thread.stop(0.05), "it is still at a group"
    bench.host.go_on.set()
    assert bench.thread.stop(WAIT_S)
    assert bench.take().key.step == HELD_STEP
    assert bench.thread.heartbeat().progress == 2
    assert bench.host.status()["num_groups"] == 2, "what came after the stop was not begun"
