"""The key-encryption key: what it binds, and who may read its file."""

from __future__ import annotations

import pytest

from tdxd.core.secret import Secret
from tdxd.errors import ConfigError, DataError, HostError
from tdxd.owner.store.kek import create_kek, read_kek, read_public, unwrap, wrap
from tests.keyserver import make_bundle


@pytest.fixture
def directory(tmp_path):
    create_kek(tmp_path, Secret(bytes(range(96))))
    return tmp_path


def kek_of(directory):
    return read_kek(directory / "kek.private")


def public_of(directory):
    return read_public(directory, kek_of(directory))


def test_wrap_and_unwrap(directory):
    bundle = make_bundle("v", 3)
    got = unwrap(kek_of(directory), wrap(public_of(directory), bundle), "v", 3)
    assert got.manifest == bundle.manifest
    assert got.secret.matches(bundle.secret)


def test_private_half_elsewhere_vouches_for_the_public_one(directory, tmp_path):
    kek = tmp_path / "elsewhere"
    (directory / "kek.private").rename(kek)
    assert (
        read_public(directory, read_kek(kek)) == (directory / "kek.public").read_bytes()
    )


@pytest.mark.parametrize(("volume_id", "generation"), [("w", 3), ("v", 4)])
def test_wrapped_for_another_volume_or_generation(directory, volume_id, generation):
    wrapped = wrap(public_of(directory), make_bundle("v", 3))
    with pytest.raises(DataError, match="does not open with this key"):
        unwrap(kek_of(directory), wrapped, volume_id, generation)


def test_wrapped_under_another_key(directory, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    create_kek(other, Secret(bytes(96)))
    with pytest.raises(DataError):
        unwrap(kek_of(other), wrap(public_of(directory), make_bundle("v")), "v", 1)


def test_private_half_that_others_may_read(directory):
    (directory / "kek.private").chmod(0o640)
    with pytest.raises(ConfigError, match="has mode 0640, so others may read it"):
        kek_of(directory)


def test_private_half_is_made_private(directory):
    assert (directory / "kek.private").stat().st_mode & 0o777 == 0o600


def test_private_half_of_a_wrong_size(directory):
    (directory / "kek.private").write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes, not 96"):
        kek_of(directory)


def test_existing_key_is_never_overwritten(directory):
    with pytest.raises(HostError, match="File exists"):
        create_kek(directory, Secret(bytes(96)))


def test_missing_key(tmp_path):
    with pytest.raises(ConfigError, match=r"kek\.private is missing") as caught:
        kek_of(tmp_path)
    assert "--kek FILE" in caught.value.hint


@pytest.mark.parametrize("data", [bytes(1216), b"", b"\x05" * 1216])
def test_public_half_that_is_not_the_owners(directory, data):
    (directory / "kek.public").write_bytes(data)
    with pytest.raises(ConfigError, match=r"kek\.public is not the public half of"):
        public_of(directory)


def test_public_half_missing(directory):
    (directory / "kek.public").unlink()
    with pytest.raises(HostError, match=r"kek\.public: No such file"):
        public_of(directory)


def test_public_half_that_is_no_key():
    with pytest.raises(ConfigError, match="X25519"):
        wrap(bytes(1216), make_bundle("v"))
