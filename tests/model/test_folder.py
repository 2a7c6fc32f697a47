"""One reader of model folders: what is the model, what a machine left there, and what is refused in one sentence."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pregate.base.errors import CheckpointError, UserError
from pregate.model.folder import read_folder
from pregate.model.tokenizer import check_ids, read_tokenizer, reading_difference


@pytest.fixture
def folder(tiny_dense: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dense, tmp_path / "dense")


def change(folder: Path, file: str = "config.json", **fields: Any) -> Path:
    path = folder / file
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(old | fields))
    return folder


def add_tensor(folder: Path, name: str, dtype: str, shape: list[int]) -> None:
    """One more shard under an index, with a tensor of zeros: torch need not know the type."""
    num_bytes = {"U8": 1, "I32": 4, "F8_E4M3": 1, "F32": 4}[dtype]
    for size in shape:
        num_bytes *= size
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    (folder / "extra.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
    index = {"weight_map": {"model.norm.weight": "model.safetensors", name: "extra.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "left",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"return_dict": False},
        {"output_hidden_states": True, "torchscript": True, "use_cache": False},
        {"auto_map": {"AutoConfig": "their.Config"}, "device_map": "auto"},
    ],
)
def test_what_a_machine_left_is_no_part_of_the_model(left: dict, folder: Path):
    before = read_folder(folder).fields
    assert read_folder(change(folder, **left)).fields == {k: v for k, v in before.items() if k not in left}


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("max_position_embeddings", None, "null"),
        ("tie_word_embeddings", None, "null"),
        ("num_hidden_layers", "six", '"six"'),
        ("hidden_size", 0, "0"),
        ("vocab_size", True, "true"),
        ("num_key_value_heads", 1.5, "1.5"),
        ("hidden_act", ["silu"], r"\['silu'\]"),
        ("rope_parameters", "default", '"default"'),
        ("rms_norm_eps", "tiny", '"tiny"'),
        ("dtype", "float8_e4m3fn", '"float8_e4m3fn"'),
        ("eos_token_id", "</s>", '"</s>"'),
        ("pad_token_id", [0], r"\[0\]"),
    ],
)
def test_a_value_no_model_has_is_refused_by_key(key: str, value: Any, shown: str, folder: Path):
    sentence = f"^teacher {folder}: its config.json's {key} is {shown}; allowed: [^\n]+$"
    with pytest.raises(UserError, match=sentence):
        read_folder(change(folder, **{key: value}), "--teacher")


@pytest.mark.parametrize(
    ("config", "shown"), [({"model_type": "vit"}, "no vocab_size"), ({"text_config": "llama"}, "is no object")]
)
def test_a_config_without_a_language_model_is_refused(config: dict, shown: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    with pytest.raises(UserError, match=shown):
        read_folder(tmp_path).vocab_size  # noqa: B018 (it is read there)


@pytest.mark.parametrize(("pad", "left"), [(512, None), (-1, None), (0, 0)])
def test_a_padding_id_outside_the_vocabulary_is_set_aside(pad: int, left: int | None, folder: Path):
    found = read_folder(change(folder, pad_token_id=pad))
    assert found.fields["pad_token_id"] == left
    assert bool(found.notes) == (left is None)


@pytest.mark.parametrize(
    ("config", "generation", "eos"),
    [
        (2, {"eos_token_id": [1, 2]}, {1, 2}),
        (2, {"eos_token_id": 1}, {1}),
        ([2, 3], {}, {2, 3}),
        (2, None, {2}),
        (None, None, set()),
        (2, {"eos_token_id": [2, 100_000]}, {2}),
    ],
)
def test_generation_settings_say_what_ends_a_text_before_the_config(config, generation, eos, folder: Path):
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        change(folder, "generation_config.json", **generation)
    assert read_folder(change(folder, eos_token_id=config)).eos_ids == eos


def test_what_is_not_obeyed_is_said(folder: Path):
    settings = {"repetition_penalty": 1.3, "stop_strings": ["\n\n"], "temperature": 0.5, "do_sample": False}
    change(folder, "generation_config.json", **settings)
    found = read_folder(folder)
    assert (found.repetition_penalty, found.stop_strings) == (1.3, ("\n\n",))
    (note,) = found.notes
    obeyed = "what ends a text and the repetition penalty come from generation_config.json, all else from each request"
    assert note == f"generation_config.json's temperature 0.5: not obeyed by generate or serve; {obeyed}"
    change(folder, "generation_config.json", temperature=None)
    (note,) = read_folder(change(folder, no_repeat_ngram_size=3)).notes
    assert note.startswith("config.json's no_repeat_ngram_size 3")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_note_of_quantisation_over_plain_weights_is_dropped(method: str, folder: Path):
    found = read_folder(change(folder, quantization_config={"quant_method": method}))
    assert "quantization_config" not in found.fields
    assert found.notes == ("config.json's quantization_config is left out: the weights are plain",)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "I32", [8, 8]),
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", [8, 8]),
        ("model.layers.0.mlp.up_proj.weight", "U8", [64, 1]),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "F32", [1, 1]),
    ],
)
def test_quantised_weights_are_refused_by_name(name: str, dtype: str, shape: list[int], folder: Path):
    change(folder, quantization_config={"quant_method": "gptq"})
    add_tensor(folder, name, dtype, shape)
    with pytest.raises(UserError, match=f"quantization_config says gptq, .*quantised: {name} is stored as {dtype}"):
        read_folder(folder)


def test_editors_marks_are_no_part_of_a_file(folder: Path, tmp_path: Path):
    change(folder, "generation_config.json", eos_token_id=[1, 2])
    before = read_folder(folder).fields
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = read_folder(folder)
    assert found.fields == before
    assert found.eos_ids == {1, 2}
    assert found.tokenizer.bos_token_id == 1
    (tmp_path / "out").mkdir()
    found.carry_over(tmp_path / "out")
    assert all(path.read_bytes()[:1] == b"{" for path in (tmp_path / "out").glob("*.json"))


def test_text_is_neither_cut_nor_padded_as_somebody_trained(folder: Path):
    text = "The harbour lay still. " * 40
    before = read_tokenizer(folder).encode(text).ids
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    fields["padding"] = {"strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None}
    fields["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    assert read_tokenizer(folder).encode(text).ids == before
    assert read_folder(folder).tokenizer(text)["input_ids"] == before[1:]


@pytest.fixture
def added(folder: Path) -> Path:
    """Its tokenizer knows a token more than the embedding has rows."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 512, "content": "[PAD]", "special": True, "normalized": False}
    fields["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


def test_a_token_without_a_row_is_named_where_it_stands(added: Path):
    read = read_folder(added).tokenizer
    assert read("The harbour")["input_ids"]  # a token to spare is no harm
    where = r"'\[PAD\]' \(id 512\) at character 4 of a text, near 'The \[PAD\].*vocabulary of 512 ends at id 511$"
    with pytest.raises(UserError, match=f"^model {added}: the tokenizer makes token {where}"):
        read("The [PAD] harbour")
    encoding = read.backend.encode("[PAD]")
    with pytest.raises(UserError, match=r"^prompt of 2 tokens: .*'\[PAD\]' \(id 512\) at character 0"):
        check_ids(encoding, "[PAD]", 512, "--prompt", f"of {len(encoding.ids)} tokens")


def test_a_folder_is_no_tokenizer_file(folder: Path, tmp_path: Path):
    (folder / "tokenizer").mkdir()
    (tmp_path / "out").mkdir()
    read_folder(folder).carry_over(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_tokenizer_may_lie_in_a_folder_of_its_own(folder: Path, tmp_path: Path):
    before = read_folder(folder).tokenizer("The harbour")
    (folder / "tokenizer").mkdir()
    for path in [*folder.glob("tokenizer*.json"), *folder.glob("special_tokens_map.json")]:
        path.rename(folder / "tokenizer" / path.name)
    assert read_folder(folder).tokenizer("The harbour") == before
    (tmp_path / "out").mkdir()
    read_folder(folder).carry_over(tmp_path / "out")
    assert read_folder(folder).tokenizer("The harbour") == before
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_older_files_give_a_tokenizer_json(folder: Path, tmp_path: Path):
    """vocab.json and merges.txt alone: the same ids from what is written."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    change(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_bos_token=True)
    read = read_folder(folder).tokenizer
    (tmp_path / "out").mkdir()
    read_folder(folder).carry_over(tmp_path / "out")
    ids = read_tokenizer(tmp_path / "out").encode("The harbour", add_special_tokens=False).ids
    assert ids == read("The harbour")["input_ids"]


def test_a_folder_without_any_tokenizer_is_refused(folder: Path):
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens_map.json")]:
        path.unlink()
    with pytest.raises(UserError, match=f"^model {folder}: its tokenizer [^\n]+$"):
        _ = read_folder(folder).tokenizer
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "tokenizer_config.json: is not JSON"),
        (b"[" * 100_000, "tokenizer_config.json: is not JSON .nested too deeply"),
        ('{"bos_token": "<s>"}'.encode("utf-16"), "tokenizer_config.json: is not JSON"),
        (b"[]", "tokenizer_config.json: is not a JSON object"),
        (b'{"bos_token": 7}', "bos_token is 7; allowed: a text or null"),
    ],
)
def test_settings_of_a_tokenizer_that_cannot_be_read_are_refused(content: bytes, sentence: str, folder: Path):
    """They were taken for none: the begin-of-text they name was left out, from calibration to serving."""
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        _ = read_folder(folder).tokenizer


def test_settings_that_transformers_alone_stumbles_over_are_told_and_stop_nothing(folder: Path):
    change(folder, "tokenizer_config.json", model_max_length="x")
    note = reading_difference(folder, read_folder(folder).tokenizer)
    assert note.startswith("tokenizer.json was not compared with transformers' AutoTokenizer (")


def test_another_reading_of_the_same_tokenizer_is_named(folder: Path):
    """A class that splits by rules of its own; what is learned from and served goes by tokenizer.json."""
    assert reading_difference(folder, read_folder(folder).tokenizer) == ""
    change(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    note = reading_difference(folder, read_folder(folder).tokenizer)
    assert "AutoTokenizer reads 'Once upon a time' as [" in note


@pytest.mark.parametrize("module", ["folder", "tokenizer", "checkpoint", "file_hashes", "shard_file"])
def test_reading_a_folder_loads_neither_torch_nor_transformers(module: str, tiny_dense: Path):
    code = (
        f"import sys, pathlib, pregate.model.{module}\n"
        "from pregate.model.folder import read_folder\n"
        "found = read_folder(pathlib.Path(sys.argv[1]))\n"
        "found.eos_ids, found.context_tokens, found.vocab_size, found.tokenizer('a')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_dense)], check=True, timeout=60)
