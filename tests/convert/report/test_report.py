"""`pregate report` on real checkpoints of every kind: its numbers, its page, its refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pregate.cli.main import main
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.dense import load_dense
from pregate.convert.measure.control_table import control_rows
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.progress import QUIET
from pregate.convert.report.figures import Figures
from pregate.convert.report.measure import measure_routes
from pregate.convert.report.page import render
from pregate.convert.report.words import headline, number, percent
from pregate.model.checkpoint import read_manifest, write_manifest
from pregate.model.folder import read_folder
from tests.convert.report.pages import CUT, ROWS, check_page, findings, load, make_report, random_checkpoint, text_of

HOSTILE = '<script>alert(1)</script>"><img src="http://evil.example/x.png" onerror="alert(2)">'


@pytest.fixture(scope="module")
def predicted(tiny_path_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path checkpoint with its gates routing, so that its paths are a forecast."""
    folder = tmp_path_factory.mktemp("checkpoints") / "predicted"
    shutil.copytree(tiny_path_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"routing": "layerwise"}
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, read_manifest(folder))
    return folder


def test_the_page_stands_alone_and_says_its_conditions(exact: tuple[Figures, str], tiny_path_checkpoint: Path):
    figures, html = exact
    page = check_page(html)
    text = text_of(html)
    assert headline(figures) in text
    assert list(findings(html))[:4] == ["Quality", "Operations", "Routing or pruning", "Router"]
    for words in (figures.conditions["command"], figures.conditions["date"], figures.conditions["hardware"], "seed 0"):
        assert words in text
    assert str(tiny_path_checkpoint) in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "was made on this text" in text  # the tiny checkpoints are: the page must say so
    assert "no overlap: a swap moves whole experts" in text


def test_its_controls_are_those_of_evaluate(exact: tuple[Figures, str]):
    figures, html = exact
    names = [p.name for p in figures.quality.controls]
    assert names[:2] == ["dense parent", "static mask"]
    assert figures.quality.own == "path router"
    assert figures.quality.own in names
    for point in (*figures.quality.controls, *figures.quality.others):
        assert f"{number(point.perplexity)}{point.ratio_to_dense:.3f}{percent(point.active_share)}" in text_of(html)
        assert point.name in text_of(html)
    layerwise, dense = figures.quality.others
    gate = figures.quality.point("linear gate")
    assert (layerwise.perplexity, layerwise.active_share) == (gate.perplexity, gate.active_share)
    assert dense.perplexity == pytest.approx(figures.quality.point("dense parent").perplexity, rel=1e-4)
    assert dense.active_share == 1.0


