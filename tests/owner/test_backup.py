"""Backups: consistent while the server writes, checked when they come back, never over anything."""

from __future__ import annotations

import contextlib
import io
import shutil
import sqlite3
import tarfile
import threading

import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.errors import ConfigError, DataError, HostError
from tdxd.owner.audit.guard import check_for_serving
from tdxd.owner.server.assembly import make_keyd
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import read_tls
from tdxd.owner.store.backup import make_backup, restore_backup
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import Store
from tests.keyserver import opened_owner, serving
from tests.owner.test_store import record

KEYS = ("ca.key", "kek.private", "server.key", "signing.key")


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


def members(path):
    with tarfile.open(path) as archive:
        return {entry.name: entry for entry in archive}


async def test_backup_while_serving_then_restored_verified_and_served(owner, tmp_path):
    bundle = owner.add("v")
    stop = threading.Event()
    written = []

    def write():
        with Store.open(owner.directory) as store:
            while not stop.is_set():
                with store.transaction() as change:
                    change.record([record()] * 20)
                written.append(20)
                stop.wait(0.02)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while not written:
            pass
        for count in range(3):
            await owner.fetch("v")
            file = tmp_path / f"backup-{count}"
            made = make_backup(owner.directory, file, 5, with_keys=True)
            assert made.seq >= sum(written[:1])
            restored = restore_backup(file, tmp_path / f"restored-{count}")
            assert restored.records == made.seq
            assert restored.missing == ()
            assert restored.checkpoint == made
    finally:
        stop.set()
        thread.join()
    directory = tmp_path / "restored-2"
    config = read_config(directory)
    with Store.open(directory) as store:
        check_for_serving(directory, config, store)
        keyd = make_keyd(directory, config, store)
        with serving(keyd, read_tls(directory)) as address:
            got = (await owner.fetch("v", config=owner.config(address)))["v"]
        assert store.seal().seq == made.seq + 1
    assert isinstance(got, KeyBundle)
    assert got.secret.matches(bundle.secret)


def test_keys_go_along_only_when_asked_for(owner, tmp_path):
    make_backup(owner.directory, tmp_path / "plain", 5, with_keys=False)
    make_backup(owner.directory, tmp_path / "whole", 5, with_keys=True)
    plain, whole = members(tmp_path / "plain"), members(tmp_path / "whole")
    assert set(whole) - set(plain) == set(KEYS)
    assert set(plain) == {
        "ca.pem",
        "checkpoint",
        "kek.public",
        "keyd.toml",
        "server.pem",
        "simulated-root.der",
        "store.sqlite3",
    }
    for path in (tmp_path / "plain", tmp_path / "whole"):
        assert path.stat().st_mode & 0o777 == 0o600
    restore_backup(tmp_path / "whole", tmp_path / "restored")
    assert (tmp_path / "restored").stat().st_mode & 0o777 == 0o700
    for name in (*KEYS, "store.sqlite3"):
        assert (tmp_path / "restored" / name).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == []


def test_restored_without_keys_says_which_are_missing(owner, tmp_path):
    owner.add("v")
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=False)
    restored = restore_backup(tmp_path / "backup", tmp_path / "restored")
    assert sorted(restored.missing) == sorted(KEYS)
    assert restored.checkpoint is None
    for name in KEYS:
        shutil.copy2(owner.directory / name, tmp_path / "restored" / name)
    directory = tmp_path / "restored"
    with Store.open(directory) as store:
        check_for_serving(directory, read_config(directory), store)


def test_kek_that_lies_elsewhere(owner, tmp_path):
    kept = (owner.directory / "kek.private").rename(tmp_path / "kek")
    with pytest.raises(ConfigError, match=r"kek\.private is missing"):
        make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)
    assert not (tmp_path / "backup").exists()
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True, kek_file=kept)
    restored = restore_backup(tmp_path / "backup", tmp_path / "r", kek_file=kept)
    assert restored.missing == ("kek.private",)


def test_nothing_is_overwritten(owner, tmp_path):
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)
    kept = (tmp_path / "backup").read_bytes()
    with pytest.raises(ConfigError, match="backup exists already"):
        make_backup(owner.directory, tmp_path / "backup", 6, with_keys=True)
    assert (tmp_path / "backup").read_bytes() == kept
    with pytest.raises(ConfigError, match="store is not empty"):
        restore_backup(tmp_path / "backup", owner.directory)
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(ConfigError, match="file is not empty"):
        restore_backup(tmp_path / "backup", taken)


