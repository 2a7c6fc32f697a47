"""Every command of README, docs and deploy exists, with the flags it has; test_commands_run.py runs them."""

import ast
import importlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer.main

from pregate.cli import main as cli
from tests.docs.pages import ALL, COMMANDS, PAGES, ROOT, Block, python_of

#: Programs that are not looked into, and why.
EXCEPTIONS = {
    "docker": "needs a container engine; the pregate command in it is looked at",
    "kubectl": "needs a Kubernetes; tests/deploy/test_files.py builds what it applies",
    "openssl": "not ours",
    "scp": "needs a second machine",
    "curl": "tests/router/doors asks the HTTP door itself",
    "mkdir": "not ours",
    "umask": "not ours",
    "export": "the shell's own",
    "unzip": "not ours",
}


@cache
def parser(name: str):
    """A command line as click has it."""
    if name == "pregate":
        return typer.main.get_command(cli._app(cli.COMMANDS))
    module = importlib.import_module({"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}[name])
    return module.cli


def parse(command, words: list[str]) -> None:
    """Have a command line take its words, without running anything. Raises its own error for what it does not know."""
    with command.make_context(words[0], list(words[1:])) as context:
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else list(context.args)
    if hasattr(command, "commands"):
        assert rest, words
        assert rest[0] in command.commands, f"{words[0]} has no command {rest[0]}"
        parse(command.commands[rest[0]], rest)


def check(words: list[str]) -> None:
    """AssertionError, or the parser's, for a command that does not exist."""
    words = list(words)
    while words and re.fullmatch(r"\w+=.*", words[0]):  # VARIABLE=value before a command
        words.pop(0)
    if not words or ("/" in words[0] and (ROOT / words[0]).is_dir()):  # in a list of folders
        return
    program, rest = Path(words[0]).name, words[1:]
    if program == "pregate":
        app = cli._app(cli.COMMANDS)
        parse(parser("pregate"), ["pregate", *cli._spread(rest, cli._list_options(app))])
    elif program in ("ray", "serve"):
        parse(parser(program), [program, *rest])
        if program == "ray" and rest[0] == "exec":
            check(shlex.split(rest[-1]))
        for word in rest:
            assert not word.startswith("deploy/") or (ROOT / word).exists(), word
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert set(rest) <= targets, rest
    elif program in ("pip", "pytest"):
        check_extras(rest)
    elif program.startswith("python"):
        check_python(rest)
    else:
        assert program in EXCEPTIONS, f"{program}: a program that no rule and no exception knows"
        for at, word in enumerate(rest[:-1]):  # docker run IMAGE pregate serve ...
            if program == "docker" and word == "pregate" and rest[at + 1] in cli.COMMANDS:
                check(rest[at:])


def check_extras(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"^(?:pregate|\.)\[(\w+)\]", "\n".join(words), re.M):
        assert re.search(rf"^{extra} = \[", text, re.M), extra


def check_python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1]) is not None, words
    elif words and words[0].endswith(".py") and "/" in words[0]:
        assert (ROOT / words[0]).exists(), words


def test_pages_are_found():
    assert {"README.md", "docs/serve.md", "deploy/ray-up.md"} <= {block.page for block in ALL}
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[f"{b.page}:{' '.join(w)[:50]}" for b, w in COMMANDS])
def test_command(block: Block, words: list[str]):
    try:
        check(words)
    except Exception as error:  # noqa: BLE001 (of three parsers)
        message = getattr(error, "format_message", error.__str__)()
        pytest.fail(f"{block}: {' '.join(words)}: {message}")


@pytest.mark.parametrize("words", [
    ["pregate", "serve", "--model", "m", "--hostz", "2"], ["pregate", "bench", "nothing"], ["ray", "up", "--wait", "f"],
    ["make", "nothing"], ["pip", "install", ".[nothing]"], ["python", "-m", "benchmarks.nothing"], ["nothing"],
    ["ray", "exec", "deploy/ray-cluster.yaml", "pregate serve --nothing"],
    ["docker", "run", "image", "pregate", "serve", "--nothing", "1"],
])  # fmt: skip
def test_a_command_that_does_not_exist_is_found(words):
    with pytest.raises(Exception):  # noqa: B017, PT011 (of three parsers)
        check(words)


@pytest.mark.parametrize("block", [b for b in ALL if python_of(b)], ids=str)
def test_python_uses_names_that_exist(block: Block):
    """Its imports of ours work, and what it takes of them exists."""
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name) is not None, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pregate":
            assert hasattr(importlib.import_module("pregate"), node.attr), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target
