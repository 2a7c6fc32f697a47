"""`convert`: a dense model becomes a layer-wise routed checkpoint by CMoE, without training.

Data on its way: text -> calibration windows [S, N] -> one forward pass in which each FFN, when its turn comes, is
profiled on the inputs it gets, cut, and replaced; so every layer is profiled on the output of converted layers.

Shape letters: S windows, N tokens of a window, T = S * N, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pregate.base.errors import UserError
from pregate.convert.agreement import AgreementMeter
from pregate.convert.assembly import assemble, cut_layer, write_checkpoint
from pregate.convert.calibration import Calibration, read_calibration
from pregate.convert.cmoe import CHUNK_TOKENS, SHARED_BY, profile, split_neurons
from pregate.convert.dense import context_tokens, load_dense, load_tokenizer, outline, source_of
from pregate.convert.evaluate import score_rows
from pregate.convert.gates import fit_linear, set_representatives
from pregate.convert.progress import Progress, QuietProgress
from pregate.kernels.reference import activation
from pregate.model.checkpoint import Manifest, new_folder, read_manifest
from pregate.model.config import GATES, LayerCut, RoutedConfig
from pregate.model.gated_mlp import GatedMLP, find_gated_mlps
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ConvertOptions:
    """How to cut a dense model. `experts` is the total E, `shared` of them always on, `active` of the rest per token.

    `active` 0 makes a static mask: only the shared experts ever run. `calibration`: .txt or .jsonl files, or
    folders of them; `samples` windows of `sequence_length` tokens (cut to the model's context) are drawn from it
    with `seed`. `dtype` is what weights are stored as. `marks_per_token` and `max_iterations` are CMoE's K_a and
    number of cluster assignments; the defaults are those of its released code.
    """

    model: Path
    out: Path
    experts: int
    shared: int
    active: int
    calibration: tuple[Path, ...]
    gate: str = "linear"
    shared_by: str = "contribution"
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    dtype: str = "float32"
    marks_per_token: int = 10
    max_iterations: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("gate", GATES), ("shared_by", SHARED_BY), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise UserError.of(_option(name), getattr(self, name), f"allowed: {', '.join(allowed)}")
        lowest = {"experts": 1, "shared": 0, "active": 0, "samples": 1, "sequence_length": 2, "seed": 0}
        for name, least in (lowest | {"marks_per_token": 1, "max_iterations": 1}).items():
            if getattr(self, name) < least:
                raise UserError.of(_option(name), getattr(self, name), f"allowed: {least} or more")
        if self.shared >= self.experts:
            raise UserError.of("--shared", self.shared, f"allowed: 0 to {self.experts - 1} (below --experts)")
        if self.shared + self.active > self.experts:
            allowed = f"allowed: 0 to {self.experts - self.shared}"
            together = f"with --shared {self.shared} it exceeds --experts {self.experts}"
            raise UserError.of("--active", self.active, f"{together}; {allowed}")
        if not self.calibration:
            raise UserError("--calibration: give at least one .txt or .jsonl file, or a folder of them")

    def cut(self, width: int) -> LayerCut:
        """The cut of a layer whose FFN has `width` neurons; UserError when the experts do not divide it."""
        if width % self.experts:
            divisors = [str(n) for n in range(1, 129) if width % n == 0]
            reason = f"does not divide the FFN width {width} of {self.model}; allowed: {', '.join(divisors)}"
            raise UserError.of("--experts", self.experts, reason)
        if self.marks_per_token > width:
            raise UserError.of("marks per token", self.marks_per_token, f"allowed: 1 to {width}, the FFN width")
        return LayerCut(self.experts - self.shared, self.shared, self.active, width // self.experts)

    def describe(self) -> dict[str, Any]:
        fields = asdict(self) | {"model": str(self.model), "out": str(self.out)}
        return fields | {"calibration": [str(p) for p in self.calibration]}


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


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


def cut_one(mlp: GatedMLP, x_TD: torch.Tensor, config: RoutedConfig, options: ConvertOptions) -> RoutedMLP:
    """Profile one FFN on its inputs, split its neurons, and fit the gate."""
    cut, act = options.cut(mlp.width), config.hidden_act
    seen = profile(x_TD, mlp, activation(act), options.marks_per_token)
    split = split_neurons(seen, cut, options.shared_by, options.max_iterations)
    routed = cut_layer(mlp, split, cut, act, options.gate)
    if options.gate == "linear":
        fit_linear(routed, x_TD)
    else:
        set_representatives(routed, mlp, split.representatives_R)
    return routed


def _perplexity(model: Any, text: Calibration) -> float | None:
    """Perplexity of the held-back windows; None when the text was too short to hold any back."""
    return round(score_rows(model, text.held_back).perplexity, 4) if text.held_back else None


def _figures(model: RoutedForCausalLM, text: Calibration) -> dict[str, Any]:
    if not text.held_back:
        return {"routed_perplexity": None, "agreement": {}}
    meter = AgreementMeter()
    score = score_rows(model, text.held_back, meter)
    return {"routed_perplexity": round(score.perplexity, 4), "agreement": meter.figures()}
