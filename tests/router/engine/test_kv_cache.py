"""The paged tensors of the KV cache."""

import psutil
import torch

from pregate.router.engine.kv_cache import PagedKV

ONE_HEAD = ((1, 2), (1, 2))


def test_slots_hold_what_was_written_last():
    kv = PagedKV(3, 2, [((3, 4), (3, 4))])
    first, second = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    kv.write(0, torch.tensor([4, 1]), first, first + 1)
    kv.write(0, torch.tensor([1, 5]), second, second + 1)
    keys, values = kv.gather(0, torch.tensor([2, 0]), 1)
    expected = torch.stack([first[0], second[1], torch.zeros(3, 4), second[0]])[None]
    assert torch.equal(keys, expected)
    assert torch.equal(values[0, [0, 1, 3]], expected[0, [0, 1, 3]] + 1)


def test_lanes_are_views_of_what_gathering_copies():
    kv = PagedKV(8, 2, [ONE_HEAD])
    rows = torch.randn(16, 1, 2)
    kv.write(0, torch.arange(16), rows, -rows)
    keys, values = kv.lanes(0, first=2, stride=6, num=2, length=3)
    assert torch.equal(keys, torch.stack([rows[2:5], rows[8:11]]))
    gathered = kv.gather(0, torch.tensor([1, 2, 4, 5]), 2)
    assert torch.equal(keys, gathered[0][:, :3]) and torch.equal(values, gathered[1][:, :3])


def test_layers_may_differ_in_shape_and_all_memory_is_there_from_the_start():
    kv = PagedKV(2, 4, [ONE_HEAD, ((2, 3), (2, 5))], dtype=torch.float16)
    assert kv.keys[1].shape == (8, 2, 3) and kv.values[1].shape == (8, 2, 5)
    assert kv.nbytes == 2 * 8 * (2 + 2 + 6 + 10)


def test_blocks_take_memory_when_they_are_written():
    held = psutil.Process().memory_info().rss
    kv = PagedKV(1024, 16, [((64, 256), (64, 256))])
    assert kv.nbytes == 2 << 30
    assert psutil.Process().memory_info().rss - held < kv.nbytes // 16
    assert not kv.keys[0][:1].any()
