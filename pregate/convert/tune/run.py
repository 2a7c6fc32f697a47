"""`tune`: recover by training, under a checkpoint's own routing, what its conversion cost; or tune a dense model."""

from __future__ import annotations

import shutil
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from pregate.base.errors import UserError
from pregate.convert.device import pick_device
from pregate.convert.files.assembly import round_to, write_checkpoint
from pregate.convert.files.dense import load_dense, recorded_parent, source_of
from pregate.convert.files.partial import PartialCheckpoint, open_partial
from pregate.convert.files.shards import DenseShards
from pregate.convert.files.streamed import load_whole
from pregate.convert.files.work_folder import fingerprint, writing
from pregate.convert.progress import QUIET, Progress
from pregate.convert.text.amount import ENOUGH_TO_MEASURE, ENOUGH_TO_TRAIN, LEAST_TOKENS, check_amount
from pregate.convert.tune.data import TuningRows, read_rows
from pregate.convert.tune.figures import earlier_figures, tuned_figures
from pregate.convert.tune.loop import Record, Tuner
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.state import CURVE, record, resume, save
from pregate.model.checkpoint import Manifest, check_new_folder, read_manifest
from pregate.model.factors import read_factors
from pregate.model.folder import ModelFolder, read_folder
from pregate.model.layers import SharedExpert, find_routed_mlps, kept_float32
from pregate.model.modeling import RoutedForCausalLM

#: A checkpoint is written after the first step that ends so long after the one before, whatever its number.
CHECKPOINT_S = 300.0


def tune(options: TuneOptions, progress: Progress = QUIET) -> Manifest:
    """Tune `options.model` and write its best state to `options.out`; returns the manifest.

    Beside the weights it writes the curve, `training.jsonl`: an object per step, and one per evaluation. A run that
    was interrupted after a checkpoint goes on there when it is asked for again (`convert/files/partial.py`) and
    gives the same curve, on the same machine with as many threads. UserError for what a user can get wrong.
    """
    check_new_folder(options.out)
    source = read_folder(options.model)
    if source.fields.get("read_network") is not None:
        reason = "has a read network, which is not tuned; allowed: tune the layer-wise checkpoint, then decouple that"
        raise source.refuse(reason)
    teacher_source = None if options.teacher is None else read_folder(options.teacher, "--teacher")
    check_teacher(options, source, teacher_source)
    device = pick_device(options.device)
    rows = _rows(options, source, progress)
    read = {"--model": str(options.model.resolve()), "the model's shards": DenseShards.of(source).stamp}
    if teacher_source is not None:
        read |= {"--teacher": str(teacher_source.path.resolve()), "its shards": DenseShards.of(teacher_source).stamp}
    known = fingerprint(options.describe(), read | {"text": rows.digest()}, device)
    with open_partial(options.out, known, 0, options.restart, "step", "tuning run") as partial:
        model = load_whole(source, progress).to(device)
        teacher = load_teacher(options, teacher_source, model, progress)

        def keep(figures: Record) -> None:
            record(partial, figures)
            if "validation_perplexity" in figures:
                progress.note(f"step {figures['step']}: validation perplexity {figures['validation_perplexity']}")

        tuner = Tuner(model, rows, options, teacher, keep, progress)
        if resume(partial, tuner):
            progress.note(partial.state.going_on)
        elif options.fits_first and tuner.routed and not read_manifest(options.model).is_tuned:
            _refit(tuner, is_parent_shaped(source, teacher_source), partial, progress)
        _run(tuner, options, partial, progress)
        with writing(options.out, options.out), progress.doing("writing the checkpoint"):
            _write(tuner, options, source, partial)
        partial.finish()
    manifest = read_manifest(options.out)
    hits = manifest.figures["tune"].get("path_vs_gate")
    if hits is not None:  # tuning moves the gates and not their forecast
        kept = f"{100 * hits['mean_overlap']:.1f} % of their picks on the text of validation"
        progress.note(f"the path router forecasts the gates as they were before tuning; now it shares {kept}")
    return manifest


def _rows(options: TuneOptions, source: ModelFolder, progress: Progress) -> TuningRows:
    """The text as the model's tokens; UserError where it is too little."""
    length = min(options.sequence_length, source.context_tokens)
    share, field = options.validation_share, options.text_field
    with progress.doing("reading text"):
        rows = read_rows(options.text, source.tokenizer, length, share, options.seed, options.validation, field)
    check_amount(sum(map(len, rows.training)), ENOUGH_TO_TRAIN, "--text", options.text, progress)
    held_out, option, least = options.text, "--text", 2
    if options.validation:
        held_out, option, least = options.validation, "--validation", LEAST_TOKENS
    check_amount(sum(map(len, rows.held_back)), ENOUGH_TO_MEASURE, option, held_out, progress, least)
    return rows


def check_teacher(options: TuneOptions, source: ModelFolder, teacher: ModelFolder | None) -> None:
    """UserError for a teacher that cannot be one, and for a tuned checkpoint without any."""
    if teacher is not None:
        if teacher.is_routed:
            raise teacher.refuse("is a routed checkpoint; allowed: a dense model")
        if teacher.vocab_size != source.vocab_size:
            raise teacher.refuse(f"has a vocabulary of {teacher.vocab_size}, --model one of {source.vocab_size}")
        if options.matching and not is_parent_shaped(source, teacher):
            raise teacher.refuse("differs in layers or width; allowed: --hidden-match 0")
    elif source.is_routed and options.wants_teacher and read_manifest(options.model).is_tuned:
        reason = "is tuned already: with every expert on it is its dense parent no more"
        raise UserError.of("--model", options.model, f"{reason}; {_other_teacher(options.model)}")


