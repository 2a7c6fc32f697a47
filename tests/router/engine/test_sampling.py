"""Sampling: greedy, top-p, and draws that depend on seed and position alone."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pregate.router.engine import sampling
from pregate.router.engine.noise import log_uniform
from pregate.router.engine.sampling import chances, draw, sample
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams


def sequence(length=3, seed=5, **sampling):
    params = SamplingParams(8, **sampling)
    return Sequence("r", [0] * length, length, 8, params, seed, None, np.zeros(1))


def test_temperature_zero_takes_the_largest():
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), [sequence()]) == [1]


def misfit(drawn, share_V):
    """Chi-squared of draws against the shares they should have, over its degrees of freedom: about 1."""
    expected = share_V * len(drawn)
    seen = np.bincount(drawn, minlength=len(share_V))
    return ((seen - expected) ** 2 / expected).sum() / (len(share_V) - 1)


@pytest.mark.parametrize("by", ["seed", "position"])
def test_draws_follow_the_distribution(by):
    """Over seeds as over the positions of one text; and those of neighbours have nothing to do with each other."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    share_V = logits.softmax(0).double().numpy()
    num = 100_000
    places = (range(num), [7] * num) if by == "seed" else ([7] * num, range(num))
    drawn = sampling._race(logits.expand(num, 5), [SamplingParams(1, 1.0)] * num, *places).argmax(-1).numpy()
    assert misfit(drawn, share_V) < 4.6  # of 4 degrees of freedom: one in 1,000 has more
    for lag in (1, 2, 64):
        assert misfit(drawn[lag:] * 5 + drawn[:-lag], np.outer(share_V, share_V).ravel()) < 2.1


def test_any_token_of_a_large_vocabulary_is_as_likely_as_it_says():
    """By its id and by its likelihood, with rare ones among them."""
    size, num = 49_152, 1500
    logits = torch.linspace(0, -6, size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))]
    drawn = np.concatenate(
        [sample(logits.expand(50, size), [sequence(seed=s, temperature=1.0) for s in range(n, n + 50)])
         for n in range(0, num, 50)]
    )  # fmt: skip
    share_V = logits.softmax(0).double()
    by_id = share_V.view(64, -1).sum(-1).numpy()
    assert misfit(drawn // (size // 64), by_id) < 1.5
    order = logits.argsort()
    place_V = torch.empty_like(order).scatter_(0, order, torch.arange(size))
    by_place = share_V[order].cumsum(0).mul(31.999).long()  # 32 bins of about the same mass
    mass = np.bincount(by_place.numpy(), share_V[order].numpy(), 32)
    assert misfit(by_place[place_V[drawn]].numpy(), mass) < 1.7
    assert len(set(drawn.tolist())) > num * 0.95


def test_noise_of_a_row_is_its_own_and_above_all_finite():
    rows = log_uniform([3, 3, 4, (1 << 63) - 1], [0, 1, 0, 1 << 31], 100_000, torch.device("cpu"))
    assert rows.isfinite().all() and (rows < 0).all()
    assert torch.equal(rows[2:3, :500], log_uniform([4], [0], 500, torch.device("cpu")))
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([rows[0, :-1], rows[0, 1:]]))[0, 1].abs() < 0.02
    for row in rows:  # exponential: as many below each quantile as there should be
        at = torch.tensor([1e-4, 1e-3, 0.1, 0.5, 0.9, 0.999])
        below = (1 - row.exp()[:, None] < at).double().mean(0)
        assert ((below - at).abs() < 5 * (at * (1 - at) / 100_000).sqrt()).all()


def test_rounding_moves_a_draw_only_where_the_first_two_are_as_close():
    """One logit that is higher by 2e-6 moves every bound of a running sum; a number looked up in it flipped twice."""
    logits = torch.zeros(300, 49_152)
    logits[:, 0] = 10.0
    moved = logits.clone()
    moved[:, 0] += 2e-6
    sequences = [sequence(seed=s, temperature=1.0) for s in range(300)]
    drawn = sample(logits, sequences)
    assert 30 < drawn.count(0) < 270
    assert sample(moved, sequences) == drawn


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


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.02}, {"min_p": 0.9}, {"min_tokens": 9}])
def test_no_temperature_leaves_what_is_kept(option):
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2))
    logits[0, 299] = 9.0
    for temperature in (1e-3, 1.0, 100.0, 1e39):
        one = sequence(temperature=temperature, **option)
        one.end_ids = frozenset({299})
        kept = chances(sampling._processed(logits, [one]), [one.sampling])[0] > 0
        for one.seed in range(30):
            assert kept[sample(logits, [one])[0]]


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
