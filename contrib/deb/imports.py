"""Finds what modules import, by reading their source: nothing is run.

Imports inside functions count, too; those for type checkers only do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["closure", "imports", "module_path", "modules_below", "strings_passed_to"]


def imports(source: str) -> set[str]:
    """Return every name that a source text may import as a module, at whatever depth of it.

    `from a import b` gives both `a` and `a.b`: which of them is a module, only the files tell.
    """
    found: set[str] = set()
    for node in _running(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk over what runs: all but the bodies of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from _running(other)
            continue
        yield child
        yield from _running(child)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def module_path(root: Path, name: str) -> Path | None:
    """Return the source file of a module below `root`, None if there is none."""
    base = root.joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_name(base.name + ".py")):
        if path.is_file():
            return path
    return None


def modules_below(root: Path, package: str) -> set[str]:
    """Return the names of all modules of a package, its subpackages' included."""
    top = root.joinpath(*package.split("."))
    names = set()
    for path in top.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def closure(
    root: Path,
    starts: Iterable[str],
    tops: tuple[str, ...],
    *,
    without: tuple[str, ...] = (),
) -> tuple[dict[str, Path], set[str]]:
    """Follow imports from some modules through all below `root` whose first name is in `tops`.

    Returns the source file of each module, packages above them included where they have a file,
    and the names of what else they import. Modules in `without` are not looked at.
    """
    inside: dict[str, Path] = {}
    outside: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name in inside or name in outside or name in without:
            continue
        if name.split(".", maxsplit=1)[0] not in tops:
            outside.add(name)
            continue
        path = module_path(root, name)
        parent = name.rpartition(".")[0]
        if parent:
            waiting.append(parent)
        if path is not None:
            inside[name] = path
            waiting += imports(path.read_text(encoding="utf-8"))
    return inside, outside


def strings_passed_to(source: str, function: str) -> set[str]:
    """Return the string constants that a source text passes to a function as its only argument."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == function
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }
