"""tdx-keyd audit, backup and restore as a person types them."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import msgpack
import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.core.config import Address
from tdxd.core.decode import encode_canonical
from tdxd.owner.audit.record import GENESIS, chain_hash
from tdxd.owner.store.store import Store
from tests.cli.test_tdx_keyd import (
    bundle_file,
    ended,
    keyd,
    started,
    store,
)
from tests.keyserver import opened_owner
from tests.owner.test_store import record

__all__ = ["keyd", "store"]  # fixtures


def decide(store, *records):
    with Store.open(store) as opened, opened.transaction() as change:
        change.record(records)


def denial():
    return record(decision="denied", denial_id="d1", reason="tcb-status")


@pytest.fixture
def checkpoint(store, tmp_path):
    path = tmp_path / "elsewhere.checkpoint"
    with (store / "keyd.toml").open("a") as config:
        config.write(f'\n[audit]\ncheckpoint_file = "{path}"\n')
    return path


def test_show(keyd, store):
    decide(store, record(), denial())
    lines = keyd("audit", "show", store).splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["released", "denied"]
    (only,) = json.loads(keyd("audit", "show", store, "--denied", "--json"))
    assert only["denial_id"] == "d1"
    assert json.loads(keyd("audit", "show", store, "--limit", "1", "--json")) == [only]


def test_export_lets_anybody_follow_the_chain(keyd, store):
    decide(store, record(), denial(), record())
    lines = [json.loads(line) for line in keyd("audit", "export", store).splitlines()]
    before = GENESIS
    for line in lines:
        digest = line.pop("hash")
        line["checks"] = [
            [one["name"], one["ok"], one["expected"]]
            + ([one["actual"]] if one["actual"] != one["expected"] else [])
            for one in line["checks"]
        ]
        before = chain_hash(before, encode_canonical(line))
        assert before.hex() == digest
    found = json.loads(keyd("audit", "verify", store, "--json"))
    assert found["head"] == before.hex()
    assert len(keyd("audit", "export", store, "--after", "2").splitlines()) == 1


def test_verify_says_what_was_compared(keyd, store, tmp_path):
    decide(store, record())
    out = keyd("audit", "verify", store)
    assert "ok    1 audit records, the newest is 1\n" in out
    assert "compared with no checkpoint" in out
    file = tmp_path / "checkpoint"
    out = keyd("audit", "checkpoint", store, file)
    assert out.startswith(f"{file}: audit record 1, revision ")
    out = keyd("audit", "verify", store, "--checkpoint", file)
    assert f"ok    not behind {file}\n" in out
    assert "compared with no" not in out


def test_verify_names_what_is_wrong_and_fails(keyd, store, capfd):
    decide(store, *[record()] * 5)
    path = store / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as attacker, attacker:
        attacker.execute("DELETE FROM audit WHERE seq = 3")
        attacker.execute("UPDATE audit SET record = x'80' WHERE seq = 5")
    from tdxd.cli.tdx_keyd import run_command
    from tdxd.errors import DataError

    with pytest.raises(DataError, match="audit record 3 is missing") as caught:
        run_command(["audit", "verify", str(store)])
    assert caught.value.exit_code == 65
    assert "tdx-keyd restore" in caught.value.hint
    out = capfd.readouterr().out
    assert "FAIL  audit record 3 is missing\n" in out
    assert "FAIL  audit record 5 was edited" in out
    with pytest.raises(DataError):
        run_command(["audit", "verify", str(store), "--json"])
    found = json.loads(capfd.readouterr().out)
    assert found["ok"] is False
    assert len(found["troubles"]) == 2


def test_checkpoint_of_a_key_that_the_command_line_names(keyd, store, tmp_path):
    pin = json.loads(keyd("init", tmp_path / "other", "--name", "x", "--json"))
    file = tmp_path / "checkpoint"
    keyd("audit", "checkpoint", tmp_path / "other", file)
    err = keyd("audit", "verify", store, "--checkpoint", file, code=65)
    assert f"unknown key {pin['signing_key']}" in err
    key = pin["signing_key"]
    argv = ("audit", "verify", tmp_path / "other", "--checkpoint", file)
    assert "not behind" in keyd(*argv, "--signing-key", key)
    assert "--signing-key" in keyd(*argv, "--signing-key", "rsa:x", code=64)


def test_checkpoint_file_is_replaced_by_a_newer_one_only(keyd, store, tmp_path):
    file = tmp_path / "checkpoint"
    keyd("backup", store, tmp_path / "backup", "--with-keys")
    decide(store, record())
    keyd("audit", "checkpoint", store, file)
    keyd("restore", tmp_path / "backup", tmp_path / "older")
    err = keyd("audit", "checkpoint", tmp_path / "older", file, code=69)
    assert "holds the checkpoint of audit record 1" in err
    decide(store, record())
    made = json.loads(keyd("audit", "checkpoint", store, file, "--json"))
    assert made["seq"] == 2


def test_change_exports_its_checkpoint_at_once(keyd, store, tmp_path, checkpoint):
    keyd("add", store, bundle_file(tmp_path))
    body = msgpack.unpackb(msgpack.unpackb(checkpoint.read_bytes())["body"])
    assert body["volumes"] == {"v": {"generation": 1, "policy_version": 0}}


def test_change_whose_checkpoint_goes_nowhere_says_so_and_stands(keyd, store, tmp_path):
    with (store / "keyd.toml").open("a") as config:
        config.write(f'\n[audit]\ncheckpoint_file = "{tmp_path}/no/such/place"\n')
    err = keyd("add", store, bundle_file(tmp_path), code=69)
    assert "the change was made, but its checkpoint was not exported" in err
    assert "No such file" in err
    assert keyd("list", store).splitlines()[1].split()[0] == "v"


def test_verbs_that_change_need_the_key_and_are_told_where_it_is(keyd, store, tmp_path):
    kept = (store / "kek.private").rename(tmp_path / "kek")
    bundle = bundle_file(tmp_path)
    for argv in (
        ("add", store, bundle),
        ("audit", "verify", store),
        ("backup", store, tmp_path / "backup"),
        ("audit", "checkpoint", store, tmp_path / "checkpoint"),
    ):
        err = keyd(*argv, code=78)
        assert "kek.private is missing" in err
        assert "--kek FILE" in err
        keyd(*argv, "--kek", kept)
    keyd("remove", store, "v", "--kek", kept)


def rotated(keyd, store):
    """Publish and use the next signing key; nothing new for the audit log comes of it."""
    keyd("keys", "rotate-signing", store, "--publish")
    keyd("keys", "rotate-signing", store, "--use")


def previous(store):
    return (store / "signing.previous.key").exists()


def test_store_serves_after_its_signing_key_was_retired(keyd, store, checkpoint):
    """Nothing new was decided in between, so no server exported a checkpoint by itself."""
    keyd("add", store, bundle_file(store.parent))
    before = checkpoint.read_bytes()
    rotated(keyd, store)
    assert checkpoint.read_bytes() == before
    keyd("keys", "rotate-signing", store, "--retire")
    assert not previous(store)
    assert checkpoint.read_bytes() != before
    keyd("audit", "verify", store)
    child, _ = started(store)
    ended(child)
    keyd("audit", "checkpoint", store, checkpoint)


def test_server_that_was_not_reloaded_signs_by_no_retired_key(keyd, store, checkpoint):
    """Its exporter takes the key of the moment."""
    child, _ = started(store)
    try:
        rotated(keyd, store)
        keyd("keys", "rotate-signing", store, "--retire")
        with Store.open(store) as opened, opened.transaction() as change:
            change.record([record()])
    finally:
        ended(child)  # it exports once more
    assert f"not behind {checkpoint}" in keyd("audit", "verify", store)
    with Store.open(store) as opened:
        assert opened.seal().exported_seq == 1


@pytest.mark.parametrize("target", ["missing", "unwritable", "behind", "foreign"])
def test_key_is_not_retired_before_the_checkpoint_is_signed_anew(
    keyd, store, checkpoint, tmp_path, target
):
    keyd("add", store, bundle_file(tmp_path))
    rotated(keyd, store)
    good = checkpoint.read_bytes()
    if target == "missing":
        checkpoint.unlink()
    elif target == "unwritable":
        config = (store / "keyd.toml").read_text()
        (store / "keyd.toml").write_text(
            config.replace(str(checkpoint), f"{checkpoint}/x")
        )
    elif target == "behind":
        older = tmp_path / "older"
        keyd("backup", store, tmp_path / "backup", "--with-keys")
        decide(store, record())
        keyd("audit", "checkpoint", store, checkpoint)
        keyd("restore", tmp_path / "backup", older)
        store = older
        rename_previous(tmp_path / "store", older)
    else:
        checkpoint.write_text("something else")
    err = keyd("keys", "rotate-signing", store, "--retire", code=78)
    assert "the previous signing key is kept" in err
    assert "hint:" in err
    assert previous(store)
    if target in {"missing", "foreign"}:
        checkpoint.write_bytes(good)
        keyd("keys", "rotate-signing", store, "--retire")
        assert not previous(store)
        keyd("audit", "verify", store)


def rename_previous(source, target):
    for name in ("signing.key", "signing.previous.key"):
        (target / name).write_bytes((source / name).read_bytes())
        (target / name).chmod(0o600)


def test_retiring_with_the_key_elsewhere(keyd, store, checkpoint, tmp_path):
    rotated(keyd, store)
    kept = (store / "kek.private").rename(tmp_path / "kek")
    err = keyd("keys", "rotate-signing", store, "--retire", code=78)
    assert "--kek FILE" in err
    assert previous(store)
    keyd("keys", "rotate-signing", store, "--retire", "--kek", kept)
    assert not previous(store)
    assert f"not behind {checkpoint}" in keyd("audit", "verify", store, "--kek", kept)


def test_retiring_without_a_checkpoint_file_needs_no_key(keyd, store, tmp_path):
    rotated(keyd, store)
    (store / "kek.private").rename(tmp_path / "kek")
    keyd("keys", "rotate-signing", store, "--retire")
    assert not previous(store)


def test_verify_says_how_to_go_on_with_a_store_that_is_only_behind(
    keyd, store, tmp_path
):
    keyd("backup", store, tmp_path / "backup", "--with-keys")
    decide(store, record())
    file = tmp_path / "checkpoint"
    keyd("audit", "checkpoint", store, file)
    older = tmp_path / "older"
    keyd("restore", tmp_path / "backup", older)
    wanted = f"tdx-keyd audit accept-rollback {older} {file}"
    assert wanted in hint_of("audit", "verify", older, "--checkpoint", file)
    with (
        contextlib.closing(sqlite3.connect(store / "store.sqlite3")) as attacker,
        attacker,
    ):
        attacker.execute("DELETE FROM audit")
    wanted = "tdx-keyd restore FILE"
    assert wanted in hint_of("audit", "verify", store, "--checkpoint", file)


def hint_of(*argv):
    from tdxd.cli.tdx_keyd import run_command
    from tdxd.errors import DataError

    with pytest.raises(DataError) as caught:
        run_command([str(one) for one in argv])
    return caught.value.hint


async def test_older_backup_is_refused_until_the_owner_accepts_it(keyd, tmp_path):
    """Backup, more releases, the disk dies, the backup comes back: nothing of it by accident."""
    with opened_owner(tmp_path) as owner:
        file = tmp_path / "elsewhere.checkpoint"
        with (owner.directory / "keyd.toml").open("a") as config:
            config.write(f'\n[audit]\ncheckpoint_file = "{file}"\n')
        owner.add("v")
        await owner.fetch("v")
        keyd("backup", owner.directory, tmp_path / "backup", "--with-keys")
        owner.add("v", 2)
        await owner.fetch("v")
        keyd("audit", "checkpoint", owner.directory, file)
        older = tmp_path / "older"
        assert keyd("restore", tmp_path / "backup", older).startswith(
            f"{older}: 1 audit records\n"
        )
        assert "ok    1 audit records" not in keyd_fails(keyd, "audit", "verify", older)
        err = keyd("serve", older, code=78)
        assert "is behind its newest checkpoint" in err
        assert f"tdx-keyd audit accept-rollback {older} {file}" in err
        # Changes would carry it past the checkpoint's numbers: none is made.
        held = file.read_bytes()
        for verb in (["remove", older, "v"], ["add", older, tmp_path / "v-9.bundle"]):
            bundle_file(tmp_path, "v", 9)
            assert "is behind its newest checkpoint" in keyd(*verb, code=78)
        assert file.read_bytes() == held

        out = keyd("audit", "accept-rollback", older, file)
        assert out.splitlines() == [
            "accepted in audit record 3; what is lost:",
            "audit_records: 1, the checkpoint has 2",
            f"revision: {lost(out)[0]}, the checkpoint has {lost(out)[1]}",
            "generation of v: 1, the checkpoint has 2",
            "policy of v: 1, the checkpoint has 2",
        ]
        # The policy that stands again has a version that none of the lost ones had.
        shown = json.loads(keyd("policy", "show", older, "v", "--json"))
        assert shown["version"] == 3
        keyd("audit", "verify", older)
        child, port = started(older)
        try:
            to = owner.config(Address("127.0.0.1", port))
            got = (await owner.fetch("v", config=to))["v"]
        finally:
            ended(child)
        assert isinstance(got, KeyBundle)
        assert got.manifest.generation == 1
        # The checkpoint now is this store's; the original is a fork, and refused.
        keyd("audit", "verify", older)
        assert "is behind its newest checkpoint" in keyd(
            "serve", owner.directory, code=78
        )
        err = keyd("audit", "accept-rollback", older, file, code=65)
        assert "is not behind this checkpoint" in err


def lost(out):
    words = out.splitlines()[2].split()
    return words[1].rstrip(","), words[-1]


def keyd_fails(_keyd, *argv):
    from tdxd.cli.tdx_keyd import run_command
    from tdxd.errors import DataError

    with pytest.raises(DataError) as caught:
        run_command([str(one) for one in argv])
    return caught.value.message


def test_tampered_store_is_not_served(keyd, store, tmp_path):
    keyd("add", store, bundle_file(tmp_path))
    path = store / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as attacker, attacker:
        attacker.execute("UPDATE generations SET generation = 2")
    err = keyd("serve", store, code=78)
    assert "volume 'v' generation 1 is missing, and 1 more" in err
    assert "tdx-keyd audit verify" in err


def test_rollback_is_accepted_only_where_nothing_else_is_wrong(keyd, store, tmp_path):
    file = tmp_path / "checkpoint"
    keyd("backup", store, tmp_path / "backup", "--with-keys")
    decide(store, record())
    keyd("audit", "checkpoint", store, file)
    older = tmp_path / "older"
    keyd("restore", tmp_path / "backup", older)
    path = older / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as attacker, attacker:
        attacker.execute("DELETE FROM token_keys")
        attacker.execute("INSERT INTO policies VALUES ('v', 1, 'x', 1, x'00')")
    err = keyd("audit", "accept-rollback", older, file, code=78)
    assert "restore a backup first" in err


async def test_served_denial_reaches_its_hook_and_the_end_its_checkpoint(
    keyd, tmp_path
):
    with opened_owner(tmp_path) as owner:
        told, file = tmp_path / "told", tmp_path / "elsewhere.checkpoint"
        with (owner.directory / "keyd.toml").open("a") as config:
            config.write(
                f'\n[audit]\ncheckpoint_file = "{file}"\ncheckpoint_s = 3600.0\n'
                f'on_denial_command = ["/bin/sh", "-c", "cat >> {told}"]\n'
                "[serve]\nworkers = 2\n"
            )
        owner.add("v")
        owner.add("w", simulated="false")
        child, port = started(owner.directory)
        try:
            to = owner.config(Address("127.0.0.1", port))
            for _ in range(3):
                got = await owner.fetch("v", "w", config=to)
                assert isinstance(got["v"], KeyBundle)
        finally:
            ended(child)
        lines = [json.loads(line) for line in told.read_text().splitlines()]
        denials = owner.store.audit(denied_only=True)
        assert {one["denial_id"] for one in lines} == {one.denial_id for one in denials}
        assert len(lines) == 3
        assert lines[0]["reason"] == "simulated"
        found = json.loads(keyd("audit", "verify", owner.directory, "--json"))
        assert (found["seq"], found["exported_seq"]) == (6, 6)
        assert found["checkpoint"] == str(file)
