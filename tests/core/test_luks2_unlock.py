"""From a passphrase to the volume key: which keyslot, at what cost, and what is wiped."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxd.core import luks2, luks2_area, luks2_unlock
from tdxd.core.bundle import volume_key
from tdxd.core.luks2_json import Argon2id, Pbkdf2
from tdxd.core.luks2_read import Luks2Header, read_luks2
from tdxd.core.secret import Secret
from tdxd.errors import BadHeaderError, HostError, WrongPassphraseError
from tests.core.test_luks2_read import BUNDLE, IMAGE_BYTES

HEADER_BYTES = luks2.build_header(BUNDLE, recovery=True)
REGION = HEADER_BYTES.ljust(luks2.PAYLOAD_OFFSET_BYTES, b"\0")
HEADER = read_luks2(REGION, image_bytes=IMAGE_BYTES, source="m.img")
PASSPHRASE = luks2.recovery_passphrase(BUNDLE)
KEY = volume_key(BUNDLE).reveal()
FEW = settings(max_examples=20)  # of some milliseconds each
SALT = base64.b64encode(bytes(32)).decode()


def unlock(
    header: Luks2Header = HEADER,
    region: bytes = REGION,
    passphrase: bytes | None = None,
) -> Secret:
    secret = Secret(PASSPHRASE.reveal() if passphrase is None else passphrase)
    return luks2_unlock.unlock(header, region, secret, source="m.img")


def with_slot(kdf: Pbkdf2 | Argon2id, *, offset: int = 290816) -> Luks2Header:
    """The header with a second keyslot that the passphrase does not open."""
    (slot,) = HEADER.keyslots
    area = dataclasses.replace(slot.area, offset=str(offset))
    other = dataclasses.replace(slot, kdf=kdf, area=area)
    return dataclasses.replace(HEADER, keyslots=(other, slot))


def test_the_right_passphrase_gives_the_volume_key():
    assert unlock().reveal() == KEY


@pytest.mark.parametrize("end", [b"\n", b"\0\n", b" "])
def test_a_passphrase_is_taken_as_it_is(end):
    with pytest.raises(WrongPassphraseError, match="opens none of 1 keyslot"):
        unlock(passphrase=PASSPHRASE.reveal() + end)


@FEW
@given(st.binary(min_size=1, max_size=80))
def test_no_other_passphrase_opens_it(passphrase):
    with pytest.raises(WrongPassphraseError) as caught:
        unlock(passphrase=passphrase)
    assert "m.img" in caught.value.message


@FEW
@given(st.integers(32768, 32768 + luks2_area.SPLIT_BYTES - 1), st.integers(0, 7))
def test_a_flipped_bit_of_the_area_gives_no_key(offset, bit):
    region = bytearray(REGION)
    region[offset] ^= 1 << bit
    with pytest.raises(WrongPassphraseError):
        unlock(region=bytes(region))


def test_a_region_that_ends_too_early_is_refused():
    with pytest.raises(BadHeaderError, match="its payload begins at 16777216"):
        unlock(region=REGION[:-1])


def test_the_cheapest_keyslot_is_tried_first(monkeypatch):
    derive, tried = luks2_unlock._derive, []

    def recorded(kdf, *args):
        tried.append(kdf.cost)
        return derive(kdf, *args)

    monkeypatch.setattr(luks2_unlock, "_derive", recorded)
    costly = Pbkdf2(type="pbkdf2", hash="sha256", iterations=2000, salt=SALT)
    assert unlock(with_slot(costly)).reveal() == KEY
    assert tried == [1000 / 10**7]
    cheap = Argon2id(type="argon2id", time=4, memory=32, cpus=1, salt=SALT)
    assert unlock(with_slot(cheap)).reveal() == KEY
    assert tried[1:] == [cheap.cost, 1000 / 10**7]


def test_every_keyslot_is_tried():
    other = Argon2id(type="argon2id", time=4, memory=64, cpus=4, salt=SALT)
    with pytest.raises(WrongPassphraseError, match="opens none of 2 keyslots"):
        unlock(with_slot(other), passphrase=b"x")


def test_what_it_takes_of_memory():
    assert luks2_unlock.memory_bytes(HEADER) < 2**20
    large = Argon2id(type="argon2id", time=4, memory=2**20, cpus=4, salt=SALT)
    assert 2**30 <= luks2_unlock.memory_bytes(with_slot(large)) < 2**30 + 2**20


def test_too_little_memory_is_told(monkeypatch):
    class Scarce:
        def __init__(self, **_parameters: object) -> None:
            pass

        def derive(self, _password: bytes) -> bytes:
            raise MemoryError

    name = "cryptography.hazmat.primitives.kdf.argon2.Argon2id"
    monkeypatch.setattr(name, Scarce)
    kdf = Argon2id(type="argon2id", time=4, memory=64, cpus=1, salt=SALT)
    (slot,) = HEADER.keyslots
    header = dataclasses.replace(HEADER, keyslots=(dataclasses.replace(slot, kdf=kdf),))
    with pytest.raises(HostError, match=r"unlock m\.img: Cannot allocate") as caught:
        unlock(header)
    assert "65536 bytes" in caught.value.hint


def test_a_key_of_equal_halves_is_refused():
    """Nobody but who knows the passphrase can have made it."""
    key = bytes(range(32)) * 2
    salt = base64.b64decode(HEADER.keyslots[0].kdf.salt)
    area_key = hashlib.pbkdf2_hmac("sha256", PASSPHRASE.reveal(), salt, 1000, 64)
    area = luks2_area.seal_area(key, bytes(luks2_area.NOISE_BYTES), area_key)
    region = REGION[:32768] + area + REGION[32768 + len(area) :]
    value = hashlib.pbkdf2_hmac("sha256", key, bytes(32), 1000, 32)
    digest = dataclasses.replace(
        HEADER.digest, salt=SALT, digest=base64.b64encode(value).decode()
    )
    with pytest.raises(BadHeaderError, match="halves of the XTS key are equal"):
        unlock(dataclasses.replace(HEADER, digest=digest), region)


def test_all_but_the_result_is_wiped(monkeypatch):
    made = []

    class Watched(Secret):
        def __init__(self, data: bytes) -> None:
            super().__init__(data)
            made.append(self)

    monkeypatch.setattr(luks2_unlock, "Secret", Watched)
    cheap = Argon2id(type="argon2id", time=4, memory=32, cpus=1, salt=SALT)
    key = unlock(with_slot(cheap))
    assert [one for one in made if not one.wiped] == [key]
    assert len(made) == 4  # two keys of areas, two of volumes
    made.clear()
    with pytest.raises(WrongPassphraseError):
        unlock(passphrase=b"x")
    assert len(made) == 2
    assert all(one.wiped for one in made)


# --- the splitter -------------------------------------------------------------


@FEW
@given(st.binary(min_size=64, max_size=64), st.integers(0, 2**32))
def test_merging_undoes_splitting(key, seed):
    noise = random.Random(seed).randbytes(luks2_area.NOISE_BYTES)
    stripes = luks2_area.split(key, noise)
    assert stripes[: len(noise)] == noise
    assert luks2_area.merge(stripes) == key


def test_the_splitter_as_the_specification_writes_it():
    """LUKS1 On-Disk Format Specification 1.2.3, §2.4, literally."""
    noise, key = os.urandom(luks2_area.NOISE_BYTES), os.urandom(64)
    state = bytes(64)
    for number in range(3999):
        stripe = noise[number * 64 : (number + 1) * 64]
        mixed = bytes(left ^ right for left, right in zip(state, stripe, strict=True))
        state = b"".join(
            hashlib.sha256(index.to_bytes(4, "big") + mixed[at : at + 32]).digest()
            for index, at in enumerate((0, 32))
        )
    last = bytes(left ^ right for left, right in zip(state, key, strict=True))
    assert luks2_area.split(key, noise) == noise + last


def test_each_sector_of_an_area_has_its_own_tweak():
    noise, key, area_key = os.urandom(luks2_area.NOISE_BYTES), bytes(64), os.urandom(64)
    area = luks2_area.seal_area(key, noise, area_key)
    number = 499
    tweak = modes.XTS(number.to_bytes(16, "little"))
    decryptor = Cipher(algorithms.AES(area_key), tweak).decryptor()
    plain = decryptor.update(area[number * 512 : (number + 1) * 512])
    assert plain[:448] == noise[number * 512 :]
    assert luks2_area.open_area(area, area_key) == key
