"""The key-encryption key: an HPKE key pair whose public half is enough to add secrets.

Bundles lie in the database sealed to it, bound to their volume id and generation, so whoever writes
to the database can neither read a secret nor put one in another's place.
"""

from __future__ import annotations

from pathlib import Path

from tdxd.core import hpke
from tdxd.core.bundle import KeyBundle
from tdxd.core.keyrelease import encode_lp
from tdxd.core.secret import Secret
from tdxd.errors import ConfigError, DataError
from tdxd.owner.files import read_bytes, read_private, write_private, write_public

__all__ = ["PRIVATE_NAME", "PUBLIC_NAME", "create_kek", "read_kek", "unwrap", "wrap"]

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


def read_kek(directory: Path) -> hpke.KeyPair:
    """Read the private half.

    Raises: HostError, ConfigError for a wrong size or a file that others may read.
    """
    path = directory / PRIVATE_NAME
    raw = read_private(path)
    if len(raw) != hpke.SEED_BYTES:
        raise ConfigError(f"{path} has {len(raw)} bytes, not {hpke.SEED_BYTES}")
    with Secret(raw) as seed:
        return hpke.key_pair(seed)


def wrap(directory: Path, bundle: KeyBundle) -> bytes:
    """Seal a bundle to the public half.

    Raises: HostError, ConfigError.
    """
    path = directory / PUBLIC_NAME
    key = hpke.parse_public_key(read_bytes(path), error=ConfigError)
    manifest = bundle.manifest
    return hpke.seal(
        bundle.encode(), key, _info(manifest.volume_id, manifest.generation)
    )


def unwrap(
    pair: hpke.KeyPair, wrapped: bytes, volume_id: str, generation: int
) -> KeyBundle:
    """Open what `wrap` made, for the id and generation that it was made for.

    Raises: DataError.
    """
    what = f"wrapped secret of volume {volume_id!r} generation {generation}"
    info = _info(volume_id, generation)
    plain = hpke.open_sealed(wrapped, pair.private, info, error=DataError, what=what)
    bundle = KeyBundle.parse(plain, source=what)
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
