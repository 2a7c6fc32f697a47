"""What a report's numbers mean, in sentences made from them. Every threshold stands in the sentence that uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pregate.convert.measure.control_table import DENSE, LINEAR, ORACLE, PAPER, PATH, RANDOM, STATIC
from pregate.convert.report.figures import Figures, LayerRepeats

#: Marks of a finding, with the word that stands beside the sign.
GOOD, MIXED, POOR, PLAIN = "good", "mixed", "poor", "note"
#: Read-ME's measurement of its own model, one index for all layers (its section 4; 2921 of 4096 tokens).
READ_ME_REPEATS = 0.71
#: Below this many tokens a report says that its sample is small.
SMALL_SAMPLE_TOKENS = 20_000


@dataclass(frozen=True)
class Finding:
    """One judgement: a mark, its subject, and a sentence with the numbers it rests on."""

    mark: str
    subject: str
    sentence: str


def percent(share: float, digits: int = 1) -> str:
    """A share of 0 to 1 in per cent."""
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Four significant digits, no exponent: 0.01234, 7.692, 176.4, 12,345."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def number_short(value: float) -> str:
    """For the ticks of an axis: 0.05, 5, 20, 1,000."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def count(value: int) -> str:
    """A count in words a person reads: 3.9 million, 8.0 billion."""
    for unit, scale in (("billion", 10**9), ("million", 10**6)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:,}"


def graded(value: float, good: float, mixed: float) -> str:
    """`GOOD` up to the first limit, `MIXED` up to the second, else `POOR`."""
    return GOOD if value <= good else MIXED if value <= mixed else POOR


def router_share(figures: Figures) -> float | None:
    """How much of the way from random routing to the oracle the router goes, in log perplexity; None if undefined."""
    quality = figures.quality
    random, oracle = quality.point(RANDOM), quality.point(ORACLE)
    if random is None or oracle is None or oracle.perplexity >= random.perplexity:
        return None
    whole = math.log(random.perplexity / oracle.perplexity)
    return math.log(random.perplexity / quality.own_point.perplexity) / whole


def headline(figures: Figures) -> str:
    """The verdict in one sentence: what the cut costs, and whether choosing experts beats fixed neurons."""
    own, static = figures.quality.own_point, figures.quality.point(STATIC)
    ratio = own.ratio_to_dense
    if ratio < 0.98:  # then it was tuned to text like this, and the dense model was not
        loss = f"is more than made up for by tuning: perplexity is {ratio:.2f} times the untuned dense model's"
        return f"Running {percent(own.active_share, 0)} of the FFN {loss}; tune the dense model as well to compare."
    much = "no" if ratio <= 1 else "little" if ratio <= 1.05 else "some" if ratio <= 1.25 else "much"
    loss = f"costs {much} quality: perplexity is {ratio:.2f} times the dense model's"
    assert static is not None
    pays = own.perplexity < 0.98 * static.perplexity
    worth = "beats as many fixed neurons" if pays else "brings nothing over fixed neurons"
    worth = f"choosing experts for each token {worth}"
    joint = "; but " if (ratio > 1.05) == pays else "; and "
    return f"Running {percent(own.active_share, 0)} of the FFN {loss}{joint}{worth}."


def findings(figures: Figures) -> list[Finding]:
    """The judgements of the first screen, in the order a person decides in."""
    found = [_cost(figures), _against_static(figures), _against_oracle(figures), _up_front(figures)]
    found += [_balance(figures), _locality(figures), _share(figures), _sample(figures)]
    return [finding for finding in found if finding is not None]


def _cost(figures: Figures) -> Finding:
    own, dense = figures.quality.own_point, figures.quality.point(DENSE)
    assert dense is not None
    ratio = own.ratio_to_dense
    advice = {
        GOOD: "That is within 5 %: it can stand in for the dense model where this text is like yours.",
        MIXED: "That is between 5 and 25 %: compare answers on your task before you replace the dense model.",
        POOR: "That is more than 25 %: do not replace the dense model with it; raise the active share, or tune it.",
    }
    mark = graded(ratio, 1.05, 1.25)
    sentence = (
        f"Perplexity {number(own.perplexity)} against {number(dense.perplexity)} dense, {ratio:.3f} times as much."
    )
    return Finding(mark, "Quality", f"{sentence} {advice[mark]}")


def _against_static(figures: Figures) -> Finding:
    own, static = figures.quality.own_point, figures.quality.point(STATIC)
    assert static is not None
    gain = own.perplexity / static.perplexity - 1
    mark = GOOD if gain < -0.02 else MIXED if gain <= 0.02 else POOR
    advice = {
        GOOD: "Choosing experts per token pays.",
        MIXED: "The two are within 2 %: pruning gives the same with no router to run.",
        POOR: "Pruning is better and needs no router: do not serve this checkpoint.",
    }
    change = f"{percent(abs(gain))} {'lower' if gain < 0 else 'higher'}"
    sentence = (
        f"Perplexity is {change} than with the same number of fixed neurons (static mask, {number(static.perplexity)})."
    )
    return Finding(mark, "Routing or pruning", f"{sentence} {advice[mark]}")


