"""The structure that the design promises: imports go one way, files and functions stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tdxd"
RANK = {
    "errors": 0,
    "core": 1,
    "proto": 1,
    "host": 2,
    "guest": 3,
    "owner": 3,
    "user": 3,
    "model_server": 3,
    "sim": 3,
    "cli": 4,
}
ROLES = {"guest", "owner", "user", "model_server", "sim"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_pb2" not in path.name)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
TDXCTL_MAY = {
    "tdxd.errors",
    "tdxd.core",
    "tdxd.core.wire",
    "tdxd.cli.boundary",
    "tdxd.cli.doctor_tables",
    "tdxd.cli.passphrase",
    "tdxd.cli.status_tables",
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports, at whatever depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "tdxd"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    here = part_of(path)
    if here == "__init__":
        assert not imported(path)
        return
    for name in imported(path):
        parts = name.split(".")
        there = parts[1] if len(parts) > 1 and parts[1] in RANK else here
        assert RANK[there] <= RANK[here], f"{here} imports {name}"
        assert not (here in ROLES and there in ROLES and here != there), name


def test_tdxctl_imports_only_errors_and_the_wire() -> None:
    names = imported(PACKAGE / "cli" / "tdxctl.py")
    modules = {
        name
        for name in names
        if not any(other.startswith(name + ".") for other in names)
    }
    for name in modules:
        assert name in TDXCTL_MAY or name.rpartition(".")[0] in TDXCTL_MAY, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            docstring = ast.get_docstring(node, clean=False)
            lines -= len(docstring.splitlines()) if docstring else 0
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_core_does_no_io() -> None:
    """No module of core reaches the clock, the disk, the network or chance."""
    forbidden = {
        "os",
        "io",
        "time",
        "random",
        "secrets",
        "socket",
        "pathlib",
        "subprocess",
        "trio",
    }
    for path in FILES:
        if part_of(path) != "core":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            used = {name.split(".")[0] for name in names} & forbidden
            assert not used, f"{path.name} imports {used}"


def test_no_simulated_platform_in_the_product() -> None:
    for part in ("core", "host", "guest"):
        for path in (PACKAGE / part).rglob("*.py"):
            words = path.read_text().lower()
            assert "tdx-sim" not in words, path
            assert "tdxd.sim" not in words, path
