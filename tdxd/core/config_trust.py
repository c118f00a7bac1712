"""What proves the configuration to the key server: the digest of its files, and the verdict.

A quote covers the kernel's command line (RTMR2) and MRCONFIGID. So a configuration counts as
measured if it lies on a root file system whose dm-verity root hash stands on the command line,
or if its digest is the TD's MRCONFIGID. That the key server's policy pins these is its part.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Sequence

__all__ = ["ConfigTrust", "command_line_root_hash", "config_digest", "verity_root_hash"]

_LABEL = b"tdxd/config/v1"
_ROOT_HASH = re.compile(r"[0-9a-f]{64}(?:[0-9a-f]{64})?")
_WEAKER = ("ignore_corruption", "check_at_most_once", "ignore_zero_blocks")
_ROOT_HASH_FIELD = 8
_FIRST_OPTION = 11
"""dm-verity's parameters: version, two devices, two block sizes, blocks, start, algorithm,
digest, salt, and then the number of options and these."""


class ConfigTrust(enum.Enum):
    """What proves a configuration, as `status` shows it."""

    ROOT_FILE_SYSTEM = "measured (rootfs)"
    CONFIG_ID = "measured (MRCONFIGID)"
    UNMEASURED = "unmeasured"
    CONTRADICTED = "unmeasured (MRCONFIGID is of another)"
    """The TD was started for another configuration, which a policy may pin: never accepted."""


def config_digest(files: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the SHA-384 that MRCONFIGID must be for these files, given as (name, content).

    SHA-384(LP(label) || count || for each file LP(name) || LP(content)); LP(x) is x after its
    length; lengths and the count are 4 bytes, big-endian.
    """
    hasher = hashlib.sha384()
    _add(hasher, _LABEL)
    hasher.update(len(files).to_bytes(4, "big"))
    for name, content in files:
        _add(hasher, name.encode())
        _add(hasher, content)
    return hasher.digest()


def _add(hasher: hashlib._Hash, data: bytes) -> None:
    hasher.update(
        len(data).to_bytes(4, "big")
    )  # as the protocol's LP, without its imports
    hasher.update(data)


def command_line_root_hash(command_line: str) -> str | None:
    """Return `roothash=` of the kernel's command line; `None` unless it stands there once.

    Source: systemd-veritysetup-generator(8).
    """
    words = command_line.split(" -- ", maxsplit=1)[0].split()
    found = [
        word.removeprefix("roothash=") for word in words if word.startswith("roothash=")
    ]
    if len(found) != 1 or not _ROOT_HASH.fullmatch(found[0].lower()):
        return None
    return found[0].lower()


def verity_root_hash(target: str, parameters: str) -> str | None:
    """Return the root hash of a live dm-verity table; `None` if it is none, or a weaker one.

    Weaker is one that gives wrong blocks to readers, or checks each block only once.

    Source: Linux, Documentation/admin-guide/device-mapper/verity.rst.
    """
    fields = parameters.split()
    if target != "verity" or len(fields) <= _ROOT_HASH_FIELD:
        return None
    if any(word in _WEAKER for word in fields[_FIRST_OPTION:]):
        return None
    root_hash = fields[_ROOT_HASH_FIELD].lower()
    return root_hash if _ROOT_HASH.fullmatch(root_hash) else None
