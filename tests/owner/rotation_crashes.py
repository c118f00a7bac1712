"""Ends a rotation of the key-encryption key at each of its lines, and looks at what is left.

Run as a program with a new directory: processes are forked, which only one thread may do. Prints
how many crashes it made and which keys the stores were under afterwards.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdxd.core.secret import Secret
from tdxd.owner.audit.guard import check_for_serving
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import InitOptions, init_store
from tdxd.owner.server.token_keys import open_token_key, rotate_token_key
from tdxd.owner.store import rotation
from tdxd.owner.store.admin import add_bundle, remove_volume
from tdxd.owner.store.backup import make_backup, restore_backup
from tdxd.owner.store.kek import next_path, read_kek, read_public, unwrap
from tdxd.owner.store.store import Store
from tests.keyserver import make_bundle

CRASHED = 99
SECRET = b"\x07" * 64
TRACED = ("owner/store/rotation.py", "owner/files.py")


def forked(work: Callable[[], None]) -> int:
    """Run something in a process of its own; return its exit status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def made(directory: Path) -> Path:
    store = directory / "store"
    init_store(store, InitOptions(names=("h",), listen="127.0.0.1:0"), os.urandom)
    for name, generation in (("v", 1), ("v", 2), ("gone", 1)):
        file = directory / "bundle"
        file.write_bytes(make_bundle(name, generation, SECRET).encode())
        add_bundle(store, file, None, 5)
    remove_volume(store, "gone", None, 6)
    with Store.open(store) as opened:
        rotate_token_key(store, opened, 7, os.urandom)
    return store


def rotate_until(store: Path, line: int) -> None:
    """Rotate, and end this process at the so many-th line."""
    count = 0

    def lines(_frame: Any, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        if count == line:
            os._exit(CRASHED)
        return lines

    def calls(frame: Any, _event: str, _argument: Any) -> Any:
        return lines if frame.f_code.co_filename.endswith(TRACED) else None

    sys.settrace(calls)
    rotation.rotate_kek(store, 9, os.urandom)
    sys.settrace(None)


def whole(store: Path) -> str:
    """Check that a store serves, keeps its secrets and can be changed; return its key's name."""
    config = read_config(store)
    with Store.open(store) as opened:
        check_for_serving(store, config, opened)
        found = verify(opened, deployment=bytes.fromhex(config.deployment))
        assert found.troubles == ()
        kek = opened.kek()
        rows = opened.generations("v")
        assert [row.generation for row in rows] == [1, 2]
        for row in rows:
            got = unwrap(kek, row.wrapped, "v", row.generation)
            assert got.secret.matches(Secret(SECRET))
        for token in opened.token_keys():
            open_token_key(kek, token)
        assert read_public(store, kek) == kek.public
        rotate_token_key(store, opened, 8, os.urandom)
        return kek.key_id


def after(store: Path, old_id: str) -> None:
    """What an owner meets, and does, after the crash."""
    key_id = whole(store)
    backup = store.parent / "backup"
    make_backup(store, backup, 9, with_keys=True)
    restored = store.parent / "restored"
    restore_backup(backup, restored)
    assert whole(restored) == key_id
    finished = rotation.rotate_kek(store, 9, os.urandom).finished
    now = whole(store)
    assert now == read_kek(store / "kek.private").key_id != old_id
    assert finished == (now == key_id)
    assert not next_path(store / "kek.private").exists()
    (store.parent / "result").write_text("new" if key_id != old_id else "old")


def main(directory: Path) -> None:
    template = made(directory)
    old = template / "kek.private"
    old_id = read_kek(old).key_id
    results = []
    line = 0
    while True:
        line += 1
        place = directory / str(line)
        place.mkdir()
        store = place / "store"
        shutil.copytree(template, store)
        code = forked(functools.partial(rotate_until, store, line))
        if code == 0:
            break
        assert code == CRASHED, (line, code)
        assert forked(functools.partial(after, store, old_id)) == 0, line
        results.append((place / "result").read_text())
        shutil.rmtree(place)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
