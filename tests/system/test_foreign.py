"""Genuine LUKS2 images, opened by the real programs, by an operator or from the key server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import luks2_genuine
from tests.luks2_genuine import FILE_SYSTEM_BYTES, OWNER_PLAINTEXT
from tests.system.world import (
    BIN,
    START_S,
    Daemon,
    World,
    our_loops,
    program,
    wait_for,
)

pytestmark = [pytest.mark.root, pytest.mark.slow]

WORD = os.urandom(24).hex().encode()
WRONG = os.urandom(24).hex().encode()


@pytest.fixture(scope="module")
def image(world: World) -> Iterator[Path]:
    """A LUKS2 image with one file, `model`; PBKDF2, a thousand times."""
    path = luks2_genuine.make_image(world.directory / "foreign.img", passphrase=WORD)
    yield path
    path.unlink()


def volume(path: Path, volume_id: str = "m", **more: object) -> dict[str, Any]:
    return {"id": volume_id, "image": str(path), "kind": "luks2", **more}


def of_operator(path: Path, volume_id: str = "m") -> dict[str, Any]:
    return volume(path, volume_id, passphrase="operator")


@contextmanager
def fd_of(word: bytes) -> Iterator[int]:
    reading, writing = os.pipe()
    os.write(writing, word)
    os.close(writing)
    try:
        yield reading
    finally:
        os.close(reading)


def mount(daemon: Daemon, word: bytes, volume_id: str = "m") -> Any:
    with fd_of(word) as fd:
        flags = ("--passphrase-fd", fd, "--json")
        return daemon.ctl("mount", volume_id, *flags, pass_fds=(fd,))


def content(daemon: Daemon, point: str = "m@1") -> bytes:
    """What a file of the volume holds, in the daemon's own mount namespace."""
    run = Path(f"/proc/{daemon.process.pid}/root/run/tdxd-system-{os.getpid()}")
    return (run / "volumes" / point / "model").read_bytes()


def is_whole(data: bytes) -> bool:
    count = len(data) // len(OWNER_PLAINTEXT)
    return count > 1000 and data == OWNER_PLAINTEXT * count


def nowhere(daemon: Daemon, words: tuple[bytes, ...]) -> None:
    """Fail where a word is seen: log, events, status, arguments, environment, runtime files."""
    events = daemon.ctl("events", "--all").stdout
    assert "volume.failed" in events
    pid, run = daemon.process.pid, Path(f"/run/tdxd-system-{os.getpid()}")
    places = {
        "log": daemon.log.read_bytes(),
        "events": events.encode(),
        "status": json.dumps(daemon.status()).encode(),
        "table": daemon.ctl("status").stdout.encode(),
    }
    for name in ("cmdline", "environ"):
        places[name] = Path(f"/proc/{pid}/{name}").read_bytes()
    places |= {str(one): one.read_bytes() for one in run.rglob("*") if one.is_file()}
    for where, data in places.items():
        for word in words:
            for form in (word, word.hex().encode()):
                assert form not in data, where


def in_memory(pid: int, words: tuple[bytes, ...]) -> list[int]:
    """Count each word in all that a process can read of its own memory (proc(5))."""
    found = [0] * len(words)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            area, rights, *_rest, name = [*line.split(maxsplit=5), ""][:7]
            if "r" not in rights or name.startswith("[v"):
                continue
            start, stop = (int(number, 16) for number in area.split("-"))
            memory.seek(start)
            data = b""
            with contextlib.suppress(OSError):  # a mapping of what is no memory
                while piece := memory.read(stop - start - len(data)):
                    data += piece
            found = [n + data.count(word) for n, word in zip(found, words, strict=True)]
    return found


