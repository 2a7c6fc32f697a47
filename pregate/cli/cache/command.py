"""`pregate bench cache`: a recording, made or read, replayed through every policy at any capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import Needs, Seed, Texts, options
from pregate.base.sizes import SIZE
from pregate.cli.flags import command


@options()
class CacheOptions:
    """What to replay, at which capacities, on which clock."""

    recording: Annotated[Path | None, Field(description="Recording to replay.")] = None
    model: Annotated[
        Path | None, Field(description="Checkpoint with exact paths; makes a recording."), Needs("model")
    ] = None
    text: Annotated[Texts, Field(description="Text of its requests", min_length=0)] = ()
    trace: Annotated[Path | None, Field(description=".csv of arrivals: arrival_s, prompt_tokens, output_tokens.")] = (
        None
    )
    requests: Annotated[int, Field(ge=1, description="Requests of the trace.")] = 200
    length_scale: Annotated[float, Field(gt=0, description="Times the trace's lengths.")] = 0.25
    save: Annotated[Path | None, Field(description="File to keep the recording in (.npz).")] = None
    whole_experts: Annotated[bool, Field(description="Count whole experts, where one index holds for all layers.")] = (
        False
    )
    resident: Annotated[str, Field(description="Capacities with commas: units, or below 1 shares of all.")] = (
        "0.1,0.25,0.5,0.75"
    )
    bandwidth: Annotated[float, Field(gt=0, description="Bytes a second that units are loaded at."), SIZE] = 1e9
    layer_ms: Annotated[float, Field(gt=0, description="Milliseconds that a layer computes.")] = 1.0
    lead: Annotated[int, Field(ge=1, description="Layers that units are fetched ahead.")] = 2
    picture: Annotated[Path | None, Field(description="File of a picture of it (.png, .svg).")] = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if (self.recording is None) == (self.model is None):
            raise UserError.of("--recording", self.recording, "allowed: a recording, or --model, --text and --trace")
        if self.model is not None and (not self.text or self.trace is None):
            raise UserError.of("--model", self.model, "needs --text and --trace")
        _ = self.capacities

    @property
    def capacities(self) -> list[float]:
        """The numbers in `resident`."""
        try:
            numbers = [float(part) for part in self.resident.split(",")]
        except ValueError:
            numbers = [0.0]
        if not all(0 < n < 1 or (n >= 1 and n.is_integer()) for n in numbers):
            raise UserError.of("--resident", self.resident, "allowed: counts, and shares below 1, like 0.25,0.5,12")
        return numbers

    def held(self, num_units: int) -> list[int]:
        """How many of a recording's units each capacity is. UserError where one is more than all."""
        if max(self.capacities) > num_units:
            raise UserError.of("--resident", self.resident, f"allowed: counts up to {num_units}, all units used")
        return [int(n) if n >= 1 else max(1, round(n * num_units)) for n in self.capacities]


@command(CacheOptions)
def cache(options: CacheOptions) -> None:
    """Replay which units were used through caching policies: hits, bytes, waiting."""
    from pregate.cli.cache.recording import Recording
    from pregate.cli.cache.results import draw, replay_all

    recording = Recording.load(options.recording) if options.recording is not None else _record(options)
    if options.save is not None:
        recording.save(options.save)
    if options.whole_experts:
        recording = recording.one_index()
    num_units = int(recording.used_SLR.any(axis=0).sum())
    rows = replay_all(
        recording, options.held(num_units), options.seed,
        bandwidth=options.bandwidth, layer_s=options.layer_ms / 1e3, lead=options.lead,
    )  # fmt: skip
    print(f"{recording.num_steps} steps, {num_units} units of {int(recording.unit_bytes)} bytes")
    print(f"{'held':>6} {'policy':<10} {'hit rate':>9} {'loaded':>10} {'stall':>8} {'wasted':>7}")
    for row in rows:
        stall = "-" if row.stall_share is None else f"{row.stall_share:.1%}"
        wasted = "-" if row.wasted_share is None else f"{row.wasted_share:.1%}"
        print(
            f"{row.held:6d} {row.policy:<10} {row.hit_rate:9.2%} {row.loaded_bytes / 1e6:8.1f}MB {stall:>8} {wasted:>7}"
        )
    if options.picture is not None:
        draw(rows, options.picture)


def _record(options: CacheOptions):  # noqa: ANN202
    from pregate.cli.cache.record import Pace, record, requests_of

    assert options.model is not None and options.text and options.trace is not None
    computer, unit_bytes, requests = requests_of(
        options.model, options.text, options.trace, options.requests, options.length_scale, options.seed
    )
    return record(computer, requests, Pace(), unit_bytes)
