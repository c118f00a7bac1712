"""Signing keys: published, used, retired; one file appears, moves or goes at each step."""

from __future__ import annotations

import os

import pytest

from tdxd.core.config import parse_signing_key
from tdxd.core.keyrelease import signing_key_id
from tdxd.errors import ConfigError, DataError
from tdxd.owner.server.signing_keys import (
    pin_line,
    publish_first,
    publish_next,
    read_signing_keys,
    retire_previous,
    use_next,
)


@pytest.fixture
def directory(tmp_path):
    publish_first(tmp_path, os.urandom)
    return tmp_path


def roles(directory):
    return {key.role: key.key_id for key in read_signing_keys(directory)}


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_publishing_that_is_cut_short_leaves_no_half_key(directory, monkeypatch, step):
    """A key file that is no key, or is root's, would keep the server from starting."""
    with monkeypatch.context() as patch:

        def killed(*_arguments):
            raise KeyboardInterrupt

        patch.setattr(os, step, killed)
        with pytest.raises(KeyboardInterrupt):
            publish_next(directory, os.urandom)
    assert list(roles(directory)) == ["current"]
    publish_next(directory, os.urandom)
    assert list(roles(directory)) == ["current", "next"]
    assert not list(directory.glob("*.new")), "nothing is left behind"


def test_whole_rotation(directory):
    first = read_signing_keys(directory)[0]
    published = publish_next(directory, os.urandom)
    assert (
        publish_next(directory, os.urandom).key_id == published.key_id
    )  # harmless again
    assert roles(directory) == {"current": first.key_id, "next": published.key_id}
    assert use_next(directory).key_id == published.key_id
    assert roles(directory) == {"current": published.key_id, "previous": first.key_id}
    assert read_signing_keys(directory)[0].role == "current"
    retire_previous(directory)
    assert roles(directory) == {"current": published.key_id}


def test_line_to_pin_is_the_raw_public_key(directory):
    key = read_signing_keys(directory)[0]
    raw = parse_signing_key(pin_line(key))
    assert raw == key.private.public_key().public_bytes_raw()
    assert key.key_id == signing_key_id(raw)


def test_nothing_is_used_that_was_not_published(directory):
    with pytest.raises(DataError, match="no next signing key") as caught:
        use_next(directory)
    assert "publish" in caught.value.hint


def test_a_key_that_guests_may_wait_for_is_not_overwritten(directory):
    publish_next(directory, os.urandom)
    use_next(directory)
    before = roles(directory)
    publish_next(directory, os.urandom)
    with pytest.raises(DataError, match="previous signing key"):
        use_next(directory)
    assert before.items() <= roles(directory).items()


def test_use_that_was_cut_short_is_done_again(directory):
    first = read_signing_keys(directory)[0].key_id
    published = publish_next(directory, os.urandom).key_id
    os.link(directory / "signing.key", directory / "signing.previous.key")
    use_next(directory)
    assert roles(directory) == {"current": published, "previous": first}


def test_nothing_to_retire(directory):
    with pytest.raises(DataError, match="no previous"):
        retire_previous(directory)


@pytest.mark.parametrize("data", [b"", bytes(31), bytes(33)])
def test_file_that_is_no_key(directory, data):
    (directory / "signing.next.key").write_bytes(data)
    (directory / "signing.next.key").chmod(0o600)
    with pytest.raises(ConfigError, match=r"signing\.next\.key"):
        read_signing_keys(directory)
    with pytest.raises(ConfigError):
        use_next(directory)
    assert (directory / "signing.key").exists()
    assert not (directory / "signing.previous.key").exists()


def test_file_that_others_may_read(directory):
    (directory / "signing.key").chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        read_signing_keys(directory)


def test_files_are_private_whatever_the_umask(directory):
    before = os.umask(0)
    try:
        publish_next(directory, os.urandom)
    finally:
        os.umask(before)
    assert (directory / "signing.next.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_next_key_belongs_to_whom_the_store_belongs(directory):
    os.chown(directory, 12345, 12346)
    publish_next(directory, os.urandom)
    made = (directory / "signing.next.key").stat()
    assert (made.st_uid, made.st_gid) == (12345, 12346)
