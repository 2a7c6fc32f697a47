"""Imports run downhill, the client is light, and the reference model stays an independent oracle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pregate"
#: What each package may import of ours, itself aside.
ALLOWED = {
    "base": set(),
    "kernels": {"base"},
    "model": {"base", "kernels"},
    "convert": {"base", "kernels", "model"},
    "workers": {"base", "kernels", "model"},
    "router": {"base", "kernels", "model", "workers", "client"},
    "client": {"base"},
    "cluster": {"base", "kernels", "model", "workers", "router", "client"},
    "cli": {"base", "kernels", "model", "convert", "workers", "router", "cluster", "client"},
}
#: Rooms of `convert/`; each imports of the others only those before it. What lies beside them knows none of them.
ROOMS = ("text", "files", "measure", "cut", "paths", "tune", "domains", "export", "report")
#: Functions that import a module by its name, a string.
BY_NAME = ("import_module", "__import__", "run_module")


def named_modules(path: Path) -> set[str]:
    """Modules of ours that `path` imports by their name, a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in found if name.startswith("pregate.")}


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that import statements of `path` name, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "pregate" or name.startswith("pregate.")}


def sources(package: str) -> list[Path]:
    return sorted((PACKAGE / package).rglob("*.py"))


def test_every_package_is_covered():
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_run_downhill(package):
    files = sources(package)
    assert files
    for path in files:
        for module in imported_modules(path) | named_modules(path):
            target = ([*module.split("."), ""])[1]
            if target in ALLOWED and target != package:
                assert target in ALLOWED[package], f"{path.relative_to(ROOT)} imports {module}"


def test_rooms_of_convert_import_only_those_before_them():
    folders = {p.name for p in (PACKAGE / "convert").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ROOMS)
    for path in sources("convert"):
        room = path.relative_to(PACKAGE / "convert").parts[0]
        allowed = ROOMS[: ROOMS.index(room)] if room in ROOMS else ()
        for module in imported_modules(path) | named_modules(path):
            target = ([*module.split("."), "", ""])[2]
            if module.startswith("pregate.convert.") and target in ROOMS and target != room:
                assert target in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_imports_by_name_are_seen(tmp_path: Path):
    source = tmp_path / "module.py"
    source.write_text('import importlib\nimportlib.import_module("pregate.cli.main")\n')
    assert named_modules(source) == {"pregate.cli.main"}


def test_router_sees_of_workers_only_messages_and_client():
    for path in sources("router"):
        for module in imported_modules(path):
            seen = module.removeprefix("pregate.workers.")
            if seen != module:
                assert re.match(r"client\b|link$|link\.protocol\b", seen), f"{path.relative_to(ROOT)} imports {module}"


def test_router_takes_only_generated_code_of_the_client():
    for path in sources("router"):
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[1:2] == ["client"] and len(parts) > 2:
                assert parts[2] == "proto", f"{path.relative_to(ROOT)} imports {module}"


def imports_closure(module: str) -> set[str]:
    """Every module of ours that importing `module` reaches."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        path = ROOT / Path(*name.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if name in seen or not file.exists():
            continue
        seen.add(name)
        todo += sorted(imported_modules(file))
        todo.append(name.rpartition(".")[0])
    return seen - {""}


def test_reference_model_is_independent():
    reached = imports_closure("pregate.model.modeling")
    assert "pregate.kernels.reference" in reached
    assert {m for m in reached if m.startswith("pregate.kernels.")} == {"pregate.kernels.reference"}
    assert not [m for m in reached if m.split(".")[1:2] in (["router"], ["workers"], ["cluster"], ["convert"])]


@pytest.mark.parametrize(
    "module",
    [
        "router.engine.scheduler",
        "router.engine.blocks",
        "router.engine.sequence",
        "cluster.placement",
        "cluster.leases",
        "cluster.config",
    ],
)
def test_deciding_code_loads_neither_torch_nor_ray(module):
    """In a process of its own, so that what the module imports in turn counts too."""
    heavy = {"torch", "ray", "transformers"}
    code = f"import sys, pregate.{module}; bad = {heavy} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


@pytest.mark.parametrize(
    "module", ["router/engine/planning", "router/engine/scheduler", "router/engine/blocks", "cluster/placement"]
)
def test_deciding_code_reads_no_clock(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not names & {"torch", "ray", "transformers", "time", "datetime"}


def test_importing_pregate_is_light():
    heavy = {"torch", "ray", "transformers", "grpc", "numpy"}
    code = f"import sys, pregate; bad = {heavy} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