def test_it_measures_on_what_evaluate_scores(tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    """Of more text than is wanted both take the same documents."""
    more = tmp_path / "more.jsonl"
    words = tiny_text.read_text(encoding="utf-8").split()
    lines = (json.dumps({"text": " ".join(words[i : i + 15])}) + "\n" for i in range(0, 150, 5))
    more.write_text("".join(lines), encoding="utf-8")
    figures, _ = make_report(tiny_path_checkpoint, more, tmp_path, seed=3)
    result = evaluate(EvaluateOptions(tiny_path_checkpoint, (more,), 150, seed=3))
    assert result["num_documents"] < 30
    assert figures.quality.own_point.perplexity == pytest.approx(result["perplexity"], abs=1e-3)


def test_its_dense_parent_is_that_of_evaluate(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """Stored in a smaller type than its parent a checkpoint is not quite that with every expert on."""
    options = ConvertOptions(tiny_dense, tmp_path / "half", 8, 2, 2, (tiny_text,), dtype="bfloat16", samples=2)
    convert(replace(options, sequence_length=64))
    figures, _ = make_report(tmp_path / "half", tiny_text, tmp_path)
    table = evaluate(EvaluateOptions(tmp_path / "half", (tiny_text,), 150, controls=True))["controls"]
    own, dense = figures.quality.own_point, figures.quality.point("dense parent")
    assert table["dense parent"]["perplexity"] == dense.perplexity
    assert table[own.name]["ratio_to_dense"] == own.ratio_to_dense
    itself = control_rows(load(tmp_path / "half"), ROWS, 1)["dense parent"]["perplexity"]
    whole = load_dense(read_folder(tiny_dense))
    parent = control_rows(load(tmp_path / "half"), ROWS, 1, whole)["dense parent"]["perplexity"]
    assert itself != parent  # so it matters which of the two is called dense


def test_agreement_by_layer_adds_up_to_the_whole(exact: tuple[Figures, str]):
    figures = exact[0]
    by_layer = [a.mean_overlap for a in figures.agreements if (a.first, a.second) == ("path", "oracle")]
    assert len(by_layer) == 3
    own = figures.quality.own_point.mean_overlap
    assert sum(by_layer) / 3 == pytest.approx(own, abs=2e-4)


def test_routes_are_the_paths_of_the_tokens(tiny_path_checkpoint: Path):
    model = load(tiny_path_checkpoint)
    routes = measure_routes(model, ROWS, QUIET)
    assert routes.starts.nonzero()[0].tolist() == [0, 58, 99]  # longest first
    paths = [path.ids for path in model.path_computer.extend([model.path_computer.new_state()] * 3, ROWS)[0]]
    for layer, visits in routes.visits.items():
        expected = [{e for e in row if e >= 0} for ids in paths for row in ids[:, layer].tolist()]
        assert [set(row.nonzero()[0].tolist()) for row in visits] == expected
    assert list(routes.visits) == [0, 1, 2]


def test_a_layerwise_checkpoint(tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    figures, html = make_report(tiny_layerwise_checkpoint, tiny_text, tmp_path)
    check_page(html)
    assert figures.quality.own == "linear gate"
    assert {(a.first, a.second) for a in figures.agreements} == {("gate", "oracle")}
    assert "Not known up front" in html
    expected = control_rows(load(tiny_layerwise_checkpoint), ROWS, 1)
    assert [p.name for p in figures.quality.controls] == list(expected)


def test_a_forecast(predicted: Path, tiny_text: Path, tmp_path: Path):
    figures, html = make_report(predicted, tiny_text, tmp_path)
    check_page(html)
    assert figures.model["forecast"]
    assert figures.quality.own == "linear gate"
    assert len({(a.first, a.second) for a in figures.agreements}) == 3
    assert [subject for subject in findings(html) if "up front" in subject or subject == "Forecast"] == ["Forecast"]


def test_a_fixed_number_and_a_dense_layer_between(uneven: Path, tiny_text: Path, tmp_path: Path):
    figures, html = make_report(uneven, tiny_text, tmp_path)
    assert "1 of them dense" in check_page(html).text
    assert [load.layer for load in figures.loads] == [0, 2]
    assert [load.num_active for load in figures.loads] == pytest.approx([2, 1])
    assert [(f.first, f.second, len(f.probabilities), len(f.base)) for f in figures.flows] == [(0, 2, 6, 3)]
    assert figures.conditions["dense"] == ""
    assert "with every expert on" in html


def test_one_layer_has_no_flow(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    figures, html = make_report(random_checkpoint(tmp_path / "one", tiny_dense, [CUT]), tiny_text, tmp_path)
    assert figures.flows == ()
    assert "nothing flows between layers" in check_page(html).text


def test_hostile_names_are_text(exact: tuple[Figures, str]):
    figures = exact[0]
    model = figures.model | dict.fromkeys(("name", "path", "family", "method", "cut"), HOSTILE)
    other = replace(figures.quality.others[0], name=HOSTILE)
    conditions = figures.conditions | {"text": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "seen_text": [HOSTILE]}
    conditions |= dict.fromkeys(("command", "dense", "hardware"), HOSTILE)
    hostile = replace(
        figures,
        model=model,
        quality=replace(figures.quality, others=(other,)),
        conditions=conditions,
        manifest={HOSTILE: [HOSTILE]},
    )
    page = check_page(render(hostile))
    assert page.text.count("<script>alert(1)</script>") >= 8


def test_a_large_model_stays_below_a_megabyte(exact: tuple[Figures, str]):
    figures = exact[0]
    shares = tuple(0.01 + 0.001 * (i % 37) for i in range(64))
    loads = tuple(replace(figures.loads[0], layer=layer, shares=shares) for layer in range(32))
    matrix = tuple(tuple((1 + (i * 7 + j * 3) % 11) / 64 for j in range(64)) for i in range(64))
    flows = tuple(
        replace(figures.flows[0], first=n, second=n + 1, probabilities=matrix, base=(1 / 64,) * 64) for n in range(31)
    )
    agreements = tuple(replace(a, layer=layer) for layer in range(32) for a in figures.agreements[:3])
    layers = tuple(replace(figures.repeats.layers[0], layer=layer) for layer in range(32))
    large = replace(figures, loads=loads, flows=flows, agreements=agreements)
    html = render(replace(large, repeats=replace(figures.repeats, layers=layers)))
    check_page(html)
    assert 100_000 < len(html.encode()) < 1_000_000


def test_the_command_line(tiny_path_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path: Path, capsys):
    out = tmp_path / "out.html"
    command = ["report", "--model", str(tiny_path_checkpoint), "--text", str(tiny_text), "--max-tokens", "60", "--json"]
    assert main([*command, "--out", str(out), "--parent", str(tiny_dense)]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["conditions"]["num_tokens"] == 60
    assert numbers["model"]["name"] == tiny_path_checkpoint.name
    assert out.read_text().startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--max-tokens": "0"}, "--max-tokens 0: allowed: 1 or more, or all"),
        ({"--max-tokens": "few"}, "--max-tokens few: allowed: a whole number, 1 or more, or all"),
        ({"--seed": "-1"}, "--seed -1: allowed: 0 or more"),
        ({"--text": "nowhere.txt"}, "--text nowhere.txt: no such path"),
        ({"--out": "nowhere/report.html"}, "--out nowhere/report.html: its parent folder does not exist"),
        ({"--out": "{text}"}, "exists already; allowed: a file that does not exist yet"),
        ({"--model": "{dense}"}, "is a dense model; convert it first"),
        ({"--parent": "{path}"}, "--parent {path}: is a routed checkpoint; allowed: the dense model it was made from"),
        ({"--compare": "nowhere"}, "--compare nowhere: no such path"),
        ({"--tuned-parent": "{dense}"}, "--tuned-parent {dense}: --model {path} was not tuned"),
        ({"--compare": "{retoken}"}, "--compare {retoken}: reads the text as other tokens"),
    ],
)
def test_refusals(
    options: dict[str, str],
    message: str,
    tiny_path_checkpoint: Path,
    tiny_dense: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys,
):
    retoken = tmp_path / "retoken"
    shutil.copytree(tiny_dense, retoken)
    fields = json.loads((retoken / "tokenizer.json").read_text())
    fields["model"]["merges"] = []  # every byte a token
    (retoken / "tokenizer.json").write_text(json.dumps(fields))
    places = {"dense": tiny_dense, "path": tiny_path_checkpoint, "text": tiny_text, "retoken": retoken}
    given = {"--model": "{path}", "--text": "{text}", "--out": str(tmp_path / "r.html"), "--max-tokens": "60"} | options
    words = [word.format(**places) for pair in given.items() for word in pair]
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_a_checkpoint_that_routes_nothing(tiny_dense: Path, tiny_text: Path, tmp_path: Path, capsys):
    folder = random_checkpoint(tmp_path / "none", tiny_dense, [CUT | {"num_active": 0}])
    words = ["--model", str(folder), "--text", str(tiny_text), "--out", str(tmp_path / "r.html")]
    assert main(["report", *words]) == 2
    assert "has no layer with an active routed expert" in capsys.readouterr().err
