"""Named secrets at the owner's: kept, released, rotated, backed up and audited as volumes are."""

from __future__ import annotations

import contextlib
import os
import sqlite3

import pytest

from tdxd.core.named_secret import SECRET_CONTENT_MAX_BYTES, NamedSecret
from tdxd.core.secret import Secret
from tdxd.errors import DataError, DeniedError, KeyReleaseError, UsageError
from tdxd.guest.leased import LeasedSecret
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.assembly import make_keyd
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import read_tls
from tdxd.owner.store.admin import (
    put_secret,
    remove_secret,
    remove_volume,
    set_policy,
)
from tdxd.owner.store.backup import make_backup, restore_backup
from tdxd.owner.store.database import schema_troubles
from tdxd.owner.store.rotation import rotate_kek
from tdxd.owner.store.store import Store
from tests.keyserver import make_bundle, opened_owner, policy_text, serving

CONTENT = b"correct horse battery staple, as a content"


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


def policy_file(owner, release=""):
    file = owner.directory.parent / "policy.toml"
    file.write_text(policy_text(owner.platform) + release)
    return file


def put(owner, secret_id="s", data=CONTENT, *, policy="own", content="file"):
    if policy == "own":
        policy = policy_file(owner)
    return put_secret(
        owner.directory, secret_id, content, Secret(data), 5, policy=policy
    )


def troubles(directory):
    deployment = bytes.fromhex(read_config(directory).deployment)
    with Store.open(directory) as opened:
        return verify(opened, None, deployment=deployment).troubles


def sql(owner, statement, *values):
    path = owner.directory / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as attacker, attacker:
        attacker.execute(statement, values)


async def fetched(owner, name="s"):
    got = (await owner.fetch(name))[name]
    assert isinstance(got, NamedSecret), got
    return got


# --- put and released ---------------------------------------------------------


async def test_it_is_released_like_a_volume(owner):
    volume = owner.add("v")
    row = put(owner)
    assert (row.generation, row.kind, row.content) == (1, "secret", "file")
    got = await owner.fetch("s", "v")
    assert got["s"].secret.reveal() == CONTENT
    assert got["s"].manifest.volume_id == "s"
    assert got["v"].secret.reveal() == volume.secret.reveal()
    record = owner.last()
    assert (record.decision, record.volume_id, record.generation) == (
        "released",
        "v",
        1,
    )
    assert owner.store.audit(limit=2)[0].volume_id == "s"
    assert troubles(owner.directory) == ()


async def test_the_largest_content_of_many_secrets_in_one_answer(owner):
    whole = os.urandom(SECRET_CONTENT_MAX_BYTES)
    names = [f"s{number:02}" for number in range(64)]
    for name in names:
        put(owner, name, whole)
    got = await owner.fetch(*names)
    assert all(got[name].secret.reveal() == whole for name in names)


@pytest.mark.parametrize("size", [0, SECRET_CONTENT_MAX_BYTES + 1])
def test_a_content_of_another_size_is_refused(owner, size):
    with pytest.raises(UsageError, match="not 1 to 65536"):
        put(owner, data=bytes(size))
    assert owner.store.volume_ids() == ()


def test_an_id_that_is_none_is_refused(owner):
    with pytest.raises(UsageError, match="volume id 'A' is not"):
        put(owner, "A")


async def test_generations_count_up_and_only_the_newest_is_released(owner):
    release = "\n[release]\ngenerations = [1, 2, 3]\n"
    numbers = [
        put(owner, data=b"%d" % number, policy=policy_file(owner, release)).generation
        for number in (1, 2, 3)
    ]
    assert numbers == [1, 2, 3]
    got = (await owner.fetch_leased("s"))["s"]
    assert isinstance(got, LeasedSecret)
    assert (got.bundle.manifest.generation, got.bundle.secret.reveal()) == (3, b"3")
    remove_secret(owner.directory, "s", 3, 6)
    assert (await fetched(owner)).manifest.generation == 2
    # A number that was taken is never given again: guests would take it for the old content.
    assert put(owner, data=b"4").generation == 4
    remove_secret(owner.directory, "s", None, 7)
    assert put(owner, data=b"5").generation == 5


async def test_a_policy_may_pin_a_generation(owner):
    put(owner, data=b"1")
    put(
        owner,
        data=b"2",
        policy=policy_file(owner, "\n[release]\ngenerations = [1]\n"),
    )
    assert (await fetched(owner)).secret.reveal() == b"1"


async def test_without_a_policy_nobody_gets_it(owner):
    put(owner, policy=None)
    got = (await owner.fetch("s"))["s"]
    assert isinstance(got, DeniedError)
    assert "no-policy" in got.message
    set_policy(owner.directory, "s", policy_file(owner), 6)
    assert (await fetched(owner)).secret.reveal() == CONTENT


async def test_the_policy_of_a_volume_is_taken(owner):
    release = "\n[release]\nlease_s = 600\nmax_per_hour = 1\n"
    owner.add("v", 1, policy_text(owner.platform) + release)
    put(owner, policy="v")
    assert owner.store.policy("s").text == owner.store.policy("v").text
    got = (await owner.fetch_leased("s"))["s"]
    assert got.lease_s == 600
    assert owner.last().lease_s == 600
    again = (await owner.fetch("s"))["s"]
    assert isinstance(again, KeyReleaseError)
    assert "quota" in again.message
    # Its quota is its own.
    assert not isinstance((await owner.fetch("v"))["v"], KeyReleaseError)
    # It is a copy: a change of the volume's changes nothing here.
    set_policy(owner.directory, "v", policy_file(owner), 7)
    assert "max_per_hour" in owner.store.policy("s").text


