"""`decouple`: train a path router for a layer-wise checkpoint and write one whose paths are exact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError
from pregate.convert.agreement import AgreementMeter
from pregate.convert.assembly import assemble, write_checkpoint
from pregate.convert.calibration import encode_pool
from pregate.convert.dense import check_model_folder, context_tokens, load_tokenizer
from pregate.convert.progress import Progress, QuietProgress
from pregate.convert.router_training import TrainingOptions, hit_rate, set_thresholds, start_from, train
from pregate.convert.scoring import score_rows
from pregate.convert.targets import TargetPool, collect_targets
from pregate.convert.text import draw_documents, read_documents, text_files
from pregate.model.checkpoint import Manifest, new_folder, read_manifest
from pregate.model.config import PathRouterConfig, RoutedConfig
from pregate.model.gates import RepresentativeGate
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter

#: One document in this many is kept back from training to measure on.
HELD_BACK_EVERY = 20


@dataclass(frozen=True)
class DecoupleOptions:
    """How to train a path router: shape (`dim`, `blocks`), `steps`, and the text to learn on.

    At most `pool_tokens` tokens of text are used, in documents of at most `sequence_length`.
    """

    model: Path
    out: Path
    text: tuple[Path, ...]
    steps: int = 1000
    dim: int = 128
    blocks: int = 1
    seed: int = 0
    pool_tokens: int = 200_000
    sequence_length: int = 512

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "dim": 4, "blocks": 1, "seed": 0, "pool_tokens": 2}.items():
            if getattr(self, name) < least:
                raise UserError.of(f"--{name.replace('_', '-')}", getattr(self, name), f"allowed: {least} or more")
        if not self.text:
            raise UserError("--text: give at least one .txt or .jsonl file, or a folder of them")
        self.shape()

    def shape(self) -> PathRouterConfig:
        return PathRouterConfig(dim=self.dim, num_blocks=self.blocks)

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"model": str(self.model), "out": str(self.out), "text": [str(p) for p in self.text]}


def decouple(options: DecoupleOptions, progress: Progress | None = None) -> Manifest:
    """Train a path router on `options.text` and write an exact checkpoint to `options.out`; returns its manifest.

    UserError for a model that is not layer-wise routed, has a path router already, or has nothing to route.
    """
    progress = progress or QuietProgress()
    with new_folder(options.out) as folder:
        config = _layerwise_config(options.model)
        rows = _read_rows(options)
        model = RoutedForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        _refuse_weights(model, options)
        pool = collect_targets(model, rows, progress)
        router, figures = train_router(model, pool, options, progress)
        measured_on = _held_back(pool).rows
        figures |= _figures("layerwise", model, measured_on)
        exact = assemble(_exact_config(config, options), model.parent, router)
        figures |= _figures("path", exact, measured_on)
        manifest = _manifest(read_manifest(options.model), options, rows, figures)
        write_checkpoint(exact, folder, options.model, manifest, _stored_dtype(config))
        return read_manifest(folder)


def _figures(name: str, model: RoutedForCausalLM, rows: list[list[int]]) -> dict[str, Any]:
    meter = AgreementMeter()
    score = score_rows(model, rows, meter)
    return {f"{name}_perplexity": round(score.perplexity, 4), f"{name}_active_share": round(meter.active_share, 4)}


def _read_rows(options: DecoupleOptions) -> list[list[int]]:
    """Token ids of the documents to learn on, drawn with the seed."""
    tokenizer = load_tokenizer(options.model)
    length = min(options.sequence_length, context_tokens(options.model))
    documents = draw_documents(read_documents(options.text, length, "--text"), options.seed)
    rows = list(encode_pool(documents, tokenizer, length, options.pool_tokens))
    if len(rows) < 2:
        raise UserError.of("--text", " ".join(map(str, options.text)), "needs two documents of two tokens or more")
    return rows


def _manifest(source: Manifest, options: DecoupleOptions, rows: list[list[int]], figures: dict[str, Any]) -> Manifest:
    """The layer-wise checkpoint's manifest with what was added under "decouple"."""
    return Manifest(
        method=f"{source.method}+decouple",
        options=source.options | {"decouple": options.describe()},
        source=source.source | {"layerwise": str(options.model.resolve())},
        calibration=source.calibration | {"decouple": _describe_text(options, rows)},
        figures=source.figures | {"decouple": figures},
    )


def train_router(
    model: RoutedForCausalLM, pool: TargetPool, options: DecoupleOptions, progress: Progress
) -> tuple[PathRouter, dict[str, Any]]:
    """Train a path router for `model` on the pool less its held-back documents, and measure it on those."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        config = model.config
        router = PathRouter(options.shape(), config.text_config.vocab_size, config.cuts, config.selection)
    embedding: Any = model.get_input_embeddings()
    start_from(router, embedding.weight)
    losses = train(router, _training(pool), TrainingOptions(options.steps, options.seed), progress)
    router.requires_grad_(False)
    set_thresholds(router, _training(pool))
    last = losses[-max(1, len(losses) // 20) :]
    figures = {"loss_first": round(losses[0], 4), "loss_last": round(sum(last) / len(last), 4)}
    return router, figures | {
        "path_vs_oracle": hit_rate(router, _held_back(pool), [mlp.mass_threshold for mlp in model.routed_mlps])
    }


def _held_back(pool: TargetPool) -> TargetPool:
    return TargetPool(pool.rows[::HELD_BACK_EVERY], pool.mass[::HELD_BACK_EVERY])


def _training(pool: TargetPool) -> TargetPool:
    kept = [i for i in range(len(pool.rows)) if i % HELD_BACK_EVERY]
    return TargetPool([pool.rows[i] for i in kept], [pool.mass[i] for i in kept])


def _layerwise_config(path: Path) -> RoutedConfig:
    """Config of a checkpoint that can be decoupled; UserError says why another cannot."""
    if check_model_folder(path)["model_type"] != RoutedConfig.model_type:
        raise UserError.of("--model", path, "is a dense model; convert it first with `pregate convert`")
    config = RoutedConfig.from_pretrained(path)
    if config.routing == "path" or config.has_path_router:
        raise UserError.of("--model", path, "already decoupled; allowed: a layer-wise checkpoint of `pregate convert`")
    if not any(c.num_active for c in config.cuts):
        raise UserError.of("--model", path, "has no layer with an active routed expert; there is nothing to route")
    return config


def _refuse_weights(model: RoutedForCausalLM, options: DecoupleOptions) -> None:
    """A path's experts all weigh 1; a gate that has learned to weigh them would lose that in silence."""
    for mlp in model.routed_mlps:
        if isinstance(mlp.gate, RepresentativeGate) and mlp.gate.scale.any():
            reason = f"layer {mlp.layer}'s gate weighs its experts (scale is not 0); paths cannot"
            raise UserError.of("--model", options.model, reason)


def _exact_config(config: RoutedConfig, options: DecoupleOptions) -> RoutedConfig:
    fields = config.to_dict() | {"routing": "path", "path_router": asdict(options.shape())}
    return RoutedConfig.from_dict(fields)


def _stored_dtype(config: RoutedConfig) -> str:
    return dtype_name(config.dtype or torch.float32)


def _describe_text(options: DecoupleOptions, rows: list[list[int]]) -> dict[str, Any]:
    return {
        "files": [str(p) for p in text_files(options.text, "--text")],
        "num_documents": len(rows),
        "num_tokens": sum(map(len, rows)),
        "seed": options.seed,
    }
