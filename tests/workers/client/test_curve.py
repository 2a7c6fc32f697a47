"""TCP with CURVE keys: who is not on the list gets nothing at all."""

import pytest
import torch
import zmq

from benchmarks.echo import EchoHost
from pregate.base.errors import HostLostError, UserError
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import GroupKey, Hello
from pregate.workers.link.transport import CurveKeys
from pregate.workers.link.wire import encode

KEY = GroupKey("e", 1, 0, 0)
TERMS = {"engine": "e", "fingerprint": "echo", "dtype": torch.float32, "width": 512, "max_rows": 64}


def test_only_listed_keys_get_an_answer(serve):
    ours, theirs = CurveKeys.new(), CurveKeys.new()
    served = serve(EchoHost(HostOptions()), endpoint="tcp://127.0.0.1:*", allowed_client_keys=(ours.public,))
    assert served.server.endpoint != "tcp://127.0.0.1:*"

    stranger = served.client(hello=False, keys=theirs, hello_timeout_s=0.7)
    with pytest.raises(HostLostError, match=r"no answer to hello within 0.7 s at tcp://127.0.0.1"):
        stranger.hello(**TERMS)
    assert served.server.num_clients == 0

    client = served.client(keys=ours)
    x_ND = torch.randn(16, 512)
    client.send_group(KEY, x_ND)
    assert torch.equal(client.receive(KEY, 5.0), x_ND)
    with pytest.raises(HostLostError):
        stranger.hello(**TERMS)
    assert served.server.num_clients == 1


def test_a_client_that_does_not_encrypt_gets_nothing(serve):
    ours = CurveKeys.new()
    served = serve(EchoHost(HostOptions()), endpoint="tcp://127.0.0.1:*", allowed_client_keys=(ours.public,))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    for endpoint in (served.server.endpoint, served.server.data_endpoint):
        socket.connect(endpoint)
        socket.send_multipart(encode(Hello("e", "echo", "float32", 512, 64)))
    assert socket.poll(700) == 0
    assert served.server.num_clients == 0
    socket.close()
    context.term()


def test_a_wrong_server_key_connects_to_nobody(serve):
    ours = CurveKeys.new()
    served = serve(EchoHost(HostOptions()), endpoint="tcp://127.0.0.1:*", allowed_client_keys=(ours.public,))
    address = type(served.address)(**{**vars(served.address), "server_public_key": CurveKeys.new().public})
    client = ChannelClient(address, ChannelOptions(keys=ours, hello_timeout_s=0.7))
    with pytest.raises(HostLostError, match="no answer to hello"):
        client.hello(**TERMS)
    client.close()


def test_an_encrypted_host_needs_a_key_pair(serve):
    served = serve(EchoHost(HostOptions()), endpoint="tcp://127.0.0.1:*", allowed_client_keys=(CurveKeys.new().public,))
    with pytest.raises(UserError, match="needs a client key pair"):
        served.client()
