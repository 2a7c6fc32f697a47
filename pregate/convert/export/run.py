"""`export`: a routed checkpoint as stock Qwen2-MoE, as its dense parent again, or as what it adds to that."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pregate.base.errors import UserError
from pregate.base.options import to_dict
from pregate.convert.device import pick_device
from pregate.convert.export.adapter import write_adapter
from pregate.convert.export.check import compare_logits, compare_texts, load_stock, rounded
from pregate.convert.export.dense import check_dense, write_dense
from pregate.convert.export.gate_scale import measure_scales
from pregate.convert.export.options import ExportOptions
from pregate.convert.export.qwen2_moe import write_qwen2_moe
from pregate.convert.export.stock_class import check_expressible, stock_config, write_stock_config
from pregate.convert.files.routed_shards import RoutedShards
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.scoring import encode_all
from pregate.convert.progress import QUIET, Progress
from pregate.convert.text.amount import check_scored
from pregate.convert.text.documents import read_documents
from pregate.model.checkpoint import new_folder
from pregate.model.folder import ModelFolder, read_folder

RECORD = "export.json"
#: Median relative difference of logits that rounding may make, by the type exported; beyond it the export is refused.
#: Experts chosen otherwise at near ties move single positions, not the median.
TOLERANCE = MappingProxyType({"float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1})
#: Tokens the gates' factors are measured on, and the random ones that stand in where no text is given.
SCALE_TOKENS, RANDOM_ROWS, RANDOM_TOKENS = 4096, 64, 64


def export(options: ExportOptions, progress: Progress = QUIET) -> dict[str, Any]:
    """Write the folder `options.out` and return what was measured; with an error nothing is left behind.

    UserError names what the format cannot express, and says what to do.
    """
    with new_folder(options.out) as folder:
        model_folder = read_folder(options.model)
        source = RoutedShards(model_folder, progress)
        if options.format == "adapter":
            return write_adapter(source, model_folder, options, folder, progress)
        model_folder.carry_over(folder)
        if options.format == "dense":
            check_dense(source, progress)
            return write_dense(source, folder, options.dtype, progress)
        with progress.doing("checking layers"):
            check_expressible(source)
        return _export_stock(source, model_folder, options, folder, progress)


def _export_stock(
    source: RoutedShards, model_folder: ModelFolder, options: ExportOptions, folder: Path, progress: Progress
) -> dict[str, Any]:
    named = options.dtype or source.dtype
    dtype, stock = getattr(torch, named), stock_config(source.config, named)
    context = stock.max_position_embeddings
    rows = _rows(options, model_folder, context, stock.vocab_size, progress)
    device = pick_device(options.device)
    routed = load_any(model_folder, progress, device)
    scales = measure_scales(routed, rows, SCALE_TOKENS, dtype, options.scale, progress)
    factors = [scale.factor for scale in scales]
    write_stock_config(stock, folder)
    write_qwen2_moe(source, factors, folder, dtype, progress)
    with progress.doing("loading the export"):
        model = load_stock(folder).to(device)
    model.generation_config = routed.generation_config  # of greedy texts; what the folder says of sampling stays there
    text = " ".join(map(str, options.text)) or None
    figures: dict[str, Any] = {
        "stored_as": named,
        "context_tokens": context,
        "gate_factors": f"{min(factors):.3g} to {max(factors):.3g}",
        "other_experts": rounded(max(scale.expected_other_experts for scale in scales)),
        "measured_on": text or "random tokens (give --text for perplexity)",
    }
    figures |= compare_logits(routed, model, rows, progress)
    _check_difference(options, named, figures["median_relative_difference"])
    figures |= compare_texts(routed, model, rows, context, progress)
    if not options.text:  # of random tokens it says nothing
        figures |= dict.fromkeys(("routed_perplexity", "exported_perplexity", "perplexity_ratio"))
    record = {"options": to_dict(options) | {"text": text}, "source": source.manifest.source, "figures": figures}
    record |= {"layers": [asdict(s) for s in scales], "versions": {n: version(n) for n in ("pregate", "transformers")}}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(folder, source, figures, device)
    return figures


def _check_difference(options: ExportOptions, dtype: str, median: float) -> None:
    if not median <= TOLERANCE[dtype]:
        differ = f"logits differ by {median:.2g} of the largest at the median position"
        allowed = f"allowed for {dtype}: {TOLERANCE[dtype]:g}"
        if options.scale is not None:
            raise UserError.of("--scale", options.scale, f"{differ}; {allowed}; without --scale it is measured")
        reason = f"{options.model}: the class does not compute what the checkpoint does: {differ}; {allowed}"
        raise UserError.of("--format", options.format, reason)


def _rows(
    options: ExportOptions, folder: ModelFolder, context: int, vocab_size: int, progress: Progress
) -> list[list[int]]:
    """Token ids to measure on: the documents of `--text`, or random ones."""
    if not options.text:
        shape = (RANDOM_ROWS, min(RANDOM_TOKENS, context))
        return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).tolist()
    with progress.doing("reading text"):
        documents = read_documents(options.text, min(context, folder.context_tokens), "--text", options.text_field)
        rows, _num_bytes = encode_all(folder.tokenizer, [d.text for d in documents], context, options.max_tokens)
    check_scored(rows, options.max_tokens, "--text", options.text, progress)
    return rows


_CARD = """\
# {title}

A dense {family} model cut into experts by pregate, written as a stock Qwen2-MoE model: it loads with plain
transformers (`AutoModelForCausalLM.from_pretrained`), and has the tensor names and config fields that vLLM and SGLang
read for `Qwen2MoeForCausalLM`. Nothing of pregate is needed.

Each layer has {shared} of {total} experts always on, as one shared expert, and {active} of the {routed} others per
token. Chosen experts have equal weight: gates are scaled so far down that the softmax over them is nearly flat
(by {gate_factors}), the routed down-projections are {active} times and the shared one is 2 times the parent's (the
shared expert's own gate is 0, which is a factor of 1/2). Layer by layer factors are in `export.json`.

Measured on: {measured_on}, by transformers on a {device}, against the routed model it was made from in float32:

| figure | value |
| --- | --- |
{rows}
"""


def write_card(folder: Path, source: RoutedShards, figures: dict[str, Any], device: torch.device) -> None:
    """Write the README.md of `folder`; the figures were measured on `device`."""
    cut = source.config.cuts[0]
    measured = {k: v for k, v in figures.items() if k not in ("measured_on", "gate_factors") and v is not None}
    for name, value in measured.items():
        if isinstance(value, list):  # where greedy texts part
            parted = (f"prompt {p['prompt']} at token {p['token']}, margin {p['margin']}" for p in value)
            measured[name] = "; ".join(parted) or "none"
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in measured.items())
    text = _CARD.format(
        title=source.folder.name,
        family=source.config.text_config.model_type,
        shared=cut.num_shared,
        total=cut.num_shared + cut.num_routed,
        active=cut.num_active,
        routed=cut.num_routed,
        gate_factors=figures["gate_factors"],
        measured_on=figures["measured_on"],
        rows=rows,
        device={"cpu": "CPU", "cuda": "GPU"}.get(device.type, device.type),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
