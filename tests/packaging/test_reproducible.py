"""The same sources give the same bytes, wherever, whenever and by whomever they are built."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.unpacked import ROOT, build

pytestmark = pytest.mark.slow

COPIED = ("contrib", "docs", "systemd", "tdxd")


def copy_tree(target: Path, *, group_and_others: int) -> Path:
    """Copy the sources, with other rights and other times."""
    target.mkdir(parents=True)
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("CHANGELOG.md", "LICENSE", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, target / name)
    for path in [target, *target.rglob("*")]:
        path.chmod((path.stat().st_mode & 0o700) | group_and_others)
        os.utime(path, (1_000_000_000 + group_and_others, 1_000_000_000))
    return target


@pytest.mark.parametrize("name", ["tdxd", "tdxd-owner"])
def test_two_builds_are_equal_byte_for_byte(tmp_path, name) -> None:
    first = copy_tree(tmp_path / "a", group_and_others=0o000)
    second = copy_tree(tmp_path / "b/longer/way", group_and_others=0o055)
    # A time to come, which no file has by itself.
    epoch = {"SOURCE_DATE_EPOCH": "4102444800"}
    before = os.umask(0o077)
    try:
        here = {"TZ": "Asia/Tokyo", "LANG": "de_DE.UTF-8", **epoch}
        one = build(first, tmp_path / "one", name, **here)
        os.umask(0o002)
        there = {"TZ": "UTC", "PYTHONHASHSEED": "7", **epoch}
        two = build(second, tmp_path / "two", name, **there)
    finally:
        os.umask(before)
    assert one.name == two.name
    hashes = [hashlib.sha256(deb.read_bytes()).hexdigest() for deb in (one, two)]
    print(one.name, *hashes)
    assert hashes[0] == hashes[1]


def test_another_version_or_time_gives_another_package(tmp_path) -> None:
    tree = copy_tree(tmp_path / "tree", group_and_others=0o055)
    plain = build(tree, tmp_path, "tdxd")
    digest = hashlib.sha256(plain.read_bytes()).digest()
    other = build(tree, tmp_path, "tdxd", "--version", "99.0~test")
    assert other.name.startswith("tdxd_99.0~test_")
    unpacked = tmp_path / "unpacked"
    subprocess.run(["dpkg-deb", "-x", str(other), str(unpacked)], check=True)
    text = (unpacked / "usr/lib/tdxd/python/tdxd/__init__.py").read_text()
    assert '__version__ = "99.0~test"' in text
    again = build(tree, tmp_path, "tdxd", SOURCE_DATE_EPOCH="1700000000")
    assert again == plain
    assert hashlib.sha256(again.read_bytes()).digest() != digest


def test_an_up_to_date_package_is_left_alone(tmp_path) -> None:
    tree = copy_tree(tmp_path / "tree", group_and_others=0o055)
    deb = build(tree, tmp_path, "tdxd")
    made = deb.stat().st_ino
    assert build(tree, tmp_path, "tdxd").stat().st_ino == made
    page = tree / "contrib/man/tdxd.8"
    page.write_text(page.read_text() + '.\\" changed\n')
    assert build(tree, tmp_path, "tdxd").stat().st_ino != made
