"""The commands of README, docs and deploy are run as they stand, on small models under the names that they use and in
less text and fewer steps; those that cannot be say why."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pregate.base.pem import read_key
from pregate.cli import main as cli
from tests.cluster.leftovers import serving
from tests.docs.pages import ALL, COMMANDS, ROOT, python_of
from tests.sharing_out import only_in_chaos

#: What is not run here, and why.
NOT_RUN = {
    r"^make demo$": "tests/cluster/test_demo.py does",
    r"^make test$": "it is what runs this",
    r"^pregate/": "a list of folders, no command",
    r"pip (install|wheel|download)|^unzip|^python3.11 -m venv": "asks a registry, and changes the environment",
    r"^(mkdir|umask|export|openssl rand)": "the shell's own, or nearly",
    r"^docker": "needs a container engine",
    r"^kubectl": "needs a Kubernetes",
    r"^curl": "tests/deploy and tests/router/doors ask the same over HTTP",
    r"^scp|^ray (get-auth-token|start)": "needs machines of its own: tests/deploy/test_ray_up.py has such",
    r"^ray (up|exec|attach).* deploy/ray-cluster-local.yaml": "tests/deploy/test_ray_up.py does",
    r"^ray up .*deploy/ray-cluster.yaml": "needs an account at a cloud",
    r"^pregate (doctor|serve|push|scale) .*--ray-address|^pregate scale": "needs a Ray of several nodes: "
    "tests/deploy/test_ray_up.py, tests/cluster/test_push.py, test_elsewhere.py and tests/chaos/test_deployment.py",
    r"^serve (deploy|status)": "tests/deploy/test_serve_deploy.py does",
    r"^serve run": "tests/cluster/test_serve_app.py does",
    r"--otlp-endpoint": "tests/cluster/test_life_cycle.py serves so",
    r"SmolLM2|PARENT|s75": "needs a model of 98 MB; `make demo` serves it where there is a network",
}  # fmt: skip
#: Commands that work on files alone, and with what they are a matter of seconds.
OFFLINE = {
    "convert": {"samples": "4", "sequence-length": "64"},
    "decouple": {"steps": "3", "pool-tokens": "500"},
    "tune": {"steps": "2", "batch-tokens": "256", "sequence-length": "64"},
    "evaluate": {"max-tokens": "200"},
    "report": {"max-tokens": "200"},
    "export": {},
    "apply": {},
    "read-me": {
        "pool-tokens": "1500", "router-steps": "2", "router-batch": "2", "samples": "2", "sequence-length": "64",
        "batch-tokens": "256", "dim": "16",
    },
    "route": {},
    "doctor": {},
}  # fmt: skip
QUARTET, PATHS = ROOT / "examples" / "quartet", ROOT / "examples" / "quartet-paths"


def kind_of(words: list[str]) -> str | None:
    """What runs a command: the first that fits."""
    line = " ".join(words)
    if any(re.search(pattern, line) for pattern in NOT_RUN):
        return "nobody"
    if words[0] == "pregate" and words[1] in OFFLINE:
        return "offline"
    if words[:2] == ["pregate", "serve"]:
        return "serve"
    if words[0] == "pregate" and "--target" in words:
        return "ask"
    return "certificate" if words[:2] == ["openssl", "req"] else None


def those(kind: str, files: dict[str, str] | None = None) -> list[list[str]]:
    """The commands of a kind, each once, with these files in place of those that they name."""
    found = (tuple((files or {}).get(word, word) for word in words) for _, words in COMMANDS if kind_of(words) == kind)
    return [list(words) for words in dict.fromkeys(found)]


def with_options(words: list[str], options: dict[str, str]) -> list[str]:
    """The command with these values for its options."""
    words = list(words)
    for name, value in options.items():
        flag = f"--{name}"
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


@pytest.fixture
def run(capsys):
    """Run a command of ours in this process, which has imported all it needs; returns what it prints."""

    def run(words: list[str]) -> str:
        code, said = cli.main(words[1:]), capsys.readouterr()
        assert code == 0, f"{words}\n{said.out}\n{said.err}"
        return said.out

    return run


def test_every_command_is_run_or_has_its_reason():
    assert not [f"{block}: {' '.join(words)}" for block, words in COMMANDS if kind_of(words) is None]
    lines = [" ".join(words) for _, words in COMMANDS]
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)]


def write_texts(folder: Path) -> None:
    """What quartet wrote, under the names that the pages use."""
    texts = [json.loads(line)["text"] for line in (QUARTET / "samples.jsonl").read_text().splitlines()]
    for name in ("texts", "fit", "validation", "code", "books", "chat"):
        (folder / name).mkdir()
        for number in range(8):
            (folder / name / f"{number}.txt").write_text(texts.pop())
    (folder / "heldout.jsonl").write_text("\n".join(json.dumps({"text": texts.pop()}) for _ in range(3)))


@pytest.mark.slow
def test_from_a_dense_model_to_a_page_an_adapter_and_back(run, tmp_path, monkeypatch):
    """In the order of the pages: what one command writes the next ones read."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(QUARTET, tmp_path / "llama")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_texts(tmp_path)
    for words in those("offline"):
        assert run(with_options(words, OFFLINE[words[1]])), words
    again, paths = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("again", "llama-paths"))
    assert again == paths, "every file, bit for bit"
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("words", those("certificate"), ids=lambda words: words[-1])
def test_certificates_are_such_as_grpc_takes(words: list[str], tmp_path: Path):
    made = {option: str(tmp_path / option) for option in ("-keyout", "-out")}
    subprocess.run([made.get(before, word) for before, word in zip(["", *words], words, strict=False)], check=True)
    assert read_key("--tls-key", made["-keyout"])


