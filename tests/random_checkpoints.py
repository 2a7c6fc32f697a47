"""Tiny random checkpoints: with a tokenizer, routed by gates or by paths; with units of some size."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig

from pregate.model.checkpoint import Manifest
from pregate.model.config import LayerCut, RoutedConfig
from pregate.model.modeling import RoutedForCausalLM

NUM_LAYERS, NUM_ROUTED = 3, 5
#: Two routed layers around a dense one; a unit is 3 x 256 x 512 fp32 values, 1.5 MiB.
UNIT_CUTS = (LayerCut(6, 2, 2, 256), LayerCut(0, 8, 0, 256), LayerCut(5, 3, 2, 256))


def make_checkpoint(folder: Path, routing: str, context: int = 4096, *, predicted: bool = False) -> Path:
    """A random Llama cut S3A3E8 whose tokens are single bytes; `predicted`: gates decide, a path router foretells."""
    torch.manual_seed(0)
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    parent = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
    )
    cut = {"num_routed": NUM_ROUTED, "num_shared": 3, "num_active": 3, "expert_width": 16}
    path_router = {"dim": 16, "num_blocks": 1, "num_heads": 2, "window": 16} if routing == "path" or predicted else None
    config = RoutedConfig(parent, [cut] * NUM_LAYERS, routing=routing, path_router=path_router)
    model = RoutedForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.manifest = Manifest(method="random")
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_unit_checkpoint(folder: Path) -> Path:
    """Random weights: hidden 512, layers S2R6, dense, S3R5, experts of 256 neurons, fp32. Its units are large enough to
    see which of them were read."""
    parent = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = RoutedForCausalLM(RoutedConfig(parent, [asdict(cut) for cut in UNIT_CUTS]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mlp in model.routed_mlps:
            if mlp.experts is not None:
                mlp.experts.gate_up_proj.normal_(0, 0.1, generator=generator)
                mlp.experts.down_proj.normal_(0, 0.1, generator=generator)
    model.float().save_pretrained(folder)
    return folder
