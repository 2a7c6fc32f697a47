"""The page of a report: first the verdict in one screen, then a section for each kind of figure. One file, no script,
nothing loaded from anywhere; the policy in its head forbids it."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

from pregate.convert.measure.control_table import STATIC
from pregate.convert.report.figures import Figures
from pregate.convert.report.section_paths import flow_section, load_section
from pregate.convert.report.section_quality import quality_section
from pregate.convert.report.section_routers import agreement_section
from pregate.convert.report.section_tokens import repeats_section
from pregate.convert.report.section_training import training_section
from pregate.convert.report.words import Finding, count, findings, headline, number, percent, router_share, size

STYLE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TIMES = "\N{MULTIPLICATION SIGN}"
SIGNS = {"good": "✓ good", "mixed": "! caution", "poor": "✗ poor", "note": "• note"}
SECTIONS = (
    ("quality", "Quality against active share", quality_section),
    ("load", "Which experts are used", load_section),
    ("flow", "How paths flow between layers", flow_section),
    ("agreement", "Path, gate and oracle by layer", agreement_section),
    ("repeats", "Does a token keep its predecessor's path?", repeats_section),
    ("training", "Training", training_section),
)
WORDS = (
    ("expert", "a part of a layer's FFN. Shared experts run for every token; of the routed ones each token gets some."),
    ("path", "for one token: the routed experts it visits in every layer."),
    ("path router", "a small network that gives every token's path from token ids, before the model runs."),
    (
        "gate",
        "what chooses experts inside a layer while the model runs. Linear gate: ours, fitted to what experts "
        "contribute. Paper's gate: CMoE's, one neuron speaks for each expert.",
    ),
    (
        "oracle",
        "chooses the experts that contribute most, which needs all of them computed: a bound, not a method. A model "
        "tuned to its own router may do better by that.",
    ),
    (
        "static mask",
        "as many neurons, always the same ones, those that contribute most on average: what pruning gives.",
    ),
    ("random routing", "as many experts for each token, at random: what a router must beat."),
    ("active share", "neurons of all FFNs that run, as a share of all; measured, mean over tokens and layers."),
    ("perplexity", "exp of the mean negative log likelihood of a token; lower is better."),
)


def render(figures: Figures) -> str:
    """The whole page as HTML text."""
    name, style = escape(figures.model.name), STYLE.read_text(encoding="utf-8")
    links = "".join(f"<a href='#{key}'>{title}</a>" for key, title, _ in SECTIONS)
    body = "".join(f"<section id='{key}'><h2>{title}</h2>{draw(figures)}</section>" for key, title, draw in SECTIONS)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='referrer' content='no-referrer'>"
        f"<title>{name}: pregate report</title><style>{style}</style></head><body><main>"
        f"{_unbroken(_head(figures))}<nav>{links}<a href='#made'>How it was made</a></nav>"
        f"{_unbroken(body)}"
        f"<section id='made'><h2>How it was made and measured</h2>{_made(figures)}</section></main></body></html>\n"
    )


def _unbroken(markup: str) -> str:
    """No line ends between a number and its unit."""
    return re.sub(r"(\d) (?=%|[KMG]?B\b)", "\\1\N{NO-BREAK SPACE}", markup)


def _head(figures: Figures) -> str:
    model = figures.model
    routing = {
        "path": "paths known before the model runs",
        "layerwise": "a gate in each layer decides as the model runs",
    }[model.routing]
    if model.forecast:
        routing += ", with a forecast of the paths"
    dense = model.num_layers - model.num_routed_layers
    layers = f"{model.num_layers} layers" + (f", {dense} of them dense" if dense else "")
    about = (
        f"{escape(model.family)}, {count(model.num_parameters)} parameters, {layers}; {escape(model.cut)}; {routing}"
    )
    items = "".join(_finding(f) for f in findings(figures))
    return (
        f"<h1>{escape(model.name)}</h1><p class='soft'>{about}.</p><p class='verdict'>{escape(headline(figures))}</p>"
        f"<dl class='tiles'>{_tiles(figures)}</dl><ul class='findings'>{items}</ul>"
    )


def _finding(finding: Finding) -> str:
    sentence = _code(finding.sentence)
    return (
        f"<li class='{finding.mark}'><span class='mark'>{SIGNS[finding.mark]}</span>"
        f"<span class='subject'>{escape(finding.subject)}</span><span class='sentence'>{sentence}</span></li>"
    )


def _code(sentence: str) -> str:
    """Escaped, with what stands between backticks as code."""
    parts = escape(sentence).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _tiles(figures: Figures) -> str:
    own, static, model = figures.quality.own_point, figures.quality.point(STATIC), figures.model
    assert static is not None
    share, gain = router_share(figures), own.perplexity / static.perplexity - 1
    tiles = [
        ("Perplexity", f"{own.ratio_to_dense:.2f} {TIMES} dense", f"{number(own.perplexity)}; lower is better"),
        ("FFN that runs", percent(own.active_share), f"made for {percent(model.nominal_share)}"),
        (
            "Against static mask",
            f"{100 * gain:+.0f} %".replace("-", "\N{MINUS SIGN}"),
            "perplexity; below 0 routing pays",
        ),
        ("Router", "n/a" if share is None else percent(share, 0), "of the way from random to oracle"),
        ("Whole path kept", percent(figures.repeats.same_path), "from one token to the next"),
        (
            "Busiest expert",
            f"{max(x.max_over_mean for x in figures.loads):.2f} {TIMES} mean",
            "of its layer; 1 is even",
        ),
        ("On disk", size(model.num_bytes), f"weights in {model.dtype}"),
        ("Units", f"{model.num_units:,} {TIMES} {size(model.expert_bytes)}", "routed experts of all layers"),
    ]
    return "".join(
        f"<div class='tile'><dt>{escape(title)}</dt><dd class='big'>{escape(big)}</dd>"
        f"<dd class='small'>{escape(small)}</dd></div>"
        for title, big, small in tiles
    )


def _made(figures: Figures) -> str:
    model, c = figures.model, figures.conditions
    versions = ", ".join(f"{name} {number_}" for name, number_ in c.versions.items())
    facts = [
        ("checkpoint", f"{model.path} (manifest sha256 {c.fingerprint}…)"),
        ("method", model.method),
        (
            "selection of experts",
            "as many as score above a threshold" if model.selection == "threshold" else "a fixed number",
        ),
        ("text", ", ".join(c.text)),
        ("dense parent", c.dense or "not found; this checkpoint with every expert on stands for it"),
        ("date, duration", f"{c.date}, {c.seconds:.0f} s (loading included)"),
        ("versions", versions),
        ("hardware", c.hardware),
        ("arithmetic", "float32, whatever the weights are stored in"),
    ]
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    words = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in WORDS)
    options = escape(json.dumps(figures.manifest, indent=1, sort_keys=True))
    return (
        f"<dl class='facts'>{rows}</dl><h3>The command of this report</h3><pre>{escape(c.command)}</pre>"
        f"<details open><summary>Words</summary><dl class='facts'>{words}</dl></details>"
        f"<details><summary>Options the checkpoint was made with</summary><pre>{options}</pre></details>"
    )
