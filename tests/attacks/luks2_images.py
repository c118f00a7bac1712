"""The hostile LUKS2 images: what a host makes of a genuine one, hoping that it is opened.

`IMAGES` holds them by name; calling one with the path of a genuine image and the passphrase that
opens it writes `NAME.img` beside it and returns that path. The names begin with the number of the
attack. The host does not know the passphrase: it is used only for what an owner's other or older
image would hold (31, 32). No program is run but mke2fs, once.

Each names what must become of it with the right passphrase:

- `refused`: BadHeaderError, or WrongPassphraseError; or the mapper finds no regular file;
- `opens`: the volume key is the owner's or one that the host does not know, so that whatever the
  host put there reads as noise, or as what the owner once wrote.

In no case may `HOST_PLAINTEXT` be readable.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tdxd.core import luks2_area
from tdxd.core.luks2_read import read_luks2
from tdxd.core.luks2_unlock import unlock
from tdxd.core.secret import Secret
from tests.attacks.luks2_forgery import (
    HOST_KEY,
    HOST_PLAINTEXT,
    Luks2File,
    compact,
    digest_of,
    host_file_system,
)
from tests.luks2_genuine import OWNER_PLAINTEXT, encrypt, ext4, volume_key

__all__ = ["HOST_PLAINTEXT", "IMAGES", "HostileImage", "changed_between_reads"]

Verdict = Literal["refused", "opens"]
Make = Callable[[Path, bytes], Path]
Edit = Callable[[dict[str, Any]], object]


@dataclasses.dataclass(frozen=True, slots=True)
class HostileImage:
    """One of them; `note` says what it tries."""

    name: str
    verdict: Verdict
    note: str
    make: Make

    @property
    def number(self) -> int:
        """Its number in the list of attacks, 1 to 36."""
        return int(self.name[:2])

    def __call__(self, genuine: Path, passphrase: bytes) -> Path:
        """Write the image beside the genuine one, which stays as it is."""
        return self.make(genuine, passphrase)


IMAGES: dict[str, HostileImage] = {}


def _register(
    name: str, note: str, make: Callable[[Luks2File, bytes], object], verdict: Verdict
) -> None:
    def write(genuine: Path, passphrase: bytes) -> Path:
        file = Luks2File(bytearray(genuine.read_bytes()))
        make(file, passphrase)
        path = genuine.with_name(f"{name}.img")
        path.write_bytes(file.data)
        return path

    IMAGES[name] = HostileImage(name, verdict, note, write)


def _edited(
    name: str,
    note: str,
    edit: Edit,
    *,
    host_payload: bool = False,
    verdict: Verdict = "refused",
) -> None:
    """Register an image whose document is edited, in both copies, checksums mended."""

    def make(file: Luks2File, _passphrase: bytes) -> None:
        document = file.document
        if host_payload:
            file.put_host_payload()
        edit(document)
        file.put(document)

    _register(name, note, make, verdict)


def _segment(**changes: object) -> Edit:
    return lambda document: document["segments"]["0"].update(changes)


# --- 1 to 12: what the key is used with, and where -----------------------------


def _null_keyslot(file: Luks2File, _passphrase: bytes) -> None:
    file.put_host_payload(key=HOST_KEY)
    document = file.document
    file.put_host_key(document, "0", "0")
    document["keyslots"]["0"]["area"]["encryption"] = "cipher_null-ecb"
    file.put(document)


def _linear_and_crypt(document: dict[str, Any]) -> None:
    segment = document["segments"]["0"]
    first = {"offset": segment["offset"]}
    size = {"type": "linear", "size": str(4 * 2**20)}
    second = segment | {"offset": str(int(segment["offset"]) + 4 * 2**20)}
    document["segments"] = {"0": first | size, "1": second}
    document["digests"]["0"]["segments"] = ["1"]


def _linear(document: dict[str, Any]) -> None:
    offset = document["segments"]["0"]["offset"]
    segment = {"type": "linear", "offset": offset, "size": "dynamic"}
    document["segments"]["0"] = segment
    document["digests"]["0"]["segments"] = []


def _shift(document: dict[str, Any]) -> None:
    segment = document["segments"]["0"]
    segment["offset"] = str(int(segment["offset"]) + 4096)
    segment["iv_tweak"] = "8"


def _other_sector_size(document: dict[str, Any]) -> None:
    segment = document["segments"]["0"]
    segment["sector_size"] = 512 + 4096 - segment["sector_size"]


_register(
    "01-keyslot-null",
    "the keyslot area is not encrypted, its key the host's",
    _null_keyslot,
    "refused",
)
for _name, _note, _cipher in (
    ("02-segment-null", "the payload is not encrypted", "cipher_null-ecb"),
    (
        "03-segment-capi-null",
        "nor is it, by another name",
        "capi:ecb(cipher_null)-plain64",
    ),
    ("04-segment-null-short", "nor is it, by an alias", "null"),
):
    _edited(_name, _note, _segment(encryption=_cipher), host_payload=True)
_edited(
    "05-segment-linear", "dm-linear instead of dm-crypt", _linear, host_payload=True
)
_edited(
    "05-segment-linear-bound",
    "the same, with its digest",
    _segment(type="linear"),
    host_payload=True,
)
_edited(
    "06-linear-and-crypt",
    "the payload's start is dm-linear",
    _linear_and_crypt,
    host_payload=True,
)
_edited(
    "07-xts-null-iv",
    "each sector under the same tweak",
    _segment(encryption="aes-xts-null"),
)
_edited(
    "08-xts-plain", "tweaks that wrap at 2 TiB", _segment(encryption="aes-xts-plain")
)
_edited("09-shifted", "the payload begins a block later, still readable", _shift)
_edited("10-offset-0", "the header itself is the payload", _segment(offset="0"))
_edited("11-size", "the payload ends early", _segment(size="4096"))
_edited(
    "12-other-sector-size",
    "half of the payload reads as noise",
    _other_sector_size,
    verdict="opens",
)


# --- 13 to 20: which bytes are the header, and how they read -------------------


def _null_document(file: Luks2File) -> dict[str, Any]:
    document = file.document
    document["segments"]["0"]["encryption"] = "cipher_null-ecb"
    return document


def _newer_second(file: Luks2File, _passphrase: bytes) -> None:
    evil = _null_document(file)
    file.put_host_payload()
    file.put(evil, copies=(1,))
    file.set_sequence(1, 99)


def _second_after_bad_first(file: Luks2File, passphrase: bytes) -> None:
    _newer_second(file, passphrase)
    file.spoil(0)


def _null_copies(file: Luks2File, starts: tuple[int, ...], size: int) -> bytearray:
    """Return an image that has null copies of a `size` at some places, and keyslots behind."""
    document = _null_document(file)
    payload_offset = max(file.payload_offset, 2 * size + 2**20)
    area = document["keyslots"]["0"]["area"]
    old, area["offset"] = int(area["offset"]), str(2 * size)
    document["segments"]["0"]["offset"] = str(payload_offset)
    document["config"]["json_size"] = str(size - 4096)
    document["config"]["keyslots_size"] = str(payload_offset - 2 * size)
    made = Luks2File(bytearray(payload_offset) + host_file_system())
    made.data[:32768] = file.data[:32768]
    made.data[2 * size : 2 * size + 258048] = file.data[old : old + 258048]
    text = compact(document)
    for start in starts:
        copy = 16384 if start else 0
        made.data[start : start + 4096] = file.data[copy : copy + 4096]
        struct.pack_into(">Q", made.data, start + 8, size)
        struct.pack_into(">Q", made.data, start + 256, start)
        made.data[start + 4096 : start + size] = text.ljust(size - 4096, b"\0")
        made.seal(start, size)
    return made.data


def _third_copy(offset: int, file: Luks2File, _passphrase: bytes) -> None:
    """Both copies have wrong checksums; a good one stands where cryptsetup searches.

    A copy there is as large as its distance from the start.
    """
    file.data = _null_copies(file, (offset,), offset)
    file.spoil(0)
    if offset != 16384:
        file.spoil(1)


def _text(name: str, note: str, change: Callable[[bytes], bytes]) -> None:
    """Register an image whose JSON is changed as text, over a payload in the clear."""

    def make(file: Luks2File, _passphrase: bytes) -> None:
        changed = change(file.text)
        assert changed != file.text
        file.put_host_payload()
        file.put_text(changed)

    _register(name, note, make, "refused")


_CIPHER = b'"encryption":"aes-xts-plain64","sector_size"'


def _cipher_text(replacement: bytes) -> Callable[[bytes], bytes]:
    return lambda text: text.replace(_CIPHER, replacement + b',"sector_size"')


def _second_text(text: bytes) -> bytes:
    return text + b"\0" + text.replace(b"aes-xts-plain64", b"cipher_null-ecb")


_register(
    "13-second-newer", "the second copy is newer and null", _newer_second, "refused"
)
_register(
    "14-first-spoilt",
    "the first copy is bad, the second null",
    _second_after_bad_first,
    "refused",
)
for _offset in (2**power for power in range(14, 23)):
    _register(
        f"15-third-copy-{_offset:#x}",
        "both copies are bad, a null one stands where cryptsetup searches",
        functools.partial(_third_copy, _offset),
        "refused",
    )
_text(
    "16-duplicate-last",
    "a key twice, the last is null",
    _cipher_text(b'"encryption":"aes-xts-plain64","encryption":"cipher_null-ecb"'),
)
_text(
    "16-duplicate-first",
    "a key twice, the first is null",
    _cipher_text(b'"encryption":"cipher_null-ecb","encryption":"aes-xts-plain64"'),
)
_text(
    "17-case",
    "a key that differs in case only",
    _cipher_text(b'"encryption":"cipher_null-ecb","Encryption":"aes-xts-plain64"'),
)
_text(
    "18-nul-in-cipher",
    "a NUL that ends a C string",
    _cipher_text(b'"encryption":"cipher_null-ecb\\u0000-xts-plain64"'),
)
_text(
    "18-nul-in-key",
    "a NUL that ends a key",
    _cipher_text(
        b'"encryption":"cipher_null-ecb","encryption\\u0000x":"aes-xts-plain64"'
    ),
)
_text(
    "19-comment",
    "a comment",
    _cipher_text(b'"encryption":"cipher_null-ecb"/*,"encryption":"aes-xts-plain64"*/'),
)
_text("19-quotes", "single quotes", _cipher_text(b"'encryption':'cipher_null-ecb'"))
_text("19-spaces", "white space", _cipher_text(b'"encryption": "aes-xts-plain64"'))
_text(
    "19-escape",
    "an escape nobody needs",
    _cipher_text(b'"encryption":"\\u0061es-xts-plain64"'),
)
_text("20-after-nul", "bytes behind the text's NUL", _second_text)


# --- 21 to 29: what a header may ask for ---------------------------------------


def _reencrypting(document: dict[str, Any]) -> None:
    """A decryption that is under way, so that the start of the payload is in the clear."""
    segment = document["segments"]["0"]
    digest = document["digests"]["0"]
    clear = {"type": "linear", "offset": segment["offset"], "size": "dynamic"}
    document["segments"] = {
        "0": clear,
        "1": segment | {"flags": ["backup-previous"]},
        "2": clear | {"flags": ["backup-final"]},
    }
    area = {"type": "checksum", "hash": "sha256", "sector_size": 512}
    area |= {"offset": "548864", "size": "4096"}
    slot = {"type": "reencrypt", "key_size": 1, "mode": "decrypt", "priority": 0}
    document["keyslots"]["1"] = slot | {"direction": "forward", "area": area}
    digest["segments"] = ["1"]
    document["digests"]["1"] = digest | {"keyslots": ["1"], "segments": []}
    document["config"]["requirements"] = {"mandatory": ["online-reencrypt-v2"]}


def _token(**token: object) -> Edit:
    return lambda document: document.update(tokens={"0": token | {"keyslots": ["0"]}})


def _kdf(**changes: object) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        slot = document["keyslots"]["0"]
        slot["kdf"] = changes | {"salt": slot["kdf"]["salt"]}

    return edit


def _add_keyslot(document: dict[str, Any], offset: int) -> None:
    slot = document["keyslots"]["0"]
    area = slot["area"] | {"offset": str(offset)}
    number = str(len(document["keyslots"]))
    document["keyslots"][number] = slot | {"area": area}


def _two_digests(file: Luks2File, _passphrase: bytes) -> None:
    file.put_host_payload(key=HOST_KEY)
    document = file.document
    _add_keyslot(document, 32768 + 258048)
    digest = document["digests"]["0"] | {"keyslots": ["1"]}
    document["digests"]["1"] = digest
    file.put_host_key(document, "1", "1")
    document["keyslots"]["1"]["area"]["encryption"] = "aes-xts-plain64"
    file.put(document)


def _two_keyslots(document: dict[str, Any]) -> None:
    """A second keyslot of the host's, which the owner's passphrase cannot open."""
    _add_keyslot(document, 32768 + 258048)
    document["digests"]["0"]["keyslots"] = ["0", "1"]


def _costly_keyslots(document: dict[str, Any]) -> None:
    for number in range(1, 8):
        _add_keyslot(document, 32768 + number * 258048)
    for slot in document["keyslots"].values():
        slot["kdf"] = slot["kdf"] | {"iterations": 10**7}
    document["digests"]["0"]["keyslots"] = list(document["keyslots"])
    end = 32768 + 8 * 258048
    document["segments"]["0"]["offset"] = str(end)
    document["config"]["keyslots_size"] = str(end - 32768)


def _area(offset: Callable[[dict[str, Any]], int]) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        document["keyslots"]["0"]["area"]["offset"] = str(offset(document))

    return edit


def _payload_offset(document: dict[str, Any]) -> int:
    return int(document["segments"]["0"]["offset"])


_NO_INTEGRITY = {
    "type": "none",
    "journal_encryption": "none",
    "journal_integrity": "none",
}
_INTEGRITY = _NO_INTEGRITY | {"type": "hmac(sha256)"}

_edited(
    "21-allow-discards",
    "the host learns what is free",
    lambda document: document["config"].update(flags=["allow-discards"]),
)
_edited(
    "22-reencryption",
    "a reencryption to plaintext, half done (CVE-2021-4122)",
    _reencrypting,
    host_payload=True,
)
_edited(
    "23-keyring-token",
    "the passphrase of another volume",
    _token(type="luks2-keyring", key_description="tdxd:other:1"),
)
_edited("24-plugin-token", "a plug-in loaded by name", _token(type="../../tmp/evil"))
_edited(
    "25-argon2-memory",
    "2 TiB of memory",
    _kdf(type="argon2id", time=4, memory=2**31, cpus=4),
)
_edited(
    "25-argon2-time",
    "2^31 passes",
    _kdf(type="argon2id", time=2**31, memory=2**20, cpus=1),
)
_edited(
    "26-iterations",
    "2^32-1 iterations",
    _kdf(type="pbkdf2", hash="sha256", iterations=2**32 - 1),
)
_edited(
    "26-digest-iterations",
    "2^32-1 iterations for the digest",
    lambda document: document["digests"]["0"].update(iterations=2**32 - 1),
)
_edited(
    "26-one-iteration",
    "a keyslot that is quickly guessed",
    _kdf(type="pbkdf2", hash="sha256", iterations=1),
)
_edited("26-costly-keyslots", "eight keyslots of the greatest cost", _costly_keyslots)
_register(
    "27-two-digests", "a second keyslot with the host's key", _two_digests, "refused"
)
_edited(
    "27-two-keyslots",
    "a second keyslot that nobody opens",
    _two_keyslots,
    verdict="opens",
)
_edited("28-area-over-header", "the keyslot is the header", _area(lambda _: 16384))
_edited("28-area-over-payload", "the keyslot is the payload", _area(_payload_offset))
_edited(
    "28-area-overlapping",
    "the keyslot reaches into the payload",
    _area(lambda document: _payload_offset(document) - 4096),
)
_edited("29-no-integrity", "integrity that is none", _segment(integrity=_NO_INTEGRITY))
_edited(
    "29-fake-integrity", "integrity that nobody made", _segment(integrity=_INTEGRITY)
)


# --- 30 to 36: whole files -----------------------------------------------------


def _luks1(file: Luks2File, _passphrase: bytes) -> None:
    """A LUKS1 header whose cipher is null: any passphrase opens it, to the host's key."""
    salt = hashlib.sha256(b"LUKS1").digest()
    digest = hashlib.pbkdf2_hmac("sha1", HOST_KEY[:16], salt, 1000, 20)
    start = file.payload_offset
    header = struct.pack(
        ">6sH32s32s32sII20s32sI40s",
        *(b"LUKS\xba\xbe", 1, b"cipher_null", b"ecb", b"sha1", start // 512, 16),
        *(digest, salt, 1000, b"00000000-0000-4000-8000-000000000000"),
    )
    active, free = 0x00AC71F3, 0x0000DEAD
    for number in range(8):
        state = free if number else active
        slot = (state, 1000, salt, 8 + number * 128, 4000)
        header += struct.pack(">II32sII", *slot)
    file.put_host_payload()
    file.data[:start] = header.ljust(start, b"\0")
    split = _split_sha1(HOST_KEY[:16])
    file.data[4096 : 4096 + len(split)] = split


def _split_sha1(key: bytes) -> bytes:
    """Split a key of 16 bytes, which is less than one SHA-1, with noise that is all zero."""
    state = bytes(16)
    for _ in range(3999):
        state = hashlib.sha1(bytes(4) + state).digest()[:16]
    last = bytes(left ^ right for left, right in zip(state, key, strict=True))
    return bytes(3999 * 16) + last


def _put_key(file: Luks2File, key: bytes, passphrase: bytes) -> None:
    """Put a key into keyslot 0 under a passphrase, as its owner would have."""
    document = file.document
    slot = document["keyslots"]["0"]
    salt = hashlib.sha256(passphrase + key).digest()
    kdf = {"type": "pbkdf2", "hash": "sha256", "iterations": 1000}
    slot["kdf"] = kdf | {"salt": base64.b64encode(salt).decode()}
    area_key = hashlib.pbkdf2_hmac("sha256", passphrase, salt, 1000, 64)
    noise = hashlib.shake_256(salt).digest(luks2_area.NOISE_BYTES)
    area = luks2_area.seal_area(key, noise, area_key)
    start = int(slot["area"]["offset"])
    file.data[start : start + len(area)] = area
    document["digests"]["0"] |= digest_of(key)
    file.put(document)


def _other_volume(file: Luks2File, _passphrase: bytes) -> None:
    _put_key(file, volume_key("other"), b"the other volume's passphrase")


def _other_volume_same_passphrase(file: Luks2File, passphrase: bytes) -> None:
    _put_key(file, volume_key("other"), passphrase)


def _other_file(file: Luks2File, passphrase: bytes) -> None:
    """Header and payload of another volume: whole, and right in itself."""
    _other_volume_same_passphrase(file, passphrase)
    other = ext4(OWNER_PLAINTEXT + b"in another volume ")
    key = volume_key("other")
    file.data[file.payload_offset :] = encrypt(key, other, file.sector_bytes)


def _open(file: Luks2File, passphrase: bytes) -> bytes:
    region = bytes(file.data[: file.payload_offset])
    header = read_luks2(region, image_bytes=len(file.data), source="genuine")
    return unlock(header, region, Secret(passphrase), source="genuine").reveal()


def _old_passphrase(file: Luks2File, passphrase: bytes) -> None:
    _put_key(file, _open(file, passphrase), b"the passphrase before luksChangeKey")


def _old_image(file: Luks2File, passphrase: bytes) -> None:
    """Header and payload of last year, when the passphrase was the same."""
    key = _open(file, passphrase)
    _put_key(file, key, passphrase)
    old = ext4(OWNER_PLAINTEXT + b"last year ")
    file.data[file.payload_offset :] = encrypt(key, old, file.sector_bytes)


def _large_header(file: Luks2File, _passphrase: bytes) -> None:
    file.data = _null_copies(file, (0, 4 * 2**20), 4 * 2**20)


def _deep(file: Luks2File, _passphrase: bytes) -> None:
    room = 12288 - len(file.text) - 16
    nested = b"[" * (room // 2) + b"]" * (room // 2)
    file.put_text(file.text.replace(b'"tokens":{}', b'"tokens":{"0":' + nested + b"}"))


def _cut(size: Callable[[Luks2File], int]) -> Callable[[Luks2File, bytes], None]:
    def make(file: Luks2File, _passphrase: bytes) -> None:
        del file.data[size(file) :]

    return make


def _special(name: str, note: str, make: Callable[[Path, Path], object]) -> None:
    """Register what is no regular file: `make` gets the genuine image and the new path."""

    def write(genuine: Path, _passphrase: bytes) -> Path:
        path = genuine.with_name(f"{name}.img")
        make(genuine, path)
        return path

    IMAGES[name] = HostileImage(name, "refused", note, write)


def _flip_payload(file: Luks2File, _passphrase: bytes) -> None:
    file.data[file.payload_offset + 2 * 4096 + 5] ^= 1


def _flip_last(file: Luks2File, _passphrase: bytes) -> None:
    file.data[-1] ^= 0x80


_register("30-luks1", "a LUKS1 header with a null cipher", _luks1, "refused")
_register("31-other-volume", "another volume's header", _other_volume, "refused")
_register(
    "31-other-volume-same-passphrase",
    "another volume's header, the passphrase used twice",
    _other_volume_same_passphrase,
    "opens",
)
_register(
    "31-other-file-same-passphrase",
    "the whole file of another volume, the passphrase used twice",
    _other_file,
    "opens",
)
_register(
    "32-old-header",
    "the header before the passphrase was changed",
    _old_passphrase,
    "refused",
)
_register(
    "32-old-image", "an older generation under the same passphrase", _old_image, "opens"
)
_register("33-large-header", "copies of 4 MiB", _large_header, "refused")
_register("34-deep-json", "JSON nested 5,000 deep", _deep, "refused")
_register("35-empty", "an empty file", _cut(lambda _: 0), "refused")
_register(
    "35-cut-in-header", "cut inside the second copy", _cut(lambda _: 20000), "refused"
)
_register(
    "35-cut-in-keyslot",
    "cut inside the keyslot area",
    _cut(lambda _: 100000),
    "refused",
)
_register(
    "35-cut-before-payload",
    "cut where the payload begins",
    _cut(lambda file: file.payload_offset),
    "refused",
)
_register(
    "35-cut-in-payload",
    "cut inside the payload",
    _cut(lambda file: len(file.data) - 4196),
    "opens",
)
_special(
    "35-symlink", "a symbolic link", lambda genuine, path: path.symlink_to(genuine)
)
_special("35-fifo", "a FIFO", lambda _, path: os.mkfifo(path))
_special("35-directory", "a directory", lambda _, path: path.mkdir())
_register("36-flipped-payload", "one bit of the payload", _flip_payload, "opens")
_register("36-flipped-last-block", "one bit of the last block", _flip_last, "opens")


@contextlib.contextmanager
def changed_between_reads(image: Path, other: Path) -> Iterator[None]:
    """Exchange the first 4 MiB of `image` with those of `other` and back, again and again.

    Attack 35: whoever reads a byte twice may see two things.
    """
    size = 4 * 2**20
    contents = [path.read_bytes()[:size] for path in (other, image)]
    stop = threading.Event()
    fd = os.open(image, os.O_WRONLY)

    def exchange() -> None:
        while not stop.is_set():
            for content in contents:
                os.pwrite(fd, content, 0)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        os.close(fd)


assert {image.number for image in IMAGES.values()} == set(range(1, 37))
