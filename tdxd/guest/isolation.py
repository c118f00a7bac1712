"""What model servers and the front may touch, and how much of that this kernel enforces."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence

from tdxd.core.serving_config import ServingConfig
from tdxd.host import landlock, seccomp
from tdxd.host.cgroup import Limits
from tdxd.host.confine import Confinement
from tdxd.host.haproxy_config import REST_PORTS
from tdxd.host.proc import is_user

__all__ = ["FRONT_USER", "front_user", "limits_of", "of_front", "of_server", "shown"]

FRONT_USER = "tdxd-front"

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
_READ = (
    "/proc",
    "/sys/devices/system",
    "/sys/bus/pci",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/hosts",
    "/etc/ssl/openssl.cnf",
)
"""What the C library, TensorFlow and OpenSSL look up; nothing of it is secret from a user."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_GPU_DEVICES = "/dev/nvidia*"


def of_server(
    config: ServingConfig,
    command: str,
    *,
    read: Sequence[str] = (),
    sockets: Sequence[str] = (),
    tmp: str | None = None,
    rest_port: int | None = None,
) -> Confinement:
    """Confine a model server: it reads its models, writes to `tmp`, and connects to nobody."""
    files = landlock.FileRules(
        execute=(*_SYSTEM, *_installed_in(command), *config.read_paths),
        read=(*_READ, *read, *sockets),
        write=() if tmp is None else (tmp,),
        sockets=tuple(sockets),
        devices=(*_DEVICES, *sorted(glob.glob(_GPU_DEVICES))),
    )
    bind = () if rest_port is None else (rest_port,)
    ports = landlock.PortRules(bind=bind)
    return Confinement(files=files, ports=ports, may_connect=False)


def of_front(config: ServingConfig, directory: str) -> Confinement:
    """Confine the front: it reads its configuration and writes nothing.

    TCP leads to the model servers' REST ports alone, also from a listening socket that was
    turned round by connect(AF_UNSPEC), where the kernel can say so.
    """
    files = landlock.FileRules(
        execute=(*_SYSTEM, *_installed_in(config.haproxy)),
        read=(*_READ, directory),
        devices=_DEVICES,
    )
    connect = () if config.rest_listen is None else tuple(REST_PORTS.values())
    ports = landlock.PortRules(connect=connect)
    return Confinement(files=files, ports=ports, may_connect=True)


def front_user(config: ServingConfig) -> str:
    """Return the front's user; one of its own keeps the TLS key from a model server."""
    if config.front_user is not None:
        return config.front_user
    return FRONT_USER if is_user(FRONT_USER) else config.user


def limits_of(config: ServingConfig) -> Limits | None:
    """Return what a model server may use, if anything is limited."""
    if config.memory_limit_bytes is None and config.cpu_limit is None:
        return None
    return Limits(memory_bytes=config.memory_limit_bytes, cpus=config.cpu_limit)


def shown(config: ServingConfig, limits_problem: str) -> dict[str, object]:
    """Return what this kernel enforces, for `status`; `limits` is `None` if none is configured."""
    limits = limits_problem or "in force" if limits_of(config) else None
    abi = landlock.abi()
    return {
        "landlock_abi": abi,
        "files": abi > 0,
        "tcp_ports": abi >= landlock.ABI_TCP,
        "signals": abi >= landlock.ABI_SCOPES,
        "seccomp": seccomp.supported(),
        "limits": limits,
        "front_user_apart": front_user(config) != config.user,
    }


def _installed_in(command: str) -> tuple[str, ...]:
    """Return the directories of a program outside /usr: `PREFIX` of `PREFIX/bin/program`."""
    path = shutil.which(command)
    if path is None:
        return ()
    found = {_prefix(os.path.abspath(path)), _prefix(os.path.realpath(path))}
    return tuple(sorted(found - {"/"}))


def _prefix(path: str) -> str:
    directory = os.path.dirname(path)
    in_bin = os.path.basename(directory) in ("bin", "sbin")
    return os.path.dirname(directory) if in_bin else directory
