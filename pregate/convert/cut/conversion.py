"""`convert`: a dense model becomes a layer-wise routed checkpoint by CMoE, without training, one layer at a time.

Data on its way: text -> calibration windows [S, N] -> hidden states [S, N, D], which pass through the layers one by
one: a layer is loaded, profiled on what it gets from the converted layers before it, cut, written and dropped. So
memory holds about two layers and the windows' hidden states, however many layers there are.

Shape letters: S windows, N tokens of a window, D hidden width, H held-back windows, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch

from pregate.convert.cut.layer_pass import LayerPass
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.device import pick_device
from pregate.convert.files.assembly import SHARD, round_to
from pregate.convert.files.dense import source_fields, source_of, tell_differences
from pregate.convert.files.gguf import unpacked
from pregate.convert.files.partial import PartialCheckpoint, open_partial
from pregate.convert.files.shards import write_index
from pregate.convert.files.skeleton import Skeleton
from pregate.convert.files.work_folder import fingerprint, writing
from pregate.convert.measure.agreement import AgreementMeter
from pregate.convert.measure.scoring import Score, positions_at_once, score_pieces
from pregate.convert.progress import QUIET, Advance, Progress
from pregate.convert.text.calibration import Calibration, read_calibration
from pregate.model.checkpoint import Manifest, check_new_folder, read_manifest, write_manifest
from pregate.model.config import RoutedConfig
from pregate.model.file_hashes import file_sha256
from pregate.model.folder import is_gguf, read_folder


def convert(options: ConvertOptions, progress: Progress = QUIET) -> Manifest:
    """Convert `options.model` and write the checkpoint to `options.out`; returns its manifest.

    What a user can get wrong is refused with a UserError, before any work where it shows before (a weight that
    `dtype` cannot hold does not). A conversion that was interrupted after a layer was done goes on there when it is
    asked for again (`convert/files/partial.py`), and gives the same checkpoint, bit for bit, on the same machine with
    as many threads.
    """
    check_new_folder(options.out)
    folder = read_folder(unpacked(options.model, options.dtype, progress))
    skeleton = Skeleton(folder, pick_device(options.device))
    if options.dtype == "auto":
        options = replace(options, dtype=skeleton.shards.dtype)
    config = routed_config(skeleton, options)
    length = min(options.sequence_length, folder.context_tokens)
    drawn = options.samples, length, options.seed, options.draw
    text = read_calibration(options.calibration, folder.tokenizer, *drawn, options.text_field, progress)
    tell_differences(folder, progress)
    with progress.doing("hashing the model"):
        source = source_of(folder, skeleton.shards)
    if is_gguf(options.model):
        source["gguf"] = {"path": str(options.model.resolve()), "sha256": file_sha256(options.model)}
    read = source_fields(source, skeleton.shards) | {"calibration text": text.digest()}
    known = fingerprint(options.describe(), read, skeleton.device)
    with open_partial(options.out, known, len(skeleton.layers), options.restart) as partial:
        with progress.doing("embedding windows"):
            layer_pass = _start(skeleton, config, options, text, partial)
        _cut_layers(layer_pass, partial, progress)
        figures = _measure(skeleton, options, text, layer_pass, progress)
        if options.shared is None:
            figures["shared_experts"] = " ".join(str(cut.num_shared) for cut in config.cuts)
        calibration = text.describe() | {"seed": options.seed}
        manifest = Manifest("cmoe", options.describe(), source, calibration, figures)
        with writing(options.out, partial.checkpoint), progress.doing("writing the checkpoint"):
            _write_rest(skeleton, config, options, partial)
            write_manifest(partial.checkpoint, manifest)
        partial.finish()
    return read_manifest(options.out)


def routed_config(skeleton: Skeleton, options: ConvertOptions) -> RoutedConfig:
    """The config of the checkpoint; UserError when the experts do not divide a layer's FFN.

    Where a layer's shared experts are still to be found, it says what would do; cutting the layer settles it.
    """
    cuts = [asdict(options.cuts(width)[0]) for width in skeleton.widths]
    method = {"gate": options.gate, "selection": options.selection, "token_power": options.token_power}
    return RoutedConfig(text_config=deepcopy(skeleton.model.config), layer_cuts=cuts, **method)


@torch.no_grad()
def _start(
    skeleton: Skeleton, config: RoutedConfig, options: ConvertOptions, text: Calibration, partial: PartialCheckpoint
) -> LayerPass:
    """The pass at the layer it is at: its hidden states from the embeddings, or as an interrupted run left them."""
    meter = AgreementMeter.resumed(partial.state.carried.get("meter", {}))
    config.layer_cuts = partial.state.carried.get("layer_cuts", config.layer_cuts)
    if partial.state.layers_done:
        hidden_SND = partial.hidden(skeleton.device)
    else:
        held_back_HN = torch.tensor(text.held_back, dtype=torch.int64)
        hidden_SND = {}
        with skeleton.loaded(skeleton.outer_names):
            if text.held_back:
                hidden_SND["dense"] = skeleton.enter(held_back_HN)
            round_to(skeleton.tensors(skeleton.outer_names).values(), getattr(torch, options.dtype), "the embedding")
            hidden_SND["calibration"] = skeleton.enter(text.windows)
            if text.held_back:
                hidden_SND["routed"] = skeleton.enter(held_back_HN)
    return LayerPass(skeleton, config, options, hidden_SND, meter)


def _cut_layers(layer_pass: LayerPass, partial: PartialCheckpoint, progress: Progress) -> None:
    num_layers, done = partial.state.num_layers, partial.state.layers_done
    if done:
        progress.note(partial.state.going_on)
    skeleton = layer_pass.skeleton
    rest = [name for name in skeleton.outer_names if name not in skeleton.embedding_names]
    with progress.stage("cutting layers", num_layers) as advance, skeleton.loaded(rest):
        advance(done)
        for index in range(done, num_layers):
            partial.write_shard(shard_name(index, num_layers), layer_pass.run(index, progress))
            carried = {"meter": asdict(layer_pass.meter), "layer_cuts": layer_pass.config.layer_cuts}
            partial.layer_done(layer_pass.hidden_SND, carried)
            advance(1)


def shard_name(index: int, num_layers: int) -> str:
    """File of layer `index`; of what lies outside the layers for `index` = `num_layers`."""
    return SHARD.format(index + 1, num_layers + 1)


@torch.no_grad()
def _measure(
    skeleton: Skeleton, options: ConvertOptions, text: Calibration, layer_pass: LayerPass, progress: Progress
) -> dict[str, Any]:
    """The held-back windows' figures, from what the last layer gave: dense as it was, routed as stored."""
    if not text.held_back:
        return {"dense_perplexity": None, "routed_perplexity": None, "agreement": {}}
    names, hidden_SND = skeleton.outer_names, layer_pass.hidden_SND
    total = 2 * len(text.held_back)
    with skeleton.loaded(names), progress.stage("measuring (windows)", total) as advance:
        dense = _perplexity(skeleton, hidden_SND["dense"], text.held_back, advance)
        round_to(skeleton.tensors(names).values(), getattr(torch, options.dtype), "an embedding, norm or the head")
        routed = _perplexity(skeleton, hidden_SND["routed"], text.held_back, advance)
    meter = layer_pass.meter
    figures = {"active_share": round(meter.active_share, 4), "agreement": meter.figures()}
    return {"dense_perplexity": dense, "routed_perplexity": routed} | figures


