"""`pregate report` on real checkpoints of every kind: its numbers, its page, its refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from pregate.cluster.cli import main
from pregate.convert.control_table import control_rows
from pregate.convert.conversion import convert
from pregate.convert.decouple import DecoupleOptions, decouple
from pregate.convert.dense import load_dense
from pregate.convert.evaluate import EvaluateOptions, evaluate
from pregate.convert.options import ConvertOptions
from pregate.convert.progress import QuietProgress
from pregate.convert.report.figures import Curve, Figures
from pregate.convert.report.measure import measure_quality, measure_routes
from pregate.convert.report.numbers import Numbers, ladders, with_numbers
from pregate.convert.report.page import render
from pregate.convert.report.run import ReportOptions, report
from pregate.convert.report.words import findings, headline
from pregate.convert.scoring import score_rows
from pregate.model import RoutedConfig, RoutedForCausalLM
from pregate.model.checkpoint import Manifest, read_manifest, write_manifest

ROWS = [[1, *range(3, 60)], [1, *range(200, 240)], [1, 7, 9, 400]]
HOSTILE = '<script>alert(1)</script>"><img src="http://evil.example/x.png" onerror="alert(2)">'


class Page(HTMLParser):
    """Tags, their attributes, and all text outside of them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _load(path: Path) -> RoutedForCausalLM:
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def predicted(tiny_path_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path checkpoint with its gates in force, so that its paths are a forecast."""
    folder = tmp_path_factory.mktemp("checkpoints") / "predicted"
    shutil.copytree(tiny_path_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"routing": "layerwise"}
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, read_manifest(folder))
    return folder


def _random_checkpoint(folder: Path, dense: Path, layer_cuts: list[dict[str, int]], **fields) -> Path:
    """Random weights and a fixed number of experts; cuts may differ, as no conversion here would make them."""
    text_config = json.loads((dense / "config.json").read_text()) | {"num_hidden_layers": len(layer_cuts)}
    model = RoutedForCausalLM(RoutedConfig(text_config=text_config, layer_cuts=layer_cuts, **fields))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for mlp in model.routed_mlps:
            mlp.neuron_index.copy_(torch.arange(len(mlp.neuron_index)))
            for name, parameter in mlp.named_parameters():
                if "scale" not in name:
                    torch.nn.init.normal_(parameter, std=0.15)
    model.manifest = Manifest(method="made for a test")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, folder / name)
    return folder


CUT = {"num_routed": 6, "num_shared": 2, "num_active": 2, "expert_width": 16}
DENSE_CUT = {"num_routed": 0, "num_shared": 8, "num_active": 0, "expert_width": 16}


@pytest.fixture(scope="module")
def uneven(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer between two of 6 and 3 routed experts, a fixed number of each active."""
    folder = tmp_path_factory.mktemp("checkpoints") / "uneven"
    other = {"num_routed": 3, "num_shared": 5, "num_active": 1, "expert_width": 16}
    return _random_checkpoint(folder, tiny_dense, [CUT, DENSE_CUT, other])


def _report(model: Path, text: Path, folder: Path, **more) -> tuple[Figures, str]:
    out = folder / "report.html"
    figures = report(ReportOptions(model, out, (text,), max_tokens=150, **more))
    return figures, out.read_text()


@pytest.fixture(scope="module")
def exact(
    tiny_path_checkpoint: Path, tiny_layerwise_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path_factory
) -> tuple[Figures, str]:
    compare = (tiny_layerwise_checkpoint, tiny_dense)
    return _report(tiny_path_checkpoint, tiny_text, tmp_path_factory.mktemp("report"), compare=compare)


@pytest.fixture(scope="module", params=["threshold", "top_k"])
def coded(
    request: pytest.FixtureRequest, tiny_dense: Path, tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path_factory
) -> Path:
    """A checkpoint whose path router has gate "dselect", with either selection."""
    folder, layerwise = tmp_path_factory.mktemp("coded"), tiny_layerwise_checkpoint
    if request.param == "top_k":
        layerwise = folder / "layerwise"
        options = ConvertOptions(
            tiny_dense, layerwise, 8, 2, 2, (tiny_text,), samples=2, sequence_length=64, selection="top_k"
        )
        convert(options)
    decouple(DecoupleOptions(layerwise, folder / "path", (tiny_text,), steps=5, dim=16, gate="dselect"))
    return folder / "path"


def _check_page(html: str) -> Page:
    page = Page(html)
    assert page.open == []  # every element is closed, in order
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "object", "use", "image"})
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in {"src", "srcset", "data"}]
        assert str(attributes.get("href", "#")).startswith("#")
    policy = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert policy[0].startswith("default-src 'none'")
    assert "url(" not in html
    ids = [a["id"] for _, a in page.tags if "id" in a]
    links = [a["href"][1:] for t, a in page.tags if t == "a"]
    assert ids == links
    return page