def test_an_operator_opens_it_and_the_passphrase_is_nowhere(
    world: World, image: Path
) -> None:
    with world.daemon(volume=[of_operator(image)]) as daemon:
        shown = daemon.until_volume("failed")
        assert shown["error"]["code"] == "passphrase-needed"
        alone = daemon.ctl(
            "mount", "m", stdin=subprocess.DEVNULL, start_new_session=True
        )
        assert alone.returncode == 77
        assert "--passphrase-fd" in alone.stderr
        wrong = mount(daemon, WRONG)
        assert wrong.returncode == 65, wrong.stderr
        assert our_loops() == []
        right = mount(daemon, WORD)
        assert right.returncode == 0, right.stderr
        (shown,) = json.loads(right.stdout)["volumes"]
        assert (shown["state"], shown["kind"]) == ("mounted", "luks2")
        assert (shown["mapper"], shown["integrity"]) == ("memory", "none")
        assert shown["size_bytes"] == FILE_SYSTEM_BYTES
        assert shown["image"] == str(image)
        assert is_whole(content(daemon))
        assert daemon.volume()["bytes_read"] >= len(content(daemon))
        assert shown["last_error"]["code"] == "volume-passphrase"
        table = daemon.ctl("status").stdout
        assert "last error at" in table
        assert "luks2" in table
        nowhere(daemon, (WORD, WRONG))
        searched = (WORD[-24:], WRONG[-24:], str(image).encode())
        *secrets, bait = in_memory(daemon.process.pid, searched)
        assert bait > 0
        assert secrets == [0, 0]
        check_new_program(daemon)
        assert daemon.ctl("unmount", "m").returncode == 0
        assert our_loops() == []
        again = daemon.ctl(
            "mount", "m", stdin=subprocess.DEVNULL, start_new_session=True
        )
        assert again.returncode == 77
    for path in (world.directory / "keyd.log", world.directory / "sim.log"):
        assert not path.exists() or WORD not in path.read_bytes()


def check_new_program(daemon: Daemon) -> None:
    """The mapping stays over a re-exec, without the passphrase."""
    before = daemon.volume()
    daemon.reexec()
    after = daemon.volume()
    for key in ("state", "since", "kind", "integrity", "size_bytes", "last_error"):
        assert after[key] == before[key]
    assert after["bytes_read"] >= before["bytes_read"]
    assert is_whole(content(daemon))
    nowhere(daemon, (WORD, WRONG))


def cores(directory: Path) -> set[Path]:
    return set(directory.glob("core")) | set(directory.glob("core.*"))


def test_no_core_has_the_passphrase_and_a_crash_forgets_it(
    world: World, image: Path, tmp_path: Path
) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    with world.daemon(volume=[of_operator(image)], killed=True) as daemon:
        daemon.until_volume("failed")
        assert mount(daemon, WORD).returncode == 0
        if pattern[0] not in "|/":  # else a handler of this machine's would get them
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            bait = ["sh", "-c", "ulimit -c unlimited; kill -SEGV $$"]
            subprocess.run(bait, cwd=tmp_path, check=False)
            assert cores(tmp_path)  # a process that hides nothing is dumped
            with contextlib.suppress(PermissionError):  # not every root may
                pid = daemon.process.pid
                resource.prlimit(pid, resource.RLIMIT_CORE, unlimited)
        before = cores(Path.cwd())
        daemon.process.send_signal(signal.SIGSEGV)
        assert daemon.process.wait(START_S) == -signal.SIGSEGV
        assert cores(Path.cwd()) == before
    with world.daemon(volume=[of_operator(image)]) as daemon:
        shown = daemon.until_volume("failed", "mounted")
        assert shown["error"]["code"] == "passphrase-needed"
        assert our_loops() == []


