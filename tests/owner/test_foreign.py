"""Foreign volumes at the owner's: a passphrase is kept, released and rotated as a secret is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3

import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.core.foreign import ForeignManifest, PassphraseBundle
from tdxd.core.secret import Secret
from tdxd.errors import (
    BadHeaderError,
    DataError,
    DeniedError,
    HostError,
    MissingError,
    WrongPassphraseError,
)
from tdxd.owner.audit.guard import check_for_serving
from tdxd.owner.audit.verify import verify
from tdxd.owner.foreign.image import pin_header, read_foreign
from tdxd.owner.server.assembly import make_keyd
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import read_tls
from tdxd.owner.store.admin import add_bundles
from tdxd.owner.store.backup import make_backup, restore_backup
from tdxd.owner.store.database import schema_troubles
from tdxd.owner.store.kek import read_kek, unwrap, wrap
from tdxd.owner.store.rotation import rotate_kek
from tdxd.owner.store.store import Store
from tests.keyserver import make_bundle, opened_owner, policy_text, serving
from tests.luks2_genuine import PASSPHRASE, make_image

PIN = bytes(range(32))


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("foreign") / "vol.img")


def foreign(volume_id="f", generation=1, header_sha256=PIN, passphrase=PASSPHRASE):
    manifest = ForeignManifest(
        volume_id=volume_id, generation=generation, header_sha256=header_sha256
    )
    return PassphraseBundle(manifest=manifest, secret=Secret(passphrase))


def add(owner, *bundles, policy=True):
    file = None
    if policy:
        file = owner.directory.parent / "policy.toml"
        file.write_text(policy_text(owner.platform))
    return add_bundles(owner.directory, bundles, file, 5)


def troubles(directory):
    deployment = bytes.fromhex(read_config(directory).deployment)
    with Store.open(directory) as opened:
        return verify(opened, None, deployment=deployment).troubles


def sql(owner, statement, *values):
    path = owner.directory / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as attacker, attacker:
        attacker.execute(statement, values)


async def fetched_from(owner, directory, *names):
    """Fetch from a server that starts now on a store."""
    config = read_config(directory)
    with Store.open(directory) as opened:
        check_for_serving(directory, config, opened)
        keyd = make_keyd(directory, config, opened)
        with serving(keyd, read_tls(directory)) as address:
            return await owner.fetch(*names, config=owner.config(address))


def assert_both(got, sealed):
    assert isinstance(got["f"], PassphraseBundle)
    assert got["f"].manifest == foreign().manifest
    assert got["f"].secret.reveal() == PASSPHRASE
    assert isinstance(got["v"], KeyBundle)
    assert got["v"].manifest == sealed.manifest
    assert got["v"].secret.matches(sealed.secret)


async def test_both_kinds_are_released_in_one_request(owner):
    sealed = owner.add("v")
    add(owner, foreign())
    assert_both(await owner.fetch("f", "v"), sealed)
    assert {one.decision for one in owner.store.audit(limit=2)} == {"released"}


async def test_a_window_holds_passphrases_too(owner):
    add(owner, foreign(generation=1, passphrase=b"old"), foreign(generation=2))
    text = policy_text(owner.platform) + "[release]\ngenerations = 2\n"
    with owner.store.transaction() as change:
        change.set_policy("f", text, 9)
    got = (await owner.fetch_leased("f"))["f"]
    assert [one.manifest.generation for one in got.bundles] == [2, 1]
    assert [one.secret.reveal() for one in got.bundles] == [PASSPHRASE, b"old"]


async def test_rotated_backed_up_and_restored(owner, tmp_path):
    sealed = owner.add("v")
    add(owner, foreign())
    rotate_kek(owner.directory, 77, os.urandom)
    assert troubles(owner.directory) == ()
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)
    restore_backup(tmp_path / "backup", tmp_path / "restored")
    assert troubles(tmp_path / "restored") == ()
    got = await fetched_from(owner, tmp_path / "restored", "f", "v")
    assert_both(got, sealed)


def test_passphrase_is_nowhere_in_the_store(owner):
    add(owner, foreign(passphrase=b"wilbur-and-orville"))
    rotate_kek(owner.directory, 77, os.urandom)
    for path in owner.directory.iterdir():
        if path.is_file():
            assert b"wilbur-and-orville" not in path.read_bytes(), path.name


def test_wrapped_for_its_volume_and_generation_only(owner):
    kek = read_kek(owner.directory / "kek.private")
    wrapped = wrap(kek.public, foreign("f", 3))
    got = unwrap(kek, wrapped, "f", 3)
    assert isinstance(got, PassphraseBundle)
    assert got.secret.reveal() == PASSPHRASE
    for other in (("g", 3), ("f", 4)):
        with pytest.raises(DataError, match="does not open with this key"):
            unwrap(kek, wrapped, *other)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        foreign(header_sha256=b"").manifest.encode(),
        foreign(header_sha256=bytes(32)).manifest.encode(),
    ],
    ids=["kind", "no pin", "another pin"],
)
async def test_edited_manifest_of_a_row_opens_for_nobody(owner, manifest):
    add(owner, foreign())
    sql(owner, "UPDATE generations SET manifest = ?", manifest)
    assert isinstance((await owner.fetch("f"))["f"], DeniedError)
    assert owner.last().reason == "store"
    assert "volume 'f' generation 1 was edited" in troubles(owner.directory)[0]


async def test_manifest_put_into_the_row_of_a_sealed_image(owner):
    owner.add("v")
    sql(owner, "UPDATE generations SET manifest = ?", foreign("v").manifest.encode())
    await owner.fetch("v")
    assert owner.last().reason == "store"


@pytest.mark.parametrize("first", [make_bundle("v"), foreign("v")])
def test_a_volume_has_one_kind(owner, first):
    other = foreign("v", 2) if isinstance(first, KeyBundle) else make_bundle("v", 2)
    add(owner, first)
    with pytest.raises(DataError, match="'v' generation 1 in the store is") as caught:
        add(owner, other)
    assert "another id" in caught.value.hint
    with owner.store.transaction() as change:
        change.remove("v", 1, 7)
    add(owner, other)


def test_several_are_added_or_none(owner):
    add(owner, foreign("a"))
    before = owner.store.seal()
    with pytest.raises(DataError, match="volume 'a' generation 1 is in the store"):
        add(owner, foreign("b"), foreign("a"))
    assert owner.store.volume_ids() == ("a",)
    assert owner.store.seal() == before


# --- a store from before there were two kinds ---------------------------------


def as_before(owner):
    """Take the column away again, as the version before made its tables."""
    sql(owner, "ALTER TABLE generations DROP COLUMN manifest")
    sql(owner, "UPDATE meta SET value = 2 WHERE key = 'schema'")


async def test_an_older_store_is_upgraded_and_stays_authentic(owner, tmp_path):
    sealed = owner.add("v")
    owner.add("w", 1)
    with owner.store.transaction() as change:
        change.remove("w", 1, 7)
    as_before(owner)
    with Store.open(owner.directory) as opened, opened.reading() as sqlite:
        assert list(schema_troubles(sqlite)) == []
    with Store.open(owner.directory) as again:
        assert again.meta("schema") == 4
    assert troubles(owner.directory) == ()
    add(owner, foreign())
    assert_both(await fetched_from(owner, owner.directory, "f", "v"), sealed)


def test_an_older_backup_is_restored(owner, tmp_path):
    owner.add("v")
    make_backup(owner.directory, tmp_path / "now", 5, with_keys=True)
    as_before(owner)
    make_backup(owner.directory, tmp_path / "before", 5, with_keys=True)
    for name in ("now", "before"):
        restore_backup(tmp_path / name, tmp_path / f"{name}-restored")
        assert troubles(tmp_path / f"{name}-restored") == ()


def test_a_version_that_lies_is_an_error_and_changes_nothing(owner):
    owner.add("v")
    sql(owner, "UPDATE meta SET value = 2 WHERE key = 'schema'")
    with pytest.raises(HostError) as caught:
        Store.open(owner.directory)
    assert "duplicate column" in caught.value.hint
    sql(owner, "UPDATE meta SET value = 4 WHERE key = 'schema'")
    assert troubles(owner.directory) == ()


# --- the owner's image --------------------------------------------------------


def test_the_pin_is_the_digest_of_all_before_the_payload(image):
    with Secret(PASSPHRASE) as passphrase:
        pinned = pin_header(image, passphrase)
    found = read_foreign(image)
    offset = found.header.payload_offset_bytes
    data = image.read_bytes()
    assert pinned == hashlib.sha256(data[:offset]).digest() == found.header_sha256
    assert found.image_bytes == len(data)


def test_another_passphrase_pins_nothing(image):
    with (
        Secret(PASSPHRASE + b"\n") as typed,
        pytest.raises(WrongPassphraseError) as caught,
    ):
        pin_header(image, typed)
    assert "without a newline" in caught.value.hint


def test_an_image_that_no_guest_would_open_is_not_pinned(image, tmp_path):
    damaged = tmp_path / "damaged.img"
    data = bytearray(image.read_bytes())
    data[448] ^= 1  # the checksum of the first copy, which cryptsetup would repair
    damaged.write_bytes(data)
    with (
        Secret(PASSPHRASE) as passphrase,
        pytest.raises(BadHeaderError, match="checksum"),
    ):
        pin_header(damaged, passphrase)


def test_what_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "short").write_bytes(b"LUKS\xba\xbe")
    with pytest.raises(BadHeaderError, match="is no regular file"):
        read_foreign(tmp_path / "fifo")
    with pytest.raises(BadHeaderError, match="ends after 6 bytes"):
        read_foreign(tmp_path / "short")
    with pytest.raises(MissingError, match="no such file"):
        read_foreign(tmp_path / "none")