def test_the_page_stands_alone_and_says_its_conditions(exact: tuple[Figures, str], tiny_path_checkpoint: Path):
    figures, html = exact
    page = _check_page(html)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert headline(figures) in text
    assert all(f.subject in text for f in findings(figures))
    for words in (figures.conditions.command, figures.conditions.date, figures.conditions.hardware, "seed 0"):
        assert words in text
    assert str(tiny_path_checkpoint) in text
    assert sum(tag == "svg" for tag, _ in page.tags) >= 10
    assert "was made on this text" in text  # the tiny checkpoints are: the page must say so
    assert "no overlap: a swap moves whole experts" in text


def test_its_controls_are_those_of_evaluate(exact: tuple[Figures, str]):
    figures, html = exact
    names = [p.name for p in figures.quality.controls]
    assert names[:2] == ["dense parent", "static mask"]
    assert figures.quality.own == "path router"
    assert figures.quality.own in names
    for point in (*figures.quality.controls, *figures.quality.others):
        assert point.name in html.replace("&#x27;", "'")
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
    figures, _ = _report(tiny_path_checkpoint, more, tmp_path, seed=3)
    result = evaluate(EvaluateOptions(tiny_path_checkpoint, more, 150, seed=3))
    assert result["num_documents"] < 30
    assert figures.quality.own_point.perplexity == pytest.approx(result["perplexity"], abs=1e-3)


