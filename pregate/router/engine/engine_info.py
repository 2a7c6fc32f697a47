"""What an engine says of itself: what it serves and how busy it is, in plain types."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pregate.router.engine.engine import Engine


def describe(engine: Engine) -> dict[str, Any]:
    """What is served and how busy it is; it only reads, from any thread."""
    scheduler, allocator, counts = engine.scheduler, engine.scheduler.allocator, engine.counts
    hits, misses, _ = engine.unit_counts()
    lost, now_s = dict(engine.exchange.lost), time.monotonic()
    return {
        "model": engine.options.name or Path(engine.options.model).name,
        "max_context": engine.context,
        "vocab_size": int(engine.config.text_config.vocab_size),
        "eos_token_ids": sorted(engine.admission.eos_ids),
        "stop_strings": list(engine.stop_strings),
        "version": engine.version,
        "routing": engine.config.routing,
        "has_path_router": engine.computer is not None,
        "num_hosts": len(engine.exchange.clients),
        "num_layers": len(engine.config.cuts),
        "num_experts": [c.num_routed + c.num_shared for c in engine.config.cuts],
        "num_running": len(scheduler.running),
        "num_queued": len(scheduler.waiting),
        "num_steps": counts.num_steps,
        "num_step_tokens": counts.num_tokens,
        "num_step_units": counts.num_units,
        "step_s": counts.seconds_s,
        "unit_hits": hits,
        "unit_misses": misses,
        "batching": scheduler.policy if scheduler.batcher is None else "path",
        "step_costs": None if scheduler.batcher is None else asdict(scheduler.batcher.learned),
        "num_preempted": scheduler.num_preempted,
        "prefix_tokens": scheduler.num_matched_tokens,
        "queued_bytes": scheduler.queued_bytes,
        "kv_blocks_free": allocator.num_free,
        "kv_blocks_shared": allocator.num_shared,
        "kv_blocks": allocator.num_blocks,
        "kv_bytes": engine.runner.kv.nbytes,
        "placement": engine.exchange.placement,
        "last_paths": [] if engine.paths is None else list(engine.paths.last.told),
        "hosts": [
            {
                "host_id": h,
                "node": c.node,
                "lost": lost.get(h, ""),
                "lost_s": now_s - engine.exchange.lost_at_s.get(h, now_s) if h in lost else 0.0,
                "rows": int(counts.pairs_H[h]) if h < len(counts.pairs_H) else 0,
                "units": [] if h in lost else _digits(c.units_LR),
                **vars(c.stats),
                **vars(c.cache),
            }
            for h, c in enumerate(engine.exchange.clients)
        ],
    }


def _digits(held_LR: np.ndarray | None) -> list[str]:
    """Which units are held, a digit each, layer by layer. Example: ["101", "011"]."""
    return [] if held_LR is None else [row.tobytes().decode() for row in held_LR.astype(np.uint8) + ord("0")]
