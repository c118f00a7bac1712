"""The Ed25519 keys that sign answers, and how one follows another without a guest being left out.

First the next key is published: its line goes into the `signing_keys` of every guest's config. Then
it is used, and the one before it goes on answering those who asked it for their challenge. At last
the key before is retired. Each step is one file that appears, moves or goes; the server reads them
when it starts and at a reload.
"""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tdxd.core.keyrelease import signing_key_id
from tdxd.errors import ConfigError, DataError, HostError
from tdxd.owner.files import read_private, write_private

__all__ = [
    "SigningKey",
    "pin_line",
    "publish_first",
    "publish_next",
    "read_signing_keys",
    "retire_previous",
    "use_next",
]

_CURRENT = "signing.key"
_NEXT = "signing.next.key"
_PREVIOUS = "signing.previous.key"
_KEY_BYTES = 32
_ROLES = {"current": _CURRENT, "next": _NEXT, "previous": _PREVIOUS}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SigningKey:
    """One key: `role` is current, next or previous; `key_id` the SHA-256 of its public half."""

    role: str
    private: Ed25519PrivateKey
    key_id: bytes


def read_signing_keys(directory: Path) -> tuple[SigningKey, ...]:
    """Read the keys of a store directory, the current one first.

    Raises: HostError, ConfigError for a file that others may read or that is no key.
    """
    return tuple(
        _read(directory / name, role)
        for role, name in _ROLES.items()
        if role == "current" or (directory / name).exists()
    )


def _read(path: Path, role: str) -> SigningKey:
    try:
        private = Ed25519PrivateKey.from_private_bytes(read_private(path))
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigError(f"{path} is not a raw Ed25519 private key") from exc
    public = private.public_key().public_bytes_raw()
    return SigningKey(role=role, private=private, key_id=signing_key_id(public))


def pin_line(key: SigningKey) -> str:
    """Return what guests pin: `ed25519:` and the raw public key in Base64."""
    public = key.private.public_key().public_bytes_raw()
    return "ed25519:" + base64.b64encode(public).decode()


def publish_first(directory: Path, random_bytes: Callable[[int], bytes]) -> None:
    """Make the first key of a new store directory.

    Raises: HostError.
    """
    write_private(directory / _CURRENT, random_bytes(_KEY_BYTES))


def publish_next(directory: Path, random_bytes: Callable[[int], bytes]) -> SigningKey:
    """Make the key that is to be used next; if there is one already, return that.

    Raises: HostError, ConfigError.
    """
    path = directory / _NEXT
    if not path.exists():
        # The server reads whatever has the name: it gets it whole, and the right owner's.
        made = directory / f".{_NEXT}.new"
        try:
            made.unlink(missing_ok=True)
            write_private(made, random_bytes(_KEY_BYTES))
            _give(made)
            os.rename(made, path)
        except OSError as exc:
            raise HostError.of("make", str(path), exc) from exc
    return _read(path, "next")


def _give(path: Path) -> None:
    """Give a file that root made to whom the directory belongs: the server runs as that user."""
    owner, mine = path.parent.stat(), path.stat()
    if (owner.st_uid, owner.st_gid) != (mine.st_uid, mine.st_gid):
        os.chown(path, owner.st_uid, owner.st_gid)


def use_next(directory: Path) -> SigningKey:
    """Make the next key the current one, and the current one the previous.

    Raises: DataError if no next key was published or the previous one is not retired, HostError,
    ConfigError.
    """
    current, following, previous = (directory / name for name in _ROLES.values())
    if not following.exists():
        raise DataError(
            f"{directory} has no next signing key",
            hint="publish one, and let every guest pin it, first",
        )
    _read(following, "next")
    if previous.exists() and not previous.samefile(current):
        raise DataError(
            f"{directory} still has its previous signing key",
            hint="retire it first: no guest waits for an answer by it any more",
        )
    try:
        if not previous.exists():  # there already if the step before was cut short here
            os.link(current, previous)
        os.replace(following, current)
    except OSError as exc:
        raise HostError.of("rename", str(following), exc) from exc
    return _read(current, "current")


def retire_previous(directory: Path) -> None:
    """Destroy the previous key.

    Raises: DataError if there is none, HostError.
    """
    path = directory / _PREVIOUS
    try:
        path.unlink()
    except FileNotFoundError as exc:
        raise DataError(f"{directory} has no previous signing key") from exc
    except OSError as exc:
        raise HostError.of("remove", str(path), exc) from exc
