"""Sealed images made the plain way, in memory: what the product's tools are compared with."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tdxd.core.bundle import KeyBundle, Manifest, volume_key
from tdxd.core.secret import Secret

PAYLOAD_OFFSET = 16384
SALT = bytes(range(32))


def file_system(directory: Path, scratch: Path) -> bytes:
    """Return an erofs image of a directory, filled up to whole blocks."""
    scratch.unlink(missing_ok=True)
    subprocess.run(
        ["mkfs.erofs", "-x-1", "-T0", "--all-root", "--quiet", scratch, directory],
        check=True,
    )
    data = scratch.read_bytes()
    return data + bytes(-len(data) % 4096)


def hash_tree(data: bytes, salt: bytes) -> tuple[bytes, bytes]:
    """Return the dm-verity tree of some blocks, and its root hash."""
    levels = [data]
    while len(levels[-1]) > 4096:
        below = levels[-1]
        made = b"".join(
            hashlib.sha256(salt + below[start : start + 4096]).digest()
            for start in range(0, len(below), 4096)
        )
        levels.append(made + bytes(-len(made) % 4096))
    root = hashlib.sha256(salt + levels[-1]).digest()
    return b"".join(reversed(levels[1:])), root


def xts(key: bytes, payload: bytes, *, first_block: int = 0) -> bytes:
    """Encrypt whole blocks, numbered from `first_block`."""
    out = []
    for start in range(0, len(payload), 4096):
        tweak = (first_block * 8 + start // 512).to_bytes(16, "little")
        unit = Cipher(algorithms.AES(key), modes.XTS(tweak)).encryptor()
        out.append(unit.update(payload[start : start + 4096]))
    return b"".join(out)


def xts_decrypt(key: bytes, payload: bytes) -> bytes:
    """Decrypt whole blocks, numbered from 0."""
    out = []
    for start in range(0, len(payload), 4096):
        tweak = (start // 512).to_bytes(16, "little")
        unit = Cipher(algorithms.AES(key), modes.XTS(tweak)).decryptor()
        out.append(unit.update(payload[start : start + 4096]))
    return b"".join(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """An image on disk, its plaintext file system, and what opens it."""

    path: Path
    bundle: KeyBundle
    data: bytes

    def with_manifest(self, **changes: object) -> KeyBundle:
        """Return a bundle of the same secret whose manifest differs."""
        manifest = dataclasses.replace(self.bundle.manifest, **changes)  # type: ignore[arg-type]
        return KeyBundle(manifest=manifest, secret=self.fresh_secret())

    def fresh_secret(self) -> Secret:
        """Return a copy of the secret, since whoever gets one may wipe it."""
        return Secret(self.bundle.secret.reveal())


def seal(
    data: bytes, path: Path, *, volume_id: str = "m", generation: int = 1
) -> Reference:
    """Write the image of a file system's bytes."""
    tree, root = hash_tree(data, SALT)
    manifest = Manifest(
        volume_id=volume_id,
        generation=generation,
        payload_offset_bytes=PAYLOAD_OFFSET,
        data_blocks=len(data) // 4096,
        hash_blocks=len(tree) // 4096,
        root_hash=root,
        salt=SALT,
    )
    secret = Secret(hashlib.shake_256(b"secret").digest(64))
    bundle = KeyBundle(manifest=manifest, secret=secret)
    key = volume_key(bundle).reveal()
    path.write_bytes(bytes(PAYLOAD_OFFSET) + xts(key, data + tree))
    return Reference(path=path, bundle=bundle, data=data)
