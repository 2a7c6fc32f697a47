"""The losses of a path router: by hand, where they are least, and that each of them teaches."""

from __future__ import annotations

import math

import pytest
import torch

from pregate.convert.paths.losses import (
    ENTROPY_WEIGHT,
    STEP_WIDTH,
    STRAY_WEIGHT,
    PaperLoss,
    RelativeLoss,
    SelectorLoss,
    SetLoss,
    StraightThroughLoss,
    bit_entropy,
    code_shares,
    loss_for,
    smooth_step,
)
from pregate.convert.paths.targets import LEAST_SPREAD, MassScale
from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.path_router import PathRouter, choose_experts

CUTS = (LayerCut(5, 0, 2, 1), LayerCut(0, 1, 0, 4), LayerCut(3, 0, 1, 1))


def masses(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num_tokens, 8, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [1.0] * 5 + [9.0] * 3
    )


def test_scale_by_hand():
    cuts = (LayerCut(2, 0, 1, 1), LayerCut(0, 1, 0, 4), LayerCut(2, 0, 1, 1))
    mass = torch.tensor([[1.0, 3.0, 10.0, 30.0], [5.0, 7.0, 50.0, 70.0]])
    targets = MassScale.of(mass, cuts).targets(mass, cuts, "top_k")
    # Layer 0: masses 1 3 5 7 have standard deviation 2.582; centred within the token they are -1 and 1, so -0.3873
    # and 0.3873, whose own deviation is 0.5477. Layer 2 is ten times layer 0, so the same after standardising.
    value = 0.3873 / (0.5477 + LEAST_SPREAD)
    expected = torch.tensor([[-value, value, -value, value]] * 2)
    torch.testing.assert_close(targets, expected, rtol=1e-3, atol=0)
    # For a threshold the level counts: layer 0 has mean 4, layer 2 mean 40.
    levels = torch.tensor([[-3.0, -1.0, -3.0, -1.0], [1.0, 3.0, 1.0, 3.0]]) / 2.582
    torch.testing.assert_close(MassScale.of(mass, cuts).targets(mass, cuts, "threshold"), levels, rtol=1e-3, atol=0)


def test_the_papers_targets_by_hand():
    """Four experts with shares 0.4 0.3 0.2 0.1: scores 1.5 0.5 -0.5 -1.5; and the best two share what the best has."""
    mass = torch.tensor([[8.0, 6.0, 4.0, 2.0]])
    soft = torch.tensor([1.5, 0.5, -0.5, -1.5]).softmax(0)
    for num_active, best in ((1, [0.625, 0.125, 0.125, 0.125]), (2, [0.375, 0.375, 0.125, 0.125])):
        targets = PaperLoss([LayerCut(4, 0, num_active, 1)]).targets(mass)
        torch.testing.assert_close(targets[0], 0.75 * torch.tensor(best) + 0.25 * soft)
    assert PaperLoss([LayerCut(4, 0, 1, 1)])(torch.zeros(1, 4), targets).item() == pytest.approx(math.log(4))
    assert PaperLoss([LayerCut(2, 0, 1, 1)] * 2)(torch.zeros(1, 4), torch.full((1, 4), 0.5)).item() == pytest.approx(
        math.log(2)  # averaged over layers, not summed
    )


def test_a_relative_error_by_hand():
    """Two tokens of layer 0 (targets -3 -1 1 3 over 2.582): mean squares 0.75 each, so all weigh alike. In layer 2 the
    second token's masses are huge: its errors are the smaller a share, and the first one's count as in layer 0."""
    cuts = (LayerCut(2, 0, 1, 1), LayerCut(0, 1, 0, 4), LayerCut(2, 0, 1, 1))
    mass = torch.tensor([[1.0, 3.0, 1.0, 3.0], [5.0, 7.0, 500.0, 700.0]])
    loss = RelativeLoss(cuts, "threshold", MassScale.of(mass, cuts), mass)
    both = loss.targets(mass)
    targets, weights = both.chunk(2, dim=-1)
    assert torch.equal(targets, MassScale.of(mass, cuts).targets(mass, cuts, "threshold"))
    assert loss(targets, both).item() == 0
    # The mean alone (0, as targets are standardised) leaves a loss of 1 in every layer.
    assert loss(torch.zeros(2, 4), both).item() == pytest.approx(1)
    square = (9 + 1) / 2.582**2 / 2
    assert weights[:, :2].flatten().tolist() == pytest.approx([1 / square] * 4, rel=1e-3)
    shares = 1 / (1 + targets[:, 2:].square().mean(dim=-1))
    assert (weights[0, 2] / weights[1, 2]).item() == pytest.approx((shares[0] / shares[1]).item())


