"""After a full run: the volume secret, the TLS key and a model file are nowhere they can be seen.

Each place is searched for canaries in every form they could have: raw, hex, base64. Each search is
proved able to find: the same search meets a bait first.
"""

from __future__ import annotations

import base64
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tdxd.core.bundle import KeyBundle, volume_key
from tests.guest.observed import Observed
from tests.guest.world import GuestWorld

pytestmark = [pytest.mark.guest]

SEARCH = "/opt/tools/tests/guest/search.py"
CANARIES = "/run/canaries"
OTHER = "setpriv --reuid 65534 --regid 65534 --clear-groups --"


def forms(secret: bytes) -> list[bytes]:
    """What to look for, cut so that no alignment of base64 hides it."""
    hexed = secret.hex().encode()
    based = [base64.b64encode(secret[start:])[4:28] for start in range(3)]
    return [secret, hexed[8:56], hexed[8:56].upper(), *based]


def canaries(world: GuestWorld) -> list[bytes]:
    bundle = KeyBundle.parse((world.directory / "m.bundle").read_bytes())
    pem = (world.directory / "server.pem").read_text()
    found = re.search(r"PRIVATE KEY-----\n(.*?)\n-----END", pem, re.DOTALL)
    assert found is not None
    der = base64.b64decode(found[1].replace("\n", ""))
    secrets = [bundle.secret.reveal(), volume_key(bundle).reveal(), der[-96:-32]]
    return [*(form for one in secrets for form in forms(one)), world.model_canary]


@pytest.fixture
def searched(served: Observed) -> list[bytes]:
    """What to look for, after everything was used and read."""
    served.predict_ok()
    assert served.read_all().code == 0
    return canaries(served.world)


def found(
    served: Observed, what: str, wanted: list[bytes], *, as_other: bool = False
) -> list[str]:
    """Return the lines of the search that found something; fails if it looked at nothing."""
    served.machine.run(f"install -m 0600 /dev/null {CANARIES}")
    text = "\n".join(one.hex() for one in wanted)
    served.machine.write_file(CANARIES, text.encode())
    who = OTHER if as_other else ""
    command = f"{who} python3 -IS {SEARCH} {what} < {CANARIES}"
    lines = served.machine.output(command, timeout_s=600).splitlines()
    assert re.match(r"searched [1-9]\d{3,} bytes", lines[-1]), lines
    print(f"{what}: {lines[-1]}")
    return [line for line in lines[:-1] if CANARIES not in line]


def test_the_search_finds_a_bait(served: Observed) -> None:
    """Else the tests below would prove nothing."""
    bait = os.urandom(16).hex()
    served.machine.run(
        f"logger {bait}; echo {bait} > /var/tmp/bait; chmod 644 /var/tmp/bait; "
        f"nohup sh -c 'sleep 120; : {bait}' > /dev/null 2>&1 &"
    )
    for what, other in (("processes", False), ("journal", False), ("files", True)):
        assert found(served, what, [bait.encode()], as_other=other), what


def test_no_secret_in_command_lines_and_environments(
    served: Observed, searched: list[bytes]
) -> None:
    assert found(served, "processes", searched) == []


def test_no_secret_in_the_journal(served: Observed, searched: list[bytes]) -> None:
    assert found(served, "journal", searched) == []


def test_no_secret_in_what_another_user_reads(
    served: Observed, searched: list[bytes]
) -> None:
    assert found(served, "files", searched, as_other=True) == []


def test_no_secret_on_the_console(served: Observed, searched: list[bytes]) -> None:
    served.machine.run("echo the console is read > /dev/ttyS0")
    told = served.machine.serial_log.read_bytes()
    assert b"the console is read" in told
    assert [one for one in searched if one in told] == []


HANDLER = "/usr/local/sbin/core-handler"
CORE_HANDLER = """\
#!/bin/sh
cat > "/run/cores/$1.$2"
"""


@contextmanager
def cores(served: Observed) -> Iterator[None]:
    """Have the kernel pipe cores to a handler that keeps them."""
    served.machine.write_file(HANDLER, CORE_HANDLER.encode())
    served.machine.run(
        f"mkdir -p /run/cores; chmod 755 {HANDLER}; "
        f"echo '|{HANDLER} %e %p' > /proc/sys/kernel/core_pattern"
    )
    try:
        # A process that hides nothing is dumped: the handler works.
        served.machine.run("sh -c 'kill -SEGV $$'", check=False)
        served.machine.wait_until("ls /run/cores/sh.*")
        yield
    finally:
        served.machine.run(
            "echo core > /proc/sys/kernel/core_pattern; rm -r /run/cores"
        )


def crash(served: Observed, searched: list[bytes], pid: int) -> None:
    """Have a process dump its core, and look into what came of it."""
    with cores(served):
        served.machine.run(f"kill -SEGV {pid}")
        served.machine.wait_until(f"! test -d /proc/{pid}")
        for name in served.machine.output("ls /run/cores").split():
            if name.endswith(f".{pid}"):
                core = served.machine.read_file(f"/run/cores/{name}")
                assert [one for one in searched if one in core] == []
                assert len(core) < 2**20, f"{name} holds memory"


def test_a_front_that_crashes_tells_nothing_and_is_started_again(
    served: Observed, searched: list[bytes]
) -> None:
    """A handler that the kernel pipes cores to gets no memory, whatever the limit of cores says."""
    old = served.serving()["front_pid"]
    crash(served, searched, old)
    served.until(
        lambda: served.serving().get("front_pid") not in (None, old), "a new front"
    )
    served.until_serving()
    served.predict_ok()


def test_a_model_server_that_crashes_tells_nothing_and_is_started_again(
    served: Observed, searched: list[bytes]
) -> None:
    old = served.server_pid()
    assert old is not None
    crash(served, searched, old)
    served.until(lambda: served.server_pid() not in (None, old), "a new model server")
    served.until_serving()
    served.predict_ok()


def test_a_daemon_that_crashes_tells_nothing_is_swept_and_serves_again(
    served: Observed, searched: list[bytes], tell: Callable[[str], None]
) -> None:
    before, old = served.holdings(), served.main_pid()
    attested = len(served.events("volume.attesting"))
    crashed = time.monotonic()
    crash(served, searched, old)
    served.until_pid_changes(old)
    served.until_serving()
    tell(f"gap after a crash of tdxd: {time.monotonic() - crashed:.1f} s")
    served.predict_ok()
    assert len(served.events("volume.attesting")) > attested
    after = served.holdings()
    assert (after.counts(), after.networks) == (before.counts(), before.networks)
    assert not set(after.children) & set(before.children)


@pytest.mark.ends_the_guest
def test_no_secret_on_the_disk_of_the_root_file_system(opened: Observed) -> None:
    """Last: it takes the guest's power. The delivery disk has the image, which is ciphertext."""
    assert opened.read_all().code == 0
    opened.machine.run("sync")
    opened.machine.shut_down()
    disks = [opened.machine.root.path, opened.machine.image.root]
    disks.append(opened.machine.disk("delivery").path)
    for disk in disks:
        assert in_file(disk, canaries(opened.world)) == []


def in_file(path: Path, wanted: list[bytes]) -> list[int]:
    """Return the numbers of the canaries in a file."""
    hits, tail = set(), b""
    with path.open("rb") as file:
        while data := file.read(1 << 24):
            hits |= {number for number, one in enumerate(wanted) if one in tail + data}
            tail = data[-256:]
    return sorted(hits)
