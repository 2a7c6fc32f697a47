"""`decouple`: train a path router for a layer-wise checkpoint and write one whose paths are exact, or forecast; or a
read network, and paths are known after some layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pregate.base.errors import UserError
from pregate.convert.device import pick_device
from pregate.convert.files.assembly import write_checkpoint, write_with_router
from pregate.convert.files.partial import PartialCheckpoint, open_partial
from pregate.convert.files.streamed import load_any, load_whole
from pregate.convert.files.work_folder import fingerprint, writing
from pregate.convert.measure.agreement import RouteMeter
from pregate.convert.measure.scoring import score_rows
from pregate.convert.paths.alignment import align_experts
from pregate.convert.paths.losses import Router
from pregate.convert.paths.options import DecoupleOptions
from pregate.convert.paths.size import sized
from pregate.convert.paths.targets import TargetPool, collect_targets
from pregate.convert.paths.training import TrainingOptions, first_and_last, hit_rate, set_thresholds, train
from pregate.convert.paths.wanted_router import added, check_read_layers, cost, new_router, routed_with
from pregate.convert.progress import QUIET, Progress
from pregate.convert.text.amount import check_learned
from pregate.convert.text.calibration import encode_pool
from pregate.convert.text.documents import draw_documents, read_documents, text_files
from pregate.model.checkpoint import MANIFEST, Manifest, check_new_folder, read_manifest
from pregate.model.config import RoutedConfig
from pregate.model.factors import read_factors
from pregate.model.file_hashes import file_sha256, short_digest
from pregate.model.folder import ModelFolder, read_folder
from pregate.model.gates import RepresentativeGate
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_heads import check_heads
from pregate.model.path_router import PathRouter


def decouple(options: DecoupleOptions, progress: Progress = QUIET) -> Manifest:
    """Train a path router on `options.text` and write a checkpoint with it to `options.out`; returns its manifest.

    Its paths are exact, or with `predict` a forecast of what the gates will choose; with `read_layers` they are known
    after so many layers. UserError for a model that is not layer-wise routed, has a path router or read network
    already, or has nothing to route there. A run that was interrupted goes on when it is asked for again and gives the
    same checkpoint, on the same machine with as many threads.
    """
    check_new_folder(options.out)
    source = read_folder(options.model)
    config = _layerwise_config(source)
    if options.read_layers is not None:
        check_read_layers(options.read_layers, config, source)
    options = sized(options, config)
    assert options.steps is not None
    assert options.pool_tokens is not None
    if options.read_layers is None:
        check_heads(options.shape(), config.cuts)
    with progress.doing("reading text"):
        rows = read_rows(options, source)
    check_learned(rows, options.pool_tokens, "--text", options.text, progress)
    read = {"--model": str(options.model.resolve()), "its manifest": file_sha256(options.model / MANIFEST)[:16]}
    device = pick_device(options.device)
    known = fingerprint(options.describe(), read | {"text": short_digest(rows)}, device)
    with open_partial(options.out, known, len(rows), options.restart, "document") as partial:
        renumbers = options.heads == "single"  # in place, which takes the whole model
        model = load_whole(source, progress).to(device) if renumbers else load_any(source, progress, device)
        if not options.predict:
            _refuse_weights(model, options)
        pool = _collected(model, rows, options, partial, progress)
        if renumbers:
            with progress.doing("aligning experts"):
                pool = align_experts(model, pool)
        router, figures = train_router(model, pool, options, progress, partial)
        measured_on = pool.held_back().rows
        figures |= _figures("layerwise", model, measured_on, progress)
        routed = routed_with(model, router, options)
        if not options.predict:
            figures |= _figures(options.kind, routed, measured_on, progress)
        figures |= cost(options, config)
        manifest = _manifest(read_manifest(options.model), options, rows, figures)
        with writing(options.out, partial.checkpoint), progress.doing("writing the checkpoint"):
            factors = router.factors if isinstance(router, PathRouter) else {}
            if renumbers:
                write_checkpoint(routed, partial.checkpoint, source, manifest, source.dtype, factors)
            else:
                written = RoutedConfig.from_dict(config.to_dict() | added(options))  # with the types that are stored
                factors = read_factors(source.path) | factors
                write_with_router(written, router, partial.checkpoint, source, manifest, factors)
        partial.finish()
    return read_manifest(options.out)


def _collected(
    model: RoutedForCausalLM,
    rows: list[list[int]],
    options: DecoupleOptions,
    partial: PartialCheckpoint,
    progress: Progress,
) -> TargetPool:
    """What the router learns from, collected and kept, or as far as an interrupted run left it."""
    if partial.is_begun:
        progress.note(partial.state.going_on)
    pool = collect_targets(model, rows, progress, options.predict, partial, options.read_layers)
    if partial.state.unit != "step":
        assert options.steps is not None
        partial.begin("step", options.steps, {"losses": []})
    return pool


def _figures(name: str, model: RoutedForCausalLM, rows: list[list[int]], progress: Progress) -> dict[str, Any]:
    """What is measured of a model on text that nothing was trained on; `expert_use` has, layer by layer, the share of
    tokens that each routed expert gets, which `serve --placement balanced` goes by."""
    meter = RouteMeter()
    score = score_rows(model, rows, meter, progress, name=name)
    visits = [meter.visits.get(layer) for layer in range(len(model.config.cuts))]
    use = [[] if found is None else np.concatenate(found).mean(axis=0).round(4).tolist() for found in visits]
    return {
        f"{name}_perplexity": round(score.perplexity, 4),
        f"{name}_active_share": round(meter.active_share, 4),
        f"{name}_expert_use": use,
    }


def read_rows(options: DecoupleOptions, source: ModelFolder) -> list[list[int]]:
    """Token ids of the documents to learn on, drawn with the seed."""
    assert options.pool_tokens is not None
    length = min(options.sequence_length, source.context_tokens)
    documents = draw_documents(read_documents(options.text, length, "--text", options.text_field), options.seed)
    rows = list(encode_pool([d.text for d in documents], source.tokenizer, length, options.pool_tokens))
    if len(rows) < 2:
        raise UserError.of("--text", " ".join(map(str, options.text)), "needs two documents of two tokens or more")
    return rows


def _manifest(source: Manifest, options: DecoupleOptions, rows: list[list[int]], figures: dict[str, Any]) -> Manifest:
    """The layer-wise checkpoint's manifest with what was added under "decouple"."""
    files = [str(path) for path in text_files(options.text, "--text")]
    tokens = {"num_documents": len(rows), "num_tokens": sum(map(len, rows))}
    text = {"files": files, **tokens, "seed": options.seed}
    return Manifest(
        method=f"{source.method}+decouple",
        options=source.options | {"decouple": options.describe()},
        source=source.source | {"layerwise": str(options.model.resolve())},
        calibration=source.calibration | {"decouple": text},
        figures=source.figures | {"decouple": figures},
    )


