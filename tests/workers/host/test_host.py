import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pregate.base.errors import ProtocolError, UserError
from pregate.kernels import reference
from pregate.kernels.cpu.packed import why_no_fp16
from pregate.kernels.expert_ffn import IMPLEMENTATIONS
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import EXPERT_FFNS, HostOptions
from pregate.workers.host.plan_shelf import MAX_ENGINES, NeedPlanError
from pregate.workers.link.protocol import GroupIndex, GroupKey, Hello, HostPlan

ROOT = Path(__file__).resolve().parents[3]
WIDTH, UNIT_BYTES = 512, 3 * 256 * 512 * 4
HOME = [(0, 1), (0, 4), (2, 0)]


def i32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def rows(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows))


def expected(reader, layer: int, x_ND: torch.Tensor, index: GroupIndex) -> torch.Tensor:
    """One row per pair in pair order, by the reference."""
    act = reference.activation(reader.hidden_act)
    experts = np.repeat(index.expert_ids, index.counts)
    pairs = []
    for row, expert in zip(index.row_index.tolist(), experts.tolist(), strict=True):
        gate_up, down = reader.read_unit(layer, expert)
        pairs.append(reference.expert_ffn(x_ND[row : row + 1], gate_up, down, act))
    return torch.cat(pairs)


#: Rows a, b, c; expert 1 takes a and c, expert 4 takes a and b.
WORKED = GroupIndex(i32(1, 4), i32(2, 2), i32(0, 2, 0, 1))


def plan_of(step: int) -> HostPlan:
    """Layer 0 is WORKED, layer 1 is dense, layer 2 gives both of its rows to expert 0."""
    return HostPlan(
        step, i32(3, 0, 2), i32(0, 2, 2, 3), i32(1, 4, 0), i32(2, 2, 2), i32(0, 4, 4, 6), i32(0, 2, 0, 1, 0, 1)
    )


def test_the_names_in_the_help_are_those_that_are_allowed():
    assert EXPERT_FFNS == IMPLEMENTATIONS


@pytest.mark.parametrize("implementation", ["loop", "grouped", "packed"])
def test_one_row_per_pair_in_pair_order(reader, implementation):
    host = ExpertHost(reader, HOME, HostOptions(expert_ffn=implementation))
    x_ND = rows(3)
    y_PD = host.compute(GroupKey("e", 0, 0, 0), x_ND, WORKED)
    torch.testing.assert_close(y_PD, expected(reader, 0, x_ND, WORKED), rtol=0, atol=1e-4)
    one = GroupIndex(i32(1, 4), i32(1, 1), i32(0, 0))
    y_PD = host.compute(GroupKey("e", 0, 0, 0), x_ND[:1], one)
    torch.testing.assert_close(y_PD, expected(reader, 0, x_ND[:1], one), rtol=0, atol=1e-4)


def test_a_plan_says_the_same_as_its_indexes(reader):
    host = ExpertHost(reader, HOME, HostOptions())
    host.put_plan("e", plan_of(5))
    for layer, num_rows in ((0, 3), (2, 2)):
        x_ND = rows(num_rows)
        planned = host.compute(GroupKey("e", 5, layer, 0), x_ND, None)
        assert torch.equal(planned, host.compute(GroupKey("e", 5, layer, 0), x_ND, plan_of(5).layer(layer)))
    assert host.status()["num_pairs"] == 2 * (4 + 2)


def test_plans_are_soft_state(reader):
    host = ExpertHost(reader, HOME, HostOptions(num_plans=2))
    key = GroupKey("e", 1, 0, 0)
    with pytest.raises(NeedPlanError):
        host.compute(key, rows(3), None)
    for step in (1, 2, 3):
        host.put_plan("e", plan_of(step))
    with pytest.raises(NeedPlanError):
        host.compute(key, rows(3), None)
    host.compute(key._replace(step=3), rows(3), None)
    with pytest.raises(NeedPlanError):
        host.compute(key._replace(step=3, engine="another"), rows(3), None)
    host.forget("e")
    with pytest.raises(NeedPlanError):
        host.compute(key._replace(step=3), rows(3), None)


def test_plans_of_silent_engines_go_first(reader):
    host = ExpertHost(reader, HOME, HostOptions())
    for engine in range(MAX_ENGINES):
        host.put_plan(str(engine), plan_of(1))
    host.put_plan("0", plan_of(2))
    host.put_plan("new", plan_of(1))
    host.compute(GroupKey("0", 1, 0, 0), rows(3), None)
    with pytest.raises(NeedPlanError):
        host.compute(GroupKey("1", 1, 0, 0), rows(3), None)


