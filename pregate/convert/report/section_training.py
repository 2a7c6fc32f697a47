"""The section on training: its curves, and what they were trained on and by."""

from __future__ import annotations

from html import escape

from pregate.convert.report.figures import Figures, TrainingCurve
from pregate.convert.report.svg import Point, Series, both, chart, linear_axis
from pregate.convert.report.tuning import Asked, Tuning
from pregate.convert.report.words import number

CURVE_NAMES = {
    "loss": "Loss",
    "cross_entropy": "Cross entropy, nats per token",
    "kl": "Divergence from the teacher, nats per token",
    "validation_perplexity": "Perplexity on held-back text",
    "active_share": "Share of the FFN that runs",
    "learning_rate": "Learning rate",
}


def training_section(figures: Figures) -> str:
    """Curves of a training, where the checkpoint keeps them."""
    parts = [_curve(curve) for curve in figures.training]
    if not parts:
        parts.append(
            "<p>No training curve: the folder has no <code>training.jsonl</code>, which <code>pregate tune</code> "
            "writes beside the weights it trained.</p>"
        )
    else:
        parts.append(f"<p class='conditions'>{escape(_conditions(figures.tuning))}</p>")
    losses = figures.router_losses
    if {"loss_first", "loss_last"} <= losses.keys():
        words = f"{number(losses['loss_first'])} at the first step, {number(losses['loss_last'])} over the last 5 %"
        parts.append(f"<p>Path router, training loss: {words} (from the manifest; on the text it was trained on).</p>")
    return "".join(parts)


def _conditions(tuning: Tuning | None) -> str:
    """On what and how it was tuned."""
    if tuning is None:
        return "The manifest does not say, or not in full, what this was trained on and how."
    return f"{_on_what(tuning)}: {_trained(tuning.asked)}. {_loss(tuning.asked)} {_held_back(tuning)}"


def _on_what(tuning: Tuning) -> str:
    """Length, text, seed and arithmetic."""
    asked, outcome = tuning.asked, tuning.outcome
    return (
        f"Tuned for {outcome.steps:,} steps on {outcome.tokens:,} tokens of {', '.join(asked.text)} "
        f"({tuning.text.num_tokens:,} tokens in rows of at most {asked.sequence_length:,}), seed {asked.seed}, "
        f"in {outcome.precision} on {outcome.device}"
    )


def _trained(asked: Asked) -> str:
    """Which weights, and at what rates."""
    full = asked.method == "full"
    rest = "attention, norms, embeddings and head" if full else "attention"
    parts = f"FFNs, {rest}" if asked.backbone else "FFNs"
    how = "all weights" if full else f"low-rank changes of rank {asked.rank}"
    router = "the router's scores as they were"
    if asked.router:
        router = f"router, rate up to {asked.router_learning_rate:g}"
    return f"{parts} ({how}, rate up to {asked.learning_rate:g}); {router}"


def _loss(asked: Asked) -> str:
    """Its terms, and who taught."""
    taught = asked.kl_share > 0 or asked.hidden_match > 0
    weights = {
        "cross entropy": 1 - asked.kl_share,
        "divergence from the teacher": asked.kl_share,
        "error of the layers' outputs beside the teacher's": asked.hidden_match,
        "error of the router's scores, where they forecast contributions": asked.router_mass * asked.router,
        "Switch's balancing loss": asked.balance_loss * (asked.balance == "loss"),
    }
    terms = " + ".join(f"{weight:g} times {name}" for name, weight in weights.items() if weight)
    teacher = asked.teacher or "itself before it was tuned, with every expert on"
    return f"Loss: {terms}.{f' Teacher: {teacher}.' if taught else ''}"


def _held_back(tuning: Tuning) -> str:
    """What perplexity and active share along the training were measured on."""
    asked, text, outcome = tuning.asked, tuning.text, tuning.outcome
    where = f"of {', '.join(asked.validation)}" if asked.validation else "kept back from that text"
    refit = " (step 0 twice: before and after the fit in closed form)" if outcome.refit is not None else ""
    return (
        f"Held-back text: {text.num_validation_tokens:,} tokens of {text.num_validation_rows:,} documents {where}, "
        f"measured in float32 every {asked.eval_every:,} steps and at the end{refit}; the weights are those of step "
        f"{outcome.best_step:,}, the best of these."
    )


def _curve(curve: TrainingCurve) -> str:
    title = escape(CURVE_NAMES.get(curve.name, curve.name))
    return f"<h3>{title}</h3><figure>{both(lambda width: _curve_chart(curve, width))}</figure>"


def _curve_chart(curve: TrainingCurve, width: int) -> str:
    x = linear_axis("step", min(curve.steps), max(curve.steps), lambda v: f"{v:,.0f}")
    y = linear_axis("", min(curve.values), max(curve.values), lambda v: f"{v:g}", 4)
    last, points = len(curve.steps) - 1, []
    for index, (step, value) in enumerate(zip(curve.steps, curve.values, strict=True)):
        note = f"step {step:,.0f}: {number(value)}"
        points.append(Point(step, value, note, number(value) if index == last else ""))
    series = Series("c0", tuple(points), "solid", marks=len(points) < 40)
    return chart(curve.name, [series], x, y, width, 190)
