"""Read-ME's cut (arXiv 2410.19123, section 3.1): one expert per domain, the channels that fire most on it.

Experts overlap: a channel that many domains use is in many experts, and one that none uses is dropped. What every
domain uses can be a part of its own, the permanent expert.

Data on its way: each domain's windows -> mean |h| of every channel [L][R, I] -> one `LayerCut` and `NeuronSplit` per
layer -> the experts in the FFNs' places, their gates fitted beside.

Shape letters: L layers, R domains and so routed experts, I channels of a dense FFN, W channels a token runs, M expert
width, S shared experts, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from pregate.convert.cut.capture import SAMPLE_TOKENS
from pregate.convert.cut.cmoe import NeuronSplit
from pregate.convert.cut.layer_cut import cut_layer, fit_linear
from pregate.convert.domains.domains import Domain, channel_means, run_layers, watched
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.measure.overlap import permanent_channels
from pregate.convert.progress import Progress
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.gated_mlp import GatedMLP, find_gated_mlps


def active_width(width: int, active_share: float) -> int:
    """W, the channels that a token runs of a layer's `width`: exactly so many, 1 at least.

    Example: 0.5 of 11008 is 5504.
    """
    return max(1, round(active_share * width))


def strongest(scores_RI: np.ndarray, num_active: int) -> np.ndarray:
    """Each domain's `num_active` channels of greatest score, ascending [R, W]; ties go to the lower channel.

    Example: scores [[1, 3, 3, 2], [5, 0, 0, 0]], 2 active: [[1, 2], [0, 1]].
    """
    order_RI = np.argsort(-scores_RI, axis=1, kind="stable")
    return np.sort(order_RI[:, :num_active], axis=1)


def domain_cut(scores_RI: np.ndarray, num_active: int, permanent: str) -> tuple[LayerCut, NeuronSplit]:
    """One layer's experts from the domains' scores of its channels; one expert per token, and the same function for
    either `permanent`.

    "fused": expert i is all of domain i's `num_active` channels, no shared expert (what the released code converts
    to). "separate": what all domains chose is the shared expert. A checkpoint's shared expert is a multiple of the
    experts' width, so of M = W / (S + 1) the largest S is taken whose S * M channels there are: those of greatest mean
    score over domains; the rest stays in every expert.

    Example: 8 active, five of them chosen by all domains: S 1, M 4 (three parts of four would need 6 in common), the
    four best of the five are shared, and the fifth stays in each expert beside three channels of its own.
    """
    chosen_RW = strongest(scores_RI, num_active)
    common = permanent_channels(chosen_RW) if permanent == "separate" else np.empty(0, dtype=np.int64)
    parts = (n for n in range(num_active, 0, -1) if num_active % n == 0)
    num_shared = next(n - 1 for n in parts if num_active // n * (n - 1) <= len(common))
    width = num_active // (num_shared + 1)
    by_score = common[np.argsort(-scores_RI[:, common].mean(axis=0), kind="stable")]
    shared = np.sort(by_score[: num_shared * width])
    routed_RM = np.stack([np.setdiff1d(chosen_W, shared) for chosen_W in chosen_RW])
    return LayerCut(len(scores_RI), num_shared, 1, width), NeuronSplit(shared, routed_RM)


@dataclass(frozen=True)
class DomainExperts:
    """The cut of every layer, and what each channel contributes on average over the domains, float64 [I] a layer."""

    cuts: list[LayerCut]
    splits: list[NeuronSplit]
    contribution_LI: list[np.ndarray]


def choose_experts(model: Any, domains: Sequence[Domain], options: ReadMeOptions, progress: Progress) -> DomainExperts:
    """Profile a dense `model` on every domain and decide each layer's cut; the model stays as it is."""
    mlps = find_gated_mlps(model)
    means_RL = [channel_means(model, domain.windows_SN, progress, domain.name) for domain in domains]
    means_LRI = [np.stack([of[layer].numpy() for of in means_RL]) for layer in range(len(mlps))]
    norms_LI = [torch.linalg.vector_norm(mlp.down.detach(), dim=0, dtype=torch.float64).cpu().numpy() for mlp in mlps]
    contributions_LRI = [means * norm_I for means, norm_I in zip(means_LRI, norms_LI, strict=True)]
    scores_LRI = means_LRI if options.score == "activation" else contributions_LRI
    layers = [
        domain_cut(scores_RI, active_width(mlp.width, options.active_share), options.permanent)
        for scores_RI, mlp in zip(scores_LRI, mlps, strict=True)
    ]
    cuts, splits = zip(*layers, strict=True)
    return DomainExperts(list(cuts), list(splits), [c.mean(axis=0) for c in contributions_LRI])


def read_me_config(parent: Any, experts: DomainExperts, options: ReadMeOptions) -> RoutedConfig:
    """The config of the checkpoint: paths are exact, and one index serves all layers."""
    return RoutedConfig(
        text_config=parent,
        layer_cuts=[asdict(cut) for cut in experts.cuts],
        routing="path",
        gate="linear",
        selection="top_k",
        path_router=asdict(options.router_shape()),
    )


@torch.no_grad()
def cut_model(
    model: Any, config: RoutedConfig, experts: DomainExperts, domains: Sequence[Domain], progress: Progress
) -> None:
    """Hang the experts in the FFNs' places of a dense `model`, each layer with a linear gate fitted to their masses.

    The gates are fitted on what the FFNs get while the model is dense. They route nothing; they are there to be
    compared with (`pregate evaluate --controls`). Read-ME's experts have no representative neurons: `paper_gate` stays
    zero.
    """
    mlps = find_gated_mlps(model)
    with progress.doing("running windows"):
        inputs_LTD = ffn_inputs(model, mlps, domains)
    each = zip(mlps, experts.cuts, experts.splits, experts.contribution_LI, strict=True)
    with progress.stage("cutting layers", len(mlps)) as advance:
        for mlp, cut, split, contribution_I in each:
            mlp.check(config.hidden_act)
            routed = cut_layer(mlp, split, cut, config)
            routed.neuron_score.copy_(torch.from_numpy(contribution_I[split.neuron_index]))
            fit_linear(routed, inputs_LTD[mlp.layer])
            inputs_LTD[mlp.layer] = torch.empty(0)
            mlp.replace(routed)
            advance(1)


def ffn_inputs(model: Any, mlps: Sequence[GatedMLP], domains: Sequence[Domain]) -> list[torch.Tensor]:
    """What each layer's FFN gets [T, D] while a dense `model` runs over the domains' windows, one of each in turn until
    there are `SAMPLE_TOKENS`.
    """
    parts: list[list[torch.Tensor]] = [[] for _ in mlps]
    num_tokens = 0
    with watched([mlp.module for mlp in mlps], lambda layer, x_TD: parts[layer].append(x_TD)):
        for windows in zip_longest(*(domain.windows_SN for domain in domains)):
            for ids_N in windows:
                if ids_N is not None and num_tokens < SAMPLE_TOKENS:
                    run_layers(model, ids_N[None])
                    num_tokens += len(ids_N)
    return [torch.cat(rows) for rows in parts]
