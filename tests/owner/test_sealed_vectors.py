"""The vectors of tests/vectors/sealed, read with what docs/sealed-image.md says alone.

The reader below takes nothing of the product. Then the product must read the vectors as well, and
make them again from the same directories.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tdxd.core import luks2
from tdxd.core.bundle import KeyBundle
from tdxd.core.sealed import PublicRecord
from tdxd.core.secret import Secret
from tdxd.owner.sealing import check, extract
from tests.owner.sealing import make, model_directory, quiet

VECTORS = Path(__file__).parents[1] / "vectors" / "sealed"
NAMES = ("small", "one-block")
MKFS = "mkfs.erofs 1.5"
"""What the vectors were made with: another version may lay the file system out differently."""

# --- from the text: nothing below comes from the product until the next heading ------------------


def lp(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def hkdf(secret: bytes, size: int, info: bytes) -> bytes:
    """RFC 5869 with SHA-512 and no salt."""
    key = hmac.digest(bytes(64), secret, "sha512")
    made, block = b"", b""
    for number in range(1, -(-size // 64) + 1):
        block = hmac.digest(key, block + info + bytes([number]), "sha512")
        made += block
    return made[:size]


def read_bundle(data: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Return the manifest, its bytes and the secret."""
    bundle = msgpack.unpackb(data)
    assert sorted(bundle) == ["manifest", "secret"]
    manifest = msgpack.unpackb(bundle["manifest"])
    for value, raw in ((bundle, data), (manifest, bundle["manifest"])):
        assert msgpack.packb(dict(sorted(value.items()))) == raw
    return manifest, bundle["manifest"], bundle["secret"]


def key_of(manifest: dict[str, Any], raw: bytes, secret: bytes) -> bytes:
    volume_id = manifest["volume_id"].encode()
    info = b"tdxd/volume-key/v1" + lp(volume_id) + lp(hashlib.sha256(raw).digest())
    return hkdf(secret, 64, info)


def derived(manifest: dict[str, Any], secret: bytes, label: str, size: int) -> bytes:
    context = lp(manifest["volume_id"].encode())
    context += lp(manifest["generation"].to_bytes(8, "big"))
    return hkdf(secret, size, label.encode() + context)


