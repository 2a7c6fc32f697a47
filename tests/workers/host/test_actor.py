import logging
import os

import numpy as np
import pytest
import torch

from pregate.base.errors import UnavailableError, UserError
from pregate.kernels import reference
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.host.actor import ActorOptions, ExpertHostActor
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import GroupIndex, GroupKey
from pregate.workers.link.transport import CurveKeys

WIDTH = 512
KEY = GroupKey("e", 1, 2, 0)
#: Two rows; expert 0 takes both, expert 3 the second.
INDEX = GroupIndex(np.array([0, 3], np.int32), np.array([2, 1], np.int32), np.array([0, 1, 1], np.int32))


def ask(address, reader, **options):
    """One group through a host of layer 2's experts 0 and 3, and what the reference says."""
    client = ChannelClient(address, ChannelOptions(**options))
    client.hello(engine="e", fingerprint=reader.fingerprint, dtype=torch.float32, width=WIDTH, max_rows=8)
    x_ND = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    client.send_group(KEY, x_ND, INDEX)
    answer = client.receive(KEY, 30.0)
    client.close()
    act = reference.activation(reader.hidden_act)
    wanted = []
    for expert, row in ((0, 0), (0, 1), (3, 1)):
        gate_up, down = reader.read_unit(2, expert)
        wanted.append(reference.expert_ffn(x_ND[row : row + 1], gate_up, down, act))
    return answer, torch.cat(wanted)


def options_for(reader, **changes) -> ActorOptions:
    return ActorOptions(checkpoint=str(reader.path), units=((2, 0), (2, 3)), **changes)


@pytest.fixture(autouse=True)
def logging_as_before():
    """An actor sets logging up for its process, which here is the tests'."""
    logger = logging.getLogger("pregate")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_start_serve_drain_stop(reader, tmp_path, transport):
    keys = CurveKeys.new()
    where = {"ipc_folder": str(tmp_path / "run")} if transport == "ipc" else {"allowed_client_keys": (keys.public,)}
    host = HostOptions(host_id=4)
    actor = ExpertHostActor(options_for(reader, host=host, transport=transport, bind_address="127.0.0.1", **where))
    with pytest.raises(UnavailableError, match="expert host 4 is not running"):
        actor.status()
    address = actor.start()
    assert actor.start() is address
    assert (address.host_id, address.pid, address.node_ip) == (4, os.getpid(), "127.0.0.1")
    assert address.endpoint.startswith(f"{transport}://")
    assert (address.server_public_key is None) == (transport == "ipc")
    answer, wanted = ask(address, reader, keys=keys)
    torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-4)
    status = actor.status()
    assert (status["num_units"], status["units_read"], status["num_pairs"], status["misses"]) == (2, 2, 3, 0)
    assert status["endpoint"] == address.endpoint
    assert actor.drain(5.0)
    actor.stop()
    actor.stop()
    assert not list(tmp_path.glob("run/*"))
    with pytest.raises(UnavailableError):
        actor.status()


def test_options_that_cannot_be():
    with pytest.raises(UserError, match="transport smoke: allowed: ipc, tcp"):
        ActorOptions("x", transport="smoke")
    with pytest.raises(UserError, match="needs a folder"):
        ActorOptions("x", transport="ipc")
    with pytest.raises(UserError, match="num_threads 0"):
        ActorOptions("x", ipc_folder="/tmp/x", num_threads=0)