MODELS: dict[str, str] = dict.fromkeys(("./llama-paths", "./llama-tuned"), str(PATHS))
PLAIN, *OTHERS = sorted(those("serve", MODELS), key=len)
#: Servers with these options `make test` does not start once more: others of its tests serve with either.
LEFT_TO_CHAOS = {"--tls-cert", "--host-memory"}


def asked_of(running, served: list[str], files: dict[str, str]) -> list[list[str]]:
    """The commands that ask a server, as this one was started: with TLS or without."""
    target = f"localhost:{running.target.rpartition(':')[2]}"
    here = {"localhost:50051": target, "http://localhost:8000": target}
    asked = [words for words in those("ask", files | here) if ("--ca" in words) == ("--tls-cert" in served)]
    assert asked
    return asked


@pytest.fixture
def files(tmp_path, tiny_dense, tiny_path_checkpoint, run):
    """What the commands name, and where it is here."""
    keys = {name: str(tmp_path / name) for name in ("cert.pem", "key.pem", "token")}
    (tmp_path / "token").write_text("secret\n")
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,5,4\n0.2,9,4\n")
    found = MODELS | keys | {f"secrets/{name}": path for name, path in keys.items()}
    found |= {"./llama": str(tiny_dense), "./llama-adapter": str(tmp_path / "adapter")}
    return found | {"azure2023_conv.csv": str(trace)}


@pytest.mark.ray
@pytest.mark.slow
def test_what_is_said_to_a_server_runs(run, files):
    """`pregate serve` as README has it, and against it every Python block and every command that takes --target."""
    with serving(*PLAIN[2:]) as running:
        for words in asked_of(running, PLAIN, files):
            assert run(with_options(words, {"duration": "1"} if words[1] == "bench" else {}))
        for block in ALL:
            if (text := python_of(block)) and "pregate.Client(" in text:
                exec(compile(text.replace("127.0.0.1:50051", running.target), str(block), "exec"), {})


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "served",
    [pytest.param(words, marks=only_in_chaos if LEFT_TO_CHAOS & set(words) else ()) for words in OTHERS],
    ids=lambda words: " ".join(words[2:])[-60:],
)
def test_a_server_with_these_options_answers(served, run, files, tiny_path_checkpoint):
    """The commands that ask a server of its kind, of those without TLS one."""
    if "--adapter" in served:
        made = {"--model": str(tiny_path_checkpoint), "--parent": files["./llama"], "--out": files["./llama-adapter"]}
        run(["pregate", "export", "--format", "adapter", *(word for option in made.items() for word in option)])
    if "--tls-cert" in served:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        subprocess.run([files.get(word, word) for word in those("certificate")[-1]], check=True)
    with serving(*[files.get(word, word) for word in served[2:]]) as running:
        asked = [words for words in asked_of(running, served, files) if words[1] == "generate"]
        for words in asked if "--ca" in asked[0] else asked[:1]:
            assert run(with_options(words, {"max-tokens": "8"}))
