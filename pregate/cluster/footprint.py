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
from pregate.workers.host.residency import share_in_slots

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
    cuts = reader.config.cuts
    stored = dtype_name(reader.config.dtype or "float32")
    growth = _ITEM_BYTES[config.dtype] / _ITEM_BYTES[stored]
    staying_growth, coming_growth = _expert_growth(reader, config)
    experts = read_routed_experts(config.model)
    placement = experts.placement(config)
    unit_bytes = [reader.unit_bytes(layer) for layer in range(len(cuts))]
    units = sum(cut.num_routed * size for cut, size in zip(cuts, unit_bytes, strict=True))
    # A shared expert has three matrices of the same shape as a unit's three, num_shared times as wide.
    shared = sum(3 * reader.hidden_size * cut.shared_width * _ITEM_BYTES[stored] for cut in cuts)
    backbone = reader.manifest.weight_bytes - units - shared
    homes = [[unit_bytes[layer] for layer, _ in placement.units_of(host)] for host in range(placement.num_hosts)]
    coming = [[int(size * coming_growth) for size in sizes] for sizes in homes]
    staying = [[int(size * staying_growth) for size in sizes] for sizes in homes]
    shares = [share_in_slots(config.host.resident_experts, *sizes) for sizes in zip(coming, staying, strict=True)]
    return Footprint(
        backbone_bytes=int(backbone * growth),
        shared_bytes=int(shared * staying_growth),
        kv_cache_bytes=kv_cache_bytes(reader, config),
        units_bytes=tuple(
            int(share * sum(sizes) * (staying_growth if share == 1 else coming_growth))
            for share, sizes in zip(shares, homes, strict=True)
        ),
        # Supervisor, engines, front door; with exact paths the path router service.
        num_processes=config.hosts + config.engines + 2 + experts.exact_paths,
        num_engines=config.engines,
        kept_bytes=sum(
            min(config.host.host_memory, int((1 - share) * sum(sizes)))
            for share, sizes in zip(shares, homes, strict=True)
        ),
    )


def _expert_growth(reader: CheckpointReader, config: ServeConfig) -> tuple[float, float]:
    """Bytes in memory for each of the checkpoint's, of experts that stay, and of those that come and go: both can keep
    the 16 bits that they are stored in (`kernels/cpu/packed.py`, `stored.py`). So do the backbone's products, but not
    its embedding: its estimate is one from above."""
    import torch

    from pregate.kernels.cpu.packed import packs_to_fp16
    from pregate.kernels.expert_ffn import passing_bytes

    chosen = config.host.expert_ffn, torch.device(config.device), getattr(torch, config.dtype)
    widths = {reader.hidden_size, *(cut.expert_width for cut in reader.config.cuts if cut.num_routed)}
    item_bytes = (reader.unit_dtype or torch.float32).itemsize
    staying = 2 if item_bytes == 2 and packs_to_fp16(*chosen) else chosen[2].itemsize
    coming = passing_bytes(*chosen, reader.hidden_act, tuple(widths), reader.unit_dtype)
    return staying / item_bytes, coming / item_bytes


def kv_cache_bytes(reader: CheckpointReader, config: ServeConfig) -> int:
    """The KV cache of an engine on this machine. UserError where it is less than a block, or more than is free."""
    text = reader.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * _ITEM_BYTES[config.dtype]
    options = config.engine_options
    return options.kv_blocks(reader.config.context_tokens, per_token, available_bytes) * options.block_size * per_token
