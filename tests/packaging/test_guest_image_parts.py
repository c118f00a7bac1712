"""The measured image's parts, without booting it: the same bytes each time, and nothing more."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from contrib.guest.image.disk_image import make_disk
from contrib.guest.image.kept import CONTENTS, keep_named
from contrib.guest.image.rootfs import BLOCK_BYTES, make_root
from contrib.guest.image.uki import make_uki
from contrib.guest.image.variables import write_variable

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "contrib/guest/image"
LABEL = b"tdxd-data"


@pytest.fixture
def data_disk() -> ModuleType:
    """The program that finds the data disk, as a module."""
    path = str(IMAGE / "root/usr/lib/tdxd-image/data-disk")
    loader = importlib.machinery.SourceFileLoader("data_disk", path)
    spec = importlib.util.spec_from_loader("data_disk", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def block_device(directory: Path, name: str, *, label: bytes, magic: bool) -> None:
    """Pretend a device: its name in sysfs, and its first bytes in /dev."""
    (directory / "sys" / name).mkdir(parents=True)
    head = bytearray(8192)
    if magic:
        head[1024 + 0x38 : 1024 + 0x3A] = b"\x53\xef"
    head[1024 + 0x78 : 1024 + 0x78 + len(label)] = label
    (directory / "dev").mkdir(exist_ok=True)
    (directory / "dev" / name).write_bytes(head)


def test_the_data_disk_is_what_has_label_and_magic(
    tmp_path: Path, data_disk: ModuleType
) -> None:
    block_device(tmp_path, "vda", label=b"tdxd-data2", magic=True)
    block_device(tmp_path, "vdb", label=LABEL, magic=True)
    block_device(tmp_path, "vdc", label=LABEL, magic=False)
    block_device(tmp_path, "vdd", label=b"", magic=True)
    block_device(tmp_path, "dm-0", label=LABEL, magic=True)
    block_device(tmp_path, "loop0", label=LABEL, magic=True)
    (tmp_path / "sys/vde").mkdir()  # gone before it was opened
    (tmp_path / "sys/vdf").mkdir()
    (tmp_path / "dev/vdf").write_bytes(b"short")
    found = data_disk.candidates(str(tmp_path / "sys"), str(tmp_path / "dev"))
    assert found == [str(tmp_path / "dev/vdb")]
    block_device(tmp_path, "nvme0n1p3", label=LABEL, magic=True)
    found = data_disk.candidates(str(tmp_path / "sys"), str(tmp_path / "dev"))
    assert len(found) == 2  # and main() then uses none


def test_the_data_disk_is_never_trusted(data_disk: ModuleType) -> None:
    options = set(data_disk.OPTIONS.split(","))
    assert options == {"ro", "noload", "nodev", "nosuid", "noexec", "nosymfollow"}


def test_the_initrds_script_is_sound_shell() -> None:
    subprocess.run(["dash", "-n", str(IMAGE / "init")], check=True)
    text = (IMAGE / "init").read_text()
    for word in ("/bin/sh", "exec sh", "eval", "getty", "sulogin", "| sh"):
        assert word not in text


def test_only_what_is_named_stays(tmp_path: Path) -> None:
    for path, mode in (
        ("usr/lib/systemd/system/tdxd.service", 0o644),
        ("usr/lib/systemd/system/debug-shell.service", 0o644),
        ("usr/lib/systemd/system/new-in-debian.service", 0o644),
        ("usr/lib/udev/rules.d/60-persistent-storage.rules", 0o644),
        ("usr/lib/udev/rules.d/99-systemd.rules", 0o644),
        ("usr/lib/tmpfiles.d/other.conf", 0o644),
        ("usr/bin/su", 0o4755),
        ("usr/bin/mount", 0o4755),
        ("usr/bin/sticky", 0o2755),
        ("var/lib/dpkg/status", 0o644),
    ):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
        file.chmod(mode)
    keep_named(tmp_path, test=False)
    left = {
        str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()
    }
    assert left == {
        "usr/lib/systemd/system/tdxd.service",
        "usr/lib/udev/rules.d/99-systemd.rules",
        "usr/bin/mount",
        "usr/bin/sticky",
    }
    for name in ("mount", "sticky"):
        assert not (tmp_path / "usr/bin" / name).stat().st_mode & 0o6000


def test_the_products_command_line_lets_nobody_in() -> None:
    words = CONTENTS["command_line"].split()
    assert "lockdown=confidentiality" in words
    assert "module.sig_enforce=1" in words
    assert "systemd.import_credentials=no" in words
    assert "efi=noruntime" in words
    for word in words:
        assert not word.startswith(("init=", "rd.", "single", "systemd.debug", "root="))


def stub_like() -> bytes:
    """Make the least PE image that is one: a section of code, and room for more."""
    head = bytearray(1024)
    head[:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, 0x40)
    struct.pack_into("<4sHHIIIHH", head, 0x40, b"PE\0\0", 0x8664, 1, 0, 9, 9, 240, 0x22)
    struct.pack_into("<HBBIII", head, 0x58, 0x20B, 0, 0, 512, 0, 0)
    struct.pack_into("<II", head, 0x58 + 32, 4096, 512)
    struct.pack_into("<II", head, 0x58 + 56, 0x2000, 1024)
    section = (b".text", 100, 0x1000, 512, 1024, 0, 0, 0, 0, 0x60000020)
    struct.pack_into("<8sIIIIIIHHI", head, 0x58 + 240, *section)
    return bytes(head) + bytes(512) + b"symbols"


def test_a_kernel_image_has_its_sections_at_pages_of_their_own() -> None:
    parts = {".cmdline": b"quiet", ".linux": b"k" * 5000, ".initrd": b"i"}
    made, sections = make_uki(stub_like(), parts)
    assert list(sections) == list(parts)
    (count,) = struct.unpack_from("<H", made, 0x46)
    assert count == 4
    end = 0
    for number, (name, content) in enumerate(parts.items(), start=1):
        at = 0x58 + 240 + 40 * number
        text, size, address, raw, place = struct.unpack_from("<8sIIII", made, at)
        assert text.rstrip(b"\0").decode() == name
        assert made[place : place + size] == content
        assert address % 4096 == 0
        assert address >= end
        assert raw % 512 == 0
        end = address + size
    assert b"symbols" not in made
    assert make_uki(stub_like(), parts) == (made, sections)
    with pytest.raises(ValueError, match="no room"):
        make_uki(stub_like(), {f".{number}": b"x" for number in range(20)})
    with pytest.raises(ValueError, match="no PE image"):
        make_uki(bytes(2048), parts)


def test_the_same_tree_gives_the_same_disk(tmp_path: Path) -> None:
    """Whatever the times, the order and the owner of its files."""
    made = []
    for number, names in enumerate((("a", "b"), ("b", "a"))):
        place = tmp_path / str(number)
        tree = place / "tree"
        tree.mkdir(parents=True)
        for name in names:
            (tree / name).write_bytes(name.encode() * 9000)
            os.utime(tree / name, (1000 * number, 2000 * number))
        uki = place / "uki.efi"
        uki.write_bytes(b"MZ" + bytes(100000))
        root = make_root(tree, place / "root")
        partitions = make_disk(uki, root.partition, root.root_hash, place / "disk")
        made.append((root.root_hash, partitions, (place / "disk").read_bytes()))
    assert made[0] == made[1]
    _root_hash, (esp, root_partition), disk = made[0]
    assert disk[esp.first_byte + 82 : esp.first_byte + 87] == b"FAT32"
    assert disk[root_partition.first_byte + 1024 :][:4] == bytes.fromhex("e2e1f5e0")


@pytest.mark.skipif(shutil.which("veritysetup") is None, reason="cryptsetup-bin")
def test_the_hash_tree_is_the_kernels(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(3 * 2**20))
    root = make_root(tree, tmp_path / "root")
    check = [
        *("veritysetup", "verify", "--no-superblock", "--salt=-", "--hash=sha256"),
        *(f"--data-blocks={root.blocks}", f"--hash-offset={root.blocks * BLOCK_BYTES}"),
        *(str(root.partition), str(root.partition), root.root_hash),
    ]
    assert subprocess.run(check, check=False).returncode == 0
    with root.partition.open("r+b") as file:
        file.seek(root.blocks // 2 * BLOCK_BYTES)
        file.write(b"other")
    assert subprocess.run(check, check=False, capture_output=True).returncode != 0


def test_a_variable_is_appended_to_the_firmwares(tmp_path: Path) -> None:
    source = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
    flash = tmp_path / "variables.fd"
    shutil.copy(source, flash)
    vendor = "8cf2644b-4b0b-428f-9387-6d876050dc67"
    write_variable(flash, "First", vendor, b"one")
    write_variable(flash, "Second", vendor, b"two!")
    data = flash.read_bytes()
    assert len(data) == source.stat().st_size
    first = data.index("First".encode("utf-16-le"))
    second = data.index("Second".encode("utf-16-le"))
    assert (second - first) % 4 == 0
    assert stat.S_ISREG(flash.stat().st_mode)
