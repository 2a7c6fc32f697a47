"""A tuning run on its way, in the folder of `files/partial.py`: every tensor that tuning changes, AdamW's moments, the
best tensors so far, and beside them the curve, a line a step.

The order of batches follows from the seed and the step, and nothing else is random: there is no generator to keep.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from pregate.convert.files.partial import PartialCheckpoint, moments, put_moments
from pregate.convert.files.work_folder import write_whole, writing
from pregate.convert.tune.loop import Counters, Record, Tuner

#: The curve's file, here and in the checkpoint that is written in the end.
CURVE = "training.jsonl"


def resume(partial: PartialCheckpoint, tuner: Tuner) -> bool:
    """Bring `tuner` to where the run was interrupted; False when it had not come to its first checkpoint.

    Of the curve is kept what that checkpoint knows; a line cut short by a kill goes too.
    """
    curve, kept = partial.folder / CURVE, []
    if partial.is_begun:
        put_tensors(tuner, partial.hidden(tuner.device))
        tuner.counters = Counters(**partial.state.carried)
        lines = curve.read_text(encoding="utf-8").splitlines(keepends=True)
        done = [line for line in lines if line.endswith("}\n")]
        kept = [line for line in done if json.loads(line)["step"] <= partial.state.layers_done]
    write_whole(curve, lambda path: path.write_text("".join(kept), encoding="utf-8"))
    return partial.is_begun


def save(partial: PartialCheckpoint, tuner: Tuner) -> None:
    """Write a checkpoint of `tuner`; the one before it goes when this one counts."""
    partial.layer_done(take_tensors(tuner), asdict(tuner.counters), tuner.counters.step)


def record(partial: PartialCheckpoint, figures: Record) -> None:
    """Append a line to the curve."""
    curve = partial.folder / CURVE
    with writing(partial.out, curve), curve.open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def take_tensors(tuner: Tuner) -> dict[str, torch.Tensor]:
    """Every tensor a run goes on from."""
    found = {f"now/{n}": t for n, t in tuner.changing.items()} | {f"best/{n}": t for n, t in tuner.best.items()}
    found |= {f"offset/{layer}": t for layer, t in tuner.offsets.items()}
    return found | moments(tuner.trained.all, tuner.optimizer)


@torch.no_grad()
def put_tensors(tuner: Tuner, tensors: dict[str, torch.Tensor]) -> None:
    """Undo `take_tensors` on a fresh tuner of the same model and settings."""
    parts: dict[str, dict[str, torch.Tensor]] = {"best": {}, "offset": {}}
    for full_name, tensor in tensors.items():
        part, _, name = full_name.partition("/")
        parts.setdefault(part, {})[name] = tensor
    tuner.restore(parts["now"])
    tuner.best = {name: tensor.cpu() for name, tensor in parts["best"].items()}
    tuner.offsets.update({int(layer): tensor for layer, tensor in parts["offset"].items()})
    put_moments(tuner.trained.all, tuner.optimizer, tensors)
