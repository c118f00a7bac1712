"""What tests of sealing share: a directory of models, and its image."""

from __future__ import annotations

import os
from pathlib import Path

from tdxd.core.bundle import KeyBundle, volume_key
from tdxd.core.secret import Secret
from tdxd.owner.sealing.image import Sealed
from tdxd.owner.sealing.seal import SealRequest, seal_directory
from tests.reference_image import xts_decrypt

SECRET = bytes(range(64))


def quiet(*_args: object) -> None:
    """Show no progress."""


def model_directory(directory: Path) -> Path:
    """Make a directory to seal: inline, whole and empty files, a private file."""
    version = directory / "models" / "m" / "1"
    (version / "many").mkdir(parents=True)
    (version / "saved_model.pb").write_bytes(os.urandom(300_000))
    (version / "whole").write_bytes(os.urandom(8192))
    (version / "nothing").touch()
    for number in range(300):
        (version / "many" / f"file-{number:04}").write_bytes(b"x" * number)
    (directory / "tls").mkdir()
    (directory / "tls" / "server.pem").write_text("secret")
    return directory


def make(directory: Path, out: Path, **more: object) -> Sealed:
    """Seal a directory as `m.img` and `m.bundle` in `out`."""
    out.mkdir(exist_ok=True)
    fields: dict[str, object] = {
        "directory": directory,
        "volume_id": "m",
        "generation": 3,
        "image": out / "m.img",
        "bundle": out / "m.bundle",
        "secret": Secret(SECRET),
        "created": "2026-01-01T00:00:00+00:00",
        **more,
    }
    return seal_directory(SealRequest(**fields), quiet)  # type: ignore[arg-type]


def file_system(image: Path, bundle: KeyBundle) -> bytes:
    """Decrypt the file system of an image the plain way."""
    manifest = bundle.manifest
    start = manifest.payload_offset_bytes
    data = image.read_bytes()[start : start + manifest.data_blocks * 4096]
    return xts_decrypt(volume_key(bundle).reveal(), data)


def tree_of(directory: Path) -> dict[str, bytes | None]:
    """Return the content of every file below, None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }
