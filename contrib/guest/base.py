"""The guest's Debian: packages only, of this machine's release and from its own archives."""

from __future__ import annotations

import subprocess
from pathlib import Path

from contrib.guest.cache import Inputs, made

__all__ = ["KEYS", "apt_options", "archives", "base_directory", "release"]

# What the product's packages depend on, so that they install without a network.
_PRODUCT = (
    "python3",
    "haproxy",
    "dmsetup",
    "ca-certificates",
    "erofs-utils",
    "util-linux",
    "iproute2",
    "libstdc++6",  # TensorFlow's wheel
)
# What makes it a machine.
_MACHINE = (
    "systemd-sysv",
    "udev",
    "kmod",
    "dbus",
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
)
# What the tests need: the agent, the simulator's FUSE, ways to compare with and to look inside.
_TESTS = (
    "qemu-guest-agent",
    "fuse3",
    "libfuse3-3",
    "cryptsetup-bin",
    "e2fsprogs",
    "fio",
    "procps",
)
_PACKAGES = (*_PRODUCT, *_MACHINE, *_TESTS)
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")
_HERE = Path(__file__).parent
_SLIM = _HERE / "slim"
_INITRAMFS_HOOK = _HERE / "initramfs-hook"
_INITRAMFS_CONFIG = "MODULES=list\nCOMPRESS=zstd\n"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LIMIT_S = 900.0


def base_directory() -> Path:
    """Return the directory with `base.tar`, `kernel` and `initrd`, made if need be.

    An archive that moved on makes no new one: remove the cache to take in updates.
    """
    inputs = Inputs("base", release(), _PACKAGES, _LEFT_OUT, _INITRAMFS_CONFIG)
    inputs.files([_SLIM, _INITRAMFS_HOOK], _HERE)
    return made(inputs, _bootstrap)


def release() -> str:
    """Return the code name of this machine's Debian release.

    Raises: SystemExit, on another distribution.
    """
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    if fields.get("ID") != "debian":
        raise SystemExit(
            "guest: the guest is made of this machine's release, which is not Debian"
        )
    return fields["VERSION_CODENAME"]


def _bootstrap(directory: Path) -> None:
    sources = directory / "sources.list"
    sources.write_text(archives(release()), encoding="utf-8")
    config = directory / "initramfs.conf"
    config.write_text(_INITRAMFS_CONFIG, encoding="utf-8")
    tools = "$1/etc/initramfs-tools"
    hooks = (
        # Before the kernel is installed, so that its one initrd is made with these.
        f'--essential-hook=install -D -m 644 "{config}" "{tools}/conf.d/guest"',
        f'--essential-hook=install -D -m 755 "{_INITRAMFS_HOOK}" "{tools}/hooks/guest"',
        f'--customize-hook="{_SLIM}" "$1"',
        f'--customize-hook=cp "$1"/boot/vmlinuz-* "{directory}/kernel"',
        f'--customize-hook=cp "$1"/boot/initrd.img-* "{directory}/initrd"',
    )
    subprocess.run(
        [
            *("mmdebstrap", "--mode=root", "--variant=essential", "--quiet"),
            f"--include={','.join(_PACKAGES)}",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
            *(f"--aptopt={line}" for line in apt_options()),
            *hooks,
            *(release(), str(directory / "base.tar"), str(sources)),
        ],
        check=True,
        timeout=_LIMIT_S,
    )


def archives(codename: str) -> str:
    """Return this machine's own archives of its release, as one-line entries.

    Raises: SystemExit, if there is none.
    """
    entries = _index_entries(codename)
    if not entries:
        subprocess.run(["apt-get", "update", "-qq"], check=True, timeout=_LIMIT_S)
        entries = _index_entries(codename)
    if not entries:
        raise SystemExit(f"guest: this machine has no Debian archive of {codename}")
    return "".join(entries)


def _index_entries(codename: str) -> list[str]:
    form = "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    text = _output("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    entries = []
    for line in text.splitlines():
        origin, of, uri, suite, component = line.split("|")
        if origin == "Debian" and of.split("-")[0] == codename and component == "main":
            entries.append(f"deb [signed-by={KEYS}] {uri} {suite} {component}\n")
    return entries


def apt_options() -> list[str]:
    """Return how this machine reaches its archives: proxies, and what it checks."""
    wanted = ("Acquire::http", "Acquire::Check-", "Acquire::Retries")
    lines = _output("apt-config", "dump").splitlines()
    return [line.rstrip(";") for line in lines if line.startswith(wanted)]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
