"""How many bytes each role of a deployment holds. Reads the checkpoint's header files, no weights.

An estimate for people: weights at the dtype they are computed in, and the KV cache at its full size.
"""

from __future__ import annotations

from dataclasses import dataclass

from pregate.base.dtypes import dtype_name
from pregate.base.memory import available_bytes
from pregate.cluster.config import ServeConfig
from pregate.cluster.routed_experts import read_routed_experts
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.host.residency import held_share

#: What a Python process with torch and transformers holds before any weight. Measured: 0.4 to 0.5 GB.
PROCESS_BYTES = 500 * 10**6
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Footprint:
    """Bytes per role. `units_bytes` has one entry per host (one for the engine's own host when hosts is 0), of its
    slots; `kept_bytes` is what all hosts keep besides (`--host-memory`)."""

    backbone_bytes: int
    shared_bytes: int
    kv_cache_bytes: int
    units_bytes: tuple[int, ...]
    num_processes: int
    kept_bytes: int = 0
    num_engines: int = 1

    @property
    def engine_bytes(self) -> int:
        """Weights and cache of an engine's process, without the experts."""
        return self.backbone_bytes + self.shared_bytes + self.kv_cache_bytes

    @property
    def total_bytes(self) -> int:
        """Everything, as if all processes shared one machine."""
        return (
            self.num_engines * self.engine_bytes
            + sum(self.units_bytes)
            + self.kept_bytes
            + self.num_processes * PROCESS_BYTES
        )


def measure(reader: CheckpointReader, config: ServeConfig) -> Footprint:
    """The footprint of serving a checkpoint as `config` says. UserError when its hosts cannot be placed."""
    import torch

    from pregate.kernels.cpu.packed import packs_to_fp16

    cuts, held = reader.config.cuts, held_of_hosts(reader, config)
    stored = dtype_name(reader.config.dtype or "float32")
    growth = _ITEM_BYTES[config.dtype] / _ITEM_BYTES[stored]
    unit_bytes = [reader.unit_bytes(layer) for layer in range(len(cuts))]
    units = sum(cut.num_routed * size for cut, size in zip(cuts, unit_bytes, strict=True))
    # A shared expert has three matrices of the same shape as a unit's three, num_shared times as wide.
    shared = sum(3 * reader.hidden_size * cut.shared_width for cut in cuts)
    backbone = reader.manifest.weight_bytes - units - shared * _ITEM_BYTES[stored]
    # As experts that stay do, the backbone's products may lie in fp16, but not its embedding: an estimate from above.
    packed = _ITEM_BYTES[stored] == 2 and packs_to_fp16(  # engines choose for themselves
        "auto", torch.device(config.device), getattr(torch, config.dtype)
    )
    return Footprint(
        backbone_bytes=int(backbone * growth),
        shared_bytes=shared * (2 if packed else _ITEM_BYTES[config.dtype]),
        kv_cache_bytes=kv_cache_bytes(reader, config),
        units_bytes=tuple(int(share * num_bytes) for _, share, num_bytes in held),
        # Supervisor, engines, front door; with exact paths the path router service.
        num_processes=config.hosts + config.engines + 2 + read_routed_experts(config.model).exact_paths,
        num_engines=config.engines,
        kept_bytes=sum(
            min(config.host.host_memory, int((1 - share) * sum(unit_bytes[layer] for layer in layers)))
            for layers, share, _ in held
        ),
    )


def held_of_hosts(reader: CheckpointReader, config: ServeConfig) -> list[tuple[list[int], float, int]]:
    """Of each host the layers of its units, the share of them that has slots, and the bytes that all take. UserError
    when hosts cannot be placed, and where `--resident-experts` is less than one needs."""
    import torch

    placement = read_routed_experts(config.model).placement(config)
    homes = [[layer for layer, _ in placement.units_of(host)] for host in range(placement.num_hosts)]
    fits_fp16 = _ITEM_BYTES[dtype_name(reader.config.dtype or "float32")] == 2
    chosen = config.host.expert_ffn, torch.device(config.device), getattr(torch, config.dtype), lambda: fits_fp16
    held = [held_share(reader, layers, config.host.resident_experts, *chosen) for layers in homes]
    return [(layers, share, num_bytes) for layers, (share, _, num_bytes) in zip(homes, held, strict=True)]


def kv_cache_bytes(reader: CheckpointReader, config: ServeConfig) -> int:
    """The KV cache of an engine on this machine. UserError where it is less than a block, or more than is free."""
    text = reader.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * _ITEM_BYTES[config.dtype]
    options = config.engine_options
    return options.kv_blocks(reader.config.context_tokens, per_token, available_bytes) * options.block_size * per_token
