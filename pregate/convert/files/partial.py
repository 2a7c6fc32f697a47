"""Long work on its way: the folder beside `--out` that holds what is done and what the rest starts from.

    .<out>.partial/
      lock                     held (flock) by the process at work
      state.json               what the work is of, and how many layers are done; written last
      hidden-<l>.safetensors   hidden states entering layer l
      checkpoint/              becomes --out

Every file is written under another name, synced and renamed; `state.json` is what counts. So a conversion killed at
any moment, or by a loss of power, goes on after the last layer that it says is done. Read-ME's rounds keep their stages
here in place of layers, with the model's tensors in place of hidden states; `decouple` and `tune` their steps, with
what is trained and its optimizer's moments, and in files of their own the curve, and what is learned from, a piece at a
time: those steps come after the documents that it is found on.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pregate.base.errors import UserError
from pregate.base.folders import sync_folder
from pregate.base.strict_json import parse_json
from pregate.convert.files.shards import write_shard
from pregate.convert.files.work_folder import write_whole, writing

FORMAT_VERSION = 1
_STATE = "state.json"
#: AdamW's state of a parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """`fingerprint`: everything the result depends on, by name. `carried`: what the figures need of finished layers.

    A layer may be another `unit` of work: a stage, a step. `num_layers` 0: how many there will be is not known.
    """

    fingerprint: dict[str, Any]
    num_layers: int
    unit: str = "layer"
    layers_done: int = 0
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def going_on(self) -> str:
        """What a run that goes on says."""
        return f"going on after {self._done}, where the last run was interrupted"

    @property
    def interrupted(self) -> str:
        """What a run that was interrupted says."""
        return f"interrupted after {self._done}; the same command goes on there, with --restart it begins anew"

    @property
    def _done(self) -> str:
        return f"{self.unit} {self.layers_done}" + (f" of {self.num_layers}" if self.num_layers else "")


def partial_folder(out: Path) -> Path:
    """Where unfinished work on `out` lies."""
    return out.absolute().parent / f".{out.name}.partial"


def read_state(out: Path) -> State | None:
    """What unfinished work on `out` has done; None when there is none. UserError when it is unreadable."""
    folder = partial_folder(out)
    path = folder / _STATE
    if not path.exists() or not (folder / "checkpoint").is_dir():
        return None  # killed before its first layer was done, or after it became the checkpoint
    try:
        fields = parse_json(path.read_text(encoding="utf-8"))
        if fields.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format version")
        return State(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError.of("--out", out, f"{path} cannot be read ({error}); --restart discards {folder}") from error


def interrupted(out: Path) -> str:
    """What an interrupted run leaves of `out`, and how to go on."""
    state = read_state(out)
    return "interrupted; nothing was kept" if state is None else state.interrupted


class PartialCheckpoint:
    """The folder of unfinished work, ours while the lock is held; see `open_partial`."""

    def __init__(self, out: Path, state: State) -> None:
        self.out, self.folder, self.state = out, partial_folder(out), state
        self.checkpoint = self.folder / "checkpoint"
        self.checkpoint.mkdir(exist_ok=True)

    @property
    def is_begun(self) -> bool:
        """Whether there is something to go on from."""
        return (self.folder / _STATE).exists()

    def hidden(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The hidden states that enter the next layer, by name, as they were given to `layer_done`."""
        path = self._hidden_path(self.state.layers_done)
        if not path.exists():
            raise UserError.of("--out", self.out, f"{path} is missing; --restart discards {self.folder}")
        return {name: tensor.to(device) for name, tensor in load_file(path).items()}

    def write_shard(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one safetensors file of the checkpoint."""
        self._write(self.checkpoint / name, lambda path: write_shard(_on_cpu(tensors), path))

    def layer_done(self, hidden: dict[str, torch.Tensor], carried: dict[str, Any], done: int | None = None) -> None:
        """Record that the layer whose shard was written is done (or `done` of them), and where the next starts."""
        before = self.state.layers_done
        self.state = replace(self.state, layers_done=before + 1 if done is None else done, carried=carried)
        self._record(hidden, before)

    def begin(self, unit: str, num_layers: int, carried: dict[str, Any]) -> None:
        """Go over to work that is counted otherwise; what was done before it stays where it was kept."""
        before = self.state.layers_done
        self.state = replace(self.state, unit=unit, num_layers=num_layers, layers_done=0, carried=carried)
        self._record({}, before)

    def _record(self, hidden: dict[str, torch.Tensor], before: int) -> None:
        self.keep(self._hidden_path(self.state.layers_done), hidden)
        text = json.dumps(vars(self.state) | {"format_version": FORMAT_VERSION}, indent=1)
        self._write(self.folder / _STATE, lambda path: path.write_text(text, encoding="utf-8"))
        if before != self.state.layers_done:
            self._hidden_path(before).unlink(missing_ok=True)

    def keep(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors to a file of the folder."""
        self._write(path, lambda path: save_file(_on_cpu(tensors), path))

    def finish(self) -> None:
        """Make the checkpoint folder `out`, and drop the rest."""
        self.checkpoint.rename(self.out)
        sync_folder(self.folder.parent)
        shutil.rmtree(self.folder)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        with writing(self.out, path):
            write_whole(path, write)

    def _hidden_path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.safetensors"


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def moments(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state of each parameter, for `layer_done`."""
    each = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    return {f"{part}/{name}": state[part] for name, state in each.items() for part in _MOMENTS if part in state}


def put_moments(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Undo `moments` on a fresh optimizer; what else is among `tensors` is left alone."""
    for full_name, tensor in tensors.items():
        part, _, name = full_name.partition("/")
        if part in _MOMENTS:
            parameter = parameters[name]
            optimizer.state[parameter][part] = tensor.to(parameter.device)


@contextmanager
def open_partial(
    out: Path,
    fingerprint: dict[str, Any],
    num_layers: int,
    restart: bool,
    unit: str = "layer",
    what: str = "conversion",
) -> Iterator[PartialCheckpoint]:
    """Go on with the unfinished work on `out`, or begin it; the block holds its lock. Errors call it `what`.

    Left with an error before a layer is done, nothing stays. UserError when another process works on it, and when
    what lies there has another fingerprint (unless `restart`, which discards it).
    """
    folder = partial_folder(out)
    _sweep(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError.of("--out", out, f"cannot be written ({error})") from error
    with (folder / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        else:  # one that ended between our opening and locking has removed the file: then the lock is of nothing
            ours = os.fstat(lock.fileno()).st_nlink > 0 and not out.exists()
        if not ours:
            raise UserError.of("--out", out, f"another {what} is writing it (in {folder})")
        state = None if restart else read_state(out)
        if state is None:
            _empty(folder)
        elif state.fingerprint != fingerprint:
            raise UserError.of("--out", out, _differences(folder, what, state.fingerprint, fingerprint))
        partial = PartialCheckpoint(out, state or State(fingerprint, num_layers, unit))
        try:
            yield partial
        finally:
            if folder.exists() and not partial.is_begun:
                shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what is left of work that was killed after its checkpoint had become what was asked for."""
    for folder in parent.glob(".*.partial"):
        out = folder.with_name(folder.name[1:].removesuffix(".partial"))
        if out.exists() and not (folder / "checkpoint").exists():
            with suppress(OSError), (folder / "lock").open("rb") as lock:  # an error: it is at work
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    """Remove everything in `folder` but its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _differences(folder: Path, what: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """The sentence that says how the unfinished work in `folder` differs from what is asked for now."""
    names = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    changed = ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)
    return (
        f"{folder} holds an unfinished {what} that differs ({changed}); give what was given there to go on with it,"
        " or --restart to discard it"
    )
