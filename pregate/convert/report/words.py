"""What a report's numbers mean: the verdict in one sentence, its grades, and how numbers are written."""

from __future__ import annotations

import math

from pregate.convert.measure.control_table import ORACLE, RANDOM
from pregate.convert.report.figures import Figures

#: Marks of a finding.
GOOD, MIXED, POOR = "good", "mixed", "poor"
#: A share is drawn as even up to the first relative difference; its colour grows at each of the others.
EVEN_LIMITS = (0.05, 0.25, 1.0)


def percent(share: float, digits: int = 1) -> str:
    """A share of 0 to 1 in per cent."""
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Four significant digits, no exponent: 0.01234, 7.692, 176.4, 12,345."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


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


def even_shade(share: float, even: float) -> str:
    """Colour class of a share beside what would be even: z, or n1 to n3 below and p1 to p3 above; n3 only for none.

    Example: 0.3 beside 0.2 is half as much again: "p2"; 0.01 beside 0.2: "n2"; 0 beside 0.2: "n3".
    """
    if not even or not share:
        return "n3" if even else "z"
    times = max(share / even - 1, -0.99)
    level = sum(abs(times) >= limit for limit in EVEN_LIMITS)
    return f"{'p' if times > 0 else 'n'}{level}" if level else "z"


def router_share(figures: Figures) -> float | None:
    """How much of the way from random routing to the oracle the router goes, in log perplexity; None if undefined."""
    quality = figures.quality
    random, oracle = quality.point(RANDOM), quality.point(ORACLE)
    if random is None or oracle is None or oracle.perplexity >= random.perplexity:
        return None
    whole = math.log(random.perplexity / oracle.perplexity)
    return math.log(random.perplexity / quality.own_point.perplexity) / whole


def dense_ratio(figures: Figures) -> tuple[float, str]:
    """The checkpoint's perplexity beside that of the fairest dense model there is, and whose that is."""
    quality, tuned = figures.quality, figures.tuned_parent
    if quality.tuned_parent is None or tuned is None:
        return quality.own_point.ratio_to_dense, f"the {'untuned ' * figures.model['is_tuned']}dense model's"
    how = "tuned alike" if tuned.recorded else "given as tuned alike"
    if tuned.differences:
        how = f"tuned otherwise ({', '.join(tuned.differences)})"
    return quality.own_point.perplexity / quality.tuned_parent.perplexity, f"that of the dense model {how}"


def is_fair(figures: Figures) -> bool:
    """Whether `dense_ratio` tells what the cut costs: a tuned checkpoint needs a dense model tuned alike for that."""
    tuned = figures.tuned_parent
    return not figures.model["is_tuned"] or (tuned is not None and not tuned.differences)


def headline(figures: Figures) -> str:
    """The verdict: what the cut costs, where that can be told, and whether choosing experts beats fixed neurons."""
    ratio, whose = dense_ratio(figures)
    pays = figures.quality.gain_over_static < -0.02
    worth = f"choosing experts for each token {'beats' if pays else 'brings nothing over'} as many fixed neurons"
    if figures.model["fits_router"]:
        worth += ", to which it was not tuned"
    running = f"Running {percent(figures.quality.own_point.active_share, 0)} of the FFN"
    if not is_fair(figures):
        owner = whose.removesuffix("'s").removeprefix("that of ")
        lacks = "only one tuned alike (--tuned-parent) would tell what the cut costs"
        return f"{running} gives {ratio:.2f} times the perplexity of {owner}; {lacks}. {worth.capitalize()}."
    much = "no" if ratio <= 1 else "little" if ratio <= 1.05 else "some" if ratio <= 1.25 else "much"
    joint = "but" if (ratio > 1.05) == pays else "and"
    return f"{running} costs {much} quality: perplexity is {ratio:.2f} times {whose}; {joint} {worth}."
