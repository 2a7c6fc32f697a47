"""Sampling: greedy, top-p, and draws that depend on seed and position alone."""

import numpy as np
import torch

from pregate.router.messages import SamplingParams
from pregate.router.sampling import sample
from pregate.router.sequence import Sequence


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
