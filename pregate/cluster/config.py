"""`ServeConfig`: everything one deployment is made of, composed of the options that the other packages define."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.log import Form
from pregate.base.options import (
    Dtype,
    Key,
    Needs,
    Or,
    Word,
    check_adapter,
    follow_adapter,
    from_dict,
    options,
    to_dict,
    user_options,
)
from pregate.base.telemetry import Telemetry, check_endpoint
from pregate.model.adapter import text_folder
from pregate.router.engine.options import EngineOptions
from pregate.router.paths.options import PathOptions
from pregate.workers.host.options import HostOptions

#: A launcher's own; in everything else two launchers must agree to share one deployment.
_OWN = ("start_timeout_s", "drain_s")
#: Names of resources by which no node is told from another.
_EVERY_NODES = frozenset({"", "CPU", "GPU", "memory", "object_store_memory"})
_Gpus = Annotated[float, Field(ge=0)]


@options()
class ServeConfig:
    """One deployment. `hosts` 0 keeps the experts in the engine's process; times in seconds.

    `device` and `dtype` hold for engine and hosts alike and replace what `engine` and `host` say; GPU counts may be
    fractions. `host_threads` are torch's in each host. `drain_s` is the grace that running requests get at the end.
    An `adapter` in place of the model is served with the dense model `parent` that it was made from.
    """

    model: Annotated[str, Field(description="Checkpoint folder."), Needs("routed"), Or("adapter")]
    hosts: Annotated[int, Field(ge=0, description="Expert hosts; 0 keeps the experts in the engine's process.")] = 0
    engines: Annotated[
        int, Field(ge=1, description="Engines that share the hosts; what one that dies has begun goes on at another.")
    ] = 1
    engine_node: Annotated[
        str | None,
        Field(description="Node for engines and doors: an address in Ray, a resource that such nodes have, or any."),
        Word("here"),
    ] = None
    host_nodes: Annotated[
        Literal["pack", "spread"],
        Field(description="Nodes that hosts go to: one after another is filled, or they spread over all."),
    ] = "pack"
    name: Annotated[str, Field(description="Name of the deployment; launchers of one name share it.")] = "pregate"
    placement: Annotated[
        Literal["linear", "round_robin", "balanced"],
        Field(description="How experts are placed on hosts: in blocks, dealt like cards, or by measured use."),
    ] = "linear"
    replicas: Annotated[
        float, Field(ge=0, description="Spare copies with --placement balanced, a share of all experts.")
    ] = 0.0
    device: Annotated[Literal["cpu", "cuda"], Field(description="What engine and hosts compute on.")] = "cpu"
    dtype: Annotated[Dtype, Field(description="What they compute in.")] = "float32"
    gpus_per_host: Annotated[_Gpus, Field(description="GPUs each host asks Ray for; 1 with cuda.")] = 0.0
    engine_gpus: Annotated[_Gpus, Field(description="GPUs the engine asks Ray for; 1 with cuda.")] = 0.0
    max_hosts: Annotated[
        int | None,
        Field(ge=1, description="Add hosts while they compute for more of the time than --host-load, so many at most."),
    ] = None
    min_hosts: Annotated[
        int, Field(ge=1, description="With --max-hosts: hosts that stay when there is little to do.")
    ] = 1
    host_load: Annotated[
        float, Field(gt=0, le=1, description="With --max-hosts: the share of the time that hosts are to compute.")
    ] = 0.5
    rebalance_s: Annotated[
        float,
        Field(
            ge=0,
            description="Seconds between looks at where use asks for experts, with --placement balanced; 0: never.",
        ),
    ] = 30.0
    host_threads: Annotated[int, Field(ge=1, description="Threads of each host.")] = 1
    log_format: Annotated[Form, Field(description="How every process logs: lines of text, or of JSON.")] = "text"
    otlp_endpoint: Annotated[
        str | None,
        Field(description="Send a trace of each request to this OTLP collector (HTTP)."),
        Word("off", written=False),
    ] = None
    start_timeout_s: Annotated[float, Field(gt=0, description="Seconds the start may take.")] = 600.0
    drain_s: Annotated[float, Field(ge=0, description="Seconds that running requests get at the end.")] = 10.0
    adapter: Annotated[str | None, Field(description="Adapter folder in place of --model."), Needs("model")] = None
    parent: Annotated[str | None, Field(description="The dense model of --adapter."), Needs("model")] = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    host: HostOptions = field(default_factory=HostOptions)
    paths: PathOptions = field(default_factory=PathOptions)

    @classmethod
    def follow(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With cuda every host, and the engine, has a GPU of its own unless another number is given.

        The model's paths become ones that every process of the deployment can follow.
        """
        gpus = {"gpus_per_host": 1.0, "engine_gpus": 1.0} if given.get("device") == "cuda" else {}
        given = follow_adapter(given)
        named = {name: given[name] for name in ("model", "adapter", "parent") if given.get(name) is not None}
        return gpus | given | {name: str(Path(path).expanduser().resolve()) for name, path in named.items()}

    def __post_init__(self) -> None:
        check_adapter(self.model, self.adapter, self.parent)
        check_endpoint(self.otlp_endpoint)
        if (node := self.engine_node) is not None and (node in _EVERY_NODES or node.startswith("node:")):
            allowed = "allowed: here, any, a node's address, or a resource that you gave such nodes"
            raise UserError.of("--engine-node", node, allowed)
        if self.parent is not None and self.adapter is None:
            raise UserError.of("--parent", self.parent, "needs --adapter")
        if self.device == "cuda" and self.hosts > 1 and not self.gpus_per_host:
            raise UserError.of(
                "--gpus-per-host", 0, f"all {self.hosts} hosts would compute on one GPU; allowed: above 0, say 0.5"
            )
        if self.engines > 1 and not self.hosts:
            raise UserError.of("--engines", self.engines, "several engines share expert hosts: needs --hosts 1 or more")
        if self.hosts and self.engine.step_tokens > (most := self.host_options(0).max_rows):
            raise UserError.of("--step-tokens", self.engine.step_tokens, f"allowed: at most {most} (--max-rows)")
        self.check_hosts(self.hosts)
        _ = self.engine_options, self.host_options(0)  # their own checks, now rather than in another process

    def check_hosts(self, num_hosts: int) -> None:
        """UserError for a number of hosts outside the bounds of scaling by load."""
        if self.max_hosts is not None and not self.min_hosts <= num_hosts <= self.max_hosts:
            bounds = f"{self.min_hosts} (--min-hosts) to {self.max_hosts} (--max-hosts)"
            raise UserError.of("--hosts", num_hosts, f"allowed: {bounds}")

    @property
    def model_name(self) -> str:
        """The name clients know the model by: what `engine` says, else the folder's."""
        return self.engine.name or Path(self.model).name

    @property
    def text_path(self) -> str:
        """The folder to look for the model's tokenizer in."""
        return str(text_folder(Path(self.model), None if self.parent is None else Path(self.parent)))

    @property
    def expert_ffn(self) -> str:
        """Which implementation runs the experts on the hosts."""
        return self.host.expert_ffn

    @property
    def telemetry(self) -> Telemetry:
        """What every process tells of itself."""
        return Telemetry(self.log_format, self.otlp_endpoint)

    @property
    def engine_options(self) -> EngineOptions:
        named = {"model": self.model, "parent": self.parent, "name": self.model_name}
        return replace(self.engine, **named, dtype=self.dtype, device=self.device)

    @property
    def path_options(self) -> PathOptions:
        return replace(self.paths, model=self.model, parent=self.parent)

    def host_options(self, host_id: int) -> HostOptions:
        return replace(self.host, host_id=host_id, dtype=self.dtype, device=self.device)

    def host_core(self, host_id: int) -> int:
        """The first core of a host, where cores are pinned: after those of the engines."""
        return self.engines * self.engine.threads + host_id * self.host_threads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to cross Ray."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServeConfig:
        """Undo `to_dict`; unknown keys are UserErrors."""
        return from_dict(cls, values)

    def check_joins(self, running: ServeConfig) -> None:
        """UserError naming the first option in which this config differs from the running deployment's."""
        ours, theirs = (to_dict(replace(c, engine=c.engine_options)) for c in (self, running))
        for option in user_options(ServeConfig).values():
            a, b = ours, theirs
            for name in option.path:
                a, b = a[name], b[name]
            if a != b and option.key not in _OWN:
                sentence = f"deployment {self.name!r} is running with {b}; allowed: that, or end it first"
                raise UserError.of(option.flag, a, sentence)


@options()
class RayAccess:
    """Where Ray is. `address` None starts one on this machine, unless this process is connected already."""

    address: Annotated[
        str | None,
        Field(description="Join this Ray (auto: the running one) instead of starting one."),
        Key("ray_address"),
    ] = None
