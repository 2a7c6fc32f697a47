"""What a path router, or a read network, is trained to lower: five losses over every layer's contribution masses.

"mass" regresses them; "relative" does so with every token and layer alike; "sets" tells the oracle's choice from the
rest; "paper" is Read-ME's distillation; "captured" is minus the mass of the experts chosen, with a choice that
gradients pass: softmax with straight-through, or the codes of DSelect-k.

Shape letters: T tokens of a batch, S the routed experts of all layers side by side, O the heads' outputs likewise (S,
or code logits), R routed experts of a layer, K selectors, B bits, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from pregate.convert.paths.targets import MassScale
from pregate.kernels.reference import chosen_by, threshold_for
from pregate.model.config import LayerCut
from pregate.model.dselect import code_signs, selector_logits
from pregate.model.path_router import PathRouter, split_layers
from pregate.model.read_gate import ReadNetwork

#: What is trained: it reads what `TargetPool.inputs` are.
Router = PathRouter | ReadNetwork
#: Width of DSelect-k's smooth step, in logits: beyond half of it a bit is 0 or 1.
STEP_WIDTH = 4.0
#: Weight of the codes' entropy, and of codes that name no expert, beside the captured mass.
ENTROPY_WEIGHT, STRAY_WEIGHT = 0.02, 0.1


class MassLoss:
    """Squared error of the scores as a share of the variance of the targets (`MassScale.targets`); base of the others.

    `mass_TS`: the masses to be learned.
    """

    def __init__(self, cuts: Sequence[LayerCut], selection: str, scale: MassScale, mass_TS: torch.Tensor) -> None:
        self._cuts, self._selection, self._scale = cuts, selection, scale
        self._variance = scale.targets(mass_TS, cuts, selection).var().clamp_min(1e-12)

    def targets(self, mass_TS: torch.Tensor) -> torch.Tensor:
        """What the masses [T, S] of a document become once, before training: [T, S]."""
        return self._scale.targets(mass_TS, self._cuts, self._selection)

    def to(self, device: torch.device) -> None:
        """Have what it is computed with on `device`; targets are made where their masses are, before."""
        self._variance = self._variance.to(device)

    def __call__(self, outputs_TO: torch.Tensor, targets_TS: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of the heads' outputs for tokens of these targets."""
        return F.mse_loss(outputs_TO, targets_TS) / self._variance


class RelativeLoss(MassLoss):
    """As `MassLoss`, but a token's error in a layer counts as a share of 1 and its targets' mean square there, and a
    layer's loss as a share of what the mean alone would leave of it.

    For masses of which a few tokens' make most of a layer's variance (in SmolLM2 the first of a document, up to 95 %):
    by `MassLoss` all others hardly count there.
    """

    def __init__(self, cuts: Sequence[LayerCut], selection: str, scale: MassScale, mass_TS: torch.Tensor) -> None:
        super().__init__(cuts, selection, scale, mass_TS)
        layers = split_layers(scale.targets(mass_TS, cuts, selection), cuts)
        self._left = [(_shares(x) * x.square()).mean().clamp_min(1e-12) if x.numel() else x.sum() for x in layers]

    def targets(self, mass_TS: torch.Tensor) -> torch.Tensor:
        """The targets and, beside them, what their squared errors are multiplied by: [T, 2S]."""
        targets_TS = super().targets(mass_TS)
        layers = split_layers(targets_TS, self._cuts)
        weights = [(_shares(x) / left).expand_as(x) for x, left in zip(layers, self._left, strict=True) if x.numel()]
        return torch.cat([targets_TS, *weights], dim=-1)

    def __call__(self, outputs_TO: torch.Tensor, targets_TS: torch.Tensor) -> torch.Tensor:
        wanted_TS, weight_TS = targets_TS.chunk(2, dim=-1)
        return (weight_TS * (outputs_TO - wanted_TS).square()).mean()


def _shares(targets_TR: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + targets_TR.square().mean(dim=-1, keepdim=True))


