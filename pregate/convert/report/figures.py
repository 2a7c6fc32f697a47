"""The numbers of a report, as frozen dataclasses: what is measured, apart from how a page shows it.

Shares are 0 to 1, entropies and information in nats, sizes in bytes. A layer is numbered as in the model; only layers
with an active routed expert appear.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pregate.convert.measure.control_table import STATIC
from pregate.convert.report.costs import Costs
from pregate.convert.report.training import TrainingCurve, TunedParent


@dataclass(frozen=True)
class QualityPoint:
    """One way to run the model, or another model: FFN share measured, and perplexity on the report's text."""

    name: str
    active_share: float
    perplexity: float
    ratio_to_dense: float
    bits_per_byte: float
    same_set: float | None = None
    mean_overlap: float | None = None


@dataclass(frozen=True)
class Curve:
    """One router at other numbers of active experts; `num_active` is the mean over layers with routed experts."""

    name: str
    num_active: tuple[float, ...]
    active_shares: tuple[float, ...]
    perplexities: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """The checkpoint (`own` names its row) beside its controls, other models, and other numbers of experts.

    `tuned_parent`: the dense model that was tuned as well, where one was given.
    """

    own: str
    controls: tuple[QualityPoint, ...]
    others: tuple[QualityPoint, ...] = ()
    curves: tuple[Curve, ...] = ()
    tuned_parent: QualityPoint | None = None

    def point(self, name: str) -> QualityPoint | None:
        """The control of that name."""
        return next((p for p in self.controls if p.name == name), None)

    @property
    def own_point(self) -> QualityPoint:
        """The checkpoint as it is served."""
        return self[self.own]

    @property
    def gain_over_static(self) -> float:
        """Its perplexity beside that of as many fixed neurons, less 1: below 0 where choosing experts pays."""
        return self.own_point.perplexity / self[STATIC].perplexity - 1

    def __getitem__(self, name: str) -> QualityPoint:
        point = self.point(name)
        assert point is not None, name
        return point


@dataclass(frozen=True)
class LayerLoad:
    """Share of the tokens that visit each routed expert of a layer; `idle`: of those that visit none there."""

    layer: int
    shares: tuple[float, ...]
    num_active: float
    idle: float
    max_over_mean: float
    effective_experts: float


@dataclass(frozen=True)
class Flow:
    """Two routed layers with no other routed one between: `probabilities[i][j]` = P(j in `second` | i in `first`).

    `base[j]` is P(j in `second`). Each is of one expert visited in either layer, drawn at random from a token's, over
    the tokens that visit some in both; so a row sums to 1 (0 for an expert nobody visits). `information` is the mutual
    information of the two, less what shuffled tokens show; `entropy` that of the second.
    """

    first: int
    second: int
    probabilities: tuple[tuple[float, ...], ...]
    base: tuple[float, ...]
    information: float
    entropy: float

    @property
    def relative(self) -> float:
        """Information as a share of the second layer's entropy."""
        return self.information / self.entropy if self.entropy > 0 else 0.0


@dataclass(frozen=True)
class Agreement:
    """How often two of path, gate and oracle choose alike in one layer: equal sets, and picks in common."""

    layer: int
    first: str
    second: str
    same_set: float
    mean_overlap: float


@dataclass(frozen=True)
class LayerRepeats:
    """How a token's experts in one layer follow its predecessor's.

    `same_by_chance`: how often two tokens drawn at random have equal sets. `new_experts` of `num_experts` a token's
    predecessor did not visit (means), `new_by_chance` if tokens followed one another at random. Bytes: those of the
    new experts whole, and of their rows alone that the predecessor's experts lack.
    """

    layer: int
    same_set: float
    same_by_chance: float
    num_sets: int
    num_experts: float
    new_experts: float
    new_by_chance: float
    new_bytes: float
    new_row_bytes: float


@dataclass(frozen=True)
class Repeats:
    """How often a token keeps its predecessor's path, whole and by layer; over `num_pairs` neighbours in a document."""

    num_pairs: int
    same_path: float
    same_by_chance: float
    num_tokens: int
    num_paths: int
    commonest_path: float
    layers: tuple[LayerRepeats, ...]


@dataclass(frozen=True)
class Overlap:
    """Whether experts of a layer hold the same parent neurons, and whether those rows still hold equal weights."""

    overlaps: bool
    tied: bool
    rows_per_neuron: float


@dataclass(frozen=True)
class Figures:
    """Everything a report shows. `model`: what is reported on (`run.describe`); `conditions`: what it was measured on
    and with (`conditions.conditions_of`).

    `tuning`: what the manifest says of the training behind the curves (`training.tuning_of`), None where that is not
    enough to show. `tuned_parent`: how the dense model of `quality.tuned_parent` was tuned, next to this one.
    """

    model: dict[str, Any]
    conditions: dict[str, Any]
    quality: Quality
    costs: Costs
    tuned_parent: TunedParent | None
    loads: tuple[LayerLoad, ...]
    flows: tuple[Flow, ...]
    agreements: tuple[Agreement, ...]
    repeats: Repeats
    overlap: Overlap
    training: tuple[TrainingCurve, ...]
    tuning: dict[str, dict[str, Any]] | None
    router_losses: dict[str, float]
    manifest: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        return asdict(self)
