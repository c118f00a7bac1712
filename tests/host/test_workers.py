"""Worker processes: all the work is done, and none of them outlives its block."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdxd.core import verity
from tdxd.errors import HostError, IntegrityError
from tdxd.host import libcrypto, range_worker
from tdxd.host.range_worker import Task
from tdxd.host.workers import RANGE_BLOCKS, Workers

KEY, SALT = bytes(range(64)), bytes(32)
BLOCKS = 3 * RANGE_BLOCKS + 5


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").write_bytes(os.urandom(BLOCKS * 4096))
    with (tmp_path / "in").open("rb") as file:
        yield file


@pytest.fixture
def target(tmp_path):
    with (tmp_path / "out").open("w+b") as file:
        yield file


def children() -> set[str]:
    found = set()
    for task in os.listdir("/proc/self/task"):
        found |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


def task(source, target, op: range_worker.Op) -> Task:
    return Task(
        op=op,
        in_fd=source.fileno(),
        in_base=0,
        out_fd=target.fileno(),
        out_base=0,
        key=KEY,
        salt=SALT,
    )


def workers(source, target, count: int = 2) -> Workers:
    return Workers(count, fds=(source.fileno(), target.fileno()), what="the file")


def test_ranges_are_all_hashed_and_the_end_is_padded(source, target):
    with workers(source, target) as pool:
        pool.run(task(source, target, "hash"), blocks=BLOCKS)
    want = verity.run_digests(SALT, memoryview(source.read()))
    assert Path(target.name).read_bytes() == verity.padded(want)


def test_one_pool_does_task_after_task(source, target):
    seen: list[tuple[int, int]] = []
    with workers(source, target) as pool:
        pool.run(task(source, target, "hash"), blocks=BLOCKS)
        pool.run(
            task(source, target, "encrypt"),
            blocks=BLOCKS,
            done=lambda first, blocks: seen.append((first, blocks)),
        )
    assert sorted(seen) == [
        (0, RANGE_BLOCKS),
        (RANGE_BLOCKS, RANGE_BLOCKS),
        (2 * RANGE_BLOCKS, RANGE_BLOCKS),
        (3 * RANGE_BLOCKS, 5),
    ]


def test_an_input_that_ends_early_names_the_block(source, target):
    with (
        pytest.raises(IntegrityError, match=f"the file: ends inside block {BLOCKS}"),
        workers(source, target) as pool,
    ):
        pool.run(task(source, target, "hash"), blocks=BLOCKS + 1)
    assert children() == set()


def test_a_full_disk_is_an_error_of_writing(source):
    with (
        open("/dev/full", "r+b", buffering=0) as full,
        pytest.raises(HostError, match="write the file: No space left") as caught,
        workers(source, full) as pool,
    ):
        pool.run(task(source, full, "encrypt"), blocks=BLOCKS)
    assert caught.value.errno == errno.ENOSPC


def test_an_unreadable_input_is_an_error_of_reading(target, tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        broken = Task(
            op="hash", in_fd=fd, in_base=0, out_fd=target.fileno(), out_base=0
        )
        with (
            pytest.raises(HostError, match="read the file: Is a directory"),
            Workers(1, fds=(fd, target.fileno()), what="the file") as pool,
        ):
            pool.run(broken, blocks=1)
    finally:
        os.close(fd)


def test_a_killed_worker_is_an_error_and_leaves_none(source, target):
    with workers(source, target) as pool:
        os.kill(int(children().pop()), signal.SIGKILL)
        with pytest.raises(HostError, match="No child processes") as caught:
            pool.run(task(source, target, "hash"), blocks=BLOCKS)
    assert "status -9" in caught.value.hint
    assert children() == set()


def test_cancelling_kills_and_reaps(source, target):
    with (
        pytest.raises(HostError) as caught,
        workers(source, target) as pool,
    ):
        pool.run(task(source, target, "hash"), blocks=BLOCKS, cancelled=lambda: True)
    assert caught.value.errno == errno.ECANCELED
    assert children() == set()


def test_any_exception_of_the_caller_reaps(source, target):
    with pytest.raises(KeyboardInterrupt), workers(source, target):
        raise KeyboardInterrupt
    assert children() == set()


def test_a_worker_loads_nothing_that_it_can_do_without():
    root = str(Path(__file__).parents[2])
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import tdxd.host.range_worker\n"
        "print(*sorted(sys.modules))\n"
    )
    argv = [sys.executable, "-I", "-c", program, root]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    slow = {"dataclasses", "inspect", "typing", "json", "cryptography", "tdxd.errors"}
    assert not slow & set(said.split())


def test_what_is_left_of_buffers_after_a_part_is_done():
    first, second, third = (memoryview(bytes([n] * 4)) for n in range(3))
    for done in range(13):
        left = range_worker._rest([first, second, third], done)
        assert b"".join(left) == (b"\0" * 4 + b"\1" * 4 + b"\2" * 4)[done:]


@pytest.mark.parametrize("encrypt", [True, False])
def test_without_libcrypto_the_work_is_the_same(monkeypatch, encrypt):
    source, made = bytearray(os.urandom(3 * 4096)), []
    for library in (libcrypto._library, None):
        monkeypatch.setattr(libcrypto, "_library", library)
        target = bytearray(len(source))
        blocks, into = range_worker.blocks_of(source), range_worker.blocks_of(target)
        range_worker.crypt(KEY, blocks, into, encrypt=encrypt)(77, 3)
        made.append(target)
    assert made[0] == made[1] != source


@pytest.mark.root
def test_a_worker_cannot_be_looked_into_even_by_its_own_user():
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tdxd.host.range_worker import Task\n"
        "from tdxd.host.workers import Workers\n"
        "fds = [os.memfd_create('in'), os.memfd_create('out')]\n"
        "os.write(fds[0], bytes(4096))\n"
        "task = Task(op='hash', in_fd=fds[0], in_base=0, out_fd=fds[1], out_base=0)\n"
        "with Workers(1, fds=fds, what='x') as pool:\n"
        "    pool.run(task, blocks=1)\n"
        "    pid = pool._processes[0].pid\n"
        "    print(os.stat(f'/proc/{pid}/environ').st_uid, os.getuid())\n"
        "    open(f'/proc/{pid}/environ').read()\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, root],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "0 65534\n"  # what is not dumpable belongs to root
    assert "PermissionError" in done.stderr


def test_the_key_is_not_on_the_command_line(source, target):
    with workers(source, target, 1) as pool:
        pool.run(task(source, target, "encrypt"), blocks=1)
        (pid,) = children()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"range_worker" in command
    assert KEY not in command


def test_workers_end_when_their_parent_is_killed(tmp_path):
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from tdxd.host.workers import Workers\n"
        "w = Workers(2, fds=(), what='x')\n"
        "print(*(p.pid for p in w._processes), flush=True); time.sleep(60)\n"
    )
    root = str(Path(__file__).parents[2])
    argv = [sys.executable, "-I", "-c", program, root]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = parent.stdout.readline().split()
        parent.kill()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False
