"""A damaged checkpoint, or a port in use, is refused before anything starts."""

import shutil
import socket

import pytest

from pregate.base.errors import CheckpointError, UserError
from pregate.cluster.config import ServeConfig
from pregate.cluster.preflight import check_config, check_door
from pregate.router.doors.access import AccessOptions
from pregate.router.doors.grpc_options import GrpcOptions


@pytest.fixture
def copy(tiny_path_checkpoint, tmp_path):
    return shutil.copytree(tiny_path_checkpoint, tmp_path / "copy")


def test_a_sound_checkpoint_passes(copy):
    check_config(ServeConfig(model=str(copy), hosts=2))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_byte_is_refused(copy, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    config = ServeConfig(model=str(copy), hosts=2)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        check_config(config, whole=True)
    if name != "model.safetensors":  # that is for the hosts, which read it (tests/model/test_read_check.py)
        with pytest.raises(CheckpointError, match=f"{name}: damaged"):
            check_config(config)


@pytest.mark.parametrize("hosts", [0, 2])
@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("10kB", r"resident_experts 10000: allowed: \d+ bytes or more, room for 2 of a host's \d+"),
        ("1", "allowed: 2 or more"),
    ],
)
def test_fewer_experts_than_a_host_needs_are_refused_in_what_was_given(copy, hosts, asked, sentence):
    config = ServeConfig.from_dict({"model": str(copy), "hosts": hosts, "host": {"resident_experts": asked}})
    with pytest.raises(UserError, match=sentence):
        check_config(config)
    check_config(ServeConfig.from_dict({"model": str(copy), "hosts": hosts, "host": {"resident_experts": "0.01"}}))


def test_a_config_that_is_no_json_is_named(copy):
    size = (copy / "config.json").stat().st_size
    (copy / "config.json").write_text("x" * size)
    with pytest.raises(UserError, match=r"config\.json"):
        check_config(ServeConfig(model=str(copy), hosts=2))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("900TB", r"kv_cache_memory 900TB: allowed: at most [\d.]+[MG]B, the memory that is free"),
        (
            "1.5",
            r"kv_cache_memory 1\.5: less than a block; allowed: \d+ bytes or more, or up to 1 a fraction of what is",
        ),
        ("40", "kv_cache_memory 40: less than a block"),
    ],
)
def test_a_cache_that_no_engine_here_can_have_is_refused(copy, asked, sentence):
    """Where the deployment runs already, or elsewhere, that is for its engine to say."""
    config = ServeConfig.from_dict({"model": str(copy), "hosts": 2, "engine": {"kv_cache_memory": asked}})
    with pytest.raises(UserError, match=sentence):
        check_config(config, fits_here=True)
    check_config(config)


def test_a_block_larger_than_the_context_is_refused(copy):
    with pytest.raises(UserError, match="block_size 1000000000: is more than the context; allowed: 1 to"):
        check_config(ServeConfig.from_dict({"model": str(copy), "hosts": 2, "engine": {"block_size": 10**9}}))


def test_ports_in_use_are_refused_by_name():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options in (GrpcOptions(port=port), GrpcOptions(port=0, metrics_port=port)):
            name = "metrics_port" if options.metrics_port else "grpc_port"
            with pytest.raises(UserError, match=f"{name} {port} on 127.0.0.1: cannot be listened on"):
                check_door(options)
    with pytest.raises(UserError, match=f"metrics_port {port}: is"):
        check_door(GrpcOptions(port=port, metrics_port=port))


def test_a_door_on_another_node_is_to_be_reached(tmp_path):
    """Its port and its files are that node's."""
    with pytest.raises(UserError, match=r"host 127\.0\.0\.1: reached by nobody here on engine_node any; allowed: 0"):
        check_door(GrpcOptions(), "any")
    files = {name: tmp_path / name for name in ("tls_cert", "tls_key", "token_file")}
    check_door(GrpcOptions(access=AccessOptions("0.0.0.0", **files)), "any")
