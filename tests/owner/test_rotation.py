"""Another key-encryption key: everything under it, nothing lost, whatever happens on the way."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.errors import ConfigError, DataError, HostError, UnavailableError
from tdxd.owner.audit.guard import check_for_serving, load_checkpoint, public_keys
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.assembly import make_keyd
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import read_tls
from tdxd.owner.store import rotation
from tdxd.owner.store.backup import make_backup, restore_backup
from tdxd.owner.store.kek import next_path, read_kek, unwrap
from tdxd.owner.store.rotation import rotate_kek
from tdxd.owner.store.rotation_lock import rotation_locked
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import KekRotatedError, Store
from tests.keyserver import opened_owner, serving
from tests.owner.test_workers import Server, server, store

__all__ = ["server", "store"]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


def rotated(owner, **changes):
    return rotate_kek(owner.directory, 77, os.urandom, **changes)


def troubles(directory, checkpoint=None, kek_file=None):
    deployment = bytes.fromhex(read_config(directory).deployment)
    with Store.open(directory, kek_file) as opened:
        return verify(opened, checkpoint, deployment=deployment).troubles


def kek_of(owner):
    return read_kek(owner.directory / "kek.private")


def checkpointing(owner, path):
    with (owner.directory / "keyd.toml").open("a") as config:
        config.write(f'[audit]\ncheckpoint_file = "{path}"\n')
    return path


async def served(owner, directory, kek_file=None):
    """Fetch from a server that starts now."""
    config = read_config(directory)
    with Store.open(directory, kek_file) as opened:
        check_for_serving(directory, config, opened)
        keyd = make_keyd(directory, config, opened)
        with serving(keyd, read_tls(directory)) as address:
            return (await owner.fetch("v", config=owner.config(address)))["v"]


async def test_the_same_secrets_and_policies_under_another_key(owner):
    bundle = owner.add("v")
    owner.add("w", 1)
    owner.add("w", 2)
    with owner.store.transaction() as change:
        change.remove("w", 1, 7)
        change.raise_floors({"tcb-evaluation/r/F": 17})
    await owner.fetch("v")
    seal, state = owner.store.sealed()
    before = kek_of(owner)
    done = rotated(owner)
    assert (done.finished, done.scrubbed) == (False, True)
    assert done.key_id == kek_of(owner).key_id != before.key_id
    assert troubles(owner.directory) == ()
    got = await served(owner, owner.directory)
    assert isinstance(got, KeyBundle)
    assert got.secret.matches(bundle.secret)
    with Store.open(owner.directory) as opened:
        now, after = opened.sealed()
        assert now.revision == seal.revision + 1
        assert after.floors == state.floors
        assert set(after.policies) == set(state.policies)
        for name, held in state.generations.items():
            kept = {number: one[1] for number, one in held.items()}
            assert {n: one[1] for n, one in after.generations[name].items()} == kept
        # No image is touched: manifests, and with them the volume keys, are the same.
        assert [one.generation for one in opened.generations("w")] == [2]
    owner.add("v", 2)  # the public half was replaced, too


async def test_the_audit_log_says_so_and_its_chain_goes_on(owner):
    owner.add("v")
    await owner.fetch("v")
    before = kek_of(owner)
    done = rotated(owner)
    with Store.open(owner.directory) as opened:
        first, told = opened.audit()
        assert (first.seq, first.decision) == (1, "released")
        assert (told.seq, told.decision, told.at_s) == (2, "kek-rotated", 77)
        seen = {one.name: (one.expected, one.actual) for one in told.checks}
    assert seen["kek"] == (before.key_id, done.key_id)
    assert seen["generations"] == ("1", "1")
    assert seen["token_keys"] == ("1", "1")


def test_the_checkpoint_of_it_is_exported(owner, tmp_path):
    owner.add("v")
    path = checkpointing(owner, tmp_path / "checkpoint")
    owner.add("v", 2)
    older = load_checkpoint(path, public_keys(owner.directory))
    rotated(owner)
    newest = load_checkpoint(path, public_keys(owner.directory))
    with Store.open(owner.directory) as opened:
        seal = opened.seal()
    assert (newest.seq, newest.revision) == (seal.seq, seal.revision)
    assert newest.revision > older.revision
    assert troubles(owner.directory, newest) == ()
    assert troubles(owner.directory, older) == ()


def test_a_checkpoint_that_cannot_be_exported_is_told_and_the_rotation_stands(
    owner, tmp_path
):
    (tmp_path / "place").mkdir()
    path = checkpointing(owner, tmp_path / "place" / "checkpoint")
    (tmp_path / "place").rmdir()
    before = kek_of(owner)
    with pytest.raises(UnavailableError, match="the change was made, but"):
        rotated(owner)
    assert kek_of(owner).key_id != before.key_id
    assert not next_path(owner.directory / "kek.private").exists()
    path.parent.mkdir()
    owner.add("v")
    assert path.exists()


async def test_key_that_lies_elsewhere(owner, tmp_path):
    bundle = owner.add("v")
    elsewhere = tmp_path / "vault"
    elsewhere.mkdir()
    kept = (owner.directory / "kek.private").rename(elsewhere / "kek")
    link = tmp_path / "link"
    link.symlink_to(kept)
    before = kept.read_bytes()
    done = rotated(owner, kek_file=link)
    assert kept.read_bytes() != before
    assert link.is_symlink()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in elsewhere.iterdir()] == ["kek"]
    assert not (owner.directory / "kek.private").exists()
    assert read_kek(kept).key_id == done.key_id
    got = await served(owner, owner.directory, link)
    assert got.secret.matches(bundle.secret)


@pytest.mark.root
def test_the_file_keeps_its_owner(owner):
    os.chown(owner.directory / "kek.private", 65534, 65534)
    rotated(owner)
    found = (owner.directory / "kek.private").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 65534, 0o600)


def test_again_and_again(owner):
    bundle = owner.add("v")
    names = {kek_of(owner).key_id} | {rotated(owner).key_id for _ in range(4)}
    assert len(names) == 5
    with Store.open(owner.directory) as opened:
        (row,) = opened.generations("v")
        got = unwrap(opened.kek(), row.wrapped, "v", 1)
    assert got.secret.matches(bundle.secret)


# --- cut short ----------------------------------------------------------------


@pytest.mark.slow
def test_a_crash_at_any_line_leaves_a_store_that_serves_and_is_finished_later(tmp_path):
    """Also a backup with its keys, taken in that moment, is whole."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.owner.rotation_crashes", str(tmp_path)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) > 60
    # The commit is the one moment at which the old key ends and the new one begins.
    assert [key for key, _ in itertools.groupby(results)] == ["old", "new"]