def test_a_group_that_does_not_fit_is_refused(reader):
    host = ExpertHost(reader, HOME, HostOptions(max_rows=8))
    host.put_plan("e", plan_of(5))
    key = GroupKey("e", 5, 0, 0)
    for bad in (
        lambda: host.compute(key, rows(4), None),
        lambda: host.compute(key._replace(layer=3), rows(3), None),
        lambda: host.compute(key._replace(layer=-1), rows(3), None),
        lambda: host.compute(key, rows(2), WORKED),
        lambda: host.compute(key, rows(3)[:, :100], WORKED),
        lambda: host.compute(key, rows(9), WORKED),
        lambda: host.put_plan("e", HostPlan(6, i32(3), i32(0, 1), i32(1), i32(2), i32(0, 1), i32(0))),
    ):
        with pytest.raises(ProtocolError):
            bad()


def test_an_answer_beyond_the_message_limit_is_refused_before_it_is_computed(reader):
    host = ExpertHost(reader, HOME, HostOptions())
    num_pairs = (1 << 29) // (WIDTH * 4) + 1
    index = GroupIndex(i32(1), i32(num_pairs), np.zeros(num_pairs, np.int32))
    with pytest.raises(ProtocolError, match="answer of"):
        host.compute(GroupKey("e", 0, 0, 0), rows(1), index)


def test_only_the_home_units_are_read(reader):
    host = ExpertHost(reader, HOME, HostOptions())
    status = host.status()
    assert (status["num_units"], status["units_read"], status["misses"]) == (3, 3, 0)
    assert status["read_bytes"] == status["held_bytes"] == 3 * UNIT_BYTES
    assert reader.unit_bytes(0) == UNIT_BYTES


