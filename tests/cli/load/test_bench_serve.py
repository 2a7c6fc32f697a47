"""`pregate bench serve` against real servers: over gRPC and over OpenAI's HTTP, with refusals counted by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pregate.cli.load import bench_serve
from pregate.cli.load.arrivals import Arrival
from pregate.cli.load.options import LoadOptions
from pregate.cli.main import main
from pregate.model.tokenizer import read_tokenizer
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import door, engine_thread, local_engine, socket_folder


@pytest.fixture(scope="module")
def targets(tiny_path_checkpoint: Path):
    """The gRPC target and the OpenAI one of an engine that batches by path."""
    options = {"max_running": 4, "max_queued": 2, "batching": "path"}
    with local_engine(tiny_path_checkpoint, **options) as engine, socket_folder() as folder:
        endpoint = f"ipc://{folder}/engine.sock"
        with engine_thread(engine, endpoint), door(endpoint, tiny_path_checkpoint, engine_first=True) as front:
            server = HttpServer(build_app(DoorService(EngineClient(endpoint), tiny_path_checkpoint, "tiny")))
            yield {"grpc": front.target, "openai": server.url}
            server.close()


@pytest.mark.parametrize("kind", ["grpc", "openai"])
def test_a_trace_is_replayed_and_every_token_counted(kind, targets, tmp_path: Path, capsys):
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{n * 0.1},{3 + n},{4 + n}\n" for n in range(5))
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}0.5,999,999\n")
    picture = tmp_path / "load.png"
    arguments = [
        "bench",
        "serve",
        "--target",
        targets[kind],
        "--trace",
        str(trace),
        "--json",
        "--picture",
        str(picture),
    ]
    assert main([*arguments, "--max-output", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == {"sent": 6, "answered": 6}
    assert found["clipped_requests"] == 1
    assert found["output_tokens_per_s"] * found["seconds"] == pytest.approx(sum(range(4, 9)) + 20, abs=0.5)
    assert all(found[f"{name}_ms"]["p99"] > 0 for name in ("time_to_first_token", "inter_token", "end_to_end"))
    assert picture.stat().st_size > 10_000
    if kind == "grpc":
        assert found["server"]["batching"] == "path"
        assert found["server"]["units_per_step"] >= 1 and found["server"]["tokens_per_step"] >= 1


def test_refusals_are_counted_by_name_and_the_table_shows_them(targets, capsys):
    arguments = ["bench", "serve", "--target", targets["grpc"], "--rate", "2000", "--requests", "40"]
    assert main([*arguments, "--prompt-tokens", "5", "--output-tokens", "60"]) == 0
    shown = capsys.readouterr().out
    assert "RESOURCE EXHAUSTED" in shown and "time to first token" in shown


def test_prompts_are_cut_from_all_text_that_is_given(
    targets, tiny_text: Path, tiny_path_checkpoint: Path, tmp_path: Path, capsys
):
    load = ["--rate", "50", "--requests", "3", "--prompt-tokens", "30", "--output-tokens", "2", "--json"]
    few = tmp_path / "few.txt"
    few.write_text("the harbour")
    text = ["--tokenizer", str(tiny_path_checkpoint), "--text", str(few), str(tiny_text)]
    assert main(["bench", "serve", "--target", targets["grpc"], *load, *text]) == 0
    assert json.loads(capsys.readouterr().out)["mean_prompt_tokens"] == 30


def test_a_long_text_leaves_room_for_the_others(tiny_path_checkpoint: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench_serve, "_POOL_TOKENS", 400)
    encode = read_tokenizer(tiny_path_checkpoint).encode
    texts = [tmp_path / "long.txt", tmp_path / "next.txt"]
    texts[0].write_text("one one one.\n\n" * 5000)
    texts[1].write_text("two two two.\n\n" * 5000)
    options = LoadOptions("localhost:1", rate=1, text=tuple(texts), tokenizer=tiny_path_checkpoint)
    prompts = bench_serve._prompts(options, [Arrival(0.0, 8, 1)] * 60, 256)
    of_two = set(encode("two", add_special_tokens=False).ids) - set(encode("one", add_special_tokens=False).ids)
    assert 10 < sum(bool(of_two & set(prompt)) for prompt in prompts) < 50


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--trace, --rate: give one of them"),
        (["--rate", "1", "--text", "x.txt"], "--text, --tokenizer: give both or neither"),
        (["--trace", "/no/such"], "--trace /no/such: no such file"),
        (["--rate", "0"], "--rate 0"),
        (["--rate", "1", "--text", "/no/such", __file__, "--tokenizer", "x"], "--text /no/such: no such path"),
        (["--rate", "1", "--ca", "/no/such"], "--ca /no/such: cannot be read"),
    ],
)
@pytest.mark.parametrize("target", ["127.0.0.1:1", "https://127.0.0.1:1"])
def test_what_cannot_be_is_said(target, arguments, sentence, capsys):
    assert main(["bench", "serve", "--target", target, *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_sentence(capsys):
    assert main(["bench", "serve", "--target", "127.0.0.1:1", "--rate", "1"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
