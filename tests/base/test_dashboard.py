"""Dashboard and alarms name metrics of the list, each as what it is; the shipped dashboard is what the list gives."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pregate.base.dashboard import dashboard, stems
from pregate.base.metrics import BY_STEM

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_the_shipped_dashboard_is_what_the_list_gives():
    made = "python -m pregate.base.dashboard deploy/grafana/pregate.json"
    assert json.loads((DEPLOY / "grafana" / "pregate.json").read_text()) == dashboard(), f"run {made}"


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_names_metrics_of_the_list(expression):
    found = stems(expression)  # KeyError for any other
    assert found or expression.startswith("up{")
    counted = re.findall(r"rate\((?:\$\{prefix\})?pregate_(\w+?)(?:_bucket)?[{\[]", expression)
    for stem in found:
        assert (BY_STEM[stem].kind != "gauge") == (stem in counted), f"{stem}: counters are asked for their rate"
    for label in re.findall(r"by \(([\w, ]+)\)", expression):
        known = {"model_name", "le"} | {name for stem in found for name in BY_STEM[stem].labels}
        assert set(label.split(", ")) <= known


def test_every_metric_is_on_the_dashboard():
    shown = {stem for panel in PANELS for target in panel["targets"] for stem in stems(target["expr"])}
    assert shown == set(BY_STEM)


def test_panels_do_not_overlap():
    taken = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_alarms_say_what_to_do():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert len(rule["annotations"]["description"]) > 40
