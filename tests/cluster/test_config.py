from pathlib import Path

import pytest

from pregate.base.errors import UserError, option_name
from pregate.base.options import from_dict, to_dict
from pregate.cluster.config import ServeConfig
from pregate.router.access import AccessOptions
from pregate.router.grpc_options import GrpcOptions


def test_a_config_survives_the_way_through_a_dict(tmp_path):
    config = ServeConfig.from_dict({"model": str(tmp_path), "hosts": 2, "engine": {"model": "", "max_queued": 7}})
    again = ServeConfig.from_dict(config.to_dict())
    assert again == config
    assert again.engine_options.max_queued == 7
    assert again.engine_options.model == str(tmp_path)


def test_text_values_are_read_by_type():
    config = ServeConfig.from_dict(
        {"model": "/m", "hosts": "2", "gpus_per_host": "0.5", "engine": {"model": "", "kv_tokens": "none"}}
    )
    assert (config.hosts, config.gpus_per_host, config.engine.kv_tokens) == (2, 0.5, None)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": "/m", "hosts": 2, "host": {"colour": 1}}, r"colour 1: unknown option; allowed: host_id"),
        ({"model": "/m", "hosts": 2, "modle": "x"}, "modle x: unknown option; allowed: model, hosts"),
        ({"model": "/m", "hosts": "two"}, "hosts two: allowed: 0 or more"),
        ({"model": "/m", "hosts": 2.5}, "hosts 2.5: allowed: 0 or more"),
        ({"model": "/m", "hosts": True}, "hosts True: allowed: 0 or more"),
        ({"hosts": 2}, "model: missing"),
        ({"model": "/m", "hosts": -1}, "--hosts -1"),
        ({"model": "/m", "hosts": 1, "placement": "spread"}, "--placement spread: allowed: linear, round_robin"),
        ({"model": "/m", "hosts": 1, "device": "tpu"}, "--device tpu: allowed: cpu, cuda"),
        ({"model": "/m", "hosts": 1, "dtype": "int3"}, "--dtype int3"),
        ({"model": "/m", "hosts": 1, "gpus_per_host": -1}, "--gpus-per-host -1"),
        ({"model": "/m", "hosts": 1, "engine": 3}, "engine 3: allowed: a mapping"),
    ],
)
def test_bad_values_are_named(values, sentence):
    with pytest.raises(UserError, match=sentence):
        ServeConfig.from_dict(values)


@pytest.mark.parametrize("change", [{"hosts": 3}, {"model": "/n"}, {"placement": "round_robin"}, {"dtype": "float16"}])
def test_a_join_with_another_option_names_it(change):
    running = ServeConfig.from_dict({"model": "/m", "hosts": 2})
    (name,) = change
    with pytest.raises(UserError, match=f"{option_name(name)} .* is running with {getattr(running, name)}"):
        ServeConfig.from_dict({"model": "/m", "hosts": 2, **change}).check_joins(running)
    ServeConfig.from_dict({"model": "/m", "hosts": 2, "drain_s": 1}).check_joins(running)


def test_paths_and_nested_options_round_trip():
    options = GrpcOptions(port=1, access=AccessOptions(tls_cert=Path("/c"), tls_key=Path("/k")))
    assert from_dict(GrpcOptions, to_dict(options)) == options
