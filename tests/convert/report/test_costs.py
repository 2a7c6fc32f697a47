"""Operations and bytes of a token, against numbers counted by hand for the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

from pregate.convert.report.costs import Cost, costs
from pregate.convert.report.figures import Figures
from tests.convert.report.pages import findings, load, text_of

#: Weights of three layers: q and o of 64 x 64, k and v of 64 x 32, two norms; and the last norm.
ATTENTION = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 2 * 64) + 64
HEAD = 512 * 64
FFN = 3 * 3 * 64 * 128


def test_a_layerwise_model_by_hand(tiny_layerwise_checkpoint: Path):
    found = costs(load(tiny_layerwise_checkpoint), 0.5, 2)
    gates = 3 * 64 * 6
    assert found.parts == (
        Cost("attention, norms", 2 * ATTENTION, 2 * ATTENTION, 2 * ATTENTION, 2 * ATTENTION),
        Cost("output head", 2 * HEAD, 2 * HEAD, 2 * HEAD, 2 * HEAD),
        Cost("FFN", 2 * FFN, FFN, 2 * FFN, FFN),
        Cost("gates", 0, 2 * gates, 0, 4 * gates),
        Cost(
            "all",
            2 * (ATTENTION + HEAD + FFN),
            2 * (ATTENTION + HEAD + gates) + FFN,
            2 * (ATTENTION + HEAD + FFN),
            2 * (ATTENTION + HEAD) + FFN + 4 * gates,
        ),
    )
    assert found.router_share == 0
    assert (
        found.flops_per_earlier == 3 * 2 * 2 * 4 * 16
    )  # layers, scores and values, a multiply and an add, heads, width
    assert found.bytes_per_earlier == 3 * 2 * 2 * 16 * 2  # layers, keys and values, their heads, width, bytes


def test_a_path_router_by_hand_and_as_decouple_warned(exact: tuple[Figures, str], tiny_path_checkpoint: Path):
    figures, html = exact
    *_, router, total = figures.costs.parts
    dim, window, outputs = 32, 64, 3 * 6
    assert router.name == "path router"
    assert router.routed_flops == 24 * dim**2 + 4 * window * dim + 2 * dim * outputs
    weights = 12 * dim**2 + 3 * dim + 4 * window  # the block's, three norms', its bias by distance
    assert router.routed_bytes == 4 * (weights + dim * outputs + outputs)
    ffn = figures.costs.parts[2]
    assert ffn.routed_flops == round(2 * FFN * figures.quality.own_point.active_share)
    assert total.routed_flops == 2 * (ATTENTION + HEAD) + ffn.routed_flops + router.routed_flops
    said = json.loads((tiny_path_checkpoint / "manifest.json").read_text())["figures"]["decouple"]
    assert round(figures.costs.router_share, 5) == said["router_flops_share"] > 0.01
    mark, sentence = findings(html)["Operations"]
    assert mark == "mixed"
    share = f"{100 * figures.costs.router_share:.1f} %"
    assert f"The path router costs {share} of the dense model's operations, more than 1 %" in sentence
    assert f"takes {100 * total.routed_flops / total.dense_flops:.1f} % of the dense model's operations" in sentence


def test_the_page_shows_every_part(exact: tuple[Figures, str]):
    figures, html = exact
    for part in figures.costs.parts:
        numbers = (part.dense_flops, part.routed_flops, part.dense_bytes, part.routed_bytes)
        assert part.name + "".join(f"{number:,}" for number in numbers) in text_of(html)
