import pytest

from pregate.cluster.config import ServeConfig
from pregate.cluster.room import bundles_of, describe, lacking, refusal

NODE = {"CPU": 8.0, "GPU": 1.0, "node:10.0.0.1": 1.0}
OTHER = {"CPU": 8.0, "node:10.0.0.2": 1.0}


def config(**options):
    return ServeConfig.from_dict({"model": "/m", "hosts": 2, **options})


@pytest.mark.parametrize(
    ("options", "nodes", "lacks"),
    [
        ({}, [NODE], None),
        ({"gpus_per_host": 0.5}, [NODE], None),
        ({"gpus_per_host": 1}, [NODE], "GPU"),
        ({"gpus_per_host": 1}, [OTHER], "GPU"),
        ({"hosts": 1, "gpus_per_host": 2}, [NODE, NODE], "GPU"),  # two in all, but no node has them both
        ({"engine_gpus": 1}, [NODE, OTHER], None),
        ({"engines": 2, "engine_gpus": 0.5}, [NODE, OTHER], None),
        ({"engines": 2, "engine_gpus": 1}, [NODE, OTHER], "GPU"),
        ({"hosts": 100}, [NODE], "CPU"),
        ({}, [OTHER], "node:10.0.0.1"),
        ({}, [], "CPU"),
        ({"engine_node": "any", "engine_gpus": 1}, [OTHER, NODE], None),
        ({"engine_node": "10.0.0.2"}, [NODE, OTHER], None),
        ({"engine_node": "10.0.0.3"}, [NODE, OTHER], "node:10.0.0.3"),
        ({"engine_node": "engines"}, [NODE, OTHER], "engines"),
        ({"engine_node": "engines"}, [NODE, {**OTHER, "engines": 1}], None),
    ],
)
def test_what_a_cluster_can_never_give(options, nodes, lacks):
    assert lacking(bundles_of(config(**options), "10.0.0.1"), nodes) == lacks


def test_the_refusal_names_the_option_and_what_there_is():
    asked = config(gpus_per_host=1)
    has = describe(asked, NODE, {"CPU": 7.8})
    engine, hosts = "an engine of 0 GPUs on this node", "2 hosts of 1 GPUs each"
    assert has == f"{hosts} and {engine}; the cluster has 8 CPUs (7.8 free), 1 GPUs (0 free)"
    assert str(refusal(asked, "GPU", has)) == f"gpus_per_host 1: not to be had: {has}"
    assert str(refusal(config(hosts=99), "CPU", has)).startswith("hosts 99: too many for this cluster")
    elsewhere = config(engine_node="10.0.0.3")
    has = describe(elsewhere, NODE, NODE)
    assert "an engine of 0 GPUs on 10.0.0.3 (--engine-node); the cluster has" in has
    assert str(refusal(elsewhere, "node:10.0.0.3", has)).startswith("engine_node 10.0.0.3: no such node: 2 hosts")
