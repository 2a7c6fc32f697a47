"""Where the dense parent of a checkpoint is looked for, and what is refused where it is not found."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.convert.files.dense import dense_of, recorded_parent
from pregate.model import RoutedForCausalLM
from pregate.model.checkpoint import read_manifest, write_manifest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def _record(folder: Path, **source: object) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, source=manifest.source | source))


@pytest.fixture
def moved(tiny_layerwise_checkpoint: Path, tiny_dense: Path, tmp_path: Path) -> Path:
    """A checkpoint and its parent, moved together from where the manifest says."""
    shutil.copytree(tiny_dense, tmp_path / "moved" / "dense")
    shutil.copytree(tiny_layerwise_checkpoint, tmp_path / "moved" / "routed")
    _record(tmp_path / "moved" / "routed", path="/nowhere/dense")
    return tmp_path / "moved" / "routed"


def test_it_is_where_it_was(tiny_layerwise_checkpoint: Path, tiny_dense: Path):
    assert recorded_parent(tiny_layerwise_checkpoint) == tiny_dense.resolve()


def test_it_lies_beside_the_checkpoint(moved: Path, monkeypatch: pytest.MonkeyPatch):
    assert recorded_parent(moved) == moved.parent / "dense"
    _record(moved, path="models/dense")
    assert recorded_parent(moved) == moved.parent / "dense"
    monkeypatch.chdir(moved)
    assert recorded_parent(Path(".")) == moved.parent / "dense"


def test_a_relative_path_is_one_from_the_working_directory_first(moved: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(moved.parent / "dense", moved.parents[1] / "models" / "dense")
    _record(moved, path="models/dense")
    monkeypatch.chdir(moved.parents[1])
    assert recorded_parent(moved) == Path("models/dense")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_has_changed_is_not_it(name: str, moved: Path):
    file = moved.parent / "dense" / name
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    assert recorded_parent(moved) is None
    file.unlink()
    assert recorded_parent(moved) is None


def test_a_manifest_without_hashes_names_none(moved: Path):
    _record(moved, sha256={})
    assert recorded_parent(moved) is None


def test_the_example_finds_its_parent_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert recorded_parent(EXAMPLES / "quartet-paths") == EXAMPLES / "quartet"


def test_it_is_what_was_given_then_what_is_recorded_then_itself(moved: Path, tiny_dense: Path):
    model = RoutedForCausalLM.from_pretrained(moved)
    assert dense_of(moved, model, tiny_dense) == tiny_dense
    assert dense_of(moved, model, None) == moved.parent / "dense"
    shutil.rmtree(moved.parent / "dense")
    assert dense_of(moved, model, None) is None


def test_a_checkpoint_is_its_own_parent_until_it_is_tuned(moved: Path):
    model = RoutedForCausalLM.from_pretrained(moved)
    manifest = read_manifest(moved)
    write_manifest(moved, replace(manifest, method=f"{manifest.method}+tune"))
    assert dense_of(moved, model, None) == moved.parent / "dense"
    shutil.rmtree(moved.parent / "dense")
    with pytest.raises(UserError, match=r"^model .*was tuned.*/nowhere/dense.*; give the dense model with parent$"):
        dense_of(moved, model, None)


def test_nor_where_a_neuron_is_left_out(moved: Path):
    model = RoutedForCausalLM.from_pretrained(moved)
    model.routed_mlps[1].neuron_index[3] = model.routed_mlps[1].neuron_index[4]
    shutil.rmtree(moved.parent / "dense")
    with pytest.raises(UserError, match=r"layer 1's experts overlap or leave neurons out.*give the dense model"):
        dense_of(moved, model, None)
