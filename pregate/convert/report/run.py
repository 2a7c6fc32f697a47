"""`report`: measure a routed checkpoint on held-out text and write one self-contained HTML page to decide from."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pregate.base.dtypes import dtype_name
from pregate.base.errors import PregateError
from pregate.convert.device import pick_device
from pregate.convert.files.dense import dense_of
from pregate.convert.files.streamed import load_any
from pregate.convert.files.work_folder import write_whole
from pregate.convert.measure.control_table import DENSE, nominal_share
from pregate.convert.measure.overlap import bytes_per_row
from pregate.convert.measure.scored_text import ScoredText
from pregate.convert.progress import QUIET, Advance, Progress
from pregate.convert.report.conditions import conditions_of
from pregate.convert.report.costs import costs
from pregate.convert.report.figures import Figures
from pregate.convert.report.measure import compared, measure_overlap, measure_quality, measure_routes, num_runs
from pregate.convert.report.options import ReportOptions
from pregate.convert.report.page import render
from pregate.convert.report.routes import routed_flows
from pregate.convert.report.training import TUNED_PARENT, training_curves, tuned_parent, tuning_of
from pregate.convert.text.amount import check_scored
from pregate.model.checkpoint import Manifest, read_manifest
from pregate.model.config import RoutedConfig
from pregate.model.folder import ModelFolder, read_folder
from pregate.model.modeling import RoutedForCausalLM


def report(options: ReportOptions, progress: Progress = QUIET) -> Figures:
    """Measure `options.model`, write the page to `options.out`, and return what it shows.

    UserError for a model that is no routed checkpoint or routes nothing, or whose dense parent is needed and not found,
    for text that cannot be read, and for a model to compare with that reads the text as other tokens.
    """
    figures = measure(options, _Runs(progress))
    with progress.doing("drawing the page"):
        page = render(figures)
    try:
        write_whole(options.out, lambda path: path.write_text(page, encoding="utf-8"))
    except OSError as error:
        raise PregateError(f"--out {options.out}: cannot be written ({error})") from error
    return figures


class _Runs(Progress):
    """Numbers the scoring runs of a report, of which there are `total`."""

    total = 0

    def __init__(self, progress: Progress) -> None:
        self._progress, self._num_runs = progress, 0

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        run = name.removeprefix("scoring ")
        if run != name:
            self._num_runs += 1
            name = f"run {self._num_runs} of {self.total}: {run}"
        return self._progress.stage(name, total)

    def doing(self, name: str) -> AbstractContextManager[None]:
        return self._progress.doing(name)

    def note(self, sentence: str) -> None:
        self._progress.note(sentence)


def measure(options: ReportOptions, progress: _Runs) -> Figures:
    """All the numbers of a report."""
    started_s = time.monotonic()
    folder = read_folder(options.model, parent=options.parent)
    stored, manifest = _routed_config(folder), read_manifest(options.model)
    tuned = options.tuned_parent and tuned_parent(options.tuned_parent, options.model, manifest)
    with progress.doing("reading text"):
        text = ScoredText.read(folder, options.text, options.max_tokens, options.seed, options.text_field)
    check_scored(text.rows, options.max_tokens, "--text", options.text, progress)
    device = pick_device(options.device)
    others = _others(options, text, progress, device)
    model: RoutedForCausalLM = load_any(folder, progress, device)
    progress.total = num_runs(model, len(others))
    with progress.doing("looking for the parent"):
        parent_path = dense_of(options.model, model, options.parent)
    parent = None if parent_path is None else _load("--parent", parent_path, text, progress, device)
    quality = measure_quality(model, text.rows, text.num_bytes, parent, options.seed, progress)
    del parent
    routes = measure_routes(model, text.rows, progress)
    points = tuple(compared(name, other, text.rows, text.num_bytes, quality[DENSE], progress) for name, other in others)
    item_bytes = getattr(torch, _stored(stored)).itemsize
    losses = manifest.figures.get("decouple", {})
    row_bytes = bytes_per_row(stored.text_config.hidden_size, item_bytes)
    return Figures(
        model=describe(options.model, model, stored, manifest, row_bytes),
        conditions=conditions_of(options, text, manifest, model.device)
        | {"dense": str(parent_path or ""), "seconds": round(time.monotonic() - started_s, 1)},
        quality=replace(quality, others=points[: len(options.compare)], tuned_parent=points[-1] if tuned else None),
        costs=costs(model, quality.own_point.active_share, item_bytes),
        tuned_parent=tuned,
        loads=routes.loads(),
        flows=routed_flows(routes.visits),
        agreements=routes.agreements,
        repeats=routes.repeats(model, row_bytes),
        overlap=measure_overlap(model),
        training=training_curves(options.model),
        tuning=tuning_of(manifest),
        router_losses={name: float(losses[name]) for name in ("loss_first", "loss_last") if name in losses},
        manifest=manifest.options | {"source": manifest.source.get("path", ""), "calibration": manifest.calibration},
    )


def _routed_config(folder: ModelFolder) -> RoutedConfig:
    """The checkpoint's config; UserError for a dense model and one that routes nothing."""
    folder.check("routed")
    config = RoutedConfig.from_pretrained(folder.path)
    if not any(cut.num_active for cut in config.cuts):
        raise folder.refuse("has no layer with an active routed expert; there is nothing to report on")
    return config


