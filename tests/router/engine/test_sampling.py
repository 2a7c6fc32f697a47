"""Sampling: greedy, top-p, and draws that depend on seed and position alone."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pregate.router.engine import sampling
from pregate.router.engine.sampling import draw, sample
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams


def sequence(length=3, seed=5, **sampling):
    params = SamplingParams(8, **sampling)
    return Sequence("r", [0] * length, length, 8, params, seed, None, np.zeros(1))


def test_temperature_zero_takes_the_largest():
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), [sequence()]) == [1]


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = [sample(logits, [sequence(seed=s, temperature=1.0)])[0] for s in range(4000)]
    share = np.bincount(drawn, minlength=3) / 4000
    assert np.abs(share - logits[0].softmax(0).numpy()).max() < 0.03


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        drawn = {sample(logits, [sequence(seed=s, temperature=1.0, top_p=top_p)])[0] for s in range(300)}
        assert drawn == kept


def test_a_draw_does_not_depend_on_batch_mates():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    sequences = [sequence(seed=s, temperature=0.8) for s in range(5)]
    together = sample(logits, sequences)
    assert together == [sample(logits[i : i + 1], [sequences[i]])[0] for i in range(5)]
    moved_on = sample(logits, [sequence(length=4, seed=s, temperature=0.8) for s in range(5)])
    assert moved_on != together


class Calls(TorchDispatchMode):
    """The names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_are_drawn_together_and_the_vocabulary_is_not_sorted(top_p):
    counts = []
    for num_rows in (2, 40):
        with Calls() as calls:
            sample(
                torch.randn(num_rows, 700), [sequence(seed=s, temperature=1.0, top_p=top_p) for s in range(num_rows)]
            )
        assert not {"sort", "argsort", "topk"} & set(calls.names)
        counts.append(len(calls.names))
    assert counts[0] == counts[1]


def test_chunks_of_rows_change_nothing(monkeypatch):
    logits = torch.randn(7, 300)
    sequences = [sequence(seed=s, temperature=0.7, top_p=(1.0, 0.8)[s % 2]) for s in range(7)]
    together = sample(logits, sequences)
    monkeypatch.setattr(sampling, "_CHUNK", 600)
    assert sample(logits, sequences) == together


@pytest.mark.parametrize("levels", [3, 10**6])
def test_top_p_is_the_smallest_set_of_a_large_vocabulary(levels):
    """As sorting finds it: of equal probabilities the lower ids come first, which few levels make many of."""
    generator = torch.Generator().manual_seed(levels)
    p_BV = torch.randint(1, levels + 1, (6, 3000), generator=generator).float().log().mul(3).softmax(-1)
    top_p_B1 = torch.tensor([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])[:, None].double()
    kept = sampling._top_p(p_BV, top_p_B1) > 0
    order = torch.argsort(p_BV, dim=-1, descending=True, stable=True)
    until = p_BV.gather(1, order).cumsum(-1, dtype=torch.float64)
    num_kept = (until < top_p_B1).sum(-1).clamp_max(2999) + 1
    for row, (ids, number) in enumerate(zip(order, num_kept.tolist(), strict=True)):
        assert kept[row].sum() == pytest.approx(number, abs=1)  # the last bits of the sum
        assert kept[row, ids[: number - 1]].all()


def test_a_row_that_is_not_numbers_harms_no_other():
    logits = torch.randn(3, 300)
    sequences = [sequence(seed=s, temperature=1.0, top_p=0.9) for s in range(3)]
    clean = sample(logits, sequences)
    logits[1, :] = torch.nan
    logits[1, 5] = torch.inf
    drawn = sample(logits, sequences)
    assert (drawn[0], drawn[2]) == (clean[0], clean[2])
    assert 0 <= drawn[1] < 300


@pytest.mark.parametrize("temperature", [1e-3, 1e-60])
def test_a_tiny_temperature_takes_the_largest(temperature):
    logits = torch.randn(300) * 50
    params = SamplingParams(1, temperature=temperature, top_p=0.5)
    assert {draw(logits, params, seed, 3) for seed in range(20)} == {int(logits.argmax())}


def test_only_tokens_with_a_chance_are_drawn():
    """Over many blocks, of which most are empty; the ends of the range included."""
    logits = torch.full((1, 5000), -torch.inf)
    logits[0, [0, 777, 4999]] = torch.tensor([1.0, 2.0, 1.0])
    drawn = {draw(logits[0], SamplingParams(1, temperature=1.0), seed, 0) for seed in range(200)}
    assert drawn == {0, 777, 4999}