def _perplexity(skeleton: Skeleton, hidden_HND: torch.Tensor, held_back: list[list[int]], advance: Advance) -> float:
    score = Score(0.0, 0)
    size = positions_at_once(1, skeleton.model.config.vocab_size)
    for ids, hidden_ND in zip(held_back, hidden_HND, strict=True):
        ids_1N = torch.tensor([ids], device=hidden_ND.device)
        pieces = (part[None] for hidden_nD in hidden_ND.split(size) for part in skeleton.logits(hidden_nD[None]))
        score += score_pieces(pieces, ids_1N, torch.ones_like(ids_1N))
        advance(1)
    return round(score.perplexity, 4)


def _write_rest(skeleton: Skeleton, config: RoutedConfig, options: ConvertOptions, partial: PartialCheckpoint) -> None:
    """Everything but the layers' shards and the manifest."""
    folder, num_layers = partial.checkpoint, partial.state.num_layers
    outer = skeleton.stored(skeleton.outer_names, getattr(torch, options.dtype))
    partial.write_shard(shard_name(num_layers, num_layers), {f"parent.{name}": t for name, t in outer.items()})
    config.architectures, config.dtype = ["RoutedForCausalLM"], options.dtype
    config.save_pretrained(folder)
    skeleton.folder.carry_over(folder)
    write_index(folder)
