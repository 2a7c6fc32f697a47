"""A shard that changes while experts come and go: requests end as a loss of data, and logs say of what."""

import os
import re
import shutil

import pytest
from fastapi.testclient import TestClient

from pregate.base.errors import DataLossError
from pregate.router.doors.connect import connect_service
from pregate.router.doors.openai_app import build_app
from tests.router.running import door, engine_thread, socket_folder
from tests.router.serving import engine_over, expert_hosts

REASON = r"model\.safetensors: was changed after it was opened; put the file back as it was and start the hosts again"


def test_requests_end_as_a_loss_of_data_with_the_file_and_what_to_do(tiny_path_checkpoint, tmp_path, caplog):
    caplog.set_level("INFO", logger="pregate")
    path = shutil.copytree(tiny_path_checkpoint, tmp_path / "copy")
    with (
        socket_folder() as folder,
        expert_hosts(path, 1, folder, resident_experts=0.2) as addresses,
        engine_over(path, addresses) as engine,
        engine_thread(engine, endpoint := f"ipc://{folder}/engine.sock"),
        door(endpoint, path, engine_first=True) as front,
        TestClient(build_app(connect_service([endpoint], None, path, "tiny"))) as http,
    ):
        assert front.client.complete("O wind", 4, ignore_eos=True).token_ids
        os.utime(path / "model.safetensors", (0, 0))
        with pytest.raises(DataLossError, match=REASON):
            front.client.complete("The harbour", 4, ignore_eos=True)
        answer = http.post("/v1/completions", json={"prompt": "The harbour", "max_tokens": 4})
        assert front.client.health(), "what is held is served, and the rest may be on another host"
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "data_loss")
    assert re.search(REASON, error["message"])
    for part in ("grpc_calls", "http.errors"):
        (said,) = [record.message for record in caplog.records if record.name.endswith(part)]
        assert re.match(f"DATA_LOSS: expert host 0: unit .*{REASON}", said)
