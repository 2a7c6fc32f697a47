"""A damaged checkpoint is refused before anything starts."""

import shutil

import pytest

from pregate.base.errors import CheckpointError, UserError
from pregate.cluster.config import ServeConfig
from pregate.cluster.preflight import check_config


@pytest.fixture
def copy(tiny_path_checkpoint, tmp_path):
    return shutil.copytree(tiny_path_checkpoint, tmp_path / "copy")


def test_a_sound_checkpoint_passes(copy):
    check_config(ServeConfig(model=str(copy), hosts=2))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_flipped_byte_is_refused(copy, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        check_config(ServeConfig(model=str(copy), hosts=2))


def test_a_config_that_is_no_json_is_named(copy):
    size = (copy / "config.json").stat().st_size
    (copy / "config.json").write_text("x" * size)
    with pytest.raises(UserError, match=r"config\.json"):
        check_config(ServeConfig(model=str(copy), hosts=2))
