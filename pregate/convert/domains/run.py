"""`read-me`: a dense model becomes one expert per domain and a router that gives a token one index for all layers.

(Read-ME, arXiv 2410.19123.) Data on its way: the domains' text -> mean |h| of every channel on each -> experts that
overlap -> what each of them holds of every token's channels -> a path router distilled from it -> rounds of tuning.

Shape letters: L layers, R domains and so experts, T tokens, I channels of a dense FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pregate.convert.device import pick_device
from pregate.convert.domains.cut import active_width, choose_experts, cut_model, read_me_config
from pregate.convert.domains.domains import Domain, interleaved, read_domains
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.rounds import Rounds, num_stages
from pregate.convert.domains.targets import domain_targets, expert_masks
from pregate.convert.files.assembly import assemble, round_to, write_checkpoint
from pregate.convert.files.dense import load_dense, source_fields, source_of, tell_differences
from pregate.convert.files.partial import PartialCheckpoint, open_partial
from pregate.convert.files.shards import DenseShards
from pregate.convert.files.work_folder import fingerprint, writing
from pregate.convert.measure.control_table import nominal_share
from pregate.convert.measure.overlap import bytes_per_row, overlap_figures
from pregate.convert.measure.scoring import Score, score_rows
from pregate.convert.paths.parent_embedding import start_from
from pregate.convert.progress import QUIET, Progress
from pregate.convert.text.amount import check_learned
from pregate.model.checkpoint import Manifest, check_new_folder, read_manifest
from pregate.model.file_hashes import short_digest
from pregate.model.folder import ModelFolder, read_folder
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.layers import kept_float32
from pregate.model.path_router import PathRouter


def read_me(options: ReadMeOptions, progress: Progress = QUIET) -> Manifest:
    """Cut `options.model` by domain, train in rounds, and write the checkpoint to `options.out`; returns its manifest.

    What a user can get wrong is refused with a UserError before any work. A run that was interrupted goes on after
    the last stage it had done when the same is asked again, and gives the same checkpoint, bit for bit, on the same
    machine with as many threads.
    """
    check_new_folder(options.out)
    folder, device = read_folder(options.model), pick_device(options.device)
    shards = DenseShards.of(folder)
    if options.dtype == "auto":
        options = replace(options, dtype=shards.dtype)
    length = min(options.sequence_length, folder.context_tokens)
    sizes = options.samples, length, options.pool_tokens
    with progress.doing("reading text"):
        domains = read_domains(options.domains, folder.tokenizer, *sizes, options.seed, options.text_field)
    for domain in domains:
        check_learned(domain.rows, options.pool_tokens // len(domains), "--domain", [domain.path], progress)
    dense = load_dense(folder, progress).to(device)
    find_gated_mlps(dense)
    tell_differences(folder, progress)
    with progress.doing("hashing the model"):
        source = source_of(folder, shards)
    text = short_digest([[d.windows_SN.tolist(), d.rows, d.held_back] for d in domains])
    read = source_fields(source, shards) | {"text of the domains": text}
    with open_partial(
        options.out, fingerprint(options.describe(), read, device), num_stages(options), options.restart, "stage"
    ) as partial:
        dense_scores = _scores(dense, domains, progress)
        rounds, figures = _prepare(dense, folder, domains, options, length, progress)
        _train(rounds, partial, progress)
        figures |= _measure(rounds, domains, dense_scores, progress)
        method = "read-me+tune" if options.steps else "read-me"
        calibration = {"domains": [d.describe() for d in domains], "seed": options.seed}
        manifest = Manifest(method, options.describe(), source, calibration, figures)
        with writing(options.out, partial.checkpoint), progress.doing("writing the checkpoint"):
            write_checkpoint(rounds.model, partial.checkpoint, folder, manifest, options.dtype)
        partial.finish()
    return read_manifest(options.out)


def _prepare(
    dense: Any, folder: ModelFolder, domains: Sequence[Domain], options: ReadMeOptions, length: int, progress: Progress
) -> tuple[Rounds, dict[str, Any]]:
    """The model cut and its router at its start, and the figures of the cut; `dense` is used up."""
    experts = choose_experts(dense, domains, options, progress)
    mlps = find_gated_mlps(dense)
    widths = [mlp.width for mlp in mlps]
    active = [active_width(width, options.active_share) for width in widths]
    masks = expert_masks([split.routed_RM for split in experts.splits], widths)
    pool = domain_targets(dense, interleaved(domains), masks, active, options.target, progress)
    row_bytes = bytes_per_row(mlps[0].hidden_size, getattr(torch, options.dtype).itemsize)
    tied = options.tie_overlap or not options.steps
    indexes = [split.neuron_index for split in experts.splits]
    figures = overlap_figures(indexes, experts.cuts, widths, row_bytes, tied)
    config = read_me_config(dense.config, experts, options)
    cut_model(dense, config, experts, domains, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        router = PathRouter(options.router_shape(), dense.config.vocab_size, experts.cuts, "top_k")
    start_from(router, dense.get_input_embeddings().weight.detach().cpu())
    model = assemble(config, dense, router.to(dense.device))
    teacher = load_dense(folder, progress).to(dense.device) if options.steps and options.kl_share else None
    held_back = [row for domain in domains for row in domain.held_back]
    return Rounds(model, pool, held_back, options, length, teacher), figures


def _train(rounds: Rounds, partial: PartialCheckpoint, progress: Progress) -> None:
    """Run the stages that are not done; a stage is here what a layer is to a conversion."""
    done, total = partial.state.layers_done, partial.state.num_layers
    if done:
        progress.note(partial.state.going_on)
        rounds.restore(partial.hidden(rounds.model.device), partial.state.carried["rounds"])
    for index in range(done, total):
        rounds.run_stage(index, progress)
        partial.layer_done(rounds.tensors, {"rounds": rounds.figures})


def _scores(model: Any, domains: Sequence[Domain], progress: Progress) -> list[Score]:
    return [score_rows(model, domain.held_back, progress=progress, name=domain.name) for domain in domains]


@torch.no_grad()
def _measure(
    rounds: Rounds, domains: Sequence[Domain], dense_scores: Sequence[Score], progress: Progress
) -> dict[str, Any]:
    """Perplexity as stored beside the dense model's, and how the router spreads the domains' held-back text."""
    model, dtype = rounds.model, getattr(torch, rounds.options.dtype)
    round_to([p.data for n, p in model.named_parameters() if not kept_float32(n)], dtype, "a weight")
    scores = _scores(model, domains, progress)
    # A token's index is the same in every layer.
    indices = [[model.paths(row).ids[:, 0, 0] for row in d.held_back] for d in domains]
    repeats = np.concatenate([row[1:] == row[:-1] for rows in indices for row in rows])
    by_domain = [
        {
            "name": domain.name,
            "dense_perplexity": round(dense.perplexity, 4),
            "routed_perplexity": round(routed.perplexity, 4),
            "expert_share": [round(float(n), 4) for n in np.bincount(rows, minlength=len(domains)) / len(rows)],
        }
        for domain, dense, routed, rows in zip(domains, dense_scores, scores, map(np.concatenate, indices), strict=True)
    ]
    return {
        "dense_perplexity": round(sum(dense_scores, Score(0.0, 0)).perplexity, 4),
        "routed_perplexity": round(sum(scores, Score(0.0, 0)).perplexity, 4),
        "active_share": nominal_share(model),
        "by_domain": by_domain,
        "repeats_last_expert": round(float(repeats.mean()), 4),
        "rounds": rounds.figures,
    }
