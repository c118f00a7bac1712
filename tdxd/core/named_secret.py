"""Secrets of their own, which open no volume, and the union of all that a key server releases.

A named secret is some content under an id, such as the front's certificate with its key. Ids are
those of volumes: one namespace, so that an id means one thing. Its manifest tells nothing about
the content but what it is for: a digest of it would let a reader of the store guess at it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from tdxd.core.bundle import (
    MANIFEST_MAX_BYTES,
    CanonicalManifest,
    KeyBundle,
    check_generation,
    encode_bundle,
    parse_bundle,
)
from tdxd.core.decode import decode_canonical
from tdxd.core.foreign import (
    AnyBundle,
    AnyManifest,
    ForeignManifest,
    PassphraseBundle,
    parse_any_manifest,
)
from tdxd.core.secret import Secret
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError, TdxdError

__all__ = [
    "SECRET_CONTENT_MAX_BYTES",
    "Content",
    "NamedSecret",
    "ReleasedBundle",
    "ReleasedManifest",
    "SecretManifest",
    "parse_released_bundle",
    "parse_released_manifest",
]

SECRET_CONTENT_MAX_BYTES = 64 * 1024
_BUNDLE_MAX_BYTES = SECRET_CONTENT_MAX_BYTES + MANIFEST_MAX_BYTES + 64
"""Content, manifest, and the map around them."""

Content = Literal["tls-pem", "client-ca", "file"]
"""A private key with its certificate chain; certificates that sign those of clients; any bytes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SecretManifest(CanonicalManifest):
    """Which secret a content is; `volume_id` is its id, named as that of every other manifest."""

    kind: Literal["secret"] = "secret"
    format: Literal[1] = 1
    volume_id: str
    generation: int
    content: Content

    def __post_init__(self) -> None:
        check_volume_id(self.volume_id)
        check_generation(self.generation)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NamedSecret:
    """A secret's manifest with its content: 1 byte to 64 KiB, as they are."""

    manifest: SecretManifest
    secret: Secret

    def __post_init__(self) -> None:
        size = len(self.secret)
        if not 1 <= size <= SECRET_CONTENT_MAX_BYTES:
            msg = f"the content has {size} bytes, not 1 to {SECRET_CONTENT_MAX_BYTES}"
            raise ValueError(msg)

    def encode(self) -> bytes:
        """Encode manifest and content as canonical msgpack; the result is secret."""
        return encode_bundle(self.manifest.encode(), self.secret)

    @classmethod
    def parse(
        cls, data: bytes, *, source: str = "bundle", error: type[TdxdError] = DataError
    ) -> NamedSecret:
        """Decode canonical msgpack.

        Raises: `error`; no message shows a byte of the content.
        """

        def build(manifest: bytes, secret: Secret) -> NamedSecret:
            parsed = SecretManifest.parse(manifest, source=f"{source}: manifest")
            return cls(manifest=parsed, secret=secret)

        return parse_bundle(
            data, build, source=source, error=error, max_bytes=_BUNDLE_MAX_BYTES
        )


ReleasedManifest = AnyManifest | SecretManifest
ReleasedBundle = AnyBundle | NamedSecret


def parse_released_manifest(
    data: bytes, *, source: str = "manifest"
) -> ReleasedManifest:
    """Decode a manifest of any kind.

    Raises: DataError.
    """
    value = decode_canonical(data, source=source, max_bytes=MANIFEST_MAX_BYTES)
    if isinstance(value, dict) and value.get("kind") == "secret":
        return SecretManifest.parse(data, source=source)
    return parse_any_manifest(data, source=source)


def parse_released_bundle(
    data: bytes, *, source: str = "bundle", error: type[TdxdError] = DataError
) -> ReleasedBundle:
    """Decode a bundle of any kind: what opens a volume, or a named secret.

    Raises: `error`; no message shows a byte of the secret.
    """

    def build(manifest: bytes, secret: Secret) -> ReleasedBundle:
        parsed = parse_released_manifest(manifest, source=f"{source}: manifest")
        if isinstance(parsed, SecretManifest):
            return NamedSecret(manifest=parsed, secret=secret)
        if isinstance(parsed, ForeignManifest):
            return PassphraseBundle(manifest=parsed, secret=secret)
        return KeyBundle(manifest=parsed, secret=secret)

    return parse_bundle(
        data, build, source=source, error=error, max_bytes=_BUNDLE_MAX_BYTES
    )
