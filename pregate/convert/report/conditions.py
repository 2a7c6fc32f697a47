"""What a report's numbers were measured on and with: text, versions, hardware, date."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pregate.convert.measure.scored_text import ScoredText
from pregate.convert.report.options import ReportOptions
from pregate.convert.text.documents import text_files
from pregate.model.checkpoint import MANIFEST, Manifest

PACKAGES = ("pregate", "torch", "transformers", "numpy")


def conditions_of(options: ReportOptions, text: ScoredText, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """For `Figures.conditions`; `seen_text`: files of the text that the checkpoint was made on."""
    used = [p.resolve() for p in text_files(options.text, "--text")]
    seen = {Path(p).resolve() for p in _listed_files(manifest.calibration)}
    return {
        "command": options.command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": package_versions(),
        "hardware": hardware(device),
        "text": list(map(str, used)),
        "num_documents": len(text.rows),
        "num_tokens": text.num_tokens,
        "context_tokens": text.context,
        "seed": options.seed,
        "fingerprint": hashlib.sha256((options.model / MANIFEST).read_bytes()).hexdigest()[:16],
        "seen_text": [str(p) for p in used if p in seen],
    }


def _listed_files(calibration: dict[str, Any]) -> Iterator[str]:
    """Every file the manifest says the checkpoint was made on."""
    for name, value in calibration.items():
        if isinstance(value, dict):
            yield from _listed_files(value)
        elif name == "files" and isinstance(value, list):
            yield from map(str, value)


def package_versions() -> dict[str, str]:
    """Python's version and those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return found


def hardware(device: torch.device) -> str:
    """One line: processor, cores, threads torch uses, and the GPU if the model is on one."""
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return ", ".join([processor(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} torch threads", *gpu])


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
