"""The files that tdx-seal reads, and what it tells of them."""

from __future__ import annotations

import os
from pathlib import Path

from tdxd.core import luks2
from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.sealed import PublicRecord
from tdxd.errors import HostError
from tdxd.owner.sealing.image import record_beside

__all__ = ["describe", "read_bundle", "read_record"]

_SMALL_BYTES = 1024 * 1024


def describe(path: Path) -> dict[str, object]:
    """Tell by the content what a file is, and what it says; never a secret."""
    data = read_start(path)
    source = str(path)
    if data.startswith(luks2.MAGIC):
        header = luks2.read_header(data, source=source)
        beside = record_beside(path)
        told: dict[str, object] = {
            "kind": "sealed image" if beside.exists() else "LUKS2 image",
            "uuid": header.uuid,
            "cipher": header.cipher,
            "sector_bytes": header.sector_bytes,
            "payload_offset_bytes": header.payload_offset_bytes,
            "recovery_keyslot": header.keyslots > 0,
            "size_bytes": _size_bytes(path),
        }
        if beside.exists():
            record = read_record(beside)
            told |= {
                "id": record.id,
                "generation": record.generation,
                "sha256": record.sha256,
            }
        return told
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
