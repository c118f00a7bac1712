"""Genuine LUKS2 images as their owners make them: real cryptsetup, real ext4, no root, no device.

A small one is quick: the volume key is chosen here, so that the payload can be encrypted without
a mapping, and PBKDF2 runs a thousand times only. `tests/contract/test_luks2.py` proves with
`cryptsetup reencrypt` that this is how cryptsetup encrypts.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

PASSPHRASE = b"correct horse battery staple"
PAYLOAD_OFFSET_BYTES = 2**20
FILE_SYSTEM_BYTES = 8 * 2**20
OWNER_PLAINTEXT = b"what the owner put there, and nobody else "
QUICK = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
ARGON2ID = (
    *("--pbkdf", "argon2id", "--pbkdf-force-iterations", "4"),
    *("--pbkdf-memory", "64", "--pbkdf-parallel", "1"),
)


def volume_key(name: str = "owner") -> bytes:
    """The 64-byte key of the images of one name."""
    return hashlib.shake_256(b"volume key of " + name.encode()).digest(64)


def make_image(
    path: Path,
    *,
    passphrase: bytes = PASSPHRASE,
    kdf: tuple[str, ...] = QUICK,
    sector_bytes: int = 4096,
    offset_bytes: int = PAYLOAD_OFFSET_BYTES,
    key: bytes | None = None,
    payload: bytes | None = None,
) -> Path:
    """Write `path`: `cryptsetup luksFormat`, then a payload (by default an ext4) under its key."""
    key = key or volume_key()
    payload = ext4() if payload is None else payload
    with open(path, "wb") as file:
        file.truncate(offset_bytes + len(payload))
    with tempfile.NamedTemporaryFile(dir=path.parent) as key_file:
        Path(key_file.name).write_bytes(key)
        options = ["-s", "512", "-c", "aes-xts-plain64", "--use-urandom", *kdf]
        options += ["--sector-size", str(sector_bytes)]
        options += ["--offset", str(offset_bytes // 512)]
        options += ["--volume-key-file", key_file.name]
        cryptsetup("luksFormat", *options, path, passphrase=passphrase)
    with open(path, "r+b") as file:
        file.seek(offset_bytes)
        file.write(encrypt(key, payload, sector_bytes))
    return path


def cryptsetup(action: str, *arguments: object, passphrase: bytes) -> bytes:
    """Run cryptsetup as anybody can: the passphrase on its standard input."""
    done = subprocess.run(
        [
            *("cryptsetup", action, "--batch-mode", "--disable-locks"),
            *("--key-file", "-"),
            *map(str, arguments),
        ],
        input=passphrase,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@functools.cache
def ext4(content: bytes = OWNER_PLAINTEXT, *, label: str = "owner") -> bytes:
    """A file system of `FILE_SYSTEM_BYTES` with one file of 64 KiB and more, `model`."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        tree.mkdir()
        (tree / "model").write_bytes(content * (2**16 // len(content) + 1))
        image = Path(directory) / "ext4"
        command = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-L", label]
        command += ["-d", str(tree), str(image), f"{FILE_SYSTEM_BYTES // 1024}k"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return image.read_bytes()


def encrypt(key: bytes, data: bytes, sector_bytes: int) -> bytes:
    """Encrypt whole sectors as dm-crypt does: tweak = number of the first 512 bytes."""
    return _crypt(key, data, sector_bytes, decrypting=False)


def decrypt(key: bytes, data: bytes, sector_bytes: int) -> bytes:
    """Undo `encrypt`."""
    return _crypt(key, data, sector_bytes, decrypting=True)


def _crypt(key: bytes, data: bytes, sector_bytes: int, *, decrypting: bool) -> bytes:
    cipher = Cipher(algorithms.AES(key), modes.XTS(bytes(16)))
    made = []
    for start in range(0, len(data), sector_bytes):
        cipher.mode = modes.XTS((start // 512).to_bytes(16, "little"))
        context = cipher.decryptor() if decrypting else cipher.encryptor()
        made.append(context.update(data[start : start + sector_bytes]))
    return b"".join(made)
