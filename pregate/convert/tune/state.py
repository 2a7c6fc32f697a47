"""A tuning run on its way: the folder beside `--out` that holds what it needs to go on.

    .<out>.tuning/
      lock                        held (flock) by the process at work
      state.json                  what the run is of and how far it is; written last
      tensors-<step>.safetensors  every tensor that tuning changes, AdamW's moments, the best tensors so far
      training.jsonl              the curve, a line a step; what comes after state.json's step does not count

The order of batches follows from the seed and the step, and nothing else is random: there is no generator to keep.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pregate.base.errors import UserError
from pregate.convert.files.work_folder import interrupted_after, opened, write_whole, writing
from pregate.convert.tune.loop import Counters, Record, Tuner

FORMAT_VERSION = 1
#: The curve's file, here and in the checkpoint that is written in the end.
CURVE = "training.jsonl"
_STATE = "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def tuning_folder(out: Path) -> Path:
    """Where an unfinished tuning run that is to become `out` lies."""
    return out.absolute().parent / f".{out.name}.tuning"


def read_step(out: Path) -> int | None:
    """The step an unfinished run would go on after; None when there is none. UserError when it is unreadable."""
    state = _read_state(out)
    return None if state is None else state["counters"]["step"]


def interrupted(out: Path) -> str:
    """What an interrupted run leaves of `out`, and how to go on."""
    return interrupted_after("step", read_step(out))


def _read_state(out: Path) -> dict[str, Any] | None:
    path = tuning_folder(out) / _STATE
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError("another format version")
        Counters(**state["counters"])
        return {"fingerprint": dict(state["fingerprint"]), "counters": state["counters"]}
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{path} cannot be read ({error}); --restart discards {path.parent}"
        raise UserError.of("--out", out, reason) from error


def _fingerprint(out: Path) -> dict[str, Any] | None:
    state = _read_state(out)
    return None if state is None else state["fingerprint"]


class TuningFolder:
    """The folder of an unfinished run, ours while the lock is held; see `open_folder`."""

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self._out, self._folder, self._fingerprint = out, tuning_folder(out), fingerprint
        self.curve = self._folder / CURVE

    def load(self, tuner: Tuner) -> bool:
        """Bring `tuner` to where the run was interrupted; False when it had not come to its first checkpoint."""
        state = _read_state(self._out)
        self._cut_curve(-1 if state is None else state["counters"]["step"])
        if state is None:
            return False
        path = self._tensors_path(state["counters"]["step"])
        if not path.exists():
            raise UserError.of("--out", self._out, f"{path} is missing; --restart discards {self._folder}")
        put_tensors(tuner, load_file(path))
        tuner.counters = Counters(**state["counters"])
        return True

    def save(self, tuner: Tuner) -> None:
        """Write a checkpoint of `tuner`; the one before it goes when this one counts."""
        step = tuner.counters.step
        state = {"fingerprint": self._fingerprint, "counters": asdict(tuner.counters)}
        text = json.dumps(state | {"format_version": FORMAT_VERSION}, indent=1)
        tensors = take_tensors(tuner)
        with writing(self._out, self._folder):
            write_whole(self._tensors_path(step), lambda path: save_file(tensors, path))
            write_whole(self._folder / _STATE, lambda path: path.write_text(text, encoding="utf-8"))
        for path in self._folder.glob("tensors-*.safetensors"):
            if path != self._tensors_path(step):
                path.unlink()

    def record(self, figures: Record) -> None:
        """Append a line to the curve."""
        with writing(self._out, self.curve), self.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def discard(self) -> None:
        """The run is done and written: drop the folder."""
        shutil.rmtree(self._folder)

    def _cut_curve(self, last_step: int) -> None:
        """Keep of the curve what a checkpoint at `last_step` knows; a line cut short by a kill goes too."""
        kept = []
        if self.curve.exists():
            lines = self.curve.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= last_step]
        write_whole(self.curve, lambda path: path.write_text("".join(kept), encoding="utf-8"))

    def _tensors_path(self, step: int) -> Path:
        return self._folder / f"tensors-{step:08d}.safetensors"


def take_tensors(tuner: Tuner) -> dict[str, torch.Tensor]:
    """Every tensor a run goes on from, on the CPU."""
    found = {f"now/{n}": t for n, t in tuner.changing.items()} | {f"best/{n}": t for n, t in tuner.best.items()}
    found |= {f"offset/{layer}": t for layer, t in tuner.offsets.items()}
    for name, parameter in tuner.trained.all.items():
        moments = tuner.optimizer.state.get(parameter, {})
        found |= {f"{part}/{name}": moments[part] for part in _MOMENTS if part in moments}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def put_tensors(tuner: Tuner, tensors: dict[str, torch.Tensor]) -> None:
    """Undo `take_tensors` on a fresh tuner of the same model and settings."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        part, _, name = full_name.partition("/")
        parts.setdefault(part, {})[name] = tensor
    tuner.restore(parts["now"])
    tuner.best = parts.get("best", {})
    tuner.offsets.update({int(layer): t.to(tuner.device) for layer, t in parts.get("offset", {}).items()})
    for name, parameter in tuner.trained.all.items():
        if name in parts.get("exp_avg", {}):
            moments = {part: parts[part][name].to(parameter.device) for part in _MOMENTS}
            tuner.optimizer.state[parameter] = moments


@contextmanager
def open_folder(out: Path, fingerprint: dict[str, Any], restart: bool) -> Iterator[TuningFolder]:
    """Go on with the unfinished run that is to become `out`, or begin one; the block holds its lock.

    Left with an error before the first checkpoint, nothing stays. UserError when another process works on it, and
    when what lies there has another fingerprint (unless `restart`, which discards it).
    """
    folder = tuning_folder(out)
    with opened(out, folder, "tuning run", restart, fingerprint, lambda: _fingerprint(out)):
        try:
            yield TuningFolder(out, fingerprint)
        finally:
            if folder.exists() and not (folder / _STATE).exists():
                shutil.rmtree(folder, ignore_errors=True)
