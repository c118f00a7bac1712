"""The key-encryption key: an HPKE key pair that secrets are sealed to.

Bundles lie in the database sealed to it, bound to their volume id and generation, so whoever writes
to the database can neither read a secret nor put one in another's place. Its private half also
authenticates the rows (`key`): to open a secret and to put one into the store need it both.

While one key follows another (`rotation`) there are two files. Which of them is the store's is
decided by the database alone: the key that its seal is authentic under.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from pathlib import Path

from tdxd.core import hpke
from tdxd.core.keyrelease import encode_lp
from tdxd.core.named_secret import ReleasedBundle, parse_released_bundle
from tdxd.core.secret import Secret
from tdxd.errors import ConfigError, DataError, HostError
from tdxd.owner.files import read_bytes, read_private, write_private, write_public
from tdxd.owner.store.key import StoreKey

__all__ = [
    "PRIVATE_NAME",
    "PUBLIC_NAME",
    "Kek",
    "create_kek",
    "next_path",
    "read_kek",
    "read_public",
    "unwrap",
    "wrap",
]

PRIVATE_NAME = "kek.private"
"""96 bytes: ML-KEM-768 seed (64) || X25519 private key (32); mode 0600."""
PUBLIC_NAME = "kek.public"
"""1216 bytes: ML-KEM-768 (1184) || X25519 (32)."""
_LABEL = b"tdxd/kek/v1"


def create_kek(directory: Path, seed: Secret) -> None:
    """Write both halves of the pair that a 96-byte seed yields.

    Raises: HostError, where a file exists already among other reasons.
    """
    pair = hpke.key_pair(seed)
    write_private(directory / PRIVATE_NAME, seed.reveal())
    write_public(directory / PUBLIC_NAME, pair.public)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Kek(hpke.KeyPair):
    """The pair, and the key that authenticates the store's rows.

    `unfinished`: it is the store's key already, but its file has not taken the old one's place.
    """

    store_key: StoreKey
    unfinished: bool = False

    @property
    def key_id(self) -> str:
        """The SHA-256 of the public half in hex: what tells one from another in the audit log."""
        return hashlib.sha256(self.public).hexdigest()


def next_path(path: Path) -> Path:
    """Return where the key that follows the one of a file lies: beside it, on its file system."""
    real = Path(os.path.realpath(path))
    return real.with_name(f"{real.stem}.next{real.suffix}")


def read_kek(path: Path) -> Kek:
    """Read a file that holds the private half.

    Raises: HostError, ConfigError for a wrong size or a file that others may read.
    """
    with _read_seed(path) as seed:
        pair = hpke.key_pair(seed)
        return Kek(private=pair.private, public=pair.public, store_key=StoreKey(seed))


def _read_seed(path: Path) -> Secret:
    try:
        raw = read_private(path)
    except HostError as exc:
        if exc.errno != errno.ENOENT:
            raise
        raise ConfigError(
            f"{path} is missing: nothing in the store can be authenticated without it",
            hint="name the private half of the key-encryption key: --kek FILE",
        ) from exc
    if len(raw) != hpke.SEED_BYTES:
        raise ConfigError(f"{path} has {len(raw)} bytes, not {hpke.SEED_BYTES}")
    return Secret(raw)


def read_public(directory: Path, kek: Kek) -> bytes:
    """Return the public half, to seal secrets to: the private one vouches for it.

    Who writes to the database may well be able to write the file, too.

    Raises: HostError, ConfigError.
    """
    path = directory / PUBLIC_NAME
    if read_bytes(path) != kek.public and not kek.unfinished:
        raise ConfigError(
            f"{path} is not the public half of the key-encryption key",
            hint="nothing was sealed to it; who put it there? a backup has the right one",
        )
    return kek.public


def wrap(public: bytes, bundle: ReleasedBundle) -> bytes:
    """Seal a bundle to the public half.

    Raises: ConfigError.
    """
    key = hpke.parse_public_key(public, error=ConfigError)
    manifest = bundle.manifest
    return hpke.seal(
        bundle.encode(), key, _info(manifest.volume_id, manifest.generation)
    )


def unwrap(
    pair: hpke.KeyPair, wrapped: bytes, volume_id: str, generation: int
) -> ReleasedBundle:
    """Open what `wrap` made, for the id and generation that it was made for.

    Raises: DataError.
    """
    what = f"wrapped secret of volume {volume_id!r} generation {generation}"
    info = _info(volume_id, generation)
    plain = hpke.open_sealed(wrapped, pair.private, info, error=DataError, what=what)
    bundle = parse_released_bundle(plain, source=what)
    manifest = bundle.manifest
    if (manifest.volume_id, manifest.generation) != (volume_id, generation):
        raise DataError(
            f"{what} holds {manifest.volume_id!r} generation {manifest.generation}"
        )
    return bundle


def _info(volume_id: str, generation: int) -> bytes:
    return (
        encode_lp(_LABEL)
        + encode_lp(volume_id.encode())
        + generation.to_bytes(8, "big")
    )
