"""`ServeConfig`: everything one deployment is made of, composed of the options that the other packages define."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pregate.base.errors import UserError
from pregate.cluster import strict
from pregate.cluster.placement import STRATEGIES
from pregate.router.engine_options import EngineOptions
from pregate.workers.host_options import HostOptions

DEVICES = ("cpu", "cuda")
#: What two launchers must agree on to share one deployment, and the option each field is set by.
SHARED_OPTIONS = {
    "model": "--model",
    "hosts": "--hosts",
    "placement": "--placement",
    "device": "--device",
    "dtype": "--dtype",
    "expert_ffn": "--expert-ffn",
    "gpus_per_host": "--gpus-per-host",
    "router_gpus": "--router-gpus",
}


@dataclass(frozen=True)
class ServeConfig:
    """One deployment. `hosts` 0 keeps the experts in the engine's process; times in seconds.

    `device` and `dtype` hold for engine and hosts alike and replace what `engine` and `host` say; GPU counts may be
    fractions. `host_threads` are torch's in each host (the engine has its own option). `drain_s` is the grace that
    running requests get at the end.
    """

    model: str
    hosts: int
    name: str = "pregate"
    placement: str = "linear"
    device: str = "cpu"
    dtype: str = "float32"
    gpus_per_host: float = 0.0
    router_gpus: float = 0.0
    host_threads: int = 1
    start_timeout_s: float = 600.0
    drain_s: float = 10.0
    engine: EngineOptions = field(default_factory=lambda: EngineOptions(model=""))
    host: HostOptions = field(default_factory=HostOptions)

    def __post_init__(self) -> None:
        if self.hosts < 0:
            raise UserError.of("--hosts", self.hosts, "must be 0 (experts in the engine's process) or more")
        if self.placement not in STRATEGIES:
            raise UserError.of("--placement", self.placement, f"allowed: {', '.join(STRATEGIES)}")
        if self.device not in DEVICES:
            raise UserError.of("--device", self.device, f"allowed: {', '.join(DEVICES)}")
        for name in ("gpus_per_host", "router_gpus"):
            if getattr(self, name) < 0:
                raise UserError.of(SHARED_OPTIONS[name], getattr(self, name), "must be 0 or more")
        _ = self.engine_options, self.host_options(0)  # their own checks, now rather than in another process

    @property
    def model_name(self) -> str:
        """The name clients know the model by: what `engine` says, else the folder's."""
        return self.engine.name or Path(self.model).name

    @property
    def expert_ffn(self) -> str:
        """Which implementation runs the experts on the hosts."""
        return self.host.expert_ffn

    @property
    def engine_options(self) -> EngineOptions:
        return replace(self.engine, model=self.model, name=self.model_name, dtype=self.dtype, device=self.device)

    def host_options(self, host_id: int) -> HostOptions:
        return replace(self.host, host_id=host_id, dtype=self.dtype, device=self.device)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to cross Ray."""
        return strict.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServeConfig:
        """Undo `to_dict`; also reads strings, as `serve run` passes them. Unknown keys are UserErrors."""
        config = strict.from_dict(cls, values)
        return replace(config, model=str(Path(config.model).expanduser().resolve()))

    def check_joins(self, running: ServeConfig) -> None:
        """UserError naming the first option in which this config differs from the running deployment's."""
        for name, option in SHARED_OPTIONS.items():
            ours, theirs = getattr(self, name), getattr(running, name)
            if ours != theirs:
                raise UserError.of(option, ours, f"deployment {self.name!r} is running with {theirs}; allowed: that")