def test_store_that_is_not_whole_is_not_backed_up_as_if_it_were(owner, tmp_path):
    path = owner.directory / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as attacker, attacker:
        attacker.execute("UPDATE seal SET revision = 99")
    with pytest.raises(StoreIntegrityError, match="not authentic"):
        make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)
    assert not (tmp_path / "backup").exists()


def test_backup_of_nothing(tmp_path):
    with pytest.raises(ConfigError, match="is no key server store"):
        make_backup(tmp_path, tmp_path / "backup", 5, with_keys=False)


def rewritten(source, target, change):
    """Copy a backup; `change` gets name and content, and returns entries to write."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for entry in old:
            content = old.extractfile(entry)
            assert content is not None
            for made, data in change(entry, content.read()):
                made.size = len(data) if made.isreg() else 0
                new.addfile(made, io.BytesIO(data))
    return target


def renamed(entry, name, kind=None):
    made = tarfile.TarInfo(name)
    made.type = kind or entry.type
    made.linkname = "/etc/passwd"
    return made


HOSTILE = {
    "path": lambda entry, data: [(renamed(entry, "../evil"), data)],
    "absolute": lambda entry, data: [(renamed(entry, "/tmp/evil"), data)],
    "hidden": lambda entry, data: [(renamed(entry, ".ssh"), data)],
    "symlink": lambda entry, data: [(renamed(entry, "x", tarfile.SYMTYPE), b"")],
    "hardlink": lambda entry, data: [(renamed(entry, "x", tarfile.LNKTYPE), b"")],
    "device": lambda entry, data: [(renamed(entry, "x", tarfile.CHRTYPE), b"")],
    "directory": lambda entry, data: [(renamed(entry, "x", tarfile.DIRTYPE), b"")],
    "twice": lambda entry, data: [(entry, data), (entry, data)],
    "huge": lambda entry, data: [(renamed(entry, "x.pem"), bytes(2_000_000))],
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_member_is_refused_and_nothing_is_left(owner, tmp_path, how):
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)

    def change(entry, data):
        if entry.name == "ca.pem":
            return HOSTILE[how](entry, data)
        return [(entry, data)]

    bad = rewritten(tmp_path / "backup", tmp_path / "bad", change)
    with pytest.raises(DataError, match="is none of ours"):
        restore_backup(bad, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    assert not (tmp_path / "evil").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_backup_with_another_database_is_refused(owner, tmp_path):
    """The database of one backup under the checkpoint of a later one."""
    owner.add("v")
    make_backup(owner.directory, tmp_path / "one", 5, with_keys=True)
    with owner.store.transaction() as transaction:
        transaction.record([record()])
    make_backup(owner.directory, tmp_path / "two", 6, with_keys=True)
    with tarfile.open(tmp_path / "one") as archive:
        found = archive.extractfile("store.sqlite3")
        assert found is not None
        older = found.read()

    def change(entry, data):
        return [(entry, older if entry.name == "store.sqlite3" else data)]

    mixed = rewritten(tmp_path / "two", tmp_path / "mixed", change)
    with pytest.raises(DataError, match="not whole: the audit log ends at record 0"):
        restore_backup(mixed, tmp_path / "restored")


def test_backup_with_an_edited_row_is_refused(owner, tmp_path):
    owner.add("v")
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)

    def change(entry, data):
        if entry.name == "store.sqlite3":
            data = data.replace(b'"SEPT_VE_DISABLE"', b'"SEPT_VE_DISABLX"')
        return [(entry, data)]

    bad = rewritten(tmp_path / "backup", tmp_path / "bad", change)
    with pytest.raises(DataError, match="policy of volume 'v' version 1 was edited"):
        restore_backup(bad, tmp_path / "restored")


@pytest.mark.parametrize("name", ["checkpoint", "keyd.toml", "store.sqlite3"])
def test_backup_without_one_of_its_parts(owner, tmp_path, name):
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)

    def change(entry, data):
        return [] if entry.name == name else [(entry, data)]

    bad = rewritten(tmp_path / "backup", tmp_path / "bad", change)
    with pytest.raises(DataError, match=f"{name} is missing"):
        restore_backup(bad, tmp_path / "restored")


def test_files_that_are_no_backups(owner, tmp_path):
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)
    whole = (tmp_path / "backup").read_bytes()
    for size in (0, 100, 700, 40_000):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(DataError):
            restore_backup(tmp_path / "cut", tmp_path / "restored")
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    with pytest.raises(DataError, match="is no backup"):
        restore_backup(tmp_path / "junk", tmp_path / "restored")
    with pytest.raises(HostError, match="No such file"):
        restore_backup(tmp_path / "none", tmp_path / "restored")