def test_sets_by_hand():
    """By threshold the best four of eight pairs, else each token's best two; scores of 0 are even odds."""
    cuts, mass = [LayerCut(4, 0, 2, 1)], torch.tensor([[9.0, 8.0, 7.0, 1.0], [6.0, 5.0, 2.0, 3.0]])
    loss = SetLoss(cuts, "threshold", mass)
    assert loss.targets(mass).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert SetLoss(cuts, "top_k", mass).targets(mass).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert loss(torch.zeros(2, 4), loss.targets(mass)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("target", ["mass", "relative", "sets"])
def test_few_huge_tokens_rule_plain_squares_alone(target: str):
    """One token in forty has masses a hundred times the others'. From a shared score per expert, which cannot fit all
    of them, those losses that weigh tokens alike choose what most tokens choose; plain squares what the few do."""
    cut = LayerCut(4, 0, 2, 1)
    mass = torch.rand(400, 4, generator=torch.Generator().manual_seed(3)) + torch.tensor([1.0, 1.0, 0.0, 0.0])
    mass[::40] = 100 * mass[::40].flip(1)
    router = PathRouter(PathRouterConfig(dim=4), 10, (cut,), "threshold")
    loss_of = loss_for(target, router, mass)
    targets, scores = loss_of.targets(mass), torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(scores.expand_as(mass), targets).backward()
        optimizer.step()
    best = set(scores.topk(2).indices.tolist())
    assert best == ({2, 3} if target == "mass" else {0, 1})


def test_smooth_step_and_codes_by_hand():
    steps = smooth_step(torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]) * STEP_WIDTH)
    torch.testing.assert_close(steps, torch.tensor([0, 0, 0.15625, 0.5, 0.84375, 1, 1]))
    shares = code_shares(torch.tensor([[[0.75, 0.5]]]), 3)
    assert shares.tolist() == [[[0.125, 0.375, 0.125]]]  # and the fourth code, of no expert, 0.375
    codes = code_shares(torch.tensor([[[0.75, 0.5]]]), 4)
    torch.testing.assert_close(
        bit_entropy(torch.tensor([0.75, 0.5])).sum(), torch.special.entr(codes).sum(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("selection", ["top_k", "threshold"])
def test_what_the_oracle_captures_is_no_loss_and_what_chance_does_is_one(selection: str):
    mass = masses(4000)
    loss = StraightThroughLoss(CUTS, selection, MassScale.of(mass, CUTS), mass)
    targets = loss.targets(mass)
    assert loss(targets, targets).item() == pytest.approx(0, abs=1e-5)
    assert loss(torch.randn_like(targets), targets).item() == pytest.approx(1, abs=0.05)
    assert loss(-targets, targets).item() > 1.5


def test_selectors_that_name_the_best_lose_nothing():
    """Logits far out are bits; two selectors on one expert capture it once; a stray code and doubt cost extra."""
    cut, mass = LayerCut(4, 0, 2, 1), torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    loss, far = SelectorLoss([cut], "top_k", MassScale.of(mass, [cut]), mass), 9.0
    targets = loss.targets(mass)
    best = torch.tensor([[-far, -far, far, -far]])  # experts 0 and 1
    twice = torch.tensor([[-far, -far, -far, -far]])  # expert 0, by both
    assert loss(best, targets).item() == pytest.approx(0, abs=1e-6)
    assert loss(twice, targets).item() == pytest.approx(1 - (targets[0, 0] / targets[0, :2].sum()).item(), abs=1e-6)
    doubt = loss(torch.zeros(1, 4), targets).item()
    chosen = 1 - 0.75**2
    assert doubt == pytest.approx(
        1 - chosen * targets.sum().item() / targets[0, :2].sum().item() + ENTROPY_WEIGHT * 2 * math.log(2), abs=1e-5
    )
    three = LayerCut(3, 0, 1, 1)
    stray = SelectorLoss([three], "top_k", MassScale.of(mass[:, :3], [three]), mass[:, :3])
    assert stray(torch.tensor([[far, far]]), stray.targets(mass[:, :3])).item() == pytest.approx(1 + STRAY_WEIGHT)


@pytest.mark.parametrize(
    ("target", "gate", "least"),
    [
        ("mass", "scores", 0.99),
        ("relative", "scores", 0.99),
        ("sets", "scores", 0.99),
        ("paper", "scores", 0.99),
        ("captured", "scores", 0.95),
        ("captured", "dselect", 0.75),
    ],
)
def test_every_loss_teaches_to_choose(target: str, gate: str, least: float):
    """Outputs free for each of 200 tokens: the experts they come to choose are nearly the oracle's.

    Chance is 0.4 and 0.33. Codes get stuck where every change of one bit is for the worse: with nearly as much mass.
    """
    router, mass = PathRouter(PathRouterConfig(dim=4, gate=gate), 10, CUTS), masses(200, seed=1)
    outputs, losses = fit(router, target, mass)
    assert losses[-1] < (0.1 if target not in ("paper", "sets") else losses[0])
    ids = choose_experts(router, router.scores_of(outputs)).ids
    for chosen, layer_mass, k in ((ids[:, 0], mass[:, :5], 2), (ids[:, -1], mass[:, 5:], 1)):
        best = layer_mass.topk(k).indices
        assert (chosen[:, :, None] == best[:, None, :]).any(dim=1).float().mean() > least


@pytest.mark.parametrize("gate", ["scores", "dselect"])
def test_what_is_captured_by_a_threshold_is_learned_too(gate: str):
    router = PathRouter(PathRouterConfig(dim=4, gate=gate), 10, CUTS, "threshold")
    _, losses = fit(router, "captured", masses(200, seed=1))
    assert losses[0] > 0.8
    assert losses[-1] < 0.1


def fit(router: PathRouter, target: str, mass_TS: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """What the heads would have to give, found by 150 steps, and the losses on the way."""
    loss_of = loss_for(target, router, mass_TS)
    targets = loss_of.targets(mass_TS)
    width = router.heads(torch.zeros(1, 4)).shape[-1]
    outputs = (0.1 * torch.randn(len(mass_TS), width, generator=torch.Generator().manual_seed(2))).requires_grad_()
    optimizer, losses = torch.optim.Adam([outputs], lr=0.05), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(outputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return outputs.detach(), losses
