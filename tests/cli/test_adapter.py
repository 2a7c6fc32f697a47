"""`--adapter --parent` on every command that takes them, and as keys: the same as the checkpoint, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.base.options import of_keys, user_options
from pregate.cli.flags import check_paths
from pregate.cli.main import main
from pregate.cluster.config import ServeConfig
from pregate.cluster.preflight import check_config
from pregate.convert.measure.options import EvaluateOptions


@pytest.fixture(scope="module")
def adapter(tiny_path_checkpoint: Path, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "adapter"
    asked = ["export", "--model", str(tiny_path_checkpoint), "--format", "adapter", "--out", str(out)]
    assert main([*asked, "--parent", str(tiny_dense)]) == 0
    return out


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_print_the_same(adapter, tiny_path_checkpoint, tiny_dense, tiny_text, tmp_path, capsys):
    whole, made = ["--model", tiny_path_checkpoint], ["--adapter", adapter, "--parent", tiny_dense]
    before = sorted((path, path.stat().st_mtime_ns) for path in adapter.iterdir())
    for command in (["generate", "--prompt", "the bell", "--max-tokens", "8"], ["route", "--prompt", "the bell"]):
        assert printed(capsys, *command, *made) == printed(capsys, *command, *whole)
    asked = ["--text", tiny_text, "--max-tokens", "100"]
    ours, theirs = (printed(capsys, "evaluate", *model, *asked) for model in (made, whole))
    assert ours.pop("model") == str(adapter)
    assert theirs.pop("model") == str(tiny_path_checkpoint)
    assert ours == theirs
    page = printed(capsys, "report", *made, *asked, "--out", tmp_path / "page.html")
    assert f"--adapter {adapter} " in page["conditions"]["command"]
    assert sorted((path, path.stat().st_mtime_ns) for path in adapter.iterdir()) == before


def test_apply_writes_the_checkpoint(adapter, tiny_path_checkpoint, tiny_dense, tmp_path):
    asked = ["apply", "--parent", tiny_dense, "--adapter", adapter, "--out", tmp_path / "again"]
    assert main([*map(str, asked)]) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {
        p.name: p.read_bytes() for p in tiny_path_checkpoint.iterdir()
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--adapter", "ADAPTER"], "--adapter ADAPTER: needs --parent, the dense model that it was made from"),
        (["--adapter", "ADAPTER", "--parent", "DENSE", "--model", "WHOLE"], "--model WHOLE: give it or --adapter"),
        (["--model", "ADAPTER"], "--model ADAPTER: is an adapter; give it with --adapter and its parent with --parent"),
        (["--adapter", "ADAPTER", "--parent", "WHOLE"], "--parent WHOLE: its model.safetensors is not that of"),
        ([], "--model: missing; it has no default; allowed in its place: --adapter"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], sentence: str, adapter, tiny_path_checkpoint, tiny_dense, tiny_text, capsys
):
    places: dict[str, str] = {"ADAPTER": str(adapter), "DENSE": str(tiny_dense), "WHOLE": str(tiny_path_checkpoint)}
    assert main(["evaluate", *[places.get(a, a) for a in arguments], "--text", str(tiny_text)]) == 2
    said = capsys.readouterr().err
    for name, place in places.items():
        sentence = sentence.replace(name, place)
    assert sentence in said


def test_a_deployment_is_asked_for_by_keys(adapter, tiny_dense, tiny_path_checkpoint):
    config = of_keys(ServeConfig, {"adapter": str(adapter), "parent": str(tiny_dense), "hosts": "2"})
    assert config.model == str(adapter.resolve())
    assert config.text_path == str(tiny_dense.resolve())
    assert ServeConfig.from_dict(config.to_dict()) == config
    check_config(config)
    check_paths(user_options(ServeConfig).values(), config)
    with pytest.raises(UserError, match=r"parent .*: needs adapter"):
        of_keys(ServeConfig, {"model": str(tiny_path_checkpoint), "parent": str(tiny_dense)})
    with pytest.raises(UserError, match="needs parent"):
        EvaluateOptions(adapter=adapter, text=(adapter,))  # pyright: ignore[reportCallIssue]