def _against_oracle(figures: Figures) -> Finding | None:
    share = router_share(figures)
    random, oracle = figures.quality.point(RANDOM), figures.quality.point(ORACLE)
    if share is None or random is None or oracle is None:
        return None
    mark = graded(-share, -0.9, -0.7)
    advice = {
        GOOD: "A better router would gain little (90 % or more).",
        MIXED: "A better router would gain something (between 70 and 90 %).",
        POOR: "The router is what holds this model back (below 70 %): train it longer or on text like yours.",
    }
    best = "the best by hindsight"
    if figures.model.fits_router:
        best = "the oracle"
        advice[GOOD] = (
            "That is near it or beyond (90 % or more); the model was tuned to this router, so it is no bound."
        )
    ends = f"from random experts ({number(random.perplexity)}) to {best} ({number(oracle.perplexity)})"
    sentence = f"The router gets {percent(share, 0)} of the gain in log perplexity {ends}"
    return Finding(mark, "Router", f"{sentence}. {advice[mark]}")


def _up_front(figures: Figures) -> Finding:
    model, own = figures.model, figures.quality.own_point
    gate = figures.quality.point(LINEAR) or figures.quality.point(PAPER)
    if model.routing == "path":
        if gate is None or figures.quality.own != PATH:
            return Finding(PLAIN, "Known up front", "Every token's experts are fixed before the model runs.")
        cost = own.perplexity / gate.perplexity - 1
        change = f"costs {percent(cost)}" if cost > 0 else f"gains {percent(-cost)}"
        mark = graded(cost, 0.02, 0.1)
        advice = {
            GOOD: "The price of planning ahead is small (up to 2 %).",
            MIXED: "Weigh it against what planning ahead saves you (2 to 10 %).",
            POOR: "That is dear (over 10 %): train the path router longer.",
        }
        against = f"against gates that read each layer's input ({number(gate.perplexity)})"
        if model.fits_router:
            against += ", to which the model was not tuned"
        return Finding(mark, "Known up front", f"Fixing paths before the model runs {change} {against}. {advice[mark]}")
    if model.forecast:
        pairs = [a for a in figures.agreements if {a.first, a.second} == {"path", "gate"}]
        overlap = sum(a.mean_overlap for a in pairs) / max(1, len(pairs))
        mark = graded(-overlap, -0.9, -0.7)
        return Finding(
            mark,
            "Forecast",
            f"Gates decide as the model runs; the path router's forecast shares {percent(overlap)} of their picks. "
            "It serves prefetching and grouping; 90 % is good, below 70 % much of what is fetched is not used.",
        )
    return Finding(
        PLAIN,
        "Not known up front",
        "Each layer's gate decides as the model runs, so nothing can be planned ahead. "
        "`pregate decouple` makes a checkpoint whose paths are known up front.",
    )


def _balance(figures: Figures) -> Finding:
    worst = max(figures.loads, key=lambda load: load.max_over_mean)
    unused = sum(share < 0.01 for load in figures.loads for share in load.shares)
    mark = graded(worst.max_over_mean, 1.5, 3)
    advice = {
        GOOD: "Hosts with equally many experts get about equal work (up to 1.5).",
        MIXED: "Place experts by load, not by number (1.5 to 3).",
        POOR: "Replicate the busiest experts, or one host will do most of the work (over 3).",
    }
    tail = f" {unused} of {figures.model.num_units} experts are visited by fewer than 1 % of tokens." if unused else ""
    sentence = f"The busiest expert of a layer gets {worst.max_over_mean:.2f} times the mean (layer {worst.layer})."
    return Finding(mark, "Load", f"{sentence} {advice[mark]}{tail}")


def _locality(figures: Figures) -> Finding:
    repeats = figures.repeats
    visited = total(repeats.layers, "num_experts")
    new, by_chance = total(repeats.layers, "new_experts"), total(repeats.layers, "new_by_chance")
    kept, kept_by_chance = (1 - n / visited if visited else 0.0 for n in (new, by_chance))
    mark = MIXED if kept < kept_by_chance + 0.1 else GOOD
    advice = {
        GOOD: "Keeping the last token's experts at hand helps (at least 10 points more than chance).",
        MIXED: "Keeping the last token's experts at hand helps little beyond chance (below 10 points): plan by paths.",
    }
    sentence = (
        f"A token keeps its predecessor's whole path {percent(repeats.same_path)} of the time, "
        f"and {percent(kept, 0)} of its experts ({percent(kept_by_chance, 0)} by chance)."
    )
    return Finding(mark, "Locality", f"{sentence} {advice[mark]}")


def total(layers: tuple[LayerRepeats, ...], name: str) -> float:
    """Sum over layers of one of their figures."""
    return sum(getattr(layer, name) for layer in layers)


def _share(figures: Figures) -> Finding | None:
    """Only where thresholds run clearly more or less than was asked for."""
    own, nominal = figures.quality.own_point.active_share, figures.model.nominal_share
    if abs(own - nominal) < 0.01:
        return None
    sentence = f"On this text {percent(own)} of the FFN runs, where the cut was made for {percent(nominal)}."
    return Finding(
        MIXED, "Active share", f"{sentence} The thresholds were set on other text; plan for what you see here."
    )


def _sample(figures: Figures) -> Finding | None:
    conditions = figures.conditions
    if conditions.seen_text:
        files = ", ".join(conditions.seen_text)
        sentence = f"The checkpoint was made on this text ({files}), so its numbers flatter it. Give held-out text."
        return Finding(POOR, "Text", sentence)
    if conditions.num_tokens >= SMALL_SAMPLE_TOKENS:
        return None
    sentence = (
        f"{conditions.num_tokens:,} tokens of {conditions.num_documents} documents is a small sample (below "
        f"{SMALL_SAMPLE_TOKENS:,}): do not decide on differences of a few per cent; give `--max-tokens all` or more."
    )
    return Finding(MIXED, "Sample", sentence)
