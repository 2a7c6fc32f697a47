"""Running student and teacher in tuning, and how far apart their layers are.

Shape letters: B rows, N tokens, T tokens of all rows (padding included), S routed experts of all layers side by side,
D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pregate.convert.files.skeleton import with_forward
from pregate.convert.tune.forward import TuningPass
from pregate.model.gated_mlp import decoder_layers
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import margins


def path_scores(model: RoutedForCausalLM, ids_BN: torch.Tensor) -> torch.Tensor | None:
    """The path router's scores [B * N, S] in float32; None where the layers' gates decide.

    The router is causal and padding is on the right, so real tokens do not see it.
    """
    if (router := model.deciding_router) is None:
        return None
    with torch.autocast(ids_BN.device.type, enabled=False):
        return router(ids_BN)[0].flatten(0, 1)


@torch.no_grad()
def path_offsets(model: RoutedForCausalLM, scores_TS: torch.Tensor | None, ids_BN: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of `path_scores` before thresholds choose [T]; None where thresholds are fixed."""
    router = model.deciding_router
    if router is None or router.share_control is None or scores_TS is None:
        return None
    counts_BNJ1 = router.share_control.counts(margins(router, scores_TS)).unflatten(0, tuple(ids_BN.shape))
    before_TJ1 = (counts_BNJ1.cumsum(dim=1) - counts_BNJ1).flatten(0, 1)
    return router.share_control.offset(before_TJ1).to(scores_TS.dtype)


@dataclass(frozen=True)
class Outputs:
    """What a model gives for a batch: logits [T, V], and where asked for every layer's output, [T, D] each."""

    logits: Any = None
    hidden: tuple[torch.Tensor, ...] = ()


def run_model(
    model: Any, ids_BN: torch.Tensor, tuning_pass: TuningPass | None, hidden: bool = False, again: bool = False
) -> Outputs:
    """Run a dense or a routed model, the latter's layers by `tuning_pass`; no mask is needed.

    Attention is causal and padding on the right: what real tokens get is the same, and attention faster. `again`: see
    `checkpointed`.
    """
    with layers_by(model, tuning_pass) as parent, checkpointed(parent, model, tuning_pass) if again else nullcontext():
        found = parent(input_ids=ids_BN, use_cache=False, output_hidden_states=hidden)
    layers = found.hidden_states[1:] if hidden else ()  # the first are the embeddings
    return Outputs(found.logits.flatten(0, 1), tuple(h.flatten(0, 1) for h in layers))


def run_layers(model: RoutedForCausalLM, ids_BN: torch.Tensor, tuning_pass: TuningPass) -> None:
    """As `run_model` for what the pass gathers alone: no head, no output."""
    with layers_by(model, tuning_pass) as parent:
        parent.base_model(input_ids=ids_BN, use_cache=False)


@contextmanager
def layers_by(model: Any, tuning_pass: TuningPass | None) -> Iterator[Any]:
    """Give the model to call, its routed layers computed by `tuning_pass` within the block."""
    mlps = [] if tuning_pass is None else model.routed_mlps
    before = [mlp.fast for mlp in mlps]
    for mlp in mlps:
        mlp.fast = tuning_pass
    try:
        yield model if tuning_pass is None else model.parent
    finally:
        for mlp, fast in zip(mlps, before, strict=True):
            mlp.fast = fast


@contextmanager
def checkpointed(parent: Any, model: Any, tuning_pass: TuningPass | None) -> Iterator[None]:
    """Within the block each layer of `parent` keeps its input alone; it runs again where its gradient is wanted.

    Then, too, by `tuning_pass`: by that time the block is left. (Chen et al. 2016, "Training deep nets with sublinear
    memory cost".) What comes out is the same, bit for bit.
    """

    def kept(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with layers_by(model, tuning_pass):
                return forward(*args, **kwargs)

        return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)

    with ExitStack() as stack:
        for layer in decoder_layers(parent):
            stack.enter_context(with_forward(layer, kept(layer.forward)))
        yield


def hidden_error(
    ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], real_T: torch.Tensor
) -> torch.Tensor:
    """Mean over layers and real tokens of |ours - theirs|^2 / |theirs|^2.

    Token by token: a document's first one, whose state is a hundred times another's in large models, would rule a ratio
    of sums.

    Example: one layer, one token, ours [1, 1], theirs [1, 2]: 1 / 5.
    """
    errors = []
    for our_TD, their_TD in zip(ours, theirs, strict=True):
        aim_TD = their_TD[real_T].float()
        error_T = (our_TD[real_T].float() - aim_TD).square().sum(dim=-1)
        errors.append((error_T / aim_TD.square().sum(dim=-1).clamp_min(1e-12)).mean())
    return torch.stack(errors).mean()
