"""A server of the shipped checkpoint exports what dashboard and alarms ask for, with the labels they ask by."""

import json
import re
from contextlib import ExitStack, aclosing
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from pregate.base.errors import PregateError
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService, ServiceOptions
from pregate.router.link.client import EngineClient
from pregate.router.link.messages import SamplingParams
from tests.router.running import engine_thread, socket_folder
from tests.router.serving import engine_in_process

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "examples" / "quartet-paths"


async def _use(service):
    """A text, one that is left, one that is refused, one that fails, and a route."""
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    await service.complete("It was a cold evening", sampling)
    await service.route("It was a cold evening")
    async with aclosing(service.generate("It was", SamplingParams(max_tokens=200, ignore_eos=True))) as stream:
        await anext(stream)
    for wrong in (SamplingParams(max_tokens=4, n=9), SamplingParams(max_tokens=0)):
        with pytest.raises(PregateError):
            await service.complete("It was", wrong)


@pytest.fixture(scope="module")
def exported():
    """Names of the series that a server of the shipped checkpoint exports, each with its labels."""
    with ExitStack() as stack:
        engine = stack.enter_context(engine_in_process(SHIPPED, 2))
        endpoint = f"ipc://{stack.enter_context(socket_folder())}/engine.sock"
        stack.enter_context(engine_thread(engine, endpoint))
        service = DoorService(EngineClient(endpoint), SHIPPED, "quartet", options=ServiceOptions(max_requests=8))
        with TestClient(build_app(service)) as http:
            assert http.portal is not None
            http.portal.call(_use, service)
            text = http.get("/metrics").text
            http.portal.call(service.close)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def _expressions():
    board = json.loads((ROOT / "deploy" / "grafana" / "pregate.json").read_text())
    alerts = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return found + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def test_every_expression_asks_for_what_a_running_server_exports(exported):
    expressions = _expressions()
    assert len(expressions) > 50
    for expression in expressions:
        names = re.findall(r"pregate_\w+", expression)
        assert names or expression.startswith("up{")
        for name in names:
            assert name in exported, f"{expression}: {name} is not exported"
        for labels in re.findall(r"by \(([\w, ]+)\)", expression):
            for label in labels.split(", "):
                assert any(label in exported[name] for name in names), f"{expression}: nothing has the label {label}"
