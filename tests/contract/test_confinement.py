"""Confined programs on the real kernel: what Landlock and seccomp leave them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.host import landlock, seccomp
from tdxd.host.confine import Confinement, wrapped

pytestmark = pytest.mark.root

SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
PYTHON = "/usr/bin/python3"
UNISTD = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
needs_landlock = pytest.mark.skipif(not landlock.abi(), reason="no Landlock here")
needs_ports = pytest.mark.skipif(
    landlock.abi() < landlock.ABI_TCP, reason="this Landlock knows no ports"
)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody may write to, as far as modes go."""
    path = Path("/run") / f"tdxd-confined-{os.getpid()}"
    for name in ("models", "tmp", "sockets", "secret"):
        (path / name).mkdir(parents=True)
        (path / name).chmod(0o777)
    (path / "models" / "file").write_text("weights")
    (path / "secret" / "key").write_text("PRIVATE KEY")
    (path / "secret" / "key").chmod(0o666)
    yield path
    shutil.rmtree(path)


def run(
    place: Path,
    code: str,
    *,
    connect: tuple[int, ...] = (),
    bind: tuple[int, ...] = (),
    may_connect: bool = False,
) -> str:
    """Run Python confined, as `nobody`; each `tried` prints what came of it."""
    confinement = Confinement(
        files=landlock.FileRules(
            execute=SYSTEM,
            read=("/proc", str(place / "models"), "/no/such/path"),
            write=(str(place / "tmp"),),
            sockets=(str(place / "sockets"),),
            devices=("/dev/null",),
        ),
        ports=landlock.PortRules(connect=connect, bind=bind),
        may_connect=may_connect,
    )
    prelude = f"""
import os, socket, ctypes, errno
place = {str(place)!r}
def tried(action):
    try:
        print("ok", *filter(None, [action()]))
    except OSError as exc:
        print(errno.errorcode[exc.errno])
"""
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    argv += [
        "--no-new-privs",
        "--",
        *wrapped(confinement, (PYTHON, "-I", "-c", prelude + code)),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_landlock
def test_files_are_read_and_written_only_where_allowed(place: Path) -> None:
    code = """
tried(lambda: open(place + "/models/file").read())
tried(lambda: open(place + "/models/file", "r+"))
tried(lambda: open(place + "/models/new", "w"))
tried(lambda: open(place + "/secret/key").read())
tried(lambda: os.listdir(place + "/secret"))
tried(lambda: open("/etc/passwd").read())
tried(lambda: open(place + "/tmp/own", "w").close())
tried(lambda: open(place + "/sockets/file", "w"))
tried(lambda: os.symlink(place + "/secret", place + "/tmp/way"))
tried(lambda: os.link(place + "/secret/key", place + "/tmp/key"))
tried(lambda: open("/dev/null", "w").close())
"""
    assert run(place, code).splitlines() == [
        "ok weights",
        *["EACCES"] * 5,
        "ok",
        "EACCES",
        "EACCES",
        "EXDEV",
        "ok",
    ]


@needs_landlock
def test_the_memory_and_descriptors_of_others_are_closed_to_it(place: Path) -> None:
    """Even of a process of the same user: the front may have the same one."""
    argv = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "sleep",
        "60",
    ]
    with (place / "secret" / "key").open() as key:
        other = subprocess.Popen(argv, stdin=key)
    try:
        while "sleep" not in Path(f"/proc/{other.pid}/comm").read_text():
            assert other.poll() is None
        code = f"""
tried(lambda: open("/proc/{other.pid}/fd/0").read())
tried(lambda: open("/proc/{other.pid}/mem", "rb"))
tried(lambda: open("/proc/{other.pid}/environ").read())
"""
        assert set(run(place, code).splitlines()) <= {"EACCES", "EPERM"}
    finally:
        other.kill()
        other.wait()


@needs_ports
def test_tcp_goes_to_allowed_ports_alone(place: Path) -> None:
    """Also from a listening socket that was inherited and turned round."""
    with (
        socket.create_server(("127.0.0.1", 0)) as allowed,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        yes, no = allowed.getsockname()[1], other.getsockname()[1]
        code = f"""
tried(lambda: socket.create_connection(("127.0.0.1", {yes})).close())
tried(lambda: socket.create_connection(("127.0.0.1", {no})).close())
turned = socket.socket()
turned.connect(("127.0.0.1", {yes}))
ctypes.CDLL(None).connect(turned.fileno(), bytes(16), 16)
tried(lambda: turned.connect(("127.0.0.1", {no})))
tried(lambda: socket.socket().bind(("127.0.0.1", 0)))
"""
        answers = run(place, code, connect=(yes,), may_connect=True).splitlines()
    assert answers == ["ok", "EACCES", "EACCES", "EACCES"]


def test_a_server_can_listen_and_answer_but_not_connect(place: Path) -> None:
    code = """
one = socket.socket(socket.AF_UNIX)
tried(lambda: one.bind(place + "/sockets/own"))
tried(lambda: one.listen())
tried(lambda: socket.socket(socket.AF_UNIX).connect(place + "/sockets/own"))
tried(lambda: socket.socket().connect(("127.0.0.1", 1)))
tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
tried(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
tried(lambda: [one.close() for one in socket.socketpair()] and "")
"""
    assert run(place, code).splitlines() == ["ok", "ok", *["EPERM"] * 4, "ok"]


def test_other_families_and_dangerous_calls_are_refused(place: Path) -> None:
    code = f"""
for family in (16, 17, 40, 38):  # NETLINK, PACKET, VSOCK, ALG
    tried(lambda: socket.socket(family, socket.SOCK_RAW))
libc = ctypes.CDLL(None, use_errno=True)
for number in {sorted(seccomp.REFUSED.values())}:
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) == 0 or ctypes.get_errno() != errno.EPERM:
        print("passed", number)
print(libc.syscall(435, 0, 0), errno.errorcode[ctypes.get_errno()])
print(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
"""
    answers = run(place, code, may_connect=True).splitlines()
    assert answers == [*["EPERM"] * 4, "-1 ENOSYS", "-1 EPERM"]


def test_threads_and_programs_still_start(place: Path) -> None:
    code = """
import subprocess, threading
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
print(subprocess.run(["/bin/echo", "program"], capture_output=True, text=True).stdout)
"""
    assert run(place, code).splitlines() == ["thread", "program"]


def test_a_program_that_does_not_exist_is_named(place: Path) -> None:
    confinement = Confinement(
        files=landlock.FileRules(execute=SYSTEM), ports=landlock.PortRules()
    )
    argv = ["setpriv", "--no-new-privs", *wrapped(confinement, ("/no/such",))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        126,
        "cannot execute /no/such: No such file or directory\n",
    )


@pytest.mark.skipif(not UNISTD.exists(), reason="no kernel headers")
def test_the_numbers_are_those_of_the_kernel() -> None:
    listed = re.findall(r"#define __NR_(\w+) (\d+)", UNISTD.read_text())
    numbers = {name: int(number) for name, number in listed}
    assert {name: numbers[name] for name in seccomp.REFUSED} == seccomp.REFUSED