def _other_teacher(path: Path) -> str:
    """What to give for a checkpoint that cannot be its own teacher."""
    parent = recorded_parent(path)
    return f"give --teacher{'' if parent is None else f' {parent}'}, or --kl-share 0"


def is_parent_shaped(source: ModelFolder, teacher: ModelFolder | None) -> bool:
    """Whether there is a teacher of the student's depth and width."""
    keys = ("num_hidden_layers", "hidden_size")
    return teacher is not None and all(source.text.get(key) == teacher.text.get(key) for key in keys)


def load_teacher(options: TuneOptions, source: ModelFolder | None, model: Any, progress: Progress = QUIET) -> Any:
    """The frozen model whose distributions the student is to keep to, on its device; None where none is asked for.

    UserError for a routed model without one whose experts overlap or leave neurons out: they are not its parent.
    """
    if not options.wants_teacher:
        return None
    if source is not None:
        teacher = load_dense(source, progress).to(model.device)
    elif not isinstance(model, RoutedForCausalLM):
        teacher = deepcopy(model)
    elif model.is_partition:
        teacher = dense_parent(model)
    else:
        reason = "its experts overlap or leave neurons out, so all together are not its dense parent"
        raise UserError.of("--model", options.model, f"{reason}; {_other_teacher(options.model)}")
    return teacher.requires_grad_(False)


@torch.no_grad()
def dense_parent(model: RoutedForCausalLM) -> Any:
    """A copy of an untuned routed model's dense parent: every expert on, each FFN one again."""
    parent = deepcopy(model.parent)
    for name, mlp in find_routed_mlps(parent).items():
        gate_up, down = mlp.dense_weights()
        whole = SharedExpert(mlp.hidden_size, down.shape[1], mlp.act_name).to(down)
        whole.gate_up_proj.data, whole.down_proj.data = gate_up, down
        parent.set_submodule(name, whole)
    return parent


def _refit(tuner: Tuner, has_parent: bool, partial: PartialCheckpoint, progress: Progress) -> None:
    """Fit in closed form and keep it, or say why not."""
    if not (tuner.model.is_partition or has_parent):
        progress.note(
            "no fit in closed form: experts overlap or leave neurons out, and no --teacher of the same layers and width"
            " tells what is missing"
        )
        return
    tuner.refit()
    save(partial, tuner)


def _run(tuner: Tuner, options: TuneOptions, partial: PartialCheckpoint, progress: Progress) -> None:
    """Tune to the end, with a checkpoint every so often and the time left shown in units of the budget."""
    unit, total = ("steps", options.steps) if options.steps else ("tokens", options.token_budget or 0)
    if not total:
        unit, total = "seconds", round(60 * (options.minutes or 0)) or 1
    shown, saved_s = 0, time.monotonic()
    with progress.stage(f"tuning ({unit})", total) as advance:

        def after_step() -> None:
            nonlocal shown, saved_s
            done = round(total * tuner.share_done)
            advance(done - shown)
            shown = done
            due = tuner.counters.step % options.checkpoint_every == 0 or time.monotonic() - saved_s > CHECKPOINT_S
            if due or tuner.share_done >= 1:
                save(partial, tuner)
                saved_s = time.monotonic()

        shown = round(total * tuner.share_done)
        advance(shown)
        tuner.run(after_step=after_step)


def _write(tuner: Tuner, options: TuneOptions, source: ModelFolder, partial: PartialCheckpoint) -> None:
    """Write the best state to the checkpoint, measured as it is stored."""
    model = tuner.model
    dtype = source.dtype if source.is_routed else DenseShards.of(source).dtype  # whatever a dense model's config says
    tuner.finish(dtype=getattr(torch, dtype))
    weights = [t for n, t in model.named_parameters() if not kept_float32(n)]
    round_to([t.data for t in weights], getattr(torch, dtype), "a tuned weight")
    manifest = _manifest(tuner, options, source, getattr(torch, dtype))
    shutil.copyfile(partial.folder / CURVE, partial.checkpoint / CURVE)
    write_checkpoint(model.cpu(), partial.checkpoint, source, manifest, dtype, _factors(tuner, source))


def _factors(tuner: Tuner, source: ModelFolder) -> dict[str, torch.Tensor]:
    """What the checkpoint's tensors are made of: the low-rank changes of this tuning, after those of earlier ones.

    Nothing, where weights changed otherwise: tuned in full, or fitted in closed form to the good.
    """
    if not source.is_routed or not tuner.settings.keeps_weights or tuner.is_refitted:
        return {}
    kept = read_factors(source.path)
    for name, (up, down) in tuner.merged.items():
        stage = sum(1 for other in kept if other.startswith(f"{name}.up."))
        kept |= {f"{name}.up.{stage}": up, f"{name}.down.{stage}": down}
    return {name: factor.contiguous() for name, factor in kept.items()}


def _manifest(tuner: Tuner, options: TuneOptions, folder: ModelFolder, dtype: torch.dtype) -> Manifest:
    """The manifest of what was tuned, with what was added under "tune"."""
    if folder.is_routed:
        source = read_manifest(options.model)
        origin = source.source | {"untuned": str(options.model.resolve())}
    else:
        source, origin = Manifest("dense"), source_of(folder, DenseShards.of(folder))
    return Manifest(
        method=f"{source.method}+tune",
        options=source.options | {"tune": options.describe()},
        source=origin,
        calibration=source.calibration | {"tune": tuner.rows.describe() | {"seed": options.seed}},
        figures=earlier_figures(source.figures, tuner, dtype) | {"tune": tuned_figures(tuner)},
    )
