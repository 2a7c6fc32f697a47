import json

import pytest

from pregate.base import log


def test_json_is_an_object_a_line(capsys):
    log.configure("engine", "json")
    logger = log.get_logger("pregate.some.part")
    logger.info("%s\nand \ud800", "ü")
    log.request_id.set("a")
    try:
        raise ValueError("x")
    except ValueError:
        logger.exception("failed")
    logger.warning("of another", extra={"request_id": "b"})
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "info", "role": "engine", "logger": "pregate.some.part", "message": "ü\nand \ud800"}
    assert (second["request_id"], third["request_id"]) == ("a", "b")
    assert second["error"].startswith("Traceback") and second["error"].endswith("ValueError: x")


def test_text_is_a_line_whatever_a_message_holds(capsys):
    log.configure("engine")
    log.get_logger("pregate.x").info("a\n2026 forged\r", extra={"request_id": "r\n1"})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("I engine [r\\n1] a\\n2026 forged\\r")


@pytest.mark.parametrize("given", [None, "", "a b", "a\n", "x" * 129, "ü"])
def test_a_caller_without_a_usable_id_gets_one(given):
    assert len(log.name_request(given)) == 32
