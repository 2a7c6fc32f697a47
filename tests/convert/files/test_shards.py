"""Reading dense checkpoints of every storage, and refusing by name what would otherwise be guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config

from pregate.base.errors import UserError
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.assembly import round_to
from pregate.convert.files.shards import DenseShards, write_index
from pregate.convert.files.skeleton import Skeleton
from pregate.model import RoutedForCausalLM
from pregate.model.folder import read_folder
from pregate.model.shard_file import INDEX, TORCH_NAMES

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CPU = torch.device("cpu")


def make_dense(config: PretrainedConfig, folder: Path, tokenizer_of: Path, dtype: torch.dtype, shard: str) -> Path:
    """A random model; its biases are not zero, as they are in a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_of / name, folder / name)
    return folder


def edit(source: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a one-file model with tensors put in (or, for None, taken out)."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (LlamaConfig(**SIZES, tie_word_embeddings=False), torch.bfloat16),
        (LlamaConfig(**SIZES, tie_word_embeddings=True), torch.float16),
        (Qwen2Config(**SIZES, tie_word_embeddings=True), torch.float16),
        (Phi3Config(**SIZES), torch.bfloat16),
    ],
    ids=["untied", "tied", "attention biases", "fused gate_up"],
)
def test_shards_and_type_of_the_source_do_not_matter(
    config: PretrainedConfig, dtype: torch.dtype, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    """Sharded 16-bit weights give, bit for bit, what the same values give from one float32 file."""
    sharded = make_dense(config, tmp_path / "sharded", tiny_dense, dtype, "20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole = make_dense(config, tmp_path / "whole", tiny_dense, dtype, "1GB")
    save_file(
        {n: t.float() for n, t in load_file(whole / "model.safetensors").items()},
        whole / "model.safetensors",
        metadata={"format": "pt"},
    )
    made = []
    for source in (sharded, whole):
        out = tmp_path / f"{source.name}-moe"
        options = ConvertOptions(source, out, 8, 2, 3, (tiny_text,), samples=4, sequence_length=48, dtype="float32")
        made.append(convert(options))
    shards = [{n: f["sha256"] for n, f in m.files.items() if n.endswith(".safetensors")} for m in made]
    assert len(shards[0]) == 3
    assert shards[0] == shards[1]
    assert made[0].figures == made[1].figures
    names = {n for path in (tmp_path / "sharded-moe").glob("*.safetensors") for n in load_file(path)}
    assert ("parent.lm_head.weight" in names) is not config.tie_word_embeddings
    assert set(json.loads((tmp_path / "sharded-moe" / INDEX).read_text())["weight_map"]) == names
    dense = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    ours = RoutedForCausalLM.from_pretrained(tmp_path / "sharded-moe").state_dict()
    for name, tensor in dense.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(ours[f"parent.{name}"], tensor), name


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [Gemma2Config(**SIZES, sliding_window=16, final_logit_softcapping=5.0), Qwen2Config(**SIZES)],
    ids=["gemma2", "qwen2"],
)
def test_a_skeleton_computes_what_the_model_does(config: PretrainedConfig, tiny_dense: Path, tmp_path: Path):
    """Rotary frequencies, embedding scales, windows and soft caps are in no shard; layer by layer they are there."""
    path = make_dense(config, tmp_path / "dense", tiny_dense, torch.float32, "1GB")
    dense = AutoModelForCausalLM.from_pretrained(path).eval()
    skeleton = Skeleton(read_folder(path), CPU)
    buffers = dict(skeleton.model.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], buffer) for name, buffer in dense.named_buffers())
    ids = torch.randint(3, 512, (3, 48), generator=torch.Generator().manual_seed(0))
    with skeleton.loaded(skeleton.outer_names):
        hidden = skeleton.enter(ids)
        for index in range(2):
            with skeleton.loaded(skeleton.layer_names(index)):
                hidden = torch.cat(list(skeleton.run(index, hidden)))
        logits = torch.stack(list(skeleton.logits(hidden)))
    assert (logits - dense(ids).logits).abs().max() < 1e-5
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_a_head_may_be_stored_instead_of_the_embedding_it_is_tied_to(tiny_dense: Path, tmp_path: Path):
    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    path = make_dense(config, tmp_path / "dense", tiny_dense, torch.float32, "1GB")
    weight = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    other = edit(path, tmp_path / "other", **{"lm_head.weight": weight.clone(), "model.embed_tokens.weight": None})
    skeleton = Skeleton(read_folder(other), CPU)
    with skeleton.loaded(skeleton.outer_names):
        assert torch.equal(skeleton.model.model.embed_tokens.weight, weight)
        assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
    differ = edit(path, tmp_path / "differ", **{"lm_head.weight": weight + 1})
    with pytest.raises(UserError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but they differ"):
        Skeleton(read_folder(differ), CPU)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"weights lack model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"lm_head.weight": None}, r"weights lack lm_head\.weight"),
        ({"model.norm.weight": torch.ones(63)}, r"model\.norm\.weight has shape \[63\], its config says \[64\]"),
        ({"model.layers.0.mlp.up_proj.bias": torch.ones(128)}, r"no place for model\.layers\.0\.mlp\.up_proj\.bias"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, r"model\.norm\.weight is stored as I8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(changes: dict, sentence: str, tiny_dense: Path, tmp_path: Path):
    with pytest.raises(UserError, match=f"model .*{sentence}"):
        Skeleton(read_folder(edit(tiny_dense, tmp_path / "odd", **changes)), CPU)


def test_tensors_that_transformers_leaves_aside_are_left_aside(tiny_dense: Path, tmp_path: Path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert len(Skeleton(read_folder(edit(tiny_dense, tmp_path / "old", **old)), CPU).layers) == 3


def test_names_of_another_wrapping_are_refused(tiny_dense: Path, tmp_path: Path):
    shutil.copytree(tiny_dense, tmp_path / "wrapped")
    tensors = load_file(tmp_path / "wrapped" / "model.safetensors")
    wrapped = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(wrapped, tmp_path / "wrapped" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.embed_tokens\.weight .*they have language_model\.lm_head"):
        Skeleton(read_folder(tmp_path / "wrapped"), CPU)


def test_pickled_missing_and_damaged_files_are_refused(tiny_dense: Path, tmp_path: Path):
    (tmp_path / "pickled").mkdir()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        DenseShards(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, .* save the model as safetensors first"):
        DenseShards(tmp_path / "pickled")
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_dense).save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(UserError, match=rf"its weights cannot be loaded \({shard.name}: "):
        DenseShards(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"names {shard.name}, which is missing"):
        DenseShards(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(UserError, match="is no index of shards"):
        DenseShards(folder)


def test_every_type_that_is_read_has_its_size_in_an_index(tmp_path: Path):
    tensors = {name: torch.zeros(3, dtype=getattr(torch, dtype)) for name, dtype in TORCH_NAMES.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_index(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 3 * 7, "total_size": 3 * (8 + 4 + 2 + 2 + 8 + 4 + 1)}
    assert {name: tensor.dtype for name, tensor in DenseShards(tmp_path).tensors.items()} == {n: n for n in tensors}


def test_only_what_is_asked_for_is_read_and_it_is_a_copy(tiny_dense: Path):
    shards = DenseShards(tiny_dense)
    first = shards.read(["model.norm.weight"], CPU)
    assert list(first) == ["model.norm.weight"]
    first["model.norm.weight"].zero_()
    assert shards.read(["model.norm.weight"], CPU)["model.norm.weight"].abs().sum() > 0


def test_rounding_by_hand_and_values_a_type_cannot_hold():
    tensor = torch.tensor([1.0 + 2**-9, 3.0])
    round_to([tensor], torch.bfloat16, "it")
    assert tensor.tolist() == [1.0, 3.0]
    with pytest.raises(UserError, match="dtype float16: layer 3 has values it cannot hold; allowed: bfloat16"):
        round_to([torch.tensor([70000.0])], torch.float16, "layer 3")
