"""The manifest of a sealed image, its key bundle, and every key derived from them.

Source: design of the sealed image (docs/sealed-image.md). The volume key depends on the
secret and on every byte of the manifest, so a changed manifest yields a useless key and
never a wrong plaintext.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal, Self, TypeVar

from tdxd.core.decode import decode, decode_canonical, encode_canonical, plain
from tdxd.core.runs import BLOCK_BYTES
from tdxd.core.secret import Secret
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError, TdxdError

__all__ = [
    "BLOCK_BYTES",
    "MANIFEST_MAX_BYTES",
    "SECRET_BYTES",
    "VOLUME_KEY_BYTES",
    "CanonicalManifest",
    "KeyBundle",
    "Manifest",
    "check_generation",
    "derive",
    "encode_bundle",
    "parse_bundle",
    "volume_key",
]

T = TypeVar("T")

SECRET_BYTES = 64
VOLUME_KEY_BYTES = 64
"""aes-xts-plain64 with two 256-bit keys."""
MANIFEST_MAX_BYTES = 4096
_BUNDLE_MAX_BYTES = 8192


class CanonicalManifest:
    """What all manifests have in common: one encoding, in canonical msgpack. For dataclasses."""

    __slots__ = ()

    def encode(self) -> bytes:
        """Encode as canonical msgpack."""
        return encode_canonical(plain(self))

    @classmethod
    def parse(cls, data: bytes, *, source: str = "manifest") -> Self:
        """Decode canonical msgpack.

        Raises: DataError.
        """
        value = decode_canonical(data, source=source, max_bytes=MANIFEST_MAX_BYTES)
        made = decode(cls, value, source=source, error=DataError)
        # What `decode` would fill in must be there: a manifest has one encoding only.
        if data != made.encode():
            msg = f"{source}: a key is missing"
            raise DataError(msg)
        return made

    def digest(self) -> bytes:
        """Return the SHA-256 of the encoded manifest: 32 bytes."""
        return hashlib.sha256(self.encode()).digest()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(CanonicalManifest):
    """Everything a guest needs to map one sealed image, apart from the secret.

    The payload is one encrypted stream that starts `payload_offset_bytes` into the file:
    `data_blocks` blocks of file system, then `hash_blocks` blocks of dm-verity tree.
    `root_hash` and `salt` are 32 bytes each, of sha256.
    """

    format: Literal[1] = 1
    volume_id: str
    generation: int
    payload_offset_bytes: int
    data_blocks: int
    hash_blocks: int
    root_hash: bytes
    salt: bytes
    fs: Literal["erofs"] = "erofs"

    def __post_init__(self) -> None:
        check_volume_id(self.volume_id)
        check_generation(self.generation)
        _within("payload_offset_bytes", self.payload_offset_bytes, BLOCK_BYTES, 2**40)
        _within("data_blocks", self.data_blocks, 1, 2**40)
        _within("hash_blocks", self.hash_blocks, 0, 2**40)
        if self.payload_offset_bytes % BLOCK_BYTES:
            msg = (
                f"payload_offset_bytes {self.payload_offset_bytes} "
                f"is not a multiple of {BLOCK_BYTES}"
            )
            raise ValueError(msg)
        if len(self.root_hash) != 32 or len(self.salt) != 32:
            msg = "root_hash and salt must be 32 bytes each"
            raise ValueError(msg)

    @property
    def payload_bytes(self) -> int:
        """Size of the encrypted stream: file system and hash tree."""
        return (self.data_blocks + self.hash_blocks) * BLOCK_BYTES

    @property
    def image_bytes(self) -> int:
        """Size of the whole image file."""
        return self.payload_offset_bytes + self.payload_bytes


def check_generation(generation: int) -> None:
    """Check that a generation counts from 1, in 63 bits.

    Raises: ValueError.
    """
    _within("generation", generation, 1, 2**63 - 1)


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        msg = f"{name} {value} is not between {low} and {high}"
        raise ValueError(msg)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeyBundle:
    """A manifest with the 64-byte secret of one generation of one volume."""

    manifest: Manifest
    secret: Secret

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            msg = f"the secret has {len(self.secret)} bytes, not {SECRET_BYTES}"
            raise ValueError(msg)

    def encode(self) -> bytes:
        """Encode manifest and secret as canonical msgpack; the result is secret."""
        return encode_bundle(self.manifest.encode(), self.secret)

    @classmethod
    def parse(
        cls, data: bytes, *, source: str = "bundle", error: type[TdxdError] = DataError
    ) -> KeyBundle:
        """Decode canonical msgpack.

        Raises: `error`; no message shows a byte of the secret.
        """

        def build(manifest: bytes, secret: Secret) -> KeyBundle:
            parsed = Manifest.parse(manifest, source=f"{source}: manifest")
            return cls(manifest=parsed, secret=secret)

        return parse_bundle(data, build, source=source, error=error)


def encode_bundle(manifest: bytes, secret: Secret) -> bytes:
    """Encode a bundle of any kind as canonical msgpack; the result is secret."""
    return encode_canonical({"manifest": manifest, "secret": secret.reveal()})


def parse_bundle(
    data: bytes,
    build: Callable[[bytes, Secret], T],
    *,
    source: str,
    error: type[TdxdError],
    max_bytes: int = _BUNDLE_MAX_BYTES,
) -> T:
    """Decode a bundle of the kind that `build` makes of an encoded manifest and a secret.

    What `build` refuses (DataError, ValueError) wipes the secret.

    Raises: `error`; no message shows a byte of the secret.
    """
    try:
        value = decode_canonical(data, source=source, max_bytes=max_bytes)
        manifest, secret = _bundle_fields(value, source)
        try:
            return build(manifest, secret)
        except (DataError, ValueError):
            secret.wipe()
            raise
    except (DataError, ValueError) as exc:
        text = exc.message if isinstance(exc, TdxdError) else f"{source}: {exc}"
        raise error(text, hint="is this a bundle file of tdx-seal?") from exc


def _bundle_fields(value: object, source: str) -> tuple[bytes, Secret]:
    """Take a bundle's two fields; `decode` would show what is no bytes, and it may be the secret.

    Raises: DataError.
    """
    if isinstance(value, dict) and value.keys() == {"manifest", "secret"}:
        manifest, secret = value["manifest"], value["secret"]
        if isinstance(manifest, bytes) and isinstance(secret, bytes):
            return manifest, Secret(secret)
    msg = f"{source}: is not a map of manifest and secret, both of bytes"
    raise DataError(msg)


def derive(secret: Secret, label: str, size: int, *context: bytes) -> Secret:
    """Derive `size` bytes for one purpose.

    HKDF-SHA512 (RFC 5869) with no salt and info = label followed by each context value with
    its length as 4 bytes big-endian in front, so that no two uses share an info.
    """
    from cryptography.hazmat.primitives import hashes  # 10 ms: not at start
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = label.encode() + b"".join(
        len(item).to_bytes(4, "big") + item for item in context
    )
    kdf = HKDF(algorithm=hashes.SHA512(), length=size, salt=None, info=info)
    return Secret(kdf.derive(secret.reveal()))


def volume_key(bundle: KeyBundle) -> Secret:
    """Derive the 64-byte aes-xts-plain64 key: two halves, which must differ.

    Raises: ValueError if the halves are equal (IEEE 1619 and FIPS 140-3 IG C.I forbid it).
    """
    manifest = bundle.manifest
    key = derive(
        bundle.secret,
        "tdxd/volume-key/v1",
        VOLUME_KEY_BYTES,
        manifest.volume_id.encode(),
        manifest.digest(),
    )
    raw = key.reveal()
    if raw[:32] == raw[32:]:
        key.wipe()
        msg = "the two halves of the XTS key are equal"
        raise ValueError(msg)
    return key
