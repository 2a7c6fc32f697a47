"""What placing reads of a checkpoint, and where its experts go."""

import json

import numpy as np
import pytest

from pregate.base.errors import CheckpointError
from pregate.cluster.config import ServeConfig
from pregate.cluster.routed_experts import read_routed_experts

USE = [[0.9, 0.1, 0.5, 0.5], [], [0.2, 0.2, 0.7, 0.9]]


def checkpoint(folder, routing="path", **figures):
    cuts = [{"num_routed": count} for count in (4, 0, 4)]
    (folder / "config.json").write_text(json.dumps({"layer_cuts": cuts, "routing": routing}))
    (folder / "manifest.json").write_text(json.dumps({"figures": figures}))
    return str(folder)


def test_measured_use_decides_where_experts_go(tmp_path):
    model = checkpoint(tmp_path, decouple={"path_expert_use": USE})
    config = ServeConfig(model, hosts=2, placement="balanced", replicas=0.25)
    copies = read_routed_experts(model).placement(config).copies
    assert sorted(copies[0, 0]) == sorted(copies[2, 3]) == [0, 1], "the two used most have copies"
    assert (copies >= 0).sum() == 10


@pytest.mark.parametrize(
    ("routing", "figures"), [("path", {"decouple": {}}), ("layerwise", {"decouple": {"path_expert_use": USE}})]
)
def test_without_a_measure_of_what_is_served_all_count_alike(tmp_path, routing, figures):
    experts = read_routed_experts(checkpoint(tmp_path, routing, **figures))
    assert experts.load_LR is None
    placement = experts.placement(ServeConfig(str(tmp_path), hosts=2, placement="balanced"))
    assert [len(placement.units_of(host)) for host in range(2)] == [4, 4]


@pytest.mark.parametrize("use", [[[1.0]], "x", [[0.5] * 4, [], [None] * 4]])
def test_a_damaged_measure_names_its_file(tmp_path, use):
    model = checkpoint(tmp_path, decouple={"path_expert_use": use})
    with pytest.raises(CheckpointError, match=r"manifest.json: not a readable file of a routed checkpoint"):
        read_routed_experts(model)


def test_load_is_padded_with_zeros(tmp_path):
    load = read_routed_experts(checkpoint(tmp_path, decouple={"path_expert_use": USE})).load_LR
    assert load is not None
    assert np.array_equal(load, [USE[0], [0] * 4, USE[2]])