def on_terminal(daemon: Daemon, *lines: bytes) -> tuple[int, bytes]:
    """Run `tdxctl mount m` on a terminal, answer each prompt; return its end and its words."""
    command = [str(BIN / "tdxctl"), "--socket", str(daemon.socket_path), "mount", "m"]
    pid, fd = pty.fork()
    if not pid:
        os.execv(command[0], command)
    text, deadline_s = b"", time.monotonic() + START_S
    for number, line in enumerate(lines, start=1):
        while text.count(b"Passphrase of volume m: ") < number:
            assert time.monotonic() < deadline_s, text
            if select.select([fd], [], [], 1)[0]:
                text += os.read(fd, 4096)
        os.write(fd, line + b"\n")
    while True:
        try:
            data = os.read(fd, 4096)
        except OSError:  # the program ended
            break
        text += data
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_an_operator_is_asked_on_the_terminal(world: World, image: Path) -> None:
    with world.daemon(volume=[of_operator(image)]) as daemon:
        daemon.until_volume("failed")
        code, text = on_terminal(daemon, WRONG, WORD)
        assert code == 0, text
        assert b"mounted" in text
        assert WORD not in text
        assert WRONG not in text
        assert is_whole(content(daemon))


def add(world: World, volume_id: str, image: Path) -> str:
    """Give the passphrase to the key server, and pin the image's header."""
    policy = world.directory / "policy.toml"
    with fd_of(WORD) as fd:
        flags = ("--passphrase-fd", fd, "--image", image, "--policy", policy)
        store = world.directory / "keys"
        done = program(
            "tdx-keyd", "add", store, "--luks2", volume_id, *flags, pass_fds=(fd,)
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def spoil(path: Path, where: int) -> None:
    with path.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)
        file.seek(where)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("change", ["nothing", "a byte of an unused keyslot"])
def test_the_key_server_opens_the_very_header_that_the_owner_knows(
    world: World, image: Path, change: str
) -> None:
    path = world.directory / "delivered.img"
    shutil.copy(image, path)
    volume_id = f"pinned-{len(change)}"
    assert volume_id in add(world, volume_id, image)
    if change != "nothing":
        spoil(path, luks2_genuine.PAYLOAD_OFFSET_BYTES - 4096)
    with (
        world.key_server(),
        world.daemon(volume=[volume(path, volume_id)]) as daemon,
    ):
        shown = daemon.until_volume("mounted", "failed")
        if change == "nothing":
            assert shown["state"] == "mounted", shown
            assert shown["integrity"] == "none"
            assert is_whole(content(daemon, f"{volume_id}@1"))
        else:
            assert shown["error"]["code"] == "volume-integrity", shown
            assert "header" in shown["error"]["message"]
            assert shown["mapper"] is None
        text = daemon.log.read_bytes() + (world.directory / "keyd.log").read_bytes()
        assert WORD not in text
    path.unlink()


def test_ten_at_once_and_one_with_a_wrong_passphrase(world: World, image: Path) -> None:
    """Each `tdxctl mount` waits for its own volume; none is refused for another's sake."""
    names = [f"ten{number}" for number in range(10)]
    with world.daemon(volume=[of_operator(image, name) for name in names]) as daemon:
        wait_for(failed(daemon, 10), "all volumes to ask")
        running = []
        for name in names:
            word = WRONG if name == "ten3" else WORD
            with fd_of(word) as fd:
                command = [str(BIN / "tdxctl"), "--socket", str(daemon.socket_path)]
                command += ["mount", name, "--json", "--passphrase-fd", str(fd)]
                running.append(
                    subprocess.Popen(
                        command,
                        pass_fds=(fd,),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
        codes = [one.wait(START_S) for one in running]
        assert codes == [65 if name == "ten3" else 0 for name in names]
        assert failed(daemon, 1)()
        assert all(
            is_whole(content(daemon, f"{name}@1")) for name in names if name != "ten3"
        )
        ready = daemon.ctl("health")
        assert ready.returncode == 65
        assert ready.stdout == "not ready: volume ten3 is failed\n"
        assert len(our_loops()) == 9
        nowhere(daemon, (WORD, WRONG))


def failed(daemon: Daemon, count: int) -> Callable[[], bool]:
    def counted() -> bool:
        states = [one["state"] for one in daemon.status()["volumes"]]
        return states.count("failed") == count

    return counted
