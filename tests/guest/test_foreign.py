"""A volume that somebody else encrypted, opened by an operator in the guest, by dm-crypt."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests import luks2_genuine
from tests.guest.conftest import Boots
from tests.guest.observed import RUNTIME_DIR
from tests.luks2_genuine import OWNER_PLAINTEXT, PASSPHRASE

pytestmark = [pytest.mark.guest]


def mount(passphrase: bytes) -> str:
    """Return a command that an operator would type, with the passphrase in no argument."""
    return f"printf %s '{passphrase.decode()}' | tdxctl mount old --passphrase-fd 0"


def test_an_operator_mounts_and_unmounts_it(
    boots: Boots, guest_directory: Path
) -> None:
    """No key server is needed, and none is asked."""
    more = guest_directory / "foreign"
    more.mkdir()
    luks2_genuine.make_image(more / "old.img")
    old = {"id": "old", "image": "/srv/more/old.img", "kind": "luks2"}
    guest = boots.guest(
        images=(), more=more, volumes=[{**old, "passphrase": "operator"}]
    )
    shutil.rmtree(more)
    guest.machine.boot()
    guest.until(lambda: guest.volume()["state"] == "failed", "it asks for a passphrase")
    assert guest.volume()["error"]["code"] == "passphrase-needed"
    assert guest.machine.run(mount(b"wrong"), check=False).code == 65
    assert guest.holdings().counts() == (0, 0, 0)
    guest.machine.run(mount(PASSPHRASE), timeout_s=120)
    shown = guest.volume()
    assert (shown["state"], shown["mapper"]) == ("mounted", "dm")
    assert guest.holdings().counts() == (1, 1, 0)
    file = f"{RUNTIME_DIR}/volumes/old@1/model"
    read = guest.in_its_mounts(f"sha256sum {file}; stat -c %s {file}")
    digest, _name, size = read.stdout.split()
    content = OWNER_PLAINTEXT * (int(size) // len(OWNER_PLAINTEXT))
    assert len(content) == int(size) > 0
    assert digest == hashlib.sha256(content).hexdigest()
    guest.ctl("unmount", "old")
    assert guest.holdings().counts() == (0, 0, 0)
    assert guest.events("volume.attesting") == []
