"""What a hostile model reaches in the guest that serves it: its own files, and nobody.

Asked from outside, through the front. `attacks/test_model_isolation` has more, without systemd.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.guest.hostile import Hostile
from tests.guest.observed import RUNTIME_DIR, Observed

pytestmark = [pytest.mark.guest]

VOLUME = f"{RUNTIME_DIR}/volumes/m@1"
OWN = f"{RUNTIME_DIR}/models/m/hostile/1"
REFUSED = {"PERMISSION_DENIED", "NOT_FOUND"}
UNWRITTEN = {*REFUSED, "FAILED_PRECONDITION", "UNKNOWN"}
"""A read-only file system has no code of its own in gRPC."""


def test_it_reads_its_own_files_and_writes_to_its_own_tmp(hostile: Hostile) -> None:
    """A control: what is refused below is not refused for another reason."""
    assert hostile.outputs("read", path=f"{OWN}/fingerprint.pb")["content"]
    own = f"{RUNTIME_DIR}/tmp/own"
    hostile.outputs("write", path=own, content="own")
    assert hostile.outputs("read", path=own)["content"] == b"own"


def test_all_that_this_kernel_has_is_in_force(
    served: Observed, tell: Callable[[str], None]
) -> None:
    shown = served.serving()["isolation"]
    assert (shown["files"], shown["seccomp"]) == (True, True)
    assert (shown["limits"], shown["front_user_apart"]) == ("in force", True)
    tell(f"Landlock ABI {shown['landlock_abi']}")
    users = set()
    for pid in (served.server_pid(), served.serving()["front_pid"]):
        lines = served.machine.output(f"cat /proc/{pid}/status").splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert int(status["CapBnd"], 16) == 0
        users.add(status["Uid"].split()[0])
    assert len(users - {"0"}) == 2


def test_it_cannot_read_keys_volumes_and_processes(
    served: Observed, hostile: Hostile
) -> None:
    daemon, front = served.main_pid(), served.serving()["front_pid"]
    find = f"find /proc/{front}/fd -lname '*tdxd:cert*'"
    certificates = served.machine.output(find).split()
    assert certificates
    paths = (
        f"{VOLUME}/tls/server.pem",
        f"{VOLUME}/models/hostile/1/fingerprint.pb",
        *certificates,
        f"/proc/{front}/environ",
        f"/proc/{daemon}/environ",
        f"/proc/{daemon}/root{VOLUME}/tls/server.pem",
        "/dev/dm-1",  # the decrypted volume, the image of another one, a disk
        "/dev/loop0",
        "/dev/vda",
        "/srv/models/m.img",
        "/etc/tdxd/tdxd.toml",
        "/etc/shadow",
        "/etc/hostname",
    )
    tried = " ".join(paths)
    script = f"for one in {tried}; do head -c 1 $one > /dev/null || echo $one; done"
    there = served.in_its_mounts(script)
    assert there.stdout == "", "only what root can read proves something"
    for path in paths:
        assert hostile.refusal("read", path=path) in REFUSED, path


def test_it_cannot_write_outside_its_tmp(served: Observed, hostile: Hostile) -> None:
    for path in (
        f"{OWN}/fingerprint.pb",
        f"{OWN}/new",
        f"{RUNTIME_DIR}/serve/a/new",
        f"{RUNTIME_DIR}/serve/b/new",
        "/tmp/hostile",
        "/var/tmp/hostile",
        "/dev/shm/hostile",
        "/srv/models/m3.img",
        "/proc/self/oom_score_adj",
    ):
        code = hostile.refusal("write", path=path, content="x")
        assert code in UNWRITTEN, path
    left = "find / -xdev -name hostile -newer /proc/1 -type f 2>/dev/null"
    assert served.machine.run(left, check=False).stdout == ""


@contextmanager
def outside(served: Observed) -> Iterator[socket.socket]:
    """A server that the guest reaches, where its key server is otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        served.machine.route_keys_to(listening.getsockname()[1])
        try:
            yield listening
        finally:
            served.machine.route_keys_to(served.world.port)


def test_it_cannot_call_out(served: Observed, hostile: Hostile) -> None:
    """Last, since its call goes on trying in the model server for an hour."""
    with outside(served) as listening:
        listening.settimeout(10)
        knock = "timeout 5 bash -c 'echo > /dev/tcp/10.0.2.100/50051'"
        served.machine.run(knock)
        listening.accept()[0].close()
        call = hostile.start("dial", address="10.0.2.100:50051")
        listening.settimeout(0.2)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with pytest.raises(TimeoutError):
                listening.accept()
        assert not call.done() or call.exception() is not None
        call.cancel()
