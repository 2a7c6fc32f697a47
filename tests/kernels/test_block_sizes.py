import json

import pytest

from pregate.base.errors import UserError
from pregate.kernels.block_sizes import BLOCK_MS, KERNELS, TABLE_PATH, BlockSizes, BlockTable, block_m_for


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
