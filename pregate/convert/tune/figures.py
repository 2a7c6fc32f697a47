"""What a tuned checkpoint's manifest says came of tuning, and what it says of swaps from then on."""

from __future__ import annotations

from typing import Any

import torch

from pregate.base.dtypes import dtype_name
from pregate.convert.measure.agreement import RouteMeter, layer_figures
from pregate.convert.measure.overlap import bytes_per_row, rows_are_tied, swap_figures
from pregate.convert.measure.scoring import score_rows
from pregate.convert.tune.loop import Tuner, imbalance


def tuned_figures(tuner: Tuner) -> dict[str, Any]:
    """What came of a run that is finished, its model as it is stored; the last validation is that model's own.

    Where a path router only forecasts, which tuning does not train, also how often it still names the gates' experts.
    """
    counters, first = tuner.counters, tuner.counters.first
    forecasts = tuner.routed and tuner.model.config.routing == "layerwise" and tuner.model.config.has_path_router
    meter = RouteMeter(compares=forecasts) if tuner.routed else None
    figures: dict[str, Any] = {
        "validation_perplexity_before": round(first["perplexity"], 4),
        "validation_perplexity_after": round(score_rows(tuner.model, tuner.rows.held_back, meter).perplexity, 4),
    }
    if meter is not None and meter.forecast:
        figures["path_vs_gate"] = layer_figures(meter.forecast)
    if counters.refit:
        figures["refit"] = counters.refit
    if meter is not None:
        visits = [meter.visits[layer] for layer in sorted(meter.visits)]
        loads = [torch.stack([torch.from_numpy(x).sum(dim=0) for x in layer]).sum(dim=0) for layer in visits]
        figures |= {
            "active_share_before": round(first["active_share"], 4),
            "active_share_after": round(meter.active_share, 4),
            "load_imbalance_before": list(first["imbalance"]),
            "load_imbalance_after": [imbalance(loads_R) for loads_R in loads],
        }
    return figures | {
        "best_step": counters.best_step,
        "steps": counters.step,
        "tokens": counters.tokens,
        "seconds": round(counters.seconds, 1),
        "cpu_seconds": round(counters.cpu_seconds, 1),
        "num_trained_parameters": sum(p.numel() for p in tuner.trained.all.values()),
        "device": str(tuner.device),
        "precision": dtype_name(tuner.precision),
        "threads": torch.get_num_threads(),
    }


def earlier_figures(figures: dict[str, Any], tuner: Tuner, dtype: torch.dtype) -> dict[str, Any]:
    """`figures` of the checkpoint that was tuned: what each stage measured of the model as it left it.

    Only those of swaps are of the weights stored now, as `dtype`: a swap moves whole experts where rows that experts
    share were trained apart.
    """
    if "swap" not in figures or all(map(rows_are_tied, tuner.model.routed_mlps)):
        return figures
    mlps = tuner.model.routed_mlps
    indexes, cuts = [mlp.neuron_index.cpu().numpy() for mlp in mlps], [mlp.cut for mlp in mlps]
    size = bytes_per_row(tuner.model.config.text_config.hidden_size, dtype.itemsize)
    return figures | {"swap": swap_figures(indexes, cuts, size, tied=False)}