def train_router(
    model: RoutedForCausalLM,
    pool: TargetPool,
    options: DecoupleOptions,
    progress: Progress,
    partial: PartialCheckpoint | None = None,
) -> tuple[Router, dict[str, Any]]:
    """Train a path router, or a read network, for `model` on the pool less its held-back documents, and measure it on
    those."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        config: Any = model.config
        router = new_router(options, config)
        embedding: Any = model.get_input_embeddings()
        assert options.steps is not None
        training = TrainingOptions(options.steps, options.seed, options.objective, options.embedding or "own")
        router.to(model.device)
        losses = train(router, embedding.weight.detach().float(), pool.training(), training, progress, partial)
    router.requires_grad_(False)
    set_thresholds(router, pool.training(), progress)
    name = f"{options.kind}_vs_{'gate' if options.predict else 'oracle'}"
    return router, first_and_last(losses) | {name: hit_rate(router, pool.held_back(), progress)}


def _layerwise_config(folder: ModelFolder) -> RoutedConfig:
    """Config of a checkpoint that can be decoupled; UserError says why another cannot."""
    folder.check("layerwise")
    config = RoutedConfig.from_pretrained(folder.path)
    if not any(c.num_active for c in config.cuts):
        raise folder.refuse("has no layer with an active routed expert; there is nothing to route")
    return config


def _refuse_weights(model: RoutedForCausalLM, options: DecoupleOptions) -> None:
    """A path router's weights start at 1, if it has any; those that a gate has learned would be lost in silence."""
    for mlp in model.routed_mlps:
        if isinstance(mlp.gate, RepresentativeGate) and mlp.gate.scale.any():
            gate = f"layer {mlp.layer}'s gate weighs its experts (scale is not 0)"
            reason = f"{gate}, and a path router does not learn its weights; allowed: --predict, or a gate of scale 0"
            raise UserError.of("--model", options.model, reason)