class _CutShortError(Exception):
    pass


@pytest.fixture
def unfinished(owner, monkeypatch):
    """A store that is under its next key, whose file has not taken the old one's place."""
    owner.bundle = owner.add("v")
    with monkeypatch.context() as patched:

        def cut(_path):
            raise _CutShortError

        patched.setattr(rotation, "_take_its_place", cut)
        with pytest.raises(_CutShortError):
            rotated(owner)
    assert next_path(owner.directory / "kek.private").exists()
    return owner


async def test_every_verb_works_before_it_is_finished(unfinished, capsys):
    owner = unfinished
    before = kek_of(owner)
    got = await served(owner, owner.directory)
    assert got.secret.matches(owner.bundle.secret)
    owner.add("v", 2)
    assert troubles(owner.directory) == ()
    with Store.open(owner.directory) as opened:
        assert opened.kek().unfinished
        assert opened.kek().key_id != before.key_id
    assert "kek.rotation_unfinished" in capsys.readouterr().out
    done = rotated(owner)
    assert done.finished
    assert kek_of(owner).key_id == done.key_id
    assert isinstance(await served(owner, owner.directory), KeyBundle)


def test_finishing_makes_no_second_key_and_needs_no_whole_store(unfinished):
    with Store.open(unfinished.directory) as opened:
        wanted = opened.kek().key_id
        opened._sqlite.execute("UPDATE policies SET text = 'edited'")
    assert rotated(unfinished).key_id == wanted
    assert "was edited" in troubles(unfinished.directory)[0]


def test_a_next_key_that_seals_nothing_is_not_taken(owner):
    """Left by a rotation that did not come to its transaction, or put there by somebody."""
    owner.add("v")
    before = kek_of(owner)
    following = next_path(owner.directory / "kek.private")
    for content in (os.urandom(96), b"short", b""):
        following.write_bytes(content)
        following.chmod(0o600)
        with Store.open(owner.directory) as opened:
            assert opened.kek().key_id == before.key_id
            assert not opened.kek().unfinished
        done = rotated(owner)
        assert not done.finished
        assert not following.exists()
        assert kek_of(owner).key_id == done.key_id != before.key_id
        assert (owner.directory / "kek.private").read_bytes() != content
        before = kek_of(owner)


def test_where_no_file_can_be_made_nothing_changes(owner, tmp_path):
    owner.add("v")
    kept = (owner.directory / "kek.private").read_bytes()
    next_path(owner.directory / "kek.private").mkdir()
    with pytest.raises(HostError, match=r"kek\.next\.private"):
        rotated(owner)
    next_path(owner.directory / "kek.private").rmdir()
    assert (owner.directory / "kek.private").read_bytes() == kept
    assert troubles(owner.directory) == ()


def test_store_that_is_not_whole_is_not_put_under_another_key(owner):
    """What somebody put in would be authentic afterwards."""
    owner.add("v")
    before = kek_of(owner)
    owner.store._sqlite.execute("UPDATE policies SET text = 'looser'")
    with pytest.raises(StoreIntegrityError, match="policy of volume 'v' version 1"):
        rotated(owner)
    assert kek_of(owner).key_id == before.key_id
    assert not next_path(owner.directory / "kek.private").exists()


