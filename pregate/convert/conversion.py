"""`convert`: a dense model becomes a layer-wise routed checkpoint by CMoE, without training.

Data on its way: text -> calibration windows [S, N] -> one forward pass in which each FFN, when its turn comes, is
profiled on the inputs it gets, cut, and replaced; so every layer is profiled on the output of converted layers.

Shape letters: S windows, N tokens of a window, T = S * N, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from pregate.convert.agreement import AgreementMeter
from pregate.convert.assembly import assemble, write_checkpoint
from pregate.convert.calibration import Calibration, read_calibration
from pregate.convert.cmoe import CHUNK_TOKENS
from pregate.convert.dense import context_tokens, load_dense, load_tokenizer, outline, source_of
from pregate.convert.scoring import score_rows
from pregate.convert.layer_cut import cut_one
from pregate.convert.options import ConvertOptions
from pregate.convert.progress import Progress, QuietProgress
from pregate.model.checkpoint import Manifest, new_folder, read_manifest
from pregate.model.config import RoutedConfig
from pregate.model.gated_mlp import GatedMLP, find_gated_mlps
from pregate.model.modeling import RoutedForCausalLM


def convert(options: ConvertOptions, progress: Progress | None = None) -> Manifest:
    """Convert `options.model` and write the checkpoint to `options.out`; returns its manifest.

    Everything a user can get wrong is refused with a UserError before any work; nothing is left half-written.
    """
    progress = progress or QuietProgress()
    with new_folder(options.out) as folder:
        for mlp in outline(options.model):
            options.cut(mlp.width)
        tokenizer = load_tokenizer(options.model)
        length = min(options.sequence_length, context_tokens(options.model))
        text = read_calibration(options.calibration, tokenizer, options.samples, length, options.seed)
        dense = load_dense(options.model)
        figures = {"dense_perplexity": _perplexity(dense, text)}
        model = cut_model(dense, text.windows_SN, options, progress)
        model.parent.to(getattr(torch, options.dtype)).float()  # measured as stored
        figures |= _figures(model, text)
        manifest = Manifest(
            "cmoe", options.describe(), source_of(options.model), text.describe() | {"seed": options.seed}, figures
        )
        write_checkpoint(model, folder, options.model, manifest, options.dtype)
        return read_manifest(folder)


@torch.no_grad()
def cut_model(dense: Any, windows_SN: torch.Tensor, options: ConvertOptions, progress: Progress) -> RoutedForCausalLM:
    """Cut every FFN of `dense` (in place: its modules go into the result) while the windows pass through it once."""
    mlps = find_gated_mlps(dense)
    config = RoutedConfig(
        text_config=deepcopy(dense.config), layer_cuts=[asdict(options.cut(m.width)) for m in mlps], gate=options.gate
    )
    with progress.stage("cutting layers", len(mlps)) as advance:
        for mlp in mlps:
            mlp.check(config.hidden_act)
            mlp.replace(_Cutter(mlp, config, options, advance))
        dense.base_model(input_ids=windows_SN, use_cache=False)
    return assemble(config, dense)


class _Cutter(nn.Module):
    """Hangs in an FFN's place until it is called once: then it cuts the FFN, hangs the result there, and runs that."""

    def __init__(
        self, mlp: GatedMLP, config: RoutedConfig, options: ConvertOptions, advance: Callable[[int], None]
    ) -> None:
        super().__init__()
        self._mlp, self._config, self._options, self._advance = mlp, config, options, advance

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, self._mlp.hidden_size)
        routed = cut_one(self._mlp, x_TD, self._config, self._options)
        self._mlp.replace(routed)
        self._advance(1)
        return torch.cat([routed(rows) for rows in x_TD.split(CHUNK_TOKENS)]).view_as(x)


def _perplexity(model: Any, text: Calibration) -> float | None:
    """Perplexity of the held-back windows; None when the text was too short to hold any back."""
    return round(score_rows(model, text.held_back).perplexity, 4) if text.held_back else None


def _figures(model: RoutedForCausalLM, text: Calibration) -> dict[str, Any]:
    if not text.held_back:
        return {"routed_perplexity": None, "agreement": {}}
    meter = AgreementMeter()
    score = score_rows(model, text.held_back, meter)
    return {"routed_perplexity": round(score.perplexity, 4), "agreement": meter.figures()}
