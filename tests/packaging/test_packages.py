"""The small packages, unpacked: they run from what is in them, and hold nothing else."""

from __future__ import annotations

import json
import marshal
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from contrib.guest import base
from tests.packaging.unpacked import ROOT, installed

pytestmark = pytest.mark.slow

GUEST_LIMIT_BYTES = 64 * 2**20
_HEADER_BYTES = 16
_NEVER_CHECKED = 1
"""Flags of a compiled file: by hash, and the hash is not compared. Source: PEP 552."""
IMPORT_ALL = """
import importlib, json
for name in {modules!r}:
    importlib.import_module(name)
print(json.dumps([getattr(one, "__file__", None) for one in list(sys.modules.values())]))
"""
LAZY = """
import grpc, h11, pyroute2, socket
from tdxd.host import routes, tf_messages
request = tf_messages.model_status().GetModelStatusRequest()
request.model_spec.name = "m"
assert request.SerializeToString().hex() == "0a030a016d"
for family in ("predict", "model_metadata", "model_server_config", "meta_graph", "saved_model",
               "tensor", "prediction_log"):
    getattr(tf_messages, family)()
with pyroute2.IPRoute() as route:
    assert [one for one in route.get_links() if one.get_attr("IFLA_IFNAME") == "lo"]
channel = grpc.insecure_channel("unix:/nonexistent")
channel.close()
assert h11.Connection(h11.SERVER).our_state is h11.IDLE
"""
WORK = """
import os, tempfile
from tdxd.host.range_worker import Task
from tdxd.host.workers import Workers
with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
    source.write(bytes(8 * 4096))
    source.flush()
    fds = (source.fileno(), target.fileno())
    task = Task(op="encrypt", in_fd=fds[0], in_base=0, out_fd=fds[1], out_base=0,
                key=bytes(range(64)), salt=bytes(32))
    with Workers(2, fds=fds, what="zeros") as pool:
        pool.run(task, blocks=8)
        for process in pool._processes:
            with open(f"/proc/{process.pid}/cmdline") as file:
                argv = file.read().split("\\0")
            assert argv[:2] == ["/usr/bin/python3", "-IS"], argv
    assert os.fstat(fds[1]).st_size == 8 * 4096
"""
small = pytest.mark.parametrize("name", ["tdxd", "tdxd-owner"])


def apparent_bytes(root: Path) -> int:
    argv = ["du", "--apparent-size", "--block-size=1", "--summarize", str(root)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0])


def test_guest_package_is_at_most_64_mib_installed(unpacked) -> None:
    guest = unpacked("tdxd")
    size_bytes = apparent_bytes(guest.root)
    print(f"tdxd: {size_bytes / 2**20:.1f} MiB installed")
    assert 10 * 2**20 < size_bytes <= GUEST_LIMIT_BYTES
    stated_bytes = int(guest.field("Installed-Size")) * 1024
    assert stated_bytes <= GUEST_LIMIT_BYTES
    assert stated_bytes > size_bytes * 0.95


@small
def test_every_module_imports_from_the_package_alone(
    unpacked, clean_environment, name
) -> None:
    package = unpacked(name)
    modules = package.modules()
    assert len(modules) > 20
    done = package.run_alone(IMPORT_ALL.format(modules=modules), clean_environment)
    assert done.returncode == 0, done.stderr
    library = str(package.library)
    for path in json.loads(done.stdout):
        inside = path is None or path.startswith((library, "/usr/lib/python3"))
        assert inside, path
        assert path is None or "dist-packages" not in path


def test_what_the_daemon_imports_late_works(unpacked, clean_environment) -> None:
    done = unpacked("tdxd").run_alone(LAZY, clean_environment)
    assert done.returncode == 0, done.stderr


@small
def test_worker_processes_find_their_modules(unpacked, clean_environment, name) -> None:
    done = unpacked(name).run_alone(WORK, clean_environment)
    assert done.returncode == 0, done.stderr


@small
def test_modules_are_compiled_for_good_and_name_their_installed_path(
    unpacked, name
) -> None:
    package = unpacked(name)
    sources = sorted(package.library.rglob("*.py"))
    tag = sys.implementation.cache_tag
    for source in sources:
        compiled = source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc"
        data = compiled.read_bytes()
        assert int.from_bytes(data[4:8], "little") == _NEVER_CHECKED
        code = marshal.loads(data[_HEADER_BYTES:])
        assert code.co_filename == "/" + str(source.relative_to(package.root))
    assert len(sources) == len(list(package.library.rglob("*.pyc")))


@small
def test_no_file_knows_where_it_was_built(unpacked, name) -> None:
    package = unpacked(name)
    words = [str(ROOT).encode(), sys.prefix.encode(), b"/.stage-"]
    for path in package.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(word in data for word in words), path