class SetLoss:
    """Binary cross-entropy of the scores with the experts that the oracle chooses, in nats an expert.

    `mass_TS`: the masses to be learned, on which a layer's threshold chooses `num_active` a token on average.
    """

    def __init__(self, cuts: Sequence[LayerCut], selection: str, mass_TS: torch.Tensor) -> None:
        layers = zip(cuts, split_layers(mass_TS, cuts), strict=True)
        self._cuts, self._limits = cuts, [_limit(x, cut, selection) for cut, x in layers]

    def targets(self, mass_TS: torch.Tensor) -> torch.Tensor:
        """1 for the experts that are chosen [T, S]."""
        layers = zip(self._cuts, split_layers(mass_TS, self._cuts), self._limits, strict=True)
        return torch.cat([chosen_by(x, cut.num_active, limit).to(x) for cut, x, limit in layers], dim=-1)

    def to(self, device: torch.device) -> None:
        """It is computed with nothing of its own."""

    def __call__(self, outputs_TO: torch.Tensor, targets_TS: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(outputs_TO, targets_TS)


def _limit(x_TR: torch.Tensor, cut: LayerCut, selection: str) -> torch.Tensor | None:
    """The threshold that chooses `num_active` experts a token; None with a fixed number, or nothing to choose from."""
    return threshold_for(x_TR, cut.num_active) if selection == "threshold" and cut.num_routed else None


def loss_for(target: str, router: Router, mass_TS: torch.Tensor) -> MassLoss | PaperLoss | SetLoss:
    """The loss that `target` names (see above), scaled to the masses [T, S] to be learned."""
    if target == "paper":
        return PaperLoss(router.cuts)
    if target == "sets":
        return SetLoss(router.cuts, router.selection, mass_TS)
    codes = isinstance(router, PathRouter) and router.config.gate == "dselect"
    captured = SelectorLoss if codes else StraightThroughLoss
    kind = {"mass": MassLoss, "relative": RelativeLoss}.get(target, captured)
    return kind(router.cuts, router.selection, MassScale.of(mass_TS, router.cuts), mass_TS)


class PaperLoss:
    """Read-ME's distillation as its code has it (the notes on it, section 2), averaged over layers.

    A layer's score of an expert is its share of the token's activation, less the mean share, times 10. Target: 0.75
    of the best expert with label smoothing 0.5, and 0.25 of softmax(scores); loss: cross-entropy. Ours for the paper's
    count of channels is the contribution mass, and for more than one active expert the best k share the 0.75.

    Made for a fixed number of experts: a softmax leaves open what is added to all scores of a token, and a threshold
    compares scores of many tokens. (Tried: to hold log sum exp to 0 gains little there.)
    """

    def __init__(self, cuts: Sequence[LayerCut]) -> None:
        self._cuts = cuts
        self._num_layers = max(1, sum(c.num_routed > 0 for c in cuts))

    def targets(self, mass_TS: torch.Tensor) -> torch.Tensor:
        parts = []
        for cut, x_TR in zip(self._cuts, split_layers(mass_TS, self._cuts), strict=True):
            share_TR = x_TR / x_TR.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            best_TR = chosen_by(x_TR, max(cut.num_active, 1), None).to(x_TR.dtype)
            hard_TR = 0.5 * best_TR / best_TR.sum(dim=-1, keepdim=True) + 0.5 / max(cut.num_routed, 1)
            parts.append(0.75 * hard_TR + 0.25 * (10 * (share_TR - 1 / max(cut.num_routed, 1))).softmax(dim=-1))
        return torch.cat(parts, dim=-1)

    def to(self, device: torch.device) -> None:
        """It is computed with nothing of its own."""

    def __call__(self, outputs_TO: torch.Tensor, targets_TS: torch.Tensor) -> torch.Tensor:
        logs = torch.cat([x.log_softmax(dim=-1) for x in split_layers(outputs_TO, self._cuts)], dim=-1)
        return -(targets_TS * logs).sum(dim=-1).mean() / self._num_layers


class StraightThroughLoss(MassLoss):
    """One minus the captured mass, as a share of what an oracle captures; the scores choose.

    Forward a chosen expert counts 1 and any other 0; backward the choice is that of k * softmax (a fixed number), or of
    a sigmoid about the score that the batch's threshold would be. There a place is worth the mass at which the oracle's
    threshold lies: experts below it are to fall, though it is above the mean.
    """

    def __init__(self, cuts: Sequence[LayerCut], selection: str, scale: MassScale, mass_TS: torch.Tensor) -> None:
        super().__init__(cuts, selection, scale, mass_TS)
        targets_TS = self.targets(mass_TS)
        layers = [_hard(x, c, selection) for c, x in zip(cuts, split_layers(targets_TS, cuts), strict=True)]
        limits = [limit.expand(c.num_routed) for c, (_, limit) in zip(cuts, layers, strict=True)]
        self._limit_S = torch.cat(limits)
        self._places = sum(float(limit) * c.num_active for c, (_, limit) in zip(cuts, layers, strict=True))
        chosen_TS = torch.cat([hard for hard, _ in layers], dim=-1)
        self._most = (chosen_TS * targets_TS).sum(dim=-1).mean().clamp_min(1e-12)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._limit_S, self._most = self._limit_S.to(device), self._most.to(device)

    def __call__(self, outputs_TO: torch.Tensor, targets_TS: torch.Tensor) -> torch.Tensor:
        layers = zip(self._cuts, split_layers(outputs_TO, self._cuts), strict=True)
        return self.of_choice(torch.cat([self._choice(x, cut) for cut, x in layers], dim=-1), targets_TS)

    def of_choice(self, chosen_TS: torch.Tensor, targets_TS: torch.Tensor) -> torch.Tensor:
        """The loss of choosing each expert with these shares, 0 to 1."""
        captured = (chosen_TS * (targets_TS - self._limit_S)).sum(dim=-1).mean() + self._places
        return 1 - captured / self._most

    def _choice(self, scores_TR: torch.Tensor, cut: LayerCut) -> torch.Tensor:
        """0 and 1 [T, R], with a gradient."""
        if self._selection == "top_k":
            hard_TR, _ = _hard(scores_TR.detach(), cut, self._selection)
            soft_TR = cut.num_active * scores_TR.softmax(dim=-1)
        else:
            if scores_TR.numel() > 1:  # neither moves a choice by threshold; both can flatten a sigmoid
                scores_TR = (scores_TR - scores_TR.mean()) / scores_TR.std().clamp_min(1e-6)
            hard_TR, limit = _hard(scores_TR.detach(), cut, self._selection)
            soft_TR = torch.sigmoid(scores_TR - limit)
        return hard_TR + soft_TR - soft_TR.detach()


def _hard(scores_TR: torch.Tensor, cut: LayerCut, selection: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts are chosen, 0 or 1 [T, R], and the threshold they reach (finite; with a fixed number 0)."""
    limit = _limit(scores_TR, cut, selection)
    hard_TR = chosen_by(scores_TR, cut.num_active, limit).to(scores_TR.dtype)
    return hard_TR, scores_TR.new_zeros(()) if limit is None else limit.nan_to_num(posinf=0.0, neginf=0.0)


class SelectorLoss(StraightThroughLoss):
    """As `StraightThroughLoss`, but the selectors of DSelect-k choose: an expert counts by how sure one is of it.

    (Hazimeh et al. 2021, sections 3 and 3.1.) An expert that two selectors name counts once, as its experts' outputs
    weigh 1; so selectors need no weights to part ways. Added: the codes' entropy, which drives their bits to 0 and 1
    for each token, and, with a fixed number, the share of codes that name no expert where R is no power of two. (The
    paper divides by what is left; this is the same push with a bound.)
    """

    def __call__(self, outputs_TO: torch.Tensor, targets_TS: torch.Tensor) -> torch.Tensor:
        chosen, entropies, strays = [], [], []
        for cut, logits_TKB in zip(self._cuts, selector_logits(outputs_TO, self._cuts, self._selection), strict=True):
            bits_TKB = smooth_step(logits_TKB)
            named_TKR = code_shares(bits_TKB, cut.num_routed)
            chosen.append(1 - (1 - named_TKR).prod(dim=1))
            if cut.num_active:
                entropies.append(bit_entropy(bits_TKB).sum(dim=-1).mean())
                strays.append(1 - named_TKR.sum(dim=-1).mean())
        loss = self.of_choice(torch.cat(chosen, dim=-1), targets_TS)
        loss = loss + ENTROPY_WEIGHT * torch.stack(entropies).mean()
        return loss if self._selection == "threshold" else loss + STRAY_WEIGHT * torch.stack(strays).mean()


def smooth_step(logits: torch.Tensor) -> torch.Tensor:
    """0 below -`STEP_WIDTH` / 2, 1 above it, a cubic with matching slopes between (section 3, equation 3).

    Example: 0 gives 0.5; a quarter of the width 0.84375.
    """
    t = (logits / STEP_WIDTH).clamp(-0.5, 0.5)
    return -2 * t**3 + 1.5 * t + 0.5


def code_shares(bits_TKB: torch.Tensor, num_routed: int) -> torch.Tensor:
    """How sure each selector is of each expert's code [T, K, R]: the product over bits of bit or 1 - bit."""
    ones_RB = code_signs(num_routed, bits_TKB.shape[-1], bits_TKB) > 0
    return torch.where(ones_RB, bits_TKB[..., None, :], 1 - bits_TKB[..., None, :]).prod(dim=-1)


def bit_entropy(bits: torch.Tensor) -> torch.Tensor:
    """Entropy of each bit in nats; those of a code add up to that of its distribution over all codes."""
    bits = bits.clamp(1e-6, 1 - 1e-6)  # its slope at 0 and 1 is infinite
    return torch.special.entr(bits) + torch.special.entr(1 - bits)