def _others(
    options: ReportOptions, text: ScoredText, progress: Progress, device: torch.device
) -> list[tuple[str, Any]]:
    """The models to show beside it, by name; the tuned parent, where there is one, is the last."""
    names = [p.resolve().name for p in (options.model, *options.compare)]
    called = [str(path) if names.count(path.resolve().name) > 1 else path.resolve().name for path in options.compare]
    given = [(name, "--compare", path) for name, path in zip(called, options.compare, strict=True)]
    given += [("tuned dense parent", TUNED_PARENT, path) for path in [options.tuned_parent] if path]
    return [(name, _load(option, path, text, progress, device)) for name, option, path in given]


def _load(option: str, path: Path, text: ScoredText, progress: Progress, device: torch.device) -> Any:
    """A model to show beside the reported one; `option` says who named it. All but those to compare are dense."""
    folder = read_folder(path, option)
    with progress.doing("comparing tokens"):
        text.check_same_tokens(folder)
    if option != "--compare" and folder.is_routed:
        what = "it was made from" if option == "--parent" else "it was made from, tuned as it was"
        raise folder.refuse(f"is a routed checkpoint; allowed: the dense model {what}")
    return load_any(folder, progress, device)


def describe(
    path: Path, model: RoutedForCausalLM, config: RoutedConfig, manifest: Manifest, row_bytes: int
) -> dict[str, Any]:
    """For `Figures.model`; sizes as stored on disk.

    `is_tuned`: its weights were trained after the cut; `fits_router`: under the routing it is served with;
    `known_after`: the layers after which a read network knows the others' experts, or 0.
    """
    routed = [cut for cut in config.cuts if cut.num_routed]
    spans = []
    for name in ("num_shared", "num_routed", "num_active"):
        low, high = min(getattr(cut, name) for cut in routed), max(getattr(cut, name) for cut in routed)
        spans.append(str(low) if low == high else f"{low} to {high}")
    words = "{} shared + {} routed experts per layer, {} of the routed active per token".format(*spans)
    return {
        "name": path.resolve().name,
        "path": str(path.resolve()),
        "method": manifest.method,
        "is_tuned": manifest.is_tuned,
        "fits_router": manifest.fits_routing(config.routing),
        "routing": config.routing,
        "selection": config.selection,
        "forecast": config.routing == "layerwise" and config.has_path_router,
        "known_after": 0 if config.read_network is None else config.read_shape.layer,
        "family": str(manifest.source.get("model_type", config.text_config.model_type)),
        "num_layers": len(config.cuts),
        "num_routed_layers": len(routed),
        "cut": words + (" on average" if config.selection == "threshold" else ""),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_bytes": manifest.weight_bytes,
        "expert_bytes": max(cut.expert_width for cut in routed) * row_bytes,
        "num_units": sum(cut.num_routed for cut in routed),
        "dtype": _stored(config),
        "nominal_share": nominal_share(model),
    }


def _stored(config: RoutedConfig) -> str:
    """Type of the weights on disk (they are loaded as float32 to be measured)."""
    return dtype_name(config.dtype or torch.float32)
