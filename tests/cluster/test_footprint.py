import pytest

from pregate.cluster.config import ServeConfig
from pregate.cluster.footprint import PROCESS_BYTES, measure
from pregate.kernels.cpu.packed import why_no_fp16
from pregate.model.checkpoint import CheckpointReader
from tests.cluster.leftovers import ROOT

HIDDEN, WIDTH, LAYERS, ROUTED, SHARED = 64, 16, 3, 5, 3
UNIT = 3 * HIDDEN * WIDTH * 4


def footprint(path, **options):
    return measure(CheckpointReader(path), ServeConfig.from_dict({"model": str(path), **options}))


def test_bytes_of_each_role(layerwise_checkpoint):
    found = footprint(layerwise_checkpoint, hosts=2)
    assert found.units_bytes == ((3 + 2 + 3) * UNIT, (2 + 3 + 2) * UNIT)  # three layers take turns with the odd one
    assert found.shared_bytes == LAYERS * SHARED * UNIT
    assert found.kv_cache_bytes == 65536 * LAYERS * 2 * 2 * 16 * 4
    file_bytes = sum(path.stat().st_size for path in layerwise_checkpoint.glob("*.safetensors"))
    assert found.backbone_bytes + found.shared_bytes + sum(found.units_bytes) == file_bytes
    assert found.num_processes == 5
    several = footprint(layerwise_checkpoint, hosts=2, engines=3)
    assert several.num_processes == 7
    assert several.total_bytes - found.total_bytes == 2 * (found.engine_bytes + PROCESS_BYTES)


@pytest.mark.parametrize("hosts", [0, 1])
def test_one_holder_has_every_unit(layerwise_checkpoint, hosts):
    assert footprint(layerwise_checkpoint, hosts=hosts).units_bytes == (LAYERS * ROUTED * UNIT,)


def test_the_path_service_is_a_process_of_its_own(path_checkpoint):
    assert footprint(path_checkpoint, hosts=2).num_processes == 6


def test_half_the_dtype_is_half_the_bytes(layerwise_checkpoint):
    whole, half = (footprint(layerwise_checkpoint, hosts=1, dtype=d) for d in ("float32", "float16"))
    assert half.units_bytes[0] * 2 == whole.units_bytes[0]
    assert half.kv_cache_bytes * 2 == whole.kv_cache_bytes


def test_experts_that_come_and_go_count_as_the_slots_they_have(layerwise_checkpoint):
    """Half of 8 units are 4. Bytes in memory count as far as used."""
    half = footprint(layerwise_checkpoint, hosts=2, host={"resident_experts": 0.5})
    assert half.units_bytes == (4 * UNIT, 7 * UNIT // 2)
    assert footprint(layerwise_checkpoint, host={"resident_experts": 0.4}).units_bytes == (6 * UNIT,)
    assert half.kept_bytes == 0
    kept = footprint(layerwise_checkpoint, hosts=2, host={"resident_experts": 0.5, "host_memory": 10 * UNIT})
    assert kept.kept_bytes == 4 * UNIT + 7 * UNIT // 2
    assert kept.total_bytes - half.total_bytes == kept.kept_bytes


@pytest.mark.skipif(bool(why_no_fp16()), reason=why_no_fp16())
def test_experts_stored_in_16_bits_stay_in_them_on_a_cpu():
    quartet = ROOT / "examples" / "quartet-paths"
    packed, loop = (footprint(quartet, hosts=1, host={"expert_ffn": name}) for name in ("auto", "loop"))
    assert 2 * packed.units_bytes[0] == loop.units_bytes[0]
    half = {"resident_experts": 0.5}
    passing = footprint(quartet, hosts=1, host=half)
    assert 2 * passing.units_bytes[0] == packed.units_bytes[0], "those that come and go do, too"
    assert footprint(quartet, hosts=1, host=half | {"expert_ffn": "loop"}).units_bytes == packed.units_bytes
    assert footprint(quartet, hosts=1, host={"expert_ffn": "stored"}) == packed
    assert passing.kept_bytes == 0
    whole = footprint(quartet, hosts=1, host={"resident_experts": float(packed.units_bytes[0])})
    assert whole.units_bytes == packed.units_bytes, "all fit, packed"
    assert packed.kv_cache_bytes == loop.kv_cache_bytes