def test_its_dense_parent_is_that_of_evaluate(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    """Stored in a smaller type than its parent a checkpoint is not quite that with every expert on."""
    options = ConvertOptions(tiny_dense, tmp_path / "half", 8, 2, 2, (tiny_text,), dtype="bfloat16", samples=2)
    convert(replace(options, sequence_length=64))
    figures, _ = _report(tmp_path / "half", tiny_text, tmp_path)
    table = evaluate(EvaluateOptions(tmp_path / "half", tiny_text, 150, controls=True))["controls"]
    own, dense = figures.quality.own_point, figures.quality.point("dense parent")
    assert table["dense parent"]["perplexity"] == dense.perplexity
    assert table[own.name]["ratio_to_dense"] == own.ratio_to_dense
    itself = control_rows(_load(tmp_path / "half"), ROWS, 1)["dense parent"]["perplexity"]
    parent = control_rows(_load(tmp_path / "half"), ROWS, 1, load_dense(tiny_dense))["dense parent"]["perplexity"]
    assert itself != parent  # so it matters which of the two is called dense


def test_curves_go_from_no_routed_expert_to_the_dense_model(exact: tuple[Figures, str]):
    figures = exact[0]
    own, oracle = figures.quality.curves
    assert (own.name, oracle.name) == ("path router", "oracle")
    assert own.num_active == oracle.num_active == (0, 1, 2, 3, 4, 5, 6)
    for curve in (own, oracle):
        assert (curve.active_shares[0], curve.active_shares[-1]) == (0.25, 1.0)
        assert list(curve.active_shares) == sorted(curve.active_shares)
        assert curve.perplexities[-1] == pytest.approx(figures.quality.point("dense parent").perplexity, rel=1e-4)
    assert own.perplexities[2] == figures.quality.own_point.perplexity
    assert own.active_shares[3] == pytest.approx(5 / 8, abs=0.03)  # thresholds set on this very text


def test_with_every_expert_on_a_learned_scale_still_counts(tiny_dense: Path, tmp_path: Path):
    """The oracle weighs its experts by 1, so there it is the dense model; the gate weighs them by their scores."""
    model = _load(_random_checkpoint(tmp_path / "one", tiny_dense, [CUT], gate="representative"))
    plain_own, plain_oracle = [curve.perplexities for curve in _curves(model)]
    model.routed_mlps[0].paper_gate.scale.data.fill_(2.0)
    own, oracle = [curve.perplexities for curve in _curves(model)]
    assert plain_own[-1] == plain_oracle[-1] == oracle[-1]
    with with_numbers(model, ladders(model)[-1], {}):
        assert own[-1] == pytest.approx(score_rows(model, ROWS).perplexity, abs=1e-3)
    assert own[-1] != pytest.approx(oracle[-1], rel=1e-3)
    assert own[0] == oracle[0]


def test_nor_is_a_path_router_of_learned_weights_the_dense_model(
    tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path
):
    options = DecoupleOptions(tiny_layerwise_checkpoint, tmp_path / "path", (tiny_text,), steps=2, dim=16)
    decouple(replace(options, weights="learned"))
    model = _load(tmp_path / "path")
    model.path_router.scale.data.fill_(2.0)
    model.forget_path_computer()
    own, oracle = [curve.perplexities for curve in _curves(model)]
    assert own[-1] != pytest.approx(oracle[-1], rel=1e-3)
    assert own[0] == oracle[0]


def _curves(model: RoutedForCausalLM) -> tuple[Curve, ...]:
    return measure_quality(model, ROWS, 1, None, 0, QuietProgress()).curves


def test_a_router_made_for_one_number_of_experts_has_no_curve(
    coded: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out.html"
    words = ["--model", str(coded), "--text", str(tiny_text), "--out", str(out), "--max-tokens", "60", "--json"]
    assert main(["report", *words]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    (oracle,) = quality["curves"]
    assert (quality["own"], oracle["name"]) == ("path router", "oracle")
    assert (oracle["active_shares"][0], oracle["active_shares"][-1]) == (0.25, 1.0)
    by_name = {point["name"]: point["perplexity"] for point in quality["controls"]}
    assert oracle["perplexities"][-1] == pytest.approx(by_name["dense parent"], rel=1e-4)
    assert oracle["perplexities"][oracle["num_active"].index(2)] == by_name["oracle"]
    text = _check_page(out.read_text()).text
    assert "No line for the checkpoint's own router: one with --gate dselect is made for the number" in text


def test_a_router_that_takes_any_number_has_a_curve_and_no_excuse(exact: tuple[Figures, str]):
    assert "No line for" not in exact[1]


def test_agreement_by_layer_adds_up_to_the_whole(exact: tuple[Figures, str]):
    figures = exact[0]
    by_layer = [a.mean_overlap for a in figures.agreements if (a.first, a.second) == ("path", "oracle")]
    assert len(by_layer) == 3
    own = figures.quality.own_point.mean_overlap
    assert sum(by_layer) / 3 == pytest.approx(own, abs=2e-4)


def test_routes_are_the_paths_of_the_tokens(tiny_path_checkpoint: Path):
    model = _load(tiny_path_checkpoint)
    routes = measure_routes(model, ROWS, QuietProgress())
    assert routes.starts.nonzero()[0].tolist() == [0, 58, 99]  # longest first
    paths = [path.ids for path in model.path_computer.extend([model.path_computer.new_state()] * 3, ROWS)[0]]
    for layer, visits in routes.visits.items():
        expected = [{e for e in row if e >= 0} for ids in paths for row in ids[:, layer].tolist()]
        assert [set(row.nonzero()[0].tolist()) for row in visits] == expected
    assert list(routes.visits) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["tiny_layerwise_checkpoint", "tiny_path_checkpoint", "uneven"])
def test_numbers_are_undone(kind: str, request: pytest.FixtureRequest):
    model = _load(request.getfixturevalue(kind))
    before = score_rows(model, ROWS).nats
    limits = {mlp.layer: 0.0 for mlp in model.routed_mlps if mlp.cut.num_routed}
    for numbers in (ladders(model)[0], ladders(model)[-1]):
        with with_numbers(model, numbers, limits):
            assert score_rows(model, ROWS).nats != before
        with pytest.raises(ZeroDivisionError), with_numbers(model, numbers, limits):
            _ = 1 / 0
        assert score_rows(model, ROWS).nats == before
    assert Numbers.of(model) in ladders(model)


def test_layers_that_differ_go_part_of_the_way(uneven: Path):
    steps = [n.by_layer for n in ladders(_load(uneven))]
    assert steps[0] == (0, 0, 0)
    assert steps[-1] == (6, 0, 3)
    assert (2, 0, 1) in steps


def test_a_layerwise_checkpoint(tiny_layerwise_checkpoint: Path, tiny_text: Path, tmp_path: Path):
    figures, html = _report(tiny_layerwise_checkpoint, tiny_text, tmp_path)
    _check_page(html)
    assert figures.quality.own == "linear gate"
    assert {(a.first, a.second) for a in figures.agreements} == {("gate", "oracle")}
    assert "Not known up front" in html
    expected = control_rows(_load(tiny_layerwise_checkpoint), ROWS, 1)
    assert [p.name for p in figures.quality.controls] == list(expected)


def test_a_forecast(predicted: Path, tiny_text: Path, tmp_path: Path):
    figures, html = _report(predicted, tiny_text, tmp_path)
    _check_page(html)
    assert figures.model.forecast
    assert figures.quality.own == "linear gate"
    assert len({(a.first, a.second) for a in figures.agreements}) == 3
    assert [f.subject for f in findings(figures) if "up front" in f.subject or f.subject == "Forecast"] == ["Forecast"]


def test_a_fixed_number_and_a_dense_layer_between(uneven: Path, tiny_text: Path, tmp_path: Path):
    figures, html = _report(uneven, tiny_text, tmp_path)
    assert "1 of them dense" in _check_page(html).text
    assert [load.layer for load in figures.loads] == [0, 2]
    assert [load.num_active for load in figures.loads] == pytest.approx([2, 1])
    assert [(f.first, f.second, len(f.probabilities), len(f.base)) for f in figures.flows] == [(0, 2, 6, 3)]
    assert figures.conditions.dense == ""
    assert "with every expert on" in html


def test_one_layer_has_no_flow(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    figures, html = _report(_random_checkpoint(tmp_path / "one", tiny_dense, [CUT]), tiny_text, tmp_path)
    assert figures.flows == ()
    assert "nothing flows between layers" in _check_page(html).text


def test_hostile_names_are_text(exact: tuple[Figures, str]):
    figures = exact[0]
    model = replace(figures.model, name=HOSTILE, path=HOSTILE, family=HOSTILE, method=HOSTILE, cut=HOSTILE)
    other = replace(figures.quality.others[0], name=HOSTILE)
    conditions = replace(figures.conditions, text=(HOSTILE,), command=HOSTILE, dense=HOSTILE, hardware=HOSTILE)
    hostile = replace(
        figures,
        model=model,
        quality=replace(figures.quality, others=(other,)),
        conditions=replace(conditions, versions={HOSTILE: HOSTILE}, seen_text=(HOSTILE,)),
        manifest={HOSTILE: [HOSTILE]},
    )
    page = _check_page(render(hostile))
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
    _check_page(html)
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
        ({"--max-tokens": "few"}, "--max-tokens few: allowed: 1 or more, or all"),
        ({"--seed": "-1"}, "--seed -1: allowed: 0 or more"),
        ({"--text": "nowhere.txt"}, "--text nowhere.txt: no such path"),
        ({"--out": "nowhere/report.html"}, "--out nowhere/report.html: its parent folder does not exist"),
        ({"--out": "{text}"}, "exists already; allowed: a file that does not exist yet"),
        ({"--model": "{dense}"}, "is a dense model; allowed: a routed checkpoint"),
        ({"--parent": "{path}"}, "--parent {path}: is a routed checkpoint; allowed: the dense model it was made from"),
        ({"--compare": "nowhere"}, "--compare nowhere: no such path"),
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
    folder = _random_checkpoint(tmp_path / "none", tiny_dense, [CUT | {"num_active": 0}])
    words = ["--model", str(folder), "--text", str(tiny_text), "--out", str(tmp_path / "r.html")]
    assert main(["report", *words]) == 2
    assert "has no layer with an active routed expert" in capsys.readouterr().err
