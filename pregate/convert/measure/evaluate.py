"""`evaluate`: perplexity and bits per byte of a model on text; for a routed one, how its routers agree and controls."""

from __future__ import annotations

from typing import Any

from pregate.base.errors import UserError
from pregate.convert.device import pick_device
from pregate.convert.files.dense import dense_folder, dense_of
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.agreement import AgreementMeter, layer_figures
from pregate.convert.measure.control_table import control_rows
from pregate.convert.measure.options import EvaluateOptions
from pregate.convert.measure.scored_text import ScoredText
from pregate.convert.measure.scoring import score_rows
from pregate.convert.progress import QUIET, Progress
from pregate.convert.text.amount import check_scored
from pregate.model.folder import read_folder
from pregate.model.modeling import RoutedForCausalLM


def evaluate(options: EvaluateOptions, progress: Progress = QUIET) -> dict[str, Any]:
    """Score a model on text; for a routed model also how its routers agree with each other and with the oracle.

    Where a path router only forecasts, also how often it names the gates' experts, layer by layer.

    With `options.controls` "controls" maps a control's name to its figures (`control_table.control_rows`).
    UserError for a folder that is no model, text that cannot be read, controls of a dense model, and controls whose
    dense parent is needed and not found.
    """
    folder = read_folder(options.model, parent=options.parent)
    if options.controls and not folder.is_routed:
        raise UserError.of("--controls", "on", f"{options.model} is a dense model; allowed: a routed checkpoint")
    with progress.doing("reading text"):
        text = ScoredText.read(folder, options.text, options.max_tokens, options.seed or 0, options.text_field)
    check_scored(text.rows, options.max_tokens, "--text", options.text, progress)
    device = pick_device(options.device)
    model = load_any(folder, progress, device)
    with progress.doing("looking for the parent"):
        parent_path = dense_of(options.model, model, options.parent) if options.controls else None
    parent = None if parent_path is None else load_any(dense_folder(parent_path, "--parent"), progress, device)
    meter = AgreementMeter() if isinstance(model, RoutedForCausalLM) else None
    score = score_rows(model, text.rows, meter, progress)
    result: dict[str, Any] = {
        "model": str(options.model),
        "text": " ".join(map(str, options.text)),
        "perplexity": round(score.perplexity, 4),
        "bits_per_byte": round(score.bits_per_byte(text.num_bytes), 4),
        "num_documents": len(text.rows),
        "num_tokens": score.num_tokens,
    }
    if meter is not None:
        result["routing"] = model.config.routing
        if model.read_network is not None:
            result["paths_known_after_layers"] = model.read_network.config.layer
        result["active_share"] = round(meter.active_share, 4)
        result["agreement"] = meter.figures()
        if model.config.routing == "layerwise" and meter.forecast:
            result["forecast_hit_rate"] = layer_figures(meter.forecast)
    if options.controls:
        result["controls"] = control_rows(model, text.rows, text.num_bytes, parent, options.seed or 0, progress)
    return result
