"""What the packages hold is found by reading sources."""

from __future__ import annotations

import textwrap

import pytest

from contrib.deb import imports


def test_imports_at_any_depth_are_found_but_not_those_for_type_checkers() -> None:
    found = imports.imports(
        textwrap.dedent("""
            import a.b
            from typing import TYPE_CHECKING
            import typing
            if TYPE_CHECKING:
                import never_one
            else:
                import otherwise
            if typing.TYPE_CHECKING:
                from never import two
            def f():
                try:
                    from c import d
                except ImportError:
                    import e
            """)
    )
    modules = {"a.b", "otherwise", "c", "c.d", "e", "typing", "typing.TYPE_CHECKING"}
    assert found == modules


def test_relative_imports_are_refused_not_overlooked() -> None:
    with pytest.raises(AssertionError):
        imports.imports("from . import a")


@pytest.fixture
def tree(tmp_path):
    files = {
        "top/__init__.py": "import third.party",
        "top/start.py": "def f():\n    from top.inner import deep\n",
        "top/inner/__init__.py": "",
        "top/inner/deep.py": "import top.start\nfrom top.errors import Wrong\nimport os.path",
        "top/errors.py": "class Wrong(Exception): pass",
        "top/unused.py": "import nothing",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_closure_follows_lazy_imports_and_adds_the_packages_above(tree) -> None:
    inside, outside = imports.closure(tree, ["top.start"], ("top",))
    names = {"top", "top.start", "top.inner", "top.inner.deep", "top.errors"}
    assert inside.keys() == names
    assert inside["top.inner"] == tree / "top/inner/__init__.py"
    assert outside == {"third.party", "os.path"}


def test_closure_passes_by_what_it_is_told_to(tree) -> None:
    inside, outside = imports.closure(tree, ["top.start"], ("top",), without=("top",))
    assert "top" not in inside
    assert "top.inner.deep" in inside
    assert "third.party" not in outside


def test_modules_below_names_packages_and_modules(tree) -> None:
    assert imports.modules_below(tree, "top.inner") == {"top.inner", "top.inner.deep"}


def test_strings_passed_to_a_function() -> None:
    source = '_load("a.b")\n_load(name)\nother("c")\ndef f(): return _load("d")'
    assert imports.strings_passed_to(source, "_load") == {"a.b", "d"}
