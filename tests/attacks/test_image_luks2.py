"""The 36 attacks on a LUKS2 image, at the reader: each opened with the right passphrase.

What the mappers make of them is in test_image_foreign.py; here is what they are given.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tdxd.core.luks2_read import COPIES_BYTES, Luks2Header, read_luks2
from tdxd.core.luks2_unlock import unlock
from tdxd.core.secret import Secret
from tdxd.errors import BadHeaderError, WrongPassphraseError
from tests.attacks.luks2_images import (
    HOST_PLAINTEXT,
    IMAGES,
    changed_between_reads,
)
from tests.luks2_genuine import (
    OWNER_PLAINTEXT,
    PASSPHRASE,
    decrypt,
    ext4,
    make_image,
    volume_key,
)

FILES = [
    name
    for name in IMAGES
    if name not in ("35-symlink", "35-fifo", "35-directory")  # the mappers' to refuse
]
OPENING = {
    "12-other-sector-size": "garbled",
    "27-two-keyslots": "whole",
    "31-other-volume-same-passphrase": "noise",
    "31-other-file-same-passphrase": "another volume's",
    "32-old-image": "old",
    "35-cut-in-payload": "shorter",
    "36-flipped-payload": "one sector garbled",
    "36-flipped-last-block": "one sector garbled",
}
"""What of them is not refused, and how the payload reads then."""
PINNED_OPENING = {"35-cut-in-payload", "36-flipped-payload", "36-flipped-last-block"}
"""What of that a pinned header does not refuse: integrity is what LUKS2 has not."""
NOT_BY_CRYPTSETUP = {
    *("05-segment-linear", "31-other-volume", "32-old-header"),
    *(
        name
        for name in FILES
        if name[:2] in ["01", "06", "20", "22", "25", "26", "28", "30", "34", "35"]
    ),
}
"""What version 2.6 of Debian refuses, too, does without end, or needs a kernel for."""


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("genuine") / "genuine.img")


@pytest.fixture(scope="module")
def small_sectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "genuine.img"
    return make_image(path, sector_bytes=512)


def opened(region: bytes, image_bytes: int) -> tuple[Luks2Header, bytes]:
    """What a mapper does: every byte of the region was read once."""
    header = read_luks2(region[:COPIES_BYTES], image_bytes=image_bytes, source="x.img")
    region = region[: header.payload_offset_bytes]
    key = unlock(header, region, Secret(PASSPHRASE), source="x.img")
    return header, key.reveal()


def region_sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()[: 2**20]).digest()


def test_the_list_is_whole():
    assert {image.number for image in IMAGES.values()} == set(range(1, 37))
    opening = {name for name, image in IMAGES.items() if image.verdict == "opens"}
    assert opening == set(OPENING)


@pytest.mark.parametrize("name", FILES)
def test_no_plaintext_of_the_hosts_choosing(genuine, name):
    check_harmless(genuine, name)


@pytest.mark.parametrize("name", OPENING)
def test_no_plaintext_of_the_hosts_choosing_in_small_sectors(small_sectors, name):
    check_harmless(small_sectors, name)


def check_harmless(genuine: Path, name: str) -> None:
    path = IMAGES[name](genuine, PASSPHRASE)
    data = path.read_bytes()
    path.unlink()
    if IMAGES[name].verdict == "refused":
        with pytest.raises((BadHeaderError, WrongPassphraseError)) as caught:
            opened(data, len(data))
        assert caught.value.message.startswith("x.img: ")
        assert caught.value.message.isprintable()
        return
    header, key = opened(data, len(data))
    payload = data[header.payload_offset_bytes :][: header.payload_bytes]
    plain = decrypt(key, payload, header.sector_bytes)
    assert HOST_PLAINTEXT not in plain
    assert differing(plain) == OPENING[name]


def differing(plain: bytes) -> str:
    """Say how a payload differs from what its owner put there."""
    owner = ext4()
    if plain == owner:
        return "whole"
    if plain == ext4(OWNER_PLAINTEXT + b"last year "):
        return "old"
    if plain == ext4(OWNER_PLAINTEXT + b"in another volume "):
        return "another volume's"
    if plain == owner[: len(plain)]:
        return "shorter"
    starts = range(0, len(owner), 512)
    wrong = [at for at in starts if plain[at : at + 512] != owner[at : at + 512]]
    if wrong[-1] - wrong[0] < 4096:
        return "one sector garbled"
    return "noise" if len(wrong) == len(starts) else "garbled"


@pytest.mark.parametrize("name", OPENING)
def test_a_pinned_header_leaves_only_changes_of_the_payload(genuine, name):
    path = IMAGES[name](genuine, PASSPHRASE)
    same = region_sha256(path) == region_sha256(genuine)
    path.unlink()
    assert same == (name in PINNED_OPENING)


def test_the_special_files_are_what_they_say(genuine):
    kinds = {"symlink": stat.S_ISLNK, "fifo": stat.S_ISFIFO, "directory": stat.S_ISDIR}
    for kind, is_kind in kinds.items():
        path = IMAGES[f"35-{kind}"](genuine, PASSPHRASE)
        assert is_kind(path.lstat().st_mode)
        path.rmdir() if kind == "directory" else path.unlink()


def test_35_a_file_changed_while_it_is_read(genuine, tmp_path):
    """One read sees one thing, or a mixture that no checksum fits; nothing is read twice."""
    image = Path(shutil.copy(genuine, tmp_path / "image.img"))
    evil = IMAGES["02-segment-null"](genuine, PASSPHRASE)
    outcomes = set()
    with changed_between_reads(image, evil), open(image, "rb") as file:
        for _ in range(60):
            region = os.pread(file.fileno(), 2**20, 0)
            try:
                _, key = opened(region, image.stat().st_size)
            except (BadHeaderError, WrongPassphraseError):
                outcomes.add("refused")
            else:
                assert key == volume_key()
                outcomes.add("opened")
    evil.unlink()
    assert outcomes


@pytest.mark.parametrize(
    "name", [name for name in FILES if name not in NOT_BY_CRYPTSETUP]
)
def test_cryptsetup_itself_would_open_it(genuine, name):
    """So these are attacks, not just broken files: the same passphrase opens them there."""
    program = shutil.which("cryptsetup") or pytest.skip("cryptsetup is not installed")
    version = subprocess.run([program, "--version"], capture_output=True, check=True)
    if not version.stdout.startswith(b"cryptsetup 2.6."):
        pytest.skip("other versions refuse others of them")
    path = IMAGES[name](genuine, PASSPHRASE)
    options = ("--test-passphrase", "--disable-locks", "--key-file", "-")
    done = subprocess.run(
        [program, "open", *options, path], input=PASSPHRASE, check=False
    )
    path.unlink()
    assert done.returncode == 0
