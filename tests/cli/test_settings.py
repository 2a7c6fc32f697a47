"""What a deployment is made of: flags come before variables, these before a file; `pregate config` says whence."""

import pytest
import yaml

from pregate.cli.main import main


@pytest.fixture
def said(capsys, monkeypatch, path_checkpoint):
    """Run `pregate config` with a file and variables: (exit code, {key: (value, where from)}, stderr)."""

    def run(*arguments, file=None, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if file is not None:
            arguments = (*arguments, "--config", str(file))
        code = main(["config", *map(str, arguments)])
        printed = capsys.readouterr()
        lines = [line.partition("  # ") for line in printed.out.splitlines()]
        found = {key: (value, where) for line, _, where in lines for key, value in yaml.safe_load(line).items()}
        return code, found, printed.err

    return run


@pytest.fixture
def file(tmp_path, path_checkpoint):
    path = tmp_path / "settings.yaml"
    path.write_text(f"model: {path_checkpoint}\nhosts: 2\nresident_experts: 0.25\nblock_size: 32\ndevice: cpu\n")
    return path


def test_flags_come_before_variables_before_the_file_before_defaults(said, file, path_checkpoint):
    code, found, _ = said("--hosts", 4, file=file, PREGATE_HOSTS="3", PREGATE_BLOCK_SIZE="16")
    assert code == 0
    assert found["model"] == (str(path_checkpoint), str(file))
    assert found["hosts"] == (4, "--hosts")
    assert found["block_size"] == (16, "PREGATE_BLOCK_SIZE")
    assert found["resident_experts"] == (0.25, str(file))
    assert found["grpc_port"] == (50051, "default")


def test_a_variable_names_the_file_and_says_none(said, file):
    code, found, _ = said(PREGATE_CONFIG=str(file), PREGATE_RESIDENT_EXPERTS="none")
    assert (code, found["hosts"]) == (0, (2, str(file)))
    assert found["resident_experts"] == (None, "PREGATE_RESIDENT_EXPERTS")


def test_what_is_printed_is_a_file_that_says_the_same(said, file, tmp_path, capsys):
    _, found, _ = said("--health-poll-s", 7, file=file)
    again = tmp_path / "again.yaml"
    assert main(["config", "--config", str(file), "--health-poll-s", "7"]) == 0
    again.write_text(capsys.readouterr().out)
    _, repeated, _ = said(file=again)
    assert {key: value for key, (value, _) in repeated.items()} == {key: value for key, (value, _) in found.items()}
    assert {where for _, where in repeated.values()} == {str(again)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("modle: x\n", "modle x: unknown option; nearest: model; allowed: model, hosts"),
        ("resident-experts: 2\n", "nearest: resident_experts"),
        ("hostz: 2\nmodle: x\n", "modle x: unknown option; nearest: model; allowed: "),
        ("model: x\nhosts: many\n", "--hosts many: allowed: a whole number, 0 or more"),
        ("- hosts\n", "is no YAML mapping of options"),
        ("hosts: [\n", "is no YAML mapping of options"),
        ("1: 2\n", "settings.yaml: 1 2: unknown option; allowed: model"),
        ("a: " + "[" * 5000, "is no YAML mapping of options: it is nested too deeply"),
        ("hosts: 2\nmodel: x\nhosts: 3\n", "says hosts twice; allowed: each option once"),
        ("model: x\nhosts: 99999999999999999999\n", "--hosts 99999999999999999999: allowed: at most"),
        ("model: x\nstart_timeout_s: 1.0e+300\n", "--start-timeout-s 1e+300: allowed: at most 31536000"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(said, tmp_path, text, sentence):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    code, _, error = said(file=path)
    assert (code, error.count("\n")) == (2, 1)
    assert sentence in error


def test_a_folder_is_no_file_of_options(said, tmp_path):
    code, _, error = said(file=tmp_path)
    assert (code, error) == (2, f"pregate: --config {tmp_path}: cannot be read: Is a directory\n")


def test_an_unknown_variable_is_refused_without_what_it_says(said, file):
    code, _, error = said(file=file, PREGATE_TOKN_FILE="secret")
    assert code == 2
    assert "PREGATE_TOKN_FILE (set): unknown option" in error
    assert "nearest: PREGATE_TOKEN_FILE" in error
    assert "secret" not in error
    code, _, error = said(file=file.with_name("none.yaml"), PREGATE_TOKN_FILE="")
    assert code == 2


def test_tokens_are_not_printed(said, file, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("very-secret\n")
    _, found, _ = said(file=file, PREGATE_TOKEN_FILE=str(tokens))
    assert found["token_file"] == (str(tokens), "PREGATE_TOKEN_FILE")
    assert "very-secret" not in str(found)


def test_serve_takes_the_same(capsys, file, monkeypatch):
    monkeypatch.setenv("PREGATE_HOST", "0.0.0.0")
    assert main(["serve", "--config", str(file)]) == 2
    assert "--host 0.0.0.0: needs --tls-cert" in capsys.readouterr().err