def test_a_policy_that_is_not_there_changes_nothing(owner):
    owner.add("bare", policy=None)
    before = owner.store.seal()
    with pytest.raises(DataError, match="'bare' has no policy to take"):
        put(owner, policy="bare")
    with pytest.raises(DataError, match="no volume or secret 'nobody'"):
        put(owner, policy="nobody")
    assert owner.store.seal() == before


async def test_a_denial_is_explained_like_a_volumes(owner):
    put(owner)
    file = owner.directory.parent / "other.toml"
    file.write_text(policy_text(owner.platform, mrtd=f'["{"00" * 48}"]'))
    set_policy(owner.directory, "s", file, 6)
    got = (await owner.fetch("s"))["s"]
    assert isinstance(got, DeniedError)
    record = owner.last()
    assert (record.decision, record.volume_id, record.reason) == (
        "denied",
        "s",
        "measurements",
    )
    assert owner.store.denial(record.denial_id) == record


# --- one namespace ------------------------------------------------------------


def test_an_id_is_a_volume_or_a_secret(owner):
    owner.add("v")
    put(owner)
    with pytest.raises(DataError) as caught:
        put(owner, "v")
    assert caught.value.message == (
        "'v' generation 1 in the store is sealed, generation 2 would be a secret (file)"
    )
    with pytest.raises(DataError, match=r"'s' generation 1 .* is a secret \(file\)"):
        owner.add("s", 2)
    with pytest.raises(DataError, match=r"would be a secret \(client-ca\)"):
        put(owner, content="client-ca")
    with pytest.raises(DataError, match="'v' is a volume, no secret"):
        remove_secret(owner.directory, "v", None, 6)
    remove_volume(owner.directory, "s", None, 6)
    assert owner.add("s", 2).manifest.generation == 2


async def test_a_secret_is_no_volume_that_a_guest_may_serve(owner):
    """An event of RTMR3 that names it is not that of a volume of the store."""
    row = put(owner)
    from tdxd.owner.store.volumes import Volumes

    volumes = Volumes(owner.store, owner.store.kek())
    digest = bytes.fromhex(row.manifest_sha256)
    assert not volumes.knows("s", 1, digest)
    kept = owner.add("v")
    assert volumes.knows("v", 1, kept.manifest.digest()) is False  # not renewed yet
    volumes.renew(owner.store.seal().revision)
    assert volumes.knows("v", 1, kept.manifest.digest())


# --- at rest ------------------------------------------------------------------


def test_the_content_is_nowhere_in_the_store(owner, tmp_path):
    put(owner)
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=False)
    places = [tmp_path / "backup", *owner.directory.rglob("*")]
    for path in places:
        if path.is_file():
            assert CONTENT not in path.read_bytes(), path


async def test_a_row_of_another_generation_or_id_opens_for_nobody(owner):
    put(owner)
    put(owner, data=b"2")
    put(owner, "other")
    sql(
        owner,
        "UPDATE generations SET wrapped = (SELECT wrapped FROM generations "
        "WHERE volume_id = 's' AND generation = 1) WHERE volume_id = 'other'",
    )
    got = (await owner.fetch("other"))["other"]
    assert isinstance(got, KeyReleaseError)
    assert "store" in got.message
    assert troubles(owner.directory) != ()


async def test_its_manifest_cannot_be_edited(owner):
    put(owner)
    bundle = make_bundle("s")
    sql(owner, "UPDATE generations SET manifest = ?", bundle.manifest.encode())
    assert "generation 1" in troubles(owner.directory)[0]
    got = (await owner.fetch("s"))["s"]
    assert isinstance(got, KeyReleaseError)


async def served_from(owner, directory):
    with Store.open(directory) as store:
        keyd = make_keyd(directory, read_config(directory), store, clock=owner.now_s)
        with serving(keyd, read_tls(directory)) as address:
            return (await owner.fetch("s", config=owner.config(address)))["s"]


async def test_it_goes_through_rotation_and_backup(owner, tmp_path):
    put(owner)
    rotate_kek(owner.directory, 6, os.urandom)
    make_backup(owner.directory, tmp_path / "backup", 7, with_keys=True)
    restore_backup(tmp_path / "backup", tmp_path / "restored")
    for directory in (owner.directory, tmp_path / "restored"):
        assert troubles(directory) == ()
        got = await served_from(owner, directory)
        assert got.secret.reveal() == CONTENT


@pytest.mark.parametrize("version", [2, 3])
async def test_a_store_of_an_older_program_is_upgraded(owner, version):
    sealed = owner.add("v")
    if version == 2:
        sql(owner, "ALTER TABLE generations DROP COLUMN manifest")
    sql(owner, f"UPDATE meta SET value = {version} WHERE key = 'schema'")
    with Store.open(owner.directory) as opened:
        assert opened.meta("schema") == 4
        with opened.reading() as sqlite:
            assert list(schema_troubles(sqlite)) == []
    assert troubles(owner.directory) == ()
    put(owner)
    with Store.open(owner.directory) as again:
        assert [row.kind for row in again.generations("s")] == ["secret"]
        assert [row.kind for row in again.generations("v")] == ["sealed"]
        found = again.sealed_volume("v")
    assert found.trouble == ""
    assert sealed.manifest.digest().hex() == found.generations[0].manifest_sha256
