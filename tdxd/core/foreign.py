"""Volumes that others made: LUKS2 images which a passphrase opens, and the union of both kinds.

A foreign volume has no manifest of its own making. What stands in for it says which volume and
generation is meant and, where the owner knows his image, pins every byte before its payload. It
holds no integrity of the payload: the host may change that at any time.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from tdxd.core.bundle import (
    MANIFEST_MAX_BYTES,
    CanonicalManifest,
    KeyBundle,
    Manifest,
    check_generation,
    encode_bundle,
    parse_bundle,
)
from tdxd.core.decode import decode_canonical
from tdxd.core.secret import Secret
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError, TdxdError

__all__ = [
    "PASSPHRASE_MAX_BYTES",
    "AnyBundle",
    "AnyManifest",
    "ForeignManifest",
    "PassphraseBundle",
    "parse_any_bundle",
    "parse_any_manifest",
]

PASSPHRASE_MAX_BYTES = 512
"""What cryptsetup takes from a terminal."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForeignManifest(CanonicalManifest):
    """Which volume a passphrase is for.

    `header_sha256` is the SHA-256 of the image's bytes before its payload: binary headers, JSON
    and keyslots. Empty: any header that the strict reader takes and the passphrase opens.
    """

    kind: Literal["luks2"] = "luks2"
    format: Literal[1] = 1
    volume_id: str
    generation: int
    fs: Literal["ext4"] = "ext4"
    header_sha256: bytes = b""

    def __post_init__(self) -> None:
        check_volume_id(self.volume_id)
        check_generation(self.generation)
        if len(self.header_sha256) not in (0, 32):
            msg = f"header_sha256 has {len(self.header_sha256)} bytes, not 32 or none"
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PassphraseBundle:
    """A foreign manifest with the passphrase as typed: no newline added or taken."""

    manifest: ForeignManifest
    secret: Secret

    def __post_init__(self) -> None:
        size = len(self.secret)
        if not 1 <= size <= PASSPHRASE_MAX_BYTES:
            msg = f"the passphrase has {size} bytes, not 1 to {PASSPHRASE_MAX_BYTES}"
            raise ValueError(msg)

    def encode(self) -> bytes:
        """Encode manifest and passphrase as canonical msgpack; the result is secret."""
        return encode_bundle(self.manifest.encode(), self.secret)

    @classmethod
    def parse(
        cls, data: bytes, *, source: str = "bundle", error: type[TdxdError] = DataError
    ) -> PassphraseBundle:
        """Decode canonical msgpack.

        Raises: `error`; no message shows a byte of the passphrase.
        """

        def build(manifest: bytes, secret: Secret) -> PassphraseBundle:
            parsed = ForeignManifest.parse(manifest, source=f"{source}: manifest")
            return cls(manifest=parsed, secret=secret)

        return parse_bundle(data, build, source=source, error=error)


AnyManifest = Manifest | ForeignManifest
AnyBundle = KeyBundle | PassphraseBundle


def parse_any_manifest(data: bytes, *, source: str = "manifest") -> AnyManifest:
    """Decode a manifest of either kind: a sealed image's has no key `kind`.

    Raises: DataError.
    """
    value = decode_canonical(data, source=source, max_bytes=MANIFEST_MAX_BYTES)
    foreign = isinstance(value, dict) and "kind" in value
    cls: type[AnyManifest] = ForeignManifest if foreign else Manifest
    return cls.parse(data, source=source)


def parse_any_bundle(
    data: bytes, *, source: str = "bundle", error: type[TdxdError] = DataError
) -> AnyBundle:
    """Decode a bundle of either kind.

    Raises: `error`; no message shows a byte of the secret.
    """

    def build(manifest: bytes, secret: Secret) -> AnyBundle:
        parsed = parse_any_manifest(manifest, source=f"{source}: manifest")
        if isinstance(parsed, ForeignManifest):
            return PassphraseBundle(manifest=parsed, secret=secret)
        return KeyBundle(manifest=parsed, secret=secret)

    return parse_bundle(data, build, source=source, error=error)
