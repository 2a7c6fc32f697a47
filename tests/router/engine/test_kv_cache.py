"""The paged tensors of the KV cache."""

import torch

from pregate.router.engine.kv_cache import PagedKV


def test_slots_hold_what_was_written_last():
    kv = PagedKV(6)
    first, second = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    kv.write(0, torch.tensor([4, 1]), first, first + 1)
    kv.write(0, torch.tensor([1, 5]), second, second + 1)
    keys, values = kv.read(0, torch.tensor([[4, 1], [5, 1]]))
    assert torch.equal(keys, torch.stack([torch.stack([first[0], second[0]]), torch.stack([second[1], second[0]])]))
    assert torch.equal(values, keys + 1)


def test_the_spare_slot_is_beyond_those_that_are_handed_out_and_stays_zero():
    kv = PagedKV(6)
    kv.write(3, torch.arange(6), *(torch.full((6, 1, 2), torch.nan) for _ in range(2)))
    for part in kv.read(3, torch.tensor([kv.spare_slot])):
        assert torch.equal(part, torch.zeros(1, 1, 2))


def test_layers_are_apart_and_in_the_dtype_of_their_first_write():
    kv = PagedKV(2)
    kv.write(0, torch.tensor([0]), *(torch.ones(1, 1, 2, dtype=torch.float16) for _ in range(2)))
    kv.write(1, torch.tensor([0]), *(torch.full((1, 2, 3), 2.0) for _ in range(2)))
    assert kv.read(0, torch.tensor([0]))[0].dtype == torch.float16
    assert kv.read(1, torch.tensor([0]))[0].shape == (1, 2, 3)
