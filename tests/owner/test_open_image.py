"""tdx-seal open: what an image holds, listed and extracted, every block verified."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tdxd.core import erofs, luks2
from tdxd.errors import BadHeaderError, DataError, HostError, IntegrityError
from tdxd.owner.sealing import extract
from tests import reference_image
from tests.owner.sealing import file_system, make, model_directory, quiet, tree_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = model_directory(tmp_path / "model")
    version = directory / "models/m/1"
    os.link(version / "saved_model.pb", version / "again.pb")
    (version / "empty").mkdir()
    return directory


def flip(image: Path, offset: int) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 1]))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_comes_out_is_what_went_in(model, tmp_path):
    made = make(model, tmp_path / "out")
    image = tmp_path / "out/m.img"
    assert extract.extract(image, made.bundle, tmp_path / "back", quiet)[0] == 305
    assert tree_of(tmp_path / "back") == tree_of(model)
    version = tmp_path / "back/models/m/1"
    assert (version / "again.pb").samefile(version / "saved_model.pb")
    listed = {one.path: one.inode for one in extract.files(image, made.bundle)}
    assert set(listed) == set(tree_of(model))
    for name, inode in listed.items():
        if stat.S_ISREG(inode.mode):
            assert inode.size_bytes == (model / name).stat().st_size


def test_it_is_what_the_tools_of_erofs_extract(model, tmp_path):
    made = make(model, tmp_path / "out")
    image, plain = tmp_path / "out/m.img", tmp_path / "plain"
    plain.write_bytes(file_system(image, made.bundle))
    argv = ["fsck.erofs", f"--extract={tmp_path / 'theirs'}", "--no-preserve", plain]
    subprocess.run(argv, check=True, capture_output=True)
    extract.extract(image, made.bundle, tmp_path / "ours", quiet)
    assert tree_of(tmp_path / "ours") == tree_of(tmp_path / "theirs")


def test_sealing_what_came_out_makes_the_same_image(model, tmp_path):
    made = make(model, tmp_path / "out")
    extract.extract(tmp_path / "out/m.img", made.bundle, tmp_path / "back", quiet)
    make(tmp_path / "back", tmp_path / "again")
    one, two = (tmp_path / name / "m.img" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_private_files_stay_private(model, tmp_path):
    made = make(model, tmp_path / "out")
    mask = os.umask(0o022)
    try:
        extract.extract(tmp_path / "out/m.img", made.bundle, tmp_path / "back", quiet)
    finally:
        os.umask(mask)
    modes = {
        name: stat.S_IMODE((tmp_path / "back" / name).stat().st_mode)
        for name in ("", "models", "models/m/1/whole", "tls", "tls/server.pem")
    }
    assert [oct(mode) for mode in modes.values()] == [
        "0o755",
        "0o755",
        "0o644",
        "0o700",
        "0o600",
    ]


@pytest.mark.parametrize(
    ("size", "levels"), [(0, 1), (130 * 4096, 2), (129 * 128 * 4096, 3)]
)
def test_trees_of_every_depth(tmp_path, size, levels):
    version = tmp_path / "model/models/m/1"
    version.mkdir(parents=True)
    with (version / "weights").open("wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(b"middle")
    made = make(tmp_path / "model", tmp_path / "out")
    blocks = made.bundle.manifest.data_blocks
    assert levels == (1 if blocks <= 128 else 2 if blocks <= 128**2 else 3)
    extract.extract(tmp_path / "out/m.img", made.bundle, tmp_path / "back", quiet)
    assert tree_of(tmp_path / "back") == tree_of(tmp_path / "model")


def test_an_image_of_one_block_has_no_tree(tmp_path):
    (tmp_path / "model/models").mkdir(parents=True)
    (tmp_path / "model/models/tiny").write_bytes(b"tiny")
    data = reference_image.file_system(tmp_path / "model", tmp_path / "fs")
    assert len(data) == 4096
    made = reference_image.seal(data, tmp_path / "m.img")
    extract.extract(made.path, made.bundle, tmp_path / "back", quiet)
    assert (tmp_path / "back/models/tiny").read_bytes() == b"tiny"


def test_a_changed_block_gives_no_directory(model, tmp_path):
    """Every block of the payload in turn."""
    made = make(model, tmp_path / "out")
    manifest, image = made.bundle.manifest, tmp_path / "out/m.img"
    files = dict(tree_of(model))
    for block in range(manifest.data_blocks + manifest.hash_blocks):
        offset = luks2.PAYLOAD_OFFSET_BYTES + block * 4096 + 77
        flip(image, offset)
        with pytest.raises(IntegrityError):
            extract.extract(image, made.bundle, tmp_path / "back", quiet)
        assert names(tmp_path) == ["model", "out"]
        flip(image, offset)
    extract.extract(image, made.bundle, tmp_path / "back", quiet)
    assert tree_of(tmp_path / "back") == files


def test_a_list_reads_what_it_shows_and_verifies_that(model, tmp_path):
    made = make(model, tmp_path / "out")
    image = tmp_path / "out/m.img"
    inodes = {one.path: one.inode for one in extract.files(image, made.bundle)}
    content = inodes["models/m/1/saved_model.pb"].extents[0][0]
    flip(image, luks2.PAYLOAD_OFFSET_BYTES + content)
    assert len(list(extract.files(image, made.bundle))) == len(inodes)
    with pytest.raises(IntegrityError, match=f"block {content // 4096} is not"):
        extract.extract(image, made.bundle, tmp_path / "back", quiet)
    flip(image, luks2.PAYLOAD_OFFSET_BYTES + inodes["models"].offset)
    with pytest.raises(IntegrityError, match="is not what was sealed"):
        list(extract.files(image, made.bundle))


def test_another_bundle_does_not_open_it(model, tmp_path):
    make(model, tmp_path / "out")
    other = make(model, tmp_path / "other", generation=4)
    with pytest.raises(IntegrityError, match="does not open with the key of m gen"):
        extract.extract(tmp_path / "out/m.img", other.bundle, tmp_path / "back", quiet)
    assert not (tmp_path / "back").exists()


def test_an_existing_directory_is_kept(model, tmp_path):
    made = make(model, tmp_path / "out")
    (tmp_path / "back").mkdir()
    with pytest.raises(DataError, match="back exists already"):
        extract.extract(tmp_path / "out/m.img", made.bundle, tmp_path / "back", quiet)
    target = tmp_path / "nowhere/back"
    with pytest.raises(HostError, match=r"make the directory .*nowhere"):
        extract.extract(tmp_path / "out/m.img", made.bundle, target, quiet)


def test_odd_names_survive(model, tmp_path):
    for name in (b"new\nline", b"\xff\xfe", "ä".encode(), b"...", b" ", b"-rf"):
        Path(os.fsdecode(os.fsencode(model / "models") + b"/" + name)).write_bytes(name)
    made = make(model, tmp_path / "out")
    extract.extract(tmp_path / "out/m.img", made.bundle, tmp_path / "back", quiet)
    assert tree_of(tmp_path / "back") == tree_of(model)


@pytest.mark.parametrize("name", [b"../ver.pem", b"/etc/hosts", b"\0erver.pem"])
def test_a_name_that_leads_elsewhere_is_refused(model, tmp_path, name):
    """Only the owner could seal one; still nothing is written outside."""
    plain = reference_image.file_system(model, tmp_path / "fs")
    data = plain.replace(b"server.pem", name)
    assert data != plain
    made = reference_image.seal(data, tmp_path / "m.img")
    with pytest.raises(DataError, match="has a file of the name"):
        extract.extract(made.path, made.bundle, tmp_path / "back", quiet)
    assert names(tmp_path) == ["fs", "m.img", "model"]


def test_a_directory_inside_itself_is_refused(model, tmp_path):
    data = bytearray(reference_image.file_system(model, tmp_path / "fs"))

    def read(at: int, size: int) -> bytes:
        return bytes(data[at : at + size])

    inodes = {one.path: one.inode for one in erofs.entries(read)}
    outer, inner = inodes["models"], inodes["models/m"]
    place = outer.extents[0][0]
    here = data.index(inner.nid.to_bytes(8, "little"), place)
    data[here : here + 8] = outer.nid.to_bytes(8, "little")
    with pytest.raises(DataError, match="two directories 'models/m'"):
        list(erofs.entries(read))


def test_a_link_to_the_image_is_followed_for_the_owner(model, tmp_path):
    made = make(model, tmp_path / "out")
    (tmp_path / "link").symlink_to("out/m.img")
    assert list(extract.files(tmp_path / "link", made.bundle))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadHeaderError):
        list(extract.files(tmp_path / "fifo", made.bundle))


@pytest.mark.root
def test_a_full_disk_leaves_nothing(model, tmp_path):
    made = make(model, tmp_path / "out")
    small = tmp_path / "small"
    small.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", small]
    subprocess.run(argv, check=True)
    try:
        with pytest.raises(HostError, match="No space left on device"):
            extract.extract(tmp_path / "out/m.img", made.bundle, small / "back", quiet)
        assert names(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.root
def test_any_user_can_open_an_image(model, tmp_path):
    make(model, tmp_path / "out")
    place = Path("/var/tmp") / f"tdxd-open-{os.getpid()}"
    place.mkdir()
    try:
        for name in ("m.img", "m.bundle"):
            shutil.copyfile(tmp_path / "out" / name, place / name)
            os.chown(place / name, 65534, 65534)
        os.chown(place, 65534, 65534)
        argv = [sys.executable, "-m", "tdxd.cli.tdx_seal", "open", str(place / "m.img")]
        argv += ["--bundle", str(place / "m.bundle"), "--extract", str(place / "back")]
        nobody = {"user": 65534, "group": 65534, "extra_groups": []}
        root = Path(__file__).parents[2]
        subprocess.run(argv, cwd=root, check=True, capture_output=True, **nobody)  # type: ignore[call-overload]
        assert tree_of(place / "back") == tree_of(model)
        assert (place / "back/tls/server.pem").stat().st_uid == 65534
    finally:
        shutil.rmtree(place)