def test_a_budget_in_bytes_is_what_slots_take():
    """Of units that are stored in 16 bits and computed in 32, and lie in either."""
    reader = CheckpointReader(ROOT / "examples" / "quartet-paths")
    units = [(layer, expert) for layer in range(reader.num_layers) for expert in range(4)]
    size = reader.unit_bytes(0)
    for expert_ffn, num_units in (("auto", 6), ("loop", 3)):
        host = ExpertHost(reader, units, HostOptions(resident_experts=6.0 * size, expert_ffn=expert_ffn))
        assert (host.status()["num_units"], host.status()["held_bytes"]) == (num_units, 6 * size)
    whole = ExpertHost(reader, units, HostOptions(resident_experts=float(size * len(units))))
    assert whole.status()["num_units"] == (len(units) // 2 if why_no_fp16() else len(units)), "packed, they all fit"


def test_a_miss_reads_that_unit_and_keeps_it(reader):
    host = ExpertHost(reader, HOME, HostOptions())
    index = GroupIndex(i32(0, 2, 4), i32(1, 2, 1), i32(0, 0, 1, 1))
    x_ND = rows(2)
    for _ in range(2):
        y_PD = host.compute(GroupKey("e", 0, 0, 0), x_ND, index)
        torch.testing.assert_close(y_PD, expected(reader, 0, x_ND, index), rtol=0, atol=1e-4)
        assert (host.status()["units_read"], host.status()["misses"]) == (5, 2)
    other_layer = GroupIndex(i32(3), i32(1), i32(0))
    y_PD = ExpertHost(reader, [], HostOptions()).compute(GroupKey("e", 0, 2, 0), x_ND[:1], other_layer)
    torch.testing.assert_close(y_PD, expected(reader, 2, x_ND[:1], other_layer), rtol=0, atol=1e-4)


@pytest.mark.parametrize("unit", [(0, 6), (1, 0), (3, 0), (0, -1)])
def test_a_unit_that_does_not_exist(reader, unit):
    with pytest.raises(UserError, match="not in this checkpoint"):
        ExpertHost(reader, [unit], HostOptions())


def test_hello_is_held_to_the_checkpoint(reader):
    host = ExpertHost(reader, HOME, HostOptions(host_id=3, max_rows=100))
    fitting = Hello("e", reader.fingerprint, "float32", WIDTH, 100)
    ack = host.accept(fitting, heartbeat_s=0.5, data_endpoint="ipc:///x")
    assert (ack.host_id, ack.incarnation, ack.max_rows, ack.num_units) == (3, host.incarnation, 100, 3)
    for change, complaint in (
        ({"fingerprint": "0" * 64}, "checkpoint 000000000000: host 3 serves"),
        ({"width": 128}, "width 128: host 3 has hidden width 512"),
        ({"dtype": "int8"}, "dtype int8: allowed: float32"),
        ({"max_rows": 101}, "max_rows 101: allowed: 1 to 100"),
    ):
        with pytest.raises(UserError, match=complaint):
            host.accept(Hello(**{**vars(fitting), **change}), heartbeat_s=0.5, data_endpoint="ipc:///x")


def test_rows_come_back_in_the_dtype_they_came_in(reader):
    host = ExpertHost(reader, HOME, HostOptions())
    x_ND = rows(3)
    exact = host.compute(GroupKey("e", 0, 0, 0), x_ND.bfloat16().float(), WORKED)
    half = host.compute(GroupKey("e", 0, 0, 0), x_ND.bfloat16(), WORKED)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


def resident_bytes(path: Path) -> int:
    """Bytes of the file's pages that are mapped into this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_the_rest_of_the_file_never_enters_the_process(unit_checkpoint, tmp_path):
    """Two units of eleven are read, and nothing of the file is mapped: who writes over it changes nothing here."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(unit_checkpoint, copy)
    (shard,) = copy.glob("*.safetensors")
    host = ExpertHost(CheckpointReader(copy), [(0, 1), (2, 0)], HostOptions())
    assert host.status()["num_units"] == 2
    assert host.status()["read_bytes"] == 2 * UNIT_BYTES
    assert resident_bytes(shard) == 0


def compute_layers(host: ExpertHost, step: int) -> list[torch.Tensor]:
    return [host.compute(GroupKey("e", step, layer, 0), rows(n), None) for layer, n in ((0, 3), (2, 2))]


@pytest.mark.parametrize("implementation", ["loop", "grouped", "packed"])
def test_a_plan_is_prepared_for_all_layers_when_it_comes(reader, implementation):
    host = ExpertHost(reader, HOME, HostOptions(expert_ffn=implementation))
    host.put_plan("e", plan_of(5))
    for layer, y_PD in zip((0, 2), compute_layers(host, 5), strict=True):
        index = plan_of(5).layer(layer)
        num_rows = int(index.row_index.max()) + 1
        torch.testing.assert_close(y_PD, expected(reader, layer, rows(num_rows), index), rtol=0, atol=1e-4)
    assert host.status()["num_prepared"] == 2
    host.compute(GroupKey("e", 5, 0, 0), rows(3), WORKED)
    assert host.status()["num_prepared"] == 2, "a group with its own index goes by it"


@pytest.mark.parametrize("implementation", ["loop", "grouped", "packed"])
def test_slots_that_move_between_plan_and_group_are_looked_up_again(reader, implementation):
    """Reading expert 0 moves experts 1 and 4 from slots 0 and 1 to 1 and 2."""
    host = ExpertHost(reader, HOME, HostOptions(expert_ffn=implementation))
    host.put_plan("e", plan_of(5))
    first = compute_layers(host, 5)
    miss = GroupIndex(i32(0), i32(1), i32(0))
    host.compute(GroupKey("e", 6, 0, 0), rows(1), miss)
    assert host.status()["misses"] == 1
    for before, after in zip(first, compute_layers(host, 5), strict=True):
        assert torch.equal(before, after)
    assert host.status()["num_prepared"] == 2 + 1, "layer 2 did not change"


def test_a_plan_for_units_not_held_reads_them_when_the_group_comes(reader):
    host = ExpertHost(reader, [(0, 1), (2, 0)], HostOptions())
    host.put_plan("e", plan_of(5))
    assert host.status()["misses"] == 0
    y_PD, _ = compute_layers(host, 5)
    torch.testing.assert_close(y_PD, expected(reader, 0, rows(3), WORKED), rtol=0, atol=1e-4)
    assert (host.status()["misses"], host.status()["num_prepared"]) == (1, 1)


@pytest.mark.parametrize("unit", [(0, 6), (2, 5), (1, 0), (0, 7)])
def test_a_plan_for_a_unit_that_does_not_exist_fails_with_its_group(reader, unit):
    host = ExpertHost(reader, HOME, HostOptions())
    layer, expert = unit
    after = [int(n >= layer) for n in range(3)]
    plan = HostPlan(
        7, i32(*(int(n == layer) for n in range(3))), i32(0, *after), i32(expert), i32(1), i32(0, *after), i32(0)
    )
    host.put_plan("e", plan)
    with pytest.raises(UserError, match="not in this checkpoint"):
        host.compute(GroupKey("e", 7, layer, 0), rows(1), None)
