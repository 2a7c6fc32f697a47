import threading
import time

import pytest
import zmq

from pregate.workers.link import transport


@pytest.mark.parametrize("delay_s", [0.0, 0.0005, 0.05])
@pytest.mark.parametrize("look_first", [True, False])
def test_a_message_is_taken_before_during_and_after_the_look(delay_s, look_first):
    context = zmq.Context()
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://look")
    right.connect("inproc://look")
    right.setsockopt(zmq.RCVTIMEO, 20_000)
    sender = threading.Timer(delay_s, left.send_multipart, [[b"a", b"b"]])
    sender.start()
    assert [frame.bytes for frame in transport.receive(right, look_first)] == [b"a", b"b"]
    sender.join()
    right.setsockopt(zmq.RCVTIMEO, 10)
    started_s = time.monotonic()
    with pytest.raises(zmq.Again):
        transport.receive(right, look_first)
    assert time.monotonic() - started_s >= 0.01
    context.destroy(linger=0)
