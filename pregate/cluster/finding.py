"""One line of what `pregate doctor` says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report: `state` ok, warn or fail; `mend`: what to do, where `value` does not say it."""

    what: str
    state: str
    value: str
    mend: str = ""

    @property
    def failed(self) -> bool:
        return self.state == "fail"


def gigabytes(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
