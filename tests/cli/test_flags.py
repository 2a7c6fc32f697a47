"""Flags made of options: what they take, and that what is wrong with them is said before anything heavy is loaded."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pregate.base.options import user_options
from pregate.cli.main import main
from pregate.cluster.config import RayAccess, ServeConfig
from pregate.cluster.preflight import has_gpu_driver
from pregate.convert.tune.options import TuneOptions
from pregate.router.doors.grpc_options import GrpcOptions
from tests.convert.test_stages import Named


@pytest.mark.parametrize(
    ("command", "classes"),
    [
        ("tune", [TuneOptions]),
        ("serve", [ServeConfig, GrpcOptions, RayAccess]),
        ("doctor", [ServeConfig, GrpcOptions, RayAccess]),
    ],
)
def test_every_option_is_a_flag(
    command: str, classes: list[type], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    flags = re.findall(r"--[a-z0-9-]+", shown)
    assert [o.flag for cls in classes for o in user_options(cls).values() if o.flag not in flags] == []


def test_what_is_wrong_is_said_before_anything_heavy_is_loaded(
    path_checkpoint: Path, layerwise_checkpoint: Path, tiny_dense: Path, tiny_text: Path, tmp_path: Path
):
    """In a process of its own, so that what is loaded shows."""
    model, out, text = str(path_checkpoint), str(tmp_path / "out"), str(tiny_text)
    dense, layerwise = str(tiny_dense), str(layerwise_checkpoint)
    cut = ["--out", out, "--experts", "7", "--shared", "2", "--active", "2", "--calibration", text]
    cases = [
        [
            "convert",
            "--model",
            "/no/such",
            "--out",
            out,
            *["--experts", "8", "--shared", "2", "--active", "2", "--calibration", "x"],
        ],
        [
            "convert",
            "--model",
            str(tmp_path),
            "--out",
            out,
            *["--experts", "8", "--shared", "2", "--active", "9", "--calibration", "x"],
        ],
        ["decouple", "--model", model, "--out", out, "--text", "/no/such"],
        ["tune", "--model", model, "--out", out, "--text", "/no/such", "--method", "best"],
        ["evaluate", "--model", str(tmp_path), "--text", model],
        ["export", "--model", model, "--out", str(tmp_path), "--format", "dense"],
        ["export", "--model", model, "--out", "/proc/out", "--format", "dense"],
        ["read-me", "--model", model, "--out", out, "--domain", "/no/such", "/neither"],
        ["report", "--model", model, "--out", out, "--text", "/no/such"],
        ["generate", "--model", "/no/such", "--prompt", "a"],
        ["serve", "--model", "/no/such"],
        ["serve", "--model", model, "--host", "0.0.0.0"],
        ["serve", "--model", model, "--host", "2"],
        ["serve", "--model", model, "--max-running", "0"],
        ["serve", "--model", dense],
        ["generate", "--model", dense, "--prompt", "a"],
        ["route", "--model", layerwise, "--prompt", "a"],
        ["decouple", "--model", dense, "--out", out, "--text", text],
        ["decouple", "--model", model, "--out", out, "--text", text],
        ["export", "--model", dense, "--out", out, "--format", "dense"],
        ["report", "--model", dense, "--out", f"{out}.html", "--text", text],
        ["convert", "--model", model, *cut],
        ["convert", "--model", dense, *cut],
    ]
    if not has_gpu_driver():
        cases.append(["serve", "--model", model, "--device", "cuda"])
    code = (
        "import json, sys; from pregate.cli.main import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    assert main(arguments) == 2, arguments\n"
        "    bad = {'torch', 'transformers', 'ray', 'grpc'} & set(sys.modules); assert not bad, (arguments, bad)\n"
    )
    run = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(cases)
    assert "--out /proc/out: its parent folder cannot be written" in done.stderr
    assert "--host 2: takes an address; did you mean --hosts?" in done.stderr
    assert done.stderr.count(f"--model {dense}: is a dense model; convert it first with `pregate convert`") == 5
    assert f"--model {layerwise}: has no path router; make one with `pregate decouple`" in done.stderr
    assert f"--model {model}: is a pregate checkpoint already; allowed: a dense model" in done.stderr
    assert "--experts 7: does not divide the FFN width" in done.stderr


def test_lists_say_what_they_are_of(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "--help"]) == main(["decouple", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--stop TEXT..." in shown and "--text PATH..." in shown


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_the_first_thing_said_is_that_torch_is_loaded(
    command: str, tiny_path_checkpoint: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
):
    said = Named()
    monkeypatch.setattr("pregate.cli.printed.RichProgress", lambda: said)
    given = {"evaluate": ["--text", str(tiny_text)], "generate": ["--prompt", "O wind", "--max-tokens", "2"]}[command]
    assert main([command, "--model", str(tiny_path_checkpoint), *given]) == 0
    assert said.names[0] == "loading torch and transformers" and len(said.names) > 1


def test_every_text_that_is_given_counts(tiny_path_checkpoint: Path, tiny_text: Path, tmp_path: Path, capsys):
    evaluate = ["evaluate", "--model", str(tiny_path_checkpoint), "--json", "--text"]
    paragraphs = tiny_text.read_text(encoding="utf-8").split("\n\n")
    for name, some in {"a": paragraphs[:8], "b": paragraphs[8:]}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(some), encoding="utf-8")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    num_documents = {}
    for texts in ([files[0]], files, [files[0], "--text", files[1]], [str(tmp_path / "*.txt")], [str(tmp_path)]):
        assert main([*evaluate, *texts]) == 0
        num_documents[" ".join(texts)] = json.loads(capsys.readouterr().out)["num_documents"]
    first, *both = num_documents.values()
    assert len(set(both)) == 1 and both[0] > first
    assert main([*evaluate, "missing.txt", files[1]]) == 2
    assert "--text missing.txt: no such path" in capsys.readouterr().err


def test_tokens_in_brackets_are_no_markup(path_checkpoint: Path, tmp_path: Path, capsys):
    folder = tmp_path / "brackets"
    shutil.copytree(path_checkpoint, folder)
    file, manifest = folder / "tokenizer.json", folder / "manifest.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    new = {"x": "[/INST]", "y": "[red]"}
    for name, renamed in new.items():
        vocab[renamed] = vocab.pop(name)
        token = {"id": vocab[renamed], "content": renamed, "special": True, "normalized": False}
        tokenizer["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    fields, data = json.loads(manifest.read_text()), file.read_bytes()
    fields["files"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(fields))
    assert main(["route", "--model", str(folder), "--prompt", "a[red]b[/INST]"]) == 0
    shown = capsys.readouterr().out
    assert all(repr(token) in shown for token in new.values())
