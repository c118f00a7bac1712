"""The initrd: one script, what it calls, and the modules that reach the root file system."""

from __future__ import annotations

import lzma
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from contrib.guest.image.kept import CONTENTS, modules_with_needs
from contrib.guest.image.programs import output

__all__ = ["make_initrd"]

_INIT = Path(__file__).with_name("init")
_FOLDERS = ("bin", "dev", "lib", "lib64", "modules", "proc", "root", "sys")
_APPLETS = ("cat", "dd", "grep", "insmod", "mount", "poweroff", "sleep", "switch_root")
_FOLDER = (stat.S_IFDIR | 0o755, b"")
_TRAILER = "TRAILER!!!"


def make_initrd(base: Path, tree: Path, release: str, command_line: str) -> bytes:
    """Return the archive, uncompressed: the kernel takes it as it is.

    It holds the command line that it accepts.
    """
    files: dict[str, tuple[int, bytes]] = dict.fromkeys(_FOLDERS, _FOLDER)

    def add(name: str, content: bytes, mode: int = 0o755) -> None:
        files[name] = (stat.S_IFREG | mode, content)

    add("init", _INIT.read_bytes())
    add("cmdline", command_line.encode() + b"\n", 0o644)
    add("bin/busybox", (base / "boot/bin/busybox").read_bytes())
    for name in _APPLETS:
        files[f"bin/{name}"] = (stat.S_IFLNK | 0o777, b"busybox")
    add("bin/dmsetup", (tree / "usr/sbin/dmsetup").read_bytes())
    for library in _libraries(tree, "/usr/sbin/dmsetup"):
        add(library.lstrip("/"), (tree / library.lstrip("/")).read_bytes())
    modules = tree / "usr/lib/modules" / release
    for number, path in enumerate(
        modules_with_needs(modules, CONTENTS["modules_initrd"])
    ):
        content = lzma.decompress(path.read_bytes())
        add(f"modules/{number:02}-{path.name.removesuffix('.xz')}", content, 0o644)
    return _archive(files)


def _libraries(tree: Path, program: str) -> Iterator[str]:
    """Yield what the dynamic linker would load, by the paths that it looks at."""
    told = output("chroot", tree, "/lib64/ld-linux-x86-64.so.2", "--list", program)
    for line in told.splitlines():
        found = re.search(r"(?:=> )?(/\S+) \(0x", line)
        if found:
            # All of one name in /lib: where the linker looks anyway.
            name = os.path.basename(found[1])
            yield f"/lib64/{name}" if name.startswith("ld-") else found[1]


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """Return a cpio archive in the format `newc`, of root's, without times.

    Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    folders = {
        str(place)
        for name in files
        for place in Path(name).parents
        if str(place) != "."
    }
    whole = dict.fromkeys(folders, _FOLDER) | files
    made = bytearray()
    entries = [*sorted(whole.items()), (_TRAILER, (0, b""))]
    for number, (name, (mode, content)) in enumerate(entries, start=1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        made += b"070701" + b"".join(b"%08X" % field for field in fields)
        made += name.encode() + b"\0"
        made += bytes(-len(made) % 4) + content
        made += bytes(-len(made) % 4)
    return bytes(made)
