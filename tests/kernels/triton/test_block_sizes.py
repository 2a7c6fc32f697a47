import json

import pytest

from pregate.base.errors import UserError
from pregate.kernels.triton.block_sizes import (
    BLOCK_MS,
    KERNELS,
    TABLE_PATH,
    BlockSizes,
    BlockTable,
    block_m_for,
    fit,
    shared_bytes,
)

#: Shared memory that one block may have, in bytes, by compute capability (CUDA's programming guide, 2024).
MAX_SHARED_BYTES = {"7.5": 64 << 10, "8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10}


@pytest.mark.parametrize(
    ("mean", "block_m"), [(0.2, 16), (1, 16), (8, 16), (9, 32), (17, 64), (37, 64), (400, 64), (401, 128)]
)
def test_rows_per_tile_follow_the_mean(mean, block_m):
    assert block_m_for(int(mean * 10), 10) == block_m


def test_the_table_has_every_row_the_rule_can_ask_for():
    table = BlockTable.load("no such device")
    for kernel in KERNELS:
        wanted = {16} if kernel.startswith("decode") else set(BLOCK_MS)
        assert set(table.by_rows[kernel]) == wanted
    assert {block_m_for(rows, 8) for rows in range(1, 10_000, 7)} == set(BLOCK_MS)


def test_a_tuned_table_is_read_back_for_its_device_only(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(TABLE_PATH.read_text())
    default = BlockTable.load("")
    rows = {**default.by_rows, "down": {**default.by_rows["down"], 64: BlockSizes(32, 64, 4, 2)}}
    BlockTable("NVIDIA H200", rows).save(path)
    assert BlockTable.load("NVIDIA H200", path).sizes("down", 64) == BlockSizes(32, 64, 4, 2)
    assert BlockTable.load("another", path) == default


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"sm_90": {"down": {}}}))
    with pytest.raises(UserError, match=r"table\.json: not a table"):
        BlockTable.load("", path)
    with pytest.raises(UserError, match="block_n 48: must be a power of two"):
        BlockSizes(48, 64, 4, 2)


def test_shared_memory_worked_example():
    sizes = BlockSizes(64, 64, 8, 4)
    assert shared_bytes("gate_up", 128, sizes) == 131104
    assert fit("gate_up", 128, sizes, 131104) == sizes
    assert fit("gate_up", 128, sizes, 99 << 10) == BlockSizes(64, 64, 8, 3)
    assert fit("gate_up", 128, sizes, 48 << 10) == BlockSizes(64, 32, 8, 2)
    with pytest.raises(UserError, match="gate_up 128: no block sizes fit 16384 bytes"):
        fit("gate_up", 128, sizes, 16 << 10)


@pytest.mark.parametrize("capability", MAX_SHARED_BYTES)
def test_a_device_without_a_row_gets_sizes_that_it_can_launch(capability, log):
    limit, table = MAX_SHARED_BYTES[capability], BlockTable.load("")
    chosen = BlockTable.load("a card", max_shared_bytes=limit)
    for kernel, rows in chosen.by_rows.items():
        for block_m, sizes in rows.items():
            assert shared_bytes(kernel, block_m, sizes) <= limit
            fits = shared_bytes(kernel, block_m, table.sizes(kernel, block_m)) <= limit
            assert (sizes == table.sizes(kernel, block_m)) == fits, "cut only where it must be"
    text = "\n".join(log)
    assert f"no block sizes for a card: those of sm_90, cut to {limit} bytes" in text
    assert ("gate_up 128" in text) == (limit < 131104)


def test_a_row_of_its_own_is_not_cut(tmp_path, log):
    path = tmp_path / "table.json"
    BlockTable("a card", BlockTable.load("").by_rows).save(path)
    assert BlockTable.load("a card", path, max_shared_bytes=1).by_rows == BlockTable.load("").by_rows
    assert not log
