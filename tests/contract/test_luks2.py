"""The strict reader and the unlocking against what the real cryptsetup makes, and takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tdxd.core.luks2_read import COPIES_BYTES, Luks2Header, read_luks2
from tdxd.core.luks2_unlock import memory_bytes, unlock
from tdxd.core.secret import Secret
from tdxd.errors import BadHeaderError, WrongPassphraseError
from tests.luks2_genuine import (
    ARGON2ID,
    OWNER_PLAINTEXT,
    PASSPHRASE,
    QUICK,
    cryptsetup,
    decrypt,
    ext4,
    make_image,
    volume_key,
)

pytestmark = pytest.mark.skipif(
    not shutil.which("cryptsetup"), reason="cryptsetup is not installed"
)
OTHER = b"another passphrase \xff\x00 with any bytes\n"


def read(path: Path) -> Luks2Header:
    with open(path, "rb") as file:
        copies = file.read(COPIES_BYTES)
    return read_luks2(copies, image_bytes=path.stat().st_size, source=path.name)


def opened(path: Path, passphrase: bytes = PASSPHRASE) -> bytes:
    header = read(path)
    region = path.read_bytes()[: header.payload_offset_bytes]
    return unlock(header, region, Secret(passphrase), source=path.name).reveal()


def payload(path: Path, passphrase: bytes = PASSPHRASE) -> bytes:
    header, key = read(path), opened(path, passphrase)
    data = path.read_bytes()[header.payload_offset_bytes :]
    return decrypt(key, data[: header.payload_bytes], header.sector_bytes)


def add_key(path: Path, new: bytes, *options: str) -> None:
    key_file = path.with_suffix(".new-key")
    key_file.write_bytes(new)
    cryptsetup("luksAddKey", *options, path, key_file, passphrase=PASSPHRASE)


@pytest.fixture
def image(tmp_path):
    return make_image(tmp_path / "genuine.img")


@pytest.mark.parametrize("sector_bytes", [512, 4096])
@pytest.mark.parametrize("kdf", [QUICK, ARGON2ID], ids=["pbkdf2", "argon2id"])
def test_what_luks_format_makes_is_read_and_opened(tmp_path, kdf, sector_bytes):
    path = make_image(tmp_path / "x.img", kdf=kdf, sector_bytes=sector_bytes)
    header = read(path)
    assert header.sector_bytes == sector_bytes
    assert (header.payload_offset_bytes, header.payload_bytes) == (2**20, len(ext4()))
    assert opened(path) == volume_key()
    assert payload(path) == ext4()
    with pytest.raises(WrongPassphraseError):
        opened(path, PASSPHRASE + b"\n")


@pytest.mark.parametrize("cpus", [1, 3, 4])
def test_argon2id_of_any_number_of_lanes(tmp_path, cpus):
    kdf = (*ARGON2ID[:-3], "4096", "--pbkdf-parallel", str(cpus))
    path = make_image(tmp_path / "x.img", kdf=kdf, payload=bytes(4096))
    (slot,) = read(path).keyslots
    assert opened(path) == volume_key()
    assert slot.kdf.memory_bytes == 4096 * 1024
    assert 4096 * 1024 < memory_bytes(read(path)) < 5120 * 1024


def test_the_default_layout_and_digest(tmp_path):
    """Nothing said but the KDF's cost: 16 MiB in front, the digest's iterations measured."""
    path = tmp_path / "x.img"
    with open(path, "wb") as file:
        file.truncate(17 * 2**20)
    cryptsetup("luksFormat", *ARGON2ID, path, passphrase=PASSPHRASE)
    header = read(path)
    assert header.payload_offset_bytes == 16 * 2**20
    assert len(opened(path)) == 64


@pytest.mark.parametrize("options", [QUICK, ARGON2ID], ids=["pbkdf2", "argon2id"])
def test_every_passphrase_of_several_opens(tmp_path, options):
    image = make_image(tmp_path / "x.img", offset_bytes=4 * 2**20, payload=bytes(4096))
    for number in range(1, 8):
        add_key(image, OTHER + bytes([number]), *options, "--key-slot", str(number + 9))
    assert len(read(image).keyslots) == 8
    for passphrase in (PASSPHRASE, OTHER + b"\x01", OTHER + b"\x07"):
        assert opened(image, passphrase) == volume_key()
    with pytest.raises(WrongPassphraseError, match="none of 8 keyslots"):
        opened(image, OTHER)
    add_key(image, OTHER, *QUICK)
    with pytest.raises(BadHeaderError, match="keyslots: 9, not 1 to 8"):
        read(image)


def test_a_killed_keyslot_opens_no_more(image):
    add_key(image, OTHER, *QUICK)
    cryptsetup("luksKillSlot", image, "0", passphrase=OTHER)
    with pytest.raises(WrongPassphraseError):
        opened(image)
    assert opened(image, OTHER) == volume_key()


def test_a_changed_passphrase(image, tmp_path):
    (tmp_path / "new").write_bytes(OTHER)
    cryptsetup(
        "luksChangeKey", *ARGON2ID, image, tmp_path / "new", passphrase=PASSPHRASE
    )
    with pytest.raises(WrongPassphraseError):
        opened(image)
    assert opened(image, OTHER) == volume_key()


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_what_reencrypt_makes_of_a_plain_image(tmp_path, sector_bytes):
    """Here cryptsetup itself encrypts the payload; a second run gives it another key."""
    path = tmp_path / "x.img"
    path.write_bytes(ext4())
    with open(path, "ab") as file:
        file.truncate(len(ext4()) + 32 * 2**20)
    options = ["--type", "luks2", "--force-offline-reencrypt", "-s", "512", *QUICK]
    options += ["--sector-size", str(sector_bytes)]
    shift = ["--encrypt", "--reduce-device-size", "32M"]
    cryptsetup("reencrypt", *shift, *options, path, passphrase=PASSPHRASE)
    first = opened(path)
    assert payload(path)[: len(ext4())] == ext4()
    again = ["--force-offline-reencrypt", *QUICK]
    cryptsetup("reencrypt", *again, path, passphrase=PASSPHRASE)
    assert opened(path) != first
    assert payload(path)[: len(ext4())] == ext4()


def test_what_convert_makes_of_luks1(tmp_path):
    path = tmp_path / "x.img"
    with open(path, "wb") as file:
        file.truncate(3 * 2**20)
    options = ["--type", "luks1", "-s", "512", "--pbkdf-force-iterations", "1000"]
    cryptsetup("luksFormat", *options, path, passphrase=PASSPHRASE)
    with pytest.raises(BadHeaderError, match="a LUKS1 image"):
        read(path)
    command = ["cryptsetup", "convert", "-q", "--type", "luks2", path]
    subprocess.run(command, check=True)
    key_file = tmp_path / "key"
    dump = ["--dump-volume-key", "--volume-key-file", key_file]
    cryptsetup("luksDump", *dump, path, passphrase=PASSPHRASE)
    assert opened(path) == key_file.read_bytes()


@pytest.mark.parametrize(
    ("options", "offset_bytes"),
    [
        (("--offset", str(34000)), 34000 * 512),
        (("--offset", str(2**17)), 64 * 2**20),
        (("--luks2-keyslots-size", "1M"), None),
    ],
)
def test_other_layouts(tmp_path, options, offset_bytes):
    path = tmp_path / "x.img"
    with open(path, "wb") as file:
        file.truncate(65 * 2**20)
    cryptsetup("luksFormat", *QUICK, *options, path, passphrase=PASSPHRASE)
    assert read(path).payload_offset_bytes == offset_bytes or offset_bytes is None
    assert len(opened(path)) == 64


REFUSED = {
    "hdr_size 65536": ("--luks2-metadata-size", "64k"),
    "af.hash": ("--hash", "sha512"),
    "argon2i'": ("--pbkdf", "argon2i"),
    "'aes-xts-plain'": ("--cipher", "aes-xts-plain"),
    "key_size": ("--key-size", "256"),
    "label 'models'": ("--label", "models"),
    "sector_size": ("--sector-size", "1024"),
    "67112960": ("--offset", str(67112960 // 512)),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_luks_format_makes_of_other_options_is_refused(tmp_path, text):
    path = tmp_path / "x.img"
    with open(path, "wb") as file:
        file.truncate(66 * 2**20)
    kdf = ARGON2ID if "argon2i'" in text else QUICK
    cryptsetup("luksFormat", *kdf, *REFUSED[text], path, passphrase=PASSPHRASE)
    with pytest.raises(BadHeaderError) as caught:
        read(path)
    assert text in caught.value.message
    assert caught.value.hint


def test_the_hint_about_labels_helps(tmp_path):
    path = tmp_path / "x.img"
    with open(path, "wb") as file:
        file.truncate(17 * 2**20)
    cryptsetup("luksFormat", *QUICK, "--label", "a", path, passphrase=PASSPHRASE)
    with pytest.raises(BadHeaderError) as caught:
        read(path)
    words = caught.value.hint.partition(": ")[2].replace("''", "").split(" ")
    assert words[0] == "cryptsetup"
    subprocess.run([word if word != "IMAGE" else path for word in words], check=True)
    assert len(opened(path)) == 64


def test_an_unbound_keyslot_is_refused(image):
    add_key(image, OTHER, *QUICK, "--unbound", "--key-size", "512")
    with pytest.raises(BadHeaderError, match=r"digests\.1.*unbound"):
        read(image)


def test_a_token_is_refused(image):
    token = ["--key-description", "somewhere", "--token-id", "3"]
    cryptsetup("token", "add", *token, image, passphrase=PASSPHRASE)
    with pytest.raises(BadHeaderError, match="tokens: not empty") as caught:
        read(image)
    assert "cryptsetup token remove" in caught.value.hint
    command = ["cryptsetup", "token", "remove", "--token-id", "3", image]
    subprocess.run(command, check=True)
    assert opened(image) == volume_key()


def test_a_priority_and_flags_are_refused(image):
    command = ["cryptsetup", "config", "--priority", "prefer", "--key-slot", "0", image]
    subprocess.run(command, check=True)
    with pytest.raises(BadHeaderError, match=r"keyslots\.0\.priority: unknown key"):
        read(image)


def test_an_interrupted_reencryption_is_refused(image):
    options = ["--init-only", "--force-offline-reencrypt", *QUICK]
    cryptsetup("reencrypt", *options, image, passphrase=PASSPHRASE)
    with pytest.raises(BadHeaderError):
        read(image)


def test_the_file_system_inside_is_the_owners(image):
    assert OWNER_PLAINTEXT in payload(image)