def test_store_behind_its_checkpoint_is_not_rotated(owner, tmp_path):
    owner.add("v")
    make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)
    checkpointing(owner, tmp_path / "checkpoint")
    owner.add("v", 2)
    restore_backup(tmp_path / "backup", tmp_path / "restored")
    checkpoint = f'[audit]\ncheckpoint_file = "{tmp_path / "checkpoint"}"\n'
    with (tmp_path / "restored" / "keyd.toml").open("a") as config:
        config.write(checkpoint)
    with pytest.raises(StoreIntegrityError, match="behind its newest checkpoint"):
        rotate_kek(tmp_path / "restored", 7, os.urandom)


def test_two_at_once_come_one_after_the_other(owner):
    owner.add("v")
    before = kek_of(owner).key_id
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(rotated(owner).key_id))
        for _ in range(3)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert len({before, *done}) == 4
    assert kek_of(owner).key_id in done
    assert troubles(owner.directory) == ()


def test_a_backup_waits_for_a_rotation(owner, tmp_path):
    """Database and key files of a backup are of one moment."""
    made = []

    def back_up():
        made.append(
            make_backup(owner.directory, tmp_path / "backup", 5, with_keys=True)
        )

    thread = threading.Thread(target=back_up)
    with rotation_locked(owner.directory, exclusive=True):
        thread.start()
        thread.join(0.5)
        assert not made
    thread.join(60)
    assert made


# --- running servers ----------------------------------------------------------


async def test_a_running_server_refuses_clearly_until_it_is_started_anew(owner):
    owner.add("v")
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
    rotated(owner)
    got = (await owner.fetch("v"))["v"]
    assert not isinstance(got, KeyBundle)
    for call in (owner.store.seal, owner.store.sealed, owner.store.token_keys):
        with pytest.raises(KekRotatedError, match="was rotated") as caught:
            call()
        assert "reload" in caught.value.hint
    with pytest.raises(KekRotatedError), owner.store.transaction() as change:
        change.set_policy("v", "text", 9)
    assert isinstance(await served(owner, owner.directory), KeyBundle)


def test_a_broken_seal_is_not_taken_for_a_rotation(owner):
    owner.add("v")
    owner.store.seal()
    owner.store._sqlite.execute("UPDATE seal SET revision = 99")
    with pytest.raises(StoreIntegrityError, match="not authentic"):
        owner.store.seal()
    rotated_away = owner.directory / "kek.private"
    rotated_away.write_bytes(os.urandom(96))
    with pytest.raises(StoreIntegrityError, match="not authentic"):
        owner.store.seal()


def test_a_real_server_takes_the_new_key_at_its_reload(server: Server) -> None:
    server.ask()
    old = server.workers()
    rotate_kek(server.store, 77, os.urandom)
    os.kill(server.process.pid, signal.SIGHUP)
    server.next_address()
    server.wait_for(lambda: len(server.workers()) == 2 and not server.workers() & old)
    assert server.ask().token


# --- backups ------------------------------------------------------------------


async def test_backup_and_restore_across_a_rotation(owner, tmp_path):
    bundle = owner.add("v")
    make_backup(owner.directory, tmp_path / "before", 5, with_keys=False)
    old = tmp_path / "old-kek"
    old.write_bytes((owner.directory / "kek.private").read_bytes())
    old.chmod(0o600)
    rotated(owner)
    new = owner.directory / "kek.private"
    make_backup(owner.directory, tmp_path / "after", 5, with_keys=True)
    restored = restore_backup(tmp_path / "after", tmp_path / "restored")
    assert restored.missing == ()
    got = await served(owner, tmp_path / "restored")
    assert got.secret.matches(bundle.secret)
    # The one from before is of its own key: the new one says so, the old one opens it all.
    with pytest.raises(DataError, match="not authentic") as caught:
        restore_backup(tmp_path / "before", tmp_path / "wrong", kek_file=new)
    assert "rotate-kek" in caught.value.hint
    restore_backup(tmp_path / "before", tmp_path / "past", kek_file=old)
    with Store.open(tmp_path / "past", old) as opened:
        (row,) = opened.generations("v")
        assert unwrap(opened.kek(), row.wrapped, "v", 1).secret.matches(bundle.secret)


def test_the_old_private_half_is_no_key_of_the_store(owner, tmp_path):
    old = tmp_path / "old"
    old.write_bytes((owner.directory / "kek.private").read_bytes())
    old.chmod(0o600)
    rotated(owner)
    with Store.open(owner.directory, old) as opened:
        with pytest.raises(StoreIntegrityError, match="not authentic"):
            opened.seal()
        with pytest.raises(ConfigError):
            opened.token_keys()
