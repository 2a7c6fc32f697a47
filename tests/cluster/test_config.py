from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.base.options import from_dict, of_keys, to_dict, user_options
from pregate.cluster.config import ServeConfig
from pregate.router.doors.access import AccessOptions
from pregate.router.doors.grpc_options import GrpcOptions


def test_a_config_survives_the_way_through_a_dict(tmp_path):
    config = ServeConfig.from_dict({"model": str(tmp_path), "hosts": 2, "engine": {"model": "", "max_queued": 7}})
    again = ServeConfig.from_dict(config.to_dict())
    assert again == config
    assert again.engine_options.max_queued == 7
    assert again.engine_options.model == str(tmp_path)


def test_text_values_are_read_by_type():
    config = ServeConfig.from_dict(
        {"model": "/m", "hosts": "2", "gpus_per_host": "0.5", "engine": {"model": "", "kv_cache_memory": "none"}}
    )
    assert (config.hosts, config.gpus_per_host, config.engine.kv_cache_memory) == (2, 0.5, None)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": "/m", "hosts": 2, "host": {"colour": 1}}, r"colour 1: unknown option; allowed: host_id"),
        ({"model": "/m", "hosts": 2, "modle": "x"}, "modle x: unknown option; nearest: model; allowed: model, hosts"),
        ({"model": "/m", "hosts": "two"}, "hosts two: allowed: a whole number, 0 or more"),
        ({"model": "/m", "hosts": 2.5}, "hosts 2.5: allowed: a whole number, 0 or more"),
        ({"model": "/m", "hosts": True}, "hosts True: allowed: 0 or more"),
        ({"hosts": 2}, "model: missing"),
        ({"model": "/m", "hosts": -1}, "hosts -1"),
        ({"model": "/m", "hosts": 1, "placement": "spread"}, "placement spread: allowed: linear, round_robin"),
        ({"model": "/m", "hosts": 1, "placement": "balanced", "replicas": -0.5}, "replicas -0.5: allowed: 0 or more"),
        ({"model": "/m", "hosts": 1, "device": "tpu"}, "device tpu: allowed: cpu, cuda"),
        ({"model": "/m", "hosts": 1, "dtype": "int3"}, "dtype int3"),
        ({"model": "/m", "hosts": 1, "gpus_per_host": -1}, "gpus_per_host -1"),
        ({"model": "/m", "hosts": 1, "engine": 3}, "engine 3: allowed: a mapping"),
        ({"model": "/m", "hosts": 1, "engine": {"step_tokens": 9000}}, r"step_tokens 9000: allowed: at most 8192"),
    ],
)
def test_bad_values_are_named(values, sentence):
    with pytest.raises(UserError, match=sentence):
        ServeConfig.from_dict(values)


@pytest.mark.parametrize("change", [{"hosts": 3}, {"model": "/n"}, {"placement": "round_robin"}, {"dtype": "float16"}])
def test_a_join_with_another_option_names_it(change):
    running = ServeConfig.from_dict({"model": "/m", "hosts": 2})
    (name,) = change
    with pytest.raises(UserError, match=f"{name} .* is running with {getattr(running, name)}"):
        ServeConfig.from_dict({"model": "/m", "hosts": 2, **change}).check_joins(running)
    ServeConfig.from_dict({"model": "/m", "hosts": 2, "drain_s": 1}).check_joins(running)


def test_paths_and_nested_options_round_trip():
    options = GrpcOptions(port=1, access=AccessOptions(tls_cert=Path("/c"), tls_key=Path("/k")))
    assert from_dict(GrpcOptions, to_dict(options)) == options


@pytest.mark.parametrize("node", ["", "CPU", "GPU", "memory", "node:10.0.0.1"])
def test_engines_go_to_nodes_that_can_be_told_from_others(node):
    with pytest.raises(UserError, match=f"engine_node {node}.*allowed: here, any, a node's address"):
        ServeConfig(model="m", engine_node=node)


def test_gpus_follow_the_device():
    assert (ServeConfig("/m", 2).gpus_per_host, ServeConfig("/m", 2).engine_gpus) == (0, 0)
    config = ServeConfig("/m", 2, device="cuda")
    assert (config.gpus_per_host, config.engine_gpus) == (1, 1)
    assert ServeConfig("/m", 2, device="cuda", gpus_per_host=0.5).gpus_per_host == 0.5
    assert ServeConfig("/m", 1, device="cuda", gpus_per_host=0).gpus_per_host == 0
    with pytest.raises(UserError, match="gpus_per_host 0: all 2 hosts would compute on one GPU; allowed: above 0"):
        ServeConfig("/m", 2, device="cuda", gpus_per_host=0)


def test_several_engines_need_hosts_to_share():
    assert ServeConfig("/m", 2, engines=2).host_core(1) == 2 * ServeConfig("/m").engine.threads + 1
    with pytest.raises(UserError, match="engines 2: several engines share expert hosts: needs hosts 1 or more"):
        ServeConfig("/m", 0, engines=2)


def test_both_doors_can_say_all_of_a_deployment_and_must_agree():
    keys = user_options(ServeConfig)
    assert {
        "expert_ffn",
        "served_model_name",
        "engine_threads",
        "host_threads",
        "kv_cache_memory",
        "max_queued",
    } <= set(keys)
    running = of_keys(ServeConfig, {"model": "/m", "expert_ffn": "loop"})
    of_keys(ServeConfig, {"model": "/m", "expert_ffn": "loop", "served_model_name": "m"}).check_joins(running)
    with pytest.raises(UserError, match="expert_ffn auto: deployment 'pregate' is running with loop"):
        of_keys(ServeConfig, {"model": "/m"}).check_joins(running)
    with pytest.raises(UserError, match="served_model_name n: deployment 'pregate' is running with m"):
        of_keys(ServeConfig, {"model": "/m", "expert_ffn": "loop", "served_model_name": "n"}).check_joins(running)