@small
def test_owners_modes_and_times_are_the_same_everywhere(unpacked, name) -> None:
    argv = ["dpkg-deb", "-c", str(unpacked(name).deb)]
    listing = subprocess.run(
        argv,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TZ": "UTC", "LC_ALL": "C"},
    ).stdout.splitlines()
    assert len(listing) > 500
    assert {line.split()[1] for line in listing} == {"root/root"}
    assert len({tuple(line.split()[3:5]) for line in listing}) == 1
    modes = {line.split()[0] for line in listing}
    assert modes == {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x"}
    programs = [line.split()[5] for line in listing if line.startswith("-rwx")]
    assert all(path.startswith("./usr/bin/") for path in programs)
    assert len(programs) == {"tdxd": 2, "tdxd-owner": 3}[name]


@small
def test_shared_libraries_come_from_packages_that_are_depended_on(
    unpacked, name
) -> None:
    package = unpacked(name)
    libraries = [path for path in package.library.rglob("*") if ".so" in path.suffixes]
    assert libraries
    done = subprocess.run(
        ["ldd", *map(str, libraries)], capture_output=True, text=True, check=True
    )
    assert "not found" not in done.stdout
    names = set(re.findall(r"=> /\S*/(\S+) ", done.stdout))
    owners = set()
    for one in names:
        found = subprocess.run(
            ["dpkg-query", "-S", f"*/{one}"], capture_output=True, text=True, check=True
        )
        owners.add(found.stdout.split(":")[0])
    depends = {re.split(r"[ (]", part)[0] for part in depends_of(package)}
    assert owners - {"libc6"} <= depends
    assert "libc6" in depends


def depends_of(package) -> list[str]:
    return [one.strip() for one in re.split(r"[,|]", package.field("Depends"))]


def test_the_tests_guest_holds_what_the_packages_depend_on(unpacked) -> None:
    """It installs them without a network."""
    always = {"libc6", "libgcc-s1", "libssl3", "python3", "systemd"}  # every Debian
    for name in ("tdxd", "tdxd-owner", "tdxd-model-server"):
        for one in unpacked(name).field("Depends").split(","):
            names = {part.split()[0] for part in one.split("|")}
            assert names & {*always, *base._PACKAGES, "tdxd"}, one


def test_the_example_unit_and_page_are_where_debian_looks(unpacked) -> None:
    root = unpacked("tdxd").root
    for path in (
        "usr/lib/systemd/system/tdxd.service",
        "usr/lib/sysusers.d/tdxd.conf",
        "usr/share/man/man8/tdxd.8.gz",
        "usr/share/man/man5/tdxd.toml.5.gz",
        "usr/share/doc/tdxd/examples/tdxd.toml",
        "usr/share/doc/tdxd/licenses/trio/LICENSE.MIT",
        "usr/share/bash-completion/completions/tdxctl",
    ):
        assert (root / path).is_file(), path
    assert (root / "etc/tdxd").is_dir()
    about = (root / "usr/share/doc/tdxd/copyright").read_text()
    assert "trio" in about
    assert "common-licenses/Apache-2.0" in about


@pytest.fixture
def run(unpacked, clean_environment):
    """Return a function that runs a program as if both packages were installed."""
    prefix = installed(unpacked("tdxd"), unpacked("tdxd-owner"))

    def program(*argv: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, *map(str, argv)],
            env=clean_environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return program


@pytest.mark.root
def test_the_guests_programs_run_where_they_are_installed(
    unpacked, run, tmp_path
) -> None:
    config = tmp_path / "tdxd.toml"
    config.write_bytes((ROOT / "contrib/deb/tdxd/tdxd.toml").read_bytes())
    version = unpacked("tdxd").field("Version")
    done = run("tdxd", "--version")
    assert (done.returncode, done.stdout) == (0, f"tdxd {version}\n"), done.stderr
    done = run("tdxd", "--config", config, "--check-config")
    assert (done.returncode, done.stdout) == (0, f"{config}: ok, 1 volumes\n")
    done = run("tdxctl", "--help")
    assert done.returncode == 0
    assert "unmount" in done.stdout
    done = run("tdxctl", "--socket", tmp_path / "none", "status")
    assert done.returncode == 69
    assert done.stderr.startswith("tdxctl: error: no daemon at")


@pytest.mark.root
def test_the_owners_programs_run_where_they_are_installed(run, tmp_path) -> None:
    source = tmp_path / "source"
    (source / "models/m/1").mkdir(parents=True)
    (source / "models/m/1/saved_model.pb").write_bytes(b"weights")
    image, bundle = tmp_path / "m.img", tmp_path / "m.bundle"
    create = ("create", source, "--id", "m", "--generation", 1, "-o", image)
    done = run("tdx-seal", *create, "--bundle", bundle)
    assert done.returncode == 0, done.stderr
    done = run("tdx-seal", "verify", image, "--bundle", bundle)
    assert done.returncode == 0, done.stderr
    done = run("tdx-keyd", "init", tmp_path / "keys", "--name", "localhost")
    assert done.returncode == 0, done.stderr
    done = run("tdx-keyd", "add", tmp_path / "keys", bundle)
    assert (done.returncode, done.stdout) == (0, "added m generation 1\n"), done.stderr
