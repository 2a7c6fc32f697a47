"""A conversion on its way: the folder beside `--out` that holds finished layers and what the next one starts from.

    .<out>.partial/
      lock                     held (flock) by the process at work
      state.json               what the conversion is of, and how many layers are done; written last
      hidden-<l>.safetensors   hidden states entering layer l
      checkpoint/              becomes --out

Every file is written under another name, synced and renamed; `state.json` is what counts. So a conversion killed at
any moment, or by a loss of power, goes on after the last layer that it says is done. Read-ME's rounds keep their stages
here in place of layers, with the model's tensors in place of hidden states; `decouple` its steps, with the router's
and its optimizer's, and what it learns from in a file of its own.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pregate.base.errors import UserError
from pregate.convert.files.shard_index import write_shard
from pregate.convert.files.work_folder import interrupted_after, opened, sync_folder, write_whole, writing

FORMAT_VERSION = 1
_STATE = "state.json"


@dataclass(frozen=True)
class State:
    """`fingerprint`: everything the result depends on, by name. `carried`: what the figures need of finished layers.

    A layer may be another `unit` of work: a stage, a step.
    """

    fingerprint: dict[str, Any]
    num_layers: int
    unit: str = "layer"
    layers_done: int = 0
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def going_on(self) -> str:
        """What a run that goes on says."""
        return f"going on after {self.unit} {self.layers_done} of {self.num_layers}, where the last run was interrupted"


def partial_folder(out: Path) -> Path:
    """Where an unfinished conversion to `out` lies."""
    return out.absolute().parent / f".{out.name}.partial"


def read_state(out: Path) -> State | None:
    """What an unfinished conversion to `out` has done; None when there is none. UserError when it is unreadable."""
    folder = partial_folder(out)
    path = folder / _STATE
    if not path.exists() or not (folder / "checkpoint").is_dir():
        return None  # killed before its first layer was done, or after it became the checkpoint
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format version")
        return State(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError.of("--out", out, f"{path} cannot be read ({error}); --restart discards {folder}") from error


def interrupted(out: Path) -> str:
    """What an interrupted run leaves of `out`, and how to go on."""
    state = read_state(out)
    return (
        interrupted_after("", None)
        if state is None
        else interrupted_after(state.unit, state.layers_done, state.num_layers)
    )


def _fingerprint(out: Path) -> dict[str, Any] | None:
    state = read_state(out)
    return None if state is None else state.fingerprint


class PartialCheckpoint:
    """The folder of an unfinished conversion, ours while the lock is held; see `open_partial`."""

    def __init__(self, out: Path, state: State) -> None:
        self._out, self.folder, self.state = out, partial_folder(out), state
        self.checkpoint = self.folder / "checkpoint"
        self.checkpoint.mkdir(exist_ok=True)

    def hidden(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The hidden states that enter the next layer, by name, as they were given to `layer_done`."""
        path = self._hidden_path(self.state.layers_done)
        if not path.exists():
            raise UserError.of("--out", self._out, f"{path} is missing; --restart discards {self.folder}")
        return {name: tensor.to(device) for name, tensor in load_file(path).items()}

    def write_shard(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one safetensors file of the checkpoint."""
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self._write(self.checkpoint / name, lambda path: write_shard(on_cpu, path))

    def layer_done(self, hidden: dict[str, torch.Tensor], carried: dict[str, Any], layers: int = 1) -> None:
        """Record that the layer whose shard was written is done (or `layers` of them), and where the next starts."""
        before, done = self.state.layers_done, self.state.layers_done + layers
        self.keep(self._hidden_path(done), hidden)
        self.state = replace(self.state, layers_done=done, carried=carried)
        text = json.dumps(vars(self.state) | {"format_version": FORMAT_VERSION}, indent=1)
        self._write(self.folder / _STATE, lambda path: path.write_text(text, encoding="utf-8"))
        if before != done:
            self._hidden_path(before).unlink(missing_ok=True)

    def keep(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors to a file of the folder."""
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(path, lambda path: save_file(on_cpu, path))

    def finish(self) -> None:
        """Make the checkpoint folder `out`, and drop the rest."""
        self.checkpoint.rename(self._out)
        sync_folder(self.folder.parent)
        shutil.rmtree(self.folder)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        with writing(self._out, path):
            write_whole(path, write)

    def _hidden_path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.safetensors"


@contextmanager
def open_partial(
    out: Path, fingerprint: dict[str, Any], num_layers: int, restart: bool, unit: str = "layer"
) -> Iterator[PartialCheckpoint]:
    """Go on with the unfinished conversion to `out`, or begin one; the block holds its lock.

    Left with an error before a layer is done, nothing stays. UserError when another process works on it, and when
    what lies there has another fingerprint (unless `restart`, which discards it).
    """
    folder = partial_folder(out)
    _sweep(folder.parent)
    with opened(out, folder, "conversion", restart, fingerprint, lambda: _fingerprint(out)):
        partial = PartialCheckpoint(out, read_state(out) or State(fingerprint, num_layers, unit))
        try:
            yield partial
        finally:
            if folder.exists() and not (folder / _STATE).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what is left of work that was killed after its checkpoint had become what was asked for."""
    for folder in parent.glob(".*.partial"):
        out = folder.with_name(folder.name[1:].removesuffix(".partial"))
        if out.exists() and not (folder / "checkpoint").exists():
            with suppress(OSError), (folder / "lock").open("rb") as lock:  # an error: it is at work
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
