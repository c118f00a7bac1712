"""Which files go where, without building anything."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from contrib.deb import distributions
from contrib.deb.build import source_epoch_s
from contrib.deb.contents import contents, packaged_modules, units_of
from contrib.deb.packages import PACKAGES, Package
from tdxd.core import config
from tests.packaging.unpacked import ROOT

EXTRAS = {
    "tdxd": None,
    "tdxd-owner": "owner",
    "tdxd-model-server": "model-server",
}
FORBIDDEN = {
    "tdxd": {"sim", "owner", "user", "model_server"},
    "tdxd-owner": {"sim", "guest", "user", "model_server"},
    "tdxd-model-server": {"sim", "guest", "owner", "user"},
}
packages = pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES.keys())


def paths_of(package: Package) -> list[str]:
    return [one.path for one in contents(package, "1.2.3", 0)]


@packages
def test_each_role_has_a_package_of_its_own(package: Package) -> None:
    modules, _outside = packaged_modules(package)
    parts = {name.split(".")[1] for name in modules if "." in name}
    assert "errors" in parts
    assert not parts & FORBIDDEN[package.name]
    programs = {name.rpartition(".")[2] for name in modules if ".cli." in name}
    assert not programs & {"tdx_sim", "tdx_infer"}


@packages
def test_no_path_twice_and_no_stray_files(package: Package) -> None:
    paths = paths_of(package)
    assert len(paths) == len(set(paths))
    assert paths == sorted(paths)
    for path in paths:
        assert not path.endswith((".pyi", ".h", ".pyx", ".pyc", ".a"))
        assert "/tests/" not in path
        assert path.startswith(("usr/bin/", "usr/lib/", "usr/share/"))


@packages
def test_what_is_imported_is_declared_in_pyproject(package: Package) -> None:
    """A package's distributions are no more than an installation of its extra brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = list(project["dependencies"])
    extra = EXTRAS[package.name]
    if extra is not None:
        declared += project["optional-dependencies"][extra]
    allowed = distributions.with_requirements(Requirement(one).name for one in declared)
    _modules, outside = packaged_modules(package)
    assert distributions.holders(outside) <= allowed


def test_a_module_that_nothing_installed_holds_is_an_error() -> None:
    with pytest.raises(LookupError, match="no_such_module"):
        distributions.holders(["no_such_module.inner"])
    assert distributions.holders(["os.path", "sys"]) == set()


def test_every_file_of_systemd_is_in_one_package() -> None:
    found: list[Path] = []
    for package in PACKAGES.values():
        for one in contents(package, "1.2.3", 0):
            if isinstance(one.source, Path) and ROOT / "systemd" in one.source.parents:
                of_owner = one.source.name.startswith("tdx-keyd")
                assert (package.name == "tdxd-owner") == of_owner, one.path
                found.append(one.source)
    want = [path for path in (ROOT / "systemd").rglob("*") if path.is_file()]
    assert sorted(found) == sorted(want)


def test_every_file_of_monitoring_is_in_one_package_with_the_document() -> None:
    found: list[str] = []
    for package in PACKAGES.values():
        folder = f"usr/share/doc/{package.name}/monitoring/"
        here = {
            path.removeprefix(folder)
            for path in paths_of(package)
            if path.startswith(folder)
        }
        assert not here or "README.md" in here
        found += here - {"README.md"}
    want = [path.name for path in (ROOT / "contrib/monitoring").iterdir()]
    assert sorted(found) == sorted(want)


def test_the_guest_enables_its_units_and_the_owner_decides_himself() -> None:
    guest = units_of(contents(PACKAGES["tdxd"], "1", 0))
    enabled = ["tdxd-boot-check.service", "tdxd.service", "tdxd.socket"]
    assert guest == (enabled, [])
    owner = units_of(contents(PACKAGES["tdxd-owner"], "1", 0))
    assert owner == ([], ["tdx-keyd.service"])


def test_tensorflow_is_only_messages_in_the_guest() -> None:
    paths = paths_of(PACKAGES["tdxd"])
    found = [path for path in paths if "/python/tensorflow" in path]
    assert found
    for path in found:
        assert path.endswith(("_pb2.py", "/__init__.py", ".dist-info/METADATA"))
    assert "usr/lib/tdxd/python/tensorflow/__init__.py" not in paths
    assert len([path for path in found if path.endswith("_pb2.py")]) < 60


def test_the_example_configuration_is_valid() -> None:
    text = (ROOT / "contrib/deb/tdxd/tdxd.toml").read_text()
    assert config.parse_config([("example", text)]).volume[0].id == "digits"


@pytest.mark.parametrize(
    "script", sorted((ROOT / "contrib/deb").glob("tdxd*/p*")), ids=lambda one: one.name
)
def test_maintainer_scripts_are_posix_shell(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["dash", "-n", str(script)], check=True)


def test_the_time_is_the_commits(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    without_git = source_epoch_s(tmp_path)
    assert without_git == source_epoch_s(tmp_path)
    when = "1700000000 +0900"
    environment = {
        "GIT_AUTHOR_DATE": when,
        "GIT_COMMITTER_DATE": when,
        "PATH": "/usr/bin:/bin",
    }
    who = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "c"]):
        subprocess.run(
            ["git", "-C", str(tmp_path), *command], check=True, env=environment
        )
    assert source_epoch_s(tmp_path) == 1700000000
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12")
    assert source_epoch_s(tmp_path) == 12
