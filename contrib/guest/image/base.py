"""Debian's parts of the measured image: the packages of its root file system, and what boots it.

The kernel is that of backports: the release's own has neither a TDX guest driver nor configfs-tsm.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from contrib.guest.base import apt_options, archives, release
from contrib.guest.cache import Inputs, made

__all__ = ["EPOCH_S", "base_directory"]

EPOCH_S = 1767225600
"""2026-01-01: the time of everything in an image, whenever it is made."""

# What the product's package depends on, and what makes it a machine.
_PACKAGES = (
    "dmsetup",
    "haproxy",
    "kmod",
    "libssl3",
    "libstdc++6",
    "python3",
    "systemd",
    "systemd-resolved",
    "udev",
    "util-linux",
)
# The control channel, the simulator's FUSE, what looks inside.
_TESTS = ("fuse3", "iproute2", "libfuse3-3", "procps", "qemu-guest-agent")
_BOOT = ("linux-image-cloud-amd64", "systemd-boot-efi", "busybox-static")
"""These are unpacked beside the root file system, not installed in it."""
_LEFT_OUT = (
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
)
_FETCH = Path(__file__).with_name("fetch-boot")
_LIST = "dpkg-query --show --showformat='${Package} ${Version} ${Architecture}\\n'"
_LIMIT_S = 900.0


def base_directory(variant: str) -> Path:
    """Return the directory with `base.tar` and the tree `boot`, made if need be.

    `packages.list` names what is installed. `boot` has the files of the packages that boot the
    image, and `boot.list` their names, versions and hashes. An archive that moved on makes no new
    one: remove the cache to take in updates.
    """
    packages = _PACKAGES + (_TESTS if variant == "test" else ())
    inputs = Inputs("measured-base-" + variant, release(), packages, _BOOT, _LEFT_OUT)
    inputs.files([_FETCH], _FETCH.parent)
    return made(inputs, lambda directory: _bootstrap(packages, directory))


def _bootstrap(packages: tuple[str, ...], directory: Path) -> None:
    sources = directory / "sources.list"
    codename = release()
    own = archives(codename)
    sources.write_text(own + _backports(own, codename), encoding="utf-8")
    subprocess.run(
        [
            *("mmdebstrap", "--mode=root", "--variant=essential", "--quiet"),
            f"--include={','.join(packages)}",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
            *(f"--aptopt={line}" for line in apt_options()),
            f'--customize-hook=chroot "$1" {_LIST} >"{directory}/packages.list"',
            f'--customize-hook="{_FETCH}" "{directory}" {codename} {" ".join(_BOOT)}',
            *(codename, str(directory / "base.tar"), str(sources)),
        ],
        check=True,
        timeout=_LIMIT_S,
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "SOURCE_DATE_EPOCH": str(EPOCH_S),
        },
    )


def _backports(entries: str, codename: str) -> str:
    """Return the entry of backports: beside the release, in the same archive."""
    for line in entries.splitlines():
        *start, suite, component = line.split()
        if suite == codename:
            return f"{' '.join(start)} {codename}-backports {component}\n"
    raise SystemExit(f"guest: this machine has no Debian archive of {codename}")