def decrypted(key: bytes, stream: bytes, unit: int, sectors: int) -> bytes:
    """XTS in units of some bytes, each of so many sectors in the tweak's count."""
    out = b""
    for number in range(len(stream) // unit):
        tweak = modes.XTS((number * sectors).to_bytes(16, "little"))
        part = stream[number * unit : (number + 1) * unit]
        out += Cipher(algorithms.AES(key), tweak).decryptor().update(part)
    return out


def digests(salt: bytes, blocks: bytes) -> bytes:
    made = b""
    for start in range(0, len(blocks), 4096):
        made += hashlib.sha256(salt + blocks[start : start + 4096]).digest()
    return made


def read_image(image: bytes, bundle: bytes) -> bytes:
    """Return the file system, verified."""
    manifest, raw, secret = read_bundle(bundle)
    assert (manifest["format"], manifest["fs"]) == (1, "erofs")
    start, count = manifest["payload_offset_bytes"], manifest["data_blocks"]
    size = (count + manifest["hash_blocks"]) * 4096
    assert len(image) >= start + size
    key = key_of(manifest, raw, secret)
    assert key[:32] != key[32:]
    plain = decrypted(key, image[start : start + size], 4096, 8)
    level, levels = plain[: count * 4096], []
    while len(level) > 4096:
        above = digests(manifest["salt"], level)
        level = above + bytes(-len(above) % 4096)
        levels.append(level)
    assert b"".join(reversed(levels)) == plain[count * 4096 :]
    assert digests(manifest["salt"], level) == manifest["root_hash"]
    return plain[: count * 4096]


def unlock(header: bytes, words: bytes) -> bytes:
    """Open the keyslot of a LUKS2 header."""
    document = json.loads(header[4096:16384].rstrip(b"\0"))
    slot = document["keyslots"]["0"]
    kdf, area = slot["kdf"], slot["area"]
    salt = base64.b64decode(kdf["salt"])
    key = hashlib.pbkdf2_hmac("sha256", words, salt, kdf["iterations"], 64)
    start = int(area["offset"])
    split = decrypted(key, header[start : start + 256000], 512, 1)
    state = bytes(64)
    for number in range(4000):
        stripe = split[number * 64 : number * 64 + 64]
        state = bytes(a ^ b for a, b in zip(state, stripe, strict=True))
        if number < 3999:
            halves = (bytes(4) + state[:32], b"\0\0\0\1" + state[32:])
            state = b"".join(hashlib.sha256(half).digest() for half in halves)
    digest = document["digests"]["0"]
    salt = base64.b64decode(digest["salt"])
    made = hashlib.pbkdf2_hmac("sha256", state, salt, digest["iterations"], 32)
    assert base64.b64decode(digest["digest"]) == made
    return state


def passphrase(manifest: dict[str, Any], secret: bytes) -> str:
    raw = derived(manifest, secret, "tdxd/luks2/recovery-passphrase/v1", 20)
    text = base64.b32encode(raw).decode().lower()
    return "-".join(text[at : at + 4] for at in range(0, 32, 4))


# --- the vectors ---------------------------------------------------------------------------------


def vector(name: str) -> tuple[bytes, bytes, dict[str, Any]]:
    """Return an image, its bundle and what to find."""
    image = gzip.decompress((VECTORS / f"{name}.img.gz").read_bytes())
    expected = json.loads((VECTORS / f"{name}.expected.json").read_bytes())
    return image, (VECTORS / f"{name}.bundle").read_bytes(), expected


def found(name: str, bundle: bytes, plain: bytes, out: Path) -> dict[str, Any]:
    """Return what a file system holds, by the tools of erofs, and every value on the way to it."""
    manifest, raw, secret = read_bundle(bundle)
    out.mkdir()
    (out / "plain").write_bytes(plain)
    argv = ["fsck.erofs", f"--extract={out / 'files'}", str(out / "plain")]
    subprocess.run(argv, check=True, capture_output=True)
    files = sorted(path for path in (out / "files").rglob("*") if path.is_file())
    header = gzip.decompress((VECTORS / f"{name}.img.gz").read_bytes())[:16384]
    return {
        "manifest_sha256": hashlib.sha256(raw).hexdigest(),
        "volume_key": key_of(manifest, raw, secret).hex(),
        "root_hash": manifest["root_hash"].hex(),
        "salt": derived(manifest, secret, "tdxd/seal/verity-salt/v1", 32).hex(),
        "file_system_uuid": str(uuid.UUID(bytes=plain[1024 + 48 : 1024 + 64])),
        "file_system_sha256": hashlib.sha256(plain).hexdigest(),
        "header_uuid": header[168:208].rstrip(b"\0").decode(),
        "recovery_passphrase": passphrase(manifest, secret),
        "files": {
            str(path.relative_to(out / "files")): {
                "mode": f"{path.stat().st_mode & 0o777:04o}",
                "size_bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        },
    }


@pytest.mark.root
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_from_the_text_finds_what_is_expected(name, tmp_path):
    image, bundle, expected = vector(name)
    assert hashlib.sha256(image).hexdigest() == expected.pop("image_sha256")
    expected.pop("recovery_header_sha256")
    plain = read_image(image, bundle)
    assert found(name, bundle, plain, tmp_path / "out") == expected
    manifest, _, secret = read_bundle(bundle)
    assert manifest["salt"].hex() == expected["salt"]
    assert (manifest["hash_blocks"] == 0) == (name == "one-block")
    made = derived(manifest, secret, "tdxd/seal/fs-uuid/v1", 16)
    assert str(uuid.UUID(bytes=made)) == expected["file_system_uuid"]
    made = derived(manifest, secret, "tdxd/luks2/uuid/v1", 16)
    assert str(uuid.UUID(bytes=made, version=4)) == expected["header_uuid"]


@pytest.mark.parametrize("name", NAMES)
def test_the_recovery_passphrase_gives_the_volume_key(name):
    _, bundle, expected = vector(name)
    header = luks2.build_header(KeyBundle.parse(bundle), recovery=True)
    assert hashlib.sha256(header).hexdigest() == expected["recovery_header_sha256"]
    words = expected["recovery_passphrase"].encode()
    assert unlock(header, words).hex() == expected["volume_key"]


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_refuses_a_changed_vector(name):
    image, bundle, _ = vector(name)
    size = len(image)
    for at in (16 * 2**20, size - 4096, size - 1):
        changed = image[:at] + bytes([image[at] ^ 1]) + image[at + 1 :]
        with pytest.raises(AssertionError):
            read_image(changed, bundle)


@pytest.mark.parametrize("name", NAMES)
def test_tdx_seal_reads_the_vectors(name, tmp_path):
    data, raw, expected = vector(name)
    image, bundle = tmp_path / "m.img", KeyBundle.parse(raw)
    image.write_bytes(data)
    check.check_payload(image, bundle, quiet)
    record = (VECTORS / f"{name}.img.json").read_bytes()
    check.check_record(image, PublicRecord.parse(record, source=name), quiet)
    extract.extract(image, bundle, tmp_path / "back", quiet)
    for path, wanted in expected["files"].items():
        content = (tmp_path / "back" / path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == wanted["sha256"]


def source(name: str, directory: Path) -> Path:
    """Make the directory that a vector was sealed from."""
    noise = hashlib.shake_256(name.encode()).digest
    version = directory / "models" / "digits" / "1"
    version.mkdir(parents=True)
    if name == "one-block":
        (version / "saved_model.pb").write_bytes(noise(100))
        return directory
    (version / "saved_model.pb").write_bytes(noise(9000))
    (version / "variables").mkdir()
    (version / "variables" / "variables.index").write_bytes(noise(100))
    (version / "variables" / "variables.data").write_bytes(noise(8192))
    (version / "empty").touch()
    (directory / "tls").mkdir()
    (directory / "tls" / "server.pem").write_bytes(b"not a key\n")
    return directory


def sealed_again(name: str, out: Path) -> KeyBundle:
    """Seal a vector's directory as `m.img`, `m.img.json` and `m.bundle`."""
    return make(
        source(name, out.with_name("source")),
        out,
        volume_id=f"vectors.{name}",
        generation=7,
        secret=Secret(hashlib.shake_256(b"secret of " + name.encode()).digest(64)),
    ).bundle


@pytest.mark.parametrize("name", NAMES)
def test_the_same_directory_and_secret_make_the_vector(name, tmp_path):
    argv = ["mkfs.erofs", "-V"]  # ends with 1, by design of its own
    said = subprocess.run(argv, capture_output=True, check=False, text=True).stdout
    if said.strip() != MKFS:
        pytest.skip(f"the vectors are of {MKFS}, here is {said.strip()}")
    sealed_again(name, tmp_path / "out")
    image, bundle, _ = vector(name)
    assert (tmp_path / "out/m.img").read_bytes() == image
    assert (tmp_path / "out/m.bundle").read_bytes() == bundle
    record = (VECTORS / f"{name}.img.json").read_bytes()
    assert (tmp_path / "out/m.img.json").read_bytes() == record


def test_the_reader_reads_a_larger_image_as_well(tmp_path):
    """Two levels of the tree, which no small vector has."""
    model = model_directory(tmp_path / "model")
    (model / "models/m/1/weights").write_bytes(hashlib.shake_256(b"").digest(2**20))
    made = make(model, tmp_path / "out")
    assert made.bundle.manifest.hash_blocks > 2
    plain = read_image((tmp_path / "out/m.img").read_bytes(), made.bundle.encode())
    assert len(plain) == made.bundle.manifest.data_blocks * 4096
