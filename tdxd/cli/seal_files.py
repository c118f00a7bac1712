"""The files that tdx-seal reads, and what it tells of them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tdxd.core import luks2
from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.luks2_json import Argon2id, Pbkdf2
from tdxd.core.sealed import PublicRecord
from tdxd.errors import BadHeaderError, DataError, HostError
from tdxd.owner.foreign.image import read_foreign
from tdxd.owner.sealing.image import record_beside

__all__ = ["describe", "read_bundle", "read_record"]

_SMALL_BYTES = 1024 * 1024


def describe(path: Path) -> dict[str, object]:
    """Tell by the content what a file is, and what it says; never a secret."""
    data = read_start(path)
    source = str(path)
    if data.startswith(luks2.MAGIC):
        if record_beside(path).exists():
            return _sealed(path, data)
        return _luks2(path, data)
    if data.startswith(b"{"):
        record = PublicRecord.parse(data, source=source)
        return {"kind": "public record"} | {
            name: getattr(record, name)
            for name in ("id", "generation", "size_bytes", "sha256", "created")
        }
    with KeyBundle.parse(data, source=source).secret as secret:
        manifest = KeyBundle.parse(data, source=source).manifest
        return {
            "kind": "key bundle",
            **_manifest(manifest),
            "secret_bytes": len(secret),
        }


def _sealed(path: Path, data: bytes) -> dict[str, object]:
    record = read_record(record_beside(path))
    header = luks2.read_header(data, source=str(path))
    return {
        "kind": "sealed image",
        **_header(path, header),
        "id": record.id,
        "generation": record.generation,
        "sha256": record.sha256,
    }


def _header(path: Path, header: luks2.Header) -> dict[str, object]:
    return {
        "uuid": header.uuid,
        "cipher": header.cipher,
        "sector_bytes": header.sector_bytes,
        "payload_offset_bytes": header.payload_offset_bytes,
        "recovery_keyslot": header.keyslots > 0,
        "size_bytes": _size_bytes(path),
    }


def _luks2(path: Path, data: bytes) -> dict[str, object]:
    """Tell what a guest takes for a foreign volume; or what a sealed image shows of itself.

    Raises: BadHeaderError, DataError, HostError.
    """
    try:
        found = read_foreign(path)
    except BadHeaderError:
        with contextlib.suppress(DataError):
            header = luks2.read_header(data, source=str(path))
            if not header.keyslots:  # no passphrase opens it, and no guest reads this
                return {"kind": "LUKS2 image", **_header(path, header)}
        raise
    return {
        "kind": "LUKS2 image",
        "uuid": found.header.uuid,
        "cipher": "aes-xts-plain64",
        "sector_bytes": found.header.sector_bytes,
        "payload_offset_bytes": found.header.payload_offset_bytes,
        "payload_bytes": found.header.payload_bytes,
        "size_bytes": found.image_bytes,
        "keyslots": [_kdf(slot.kdf) for slot in found.header.keyslots],
        "header_sha256": found.header_sha256.hex(),
    }


def _kdf(kdf: Argon2id | Pbkdf2) -> str:
    if isinstance(kdf, Pbkdf2):
        return f"pbkdf2 {kdf.iterations} iterations"
    return f"argon2id {kdf.time} passes, {kdf.memory} KiB, {kdf.cpus} lanes"


def _size_bytes(path: Path) -> int:
    """Return the size of a file or a block device."""
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END)


def _manifest(manifest: Manifest) -> dict[str, object]:
    return {
        "id": manifest.volume_id,
        "generation": manifest.generation,
        "fs": manifest.fs,
        "data_bytes": manifest.data_blocks * 4096,
        "payload_offset_bytes": manifest.payload_offset_bytes,
        "image_bytes": manifest.image_bytes,
        "root_hash": manifest.root_hash.hex(),
        "manifest_sha256": manifest.digest().hex(),
    }


def read_bundle(path: Path) -> KeyBundle:
    """Read a key bundle.

    Raises: DataError, HostError.
    """
    return KeyBundle.parse(read_start(path), source=str(path))


def read_record(path: Path) -> PublicRecord:
    """Read a public record.

    Raises: DataError, HostError.
    """
    return PublicRecord.parse(read_start(path), source=str(path))


def read_start(path: Path) -> bytes:
    """Read the first MiB of a file.

    Raises: HostError.
    """
    try:
        with path.open("rb") as file:
            return file.read(_SMALL_BYTES)
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
