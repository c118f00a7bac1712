"""What is seen of a machine's protection: on another root, and on this very machine."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import pytest

from tdxd.core.protection import Observed, RootFact
from tdxd.host.exposure import observe

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue\n"
NOTHING = Observed(
    tdx_cpu=False,
    root=RootFact("unknown", writable=True, measured=False),
    command_line="",
    swap=(),
    logins=(),
    ports=(),
    agents=(),
    lockdown=None,
)


def write(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_of_an_empty_machine_nothing_is_taken_for_good(tmp_path: Path) -> None:
    assert observe(str(tmp_path)) == NOTHING


def test_a_plain_distribution_is_seen_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor : 0\nflags\t\t: fpu tdx_guest sse\n")
    write(tmp_path, "proc/swaps", "Filename Type Size\n/dev/vda2 partition 1\n")
    write(tmp_path, "proc/cmdline", "root=/dev/vda1 ro rd.shell\n")
    write(
        tmp_path,
        "proc/self/mountinfo",
        "22 1 254:1 / / ro,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro\n"
        "23 22 0:21 / /proc rw - proc proc rw\n",
    )
    write(tmp_path, "sys/kernel/security/lockdown", "[none] integrity confidentiality")
    write(tmp_path, "usr/bin/cloud-init")
    write(tmp_path, "usr/sbin/qemu-ga")
    system = "sys/fs/cgroup/system.slice"
    write(tmp_path, f"{system}/ssh.service/cgroup.procs", "400\n")
    write(tmp_path, f"{system}/debug-shell.service/cgroup.procs", "")
    write(tmp_path, f"{system}/tdxd.service/cgroup.procs", "500\n")
    getty = f"{system}/system-getty.slice/getty@tty1.service/cgroup.procs"
    write(tmp_path, getty, "401\n")
    session = "sys/fs/cgroup/user.slice/user-0.slice/session-3.scope/cgroup.procs"
    write(tmp_path, session, "402\n")
    assert observe(str(tmp_path)) == Observed(
        tdx_cpu=True,
        root=RootFact("ext4", writable=True, measured=False),
        command_line="root=/dev/vda1 ro rd.shell",
        swap=("/dev/vda2",),
        logins=("getty@tty1.service", "session-3.scope", "ssh.service"),
        ports=(),
        agents=("qemu-guest-agent", "cloud-init"),
        lockdown="none",
    )


def test_sshd_that_waits_behind_a_socket(tmp_path: Path) -> None:
    """No unit runs, and by vsock no port listens: systemd starts sshd when somebody knocks."""
    name = "sshd-vsock.socket"
    write(tmp_path, f"run/systemd/generator/{name}", "[Socket]\n")
    assert observe(str(tmp_path)).logins == (name,)
    mask = tmp_path / "etc/systemd/system" / name
    write(tmp_path, f"etc/systemd/system/{name}")
    assert observe(str(tmp_path)).logins == (name,)
    mask.unlink()
    mask.symlink_to("/dev/null")
    assert observe(str(tmp_path)).logins == ()
    write(tmp_path, "etc/systemd/system/sockets.target.wants/ssh.socket")
    assert observe(str(tmp_path)).logins == ("ssh.socket",)


def test_a_flag_is_a_word_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "flags : no_tdx_guest\nbugs : tdx_guest\n")
    assert not observe(str(tmp_path)).tdx_cpu


def test_a_read_only_file_system_is_not_a_read_only_mount_of_it(tmp_path: Path) -> None:
    line = "22 1 254:1 / / {} - erofs /dev/dm-0 {},user_xattr\n"
    write(tmp_path, "proc/self/mountinfo", line.format("ro,nodev", "ro"))
    assert observe(str(tmp_path)).root == RootFact("erofs", False, False)
    write(tmp_path, "proc/self/mountinfo", line.format("ro,nodev", "rw"))
    assert observe(str(tmp_path)).root == RootFact("erofs", True, False)


def test_what_is_mounted_over_the_root_last_counts(tmp_path: Path) -> None:
    text = "1 1 0:2 / / rw - rootfs none rw\n22 1 254:1 / / ro - erofs /dev/dm-0 ro\n"
    write(tmp_path, "proc/self/mountinfo", text)
    assert observe(str(tmp_path)).root.kind == "erofs"


def test_without_systemd_programs_are_looked_at(tmp_path: Path) -> None:
    for pid, name in ((7, "sshd"), (8, "bash"), (9, "agetty"), (10, "sshd")):
        write(tmp_path, f"proc/{pid}/comm", f"{name}\n")
    assert observe(str(tmp_path)).logins == ("agetty", "sshd")


def test_ports_beyond_loopback_up_to_the_first_connection(tmp_path: Path) -> None:
    rows = (
        "   0: 0100007F:0016 00000000:0000 0A x\n"  # 127.0.0.1:22
        "   1: 00000000:006F 00000000:0000 0A x\n"  # 0.0.0.0:111
        "   2: 0A00020F:1F90 00000000:0000 0A x\n"
        "   3: 0F02000A:D431 0202000A:0050 01 x\n"
        "   4: 00000000:270F 00000000:0000 0A x\n"  # cannot be: those who listen come first
    )
    write(tmp_path, "proc/net/tcp", HEAD + rows)
    rows = (
        f"   0: {'0' * 24}01000000:0019 {'0' * 32}:0000 0A x\n"  # ::1
        f"   1: {'0' * 16}FFFF00000100007F:001A {'0' * 32}:0000 0A x\n"
        f"   2: {'0' * 32}:2134 {'0' * 32}:0000 0A x\n"
    )
    write(tmp_path, "proc/net/tcp6", HEAD + rows)
    assert observe(str(tmp_path)).ports == (111, 8080, 8500)


@pytest.mark.parametrize("text", ["none [integrity] confidentiality\n", "[integrity]"])
def test_the_lockdown_in_force_stands_in_brackets(tmp_path: Path, text: str) -> None:
    write(tmp_path, "sys/kernel/security/lockdown", text)
    assert observe(str(tmp_path)).lockdown == "integrity"


def test_this_machine_is_seen() -> None:
    found = observe()
    with Path("/proc/mounts").open() as lines:
        kinds = [line.split()[2] for line in lines if line.split()[1] == "/"]
    assert found.root.kind == kinds[-1]
    assert found.command_line == Path("/proc/cmdline").read_text().strip()
    assert not found.root.measured  # no test runs on the measured image itself


def test_a_program_that_listens_here_is_seen() -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as open_one,
        socket.create_server(("127.0.0.1", 0)) as closed_one,
    ):
        ports = observe().ports
        assert open_one.getsockname()[1] in ports
        assert closed_one.getsockname()[1] not in ports
    with socket.create_server(("::", 0), family=socket.AF_INET6) as open_one:
        assert open_one.getsockname()[1] in observe().ports


@pytest.mark.root
def test_a_login_that_runs_here_is_seen(tmp_path: Path) -> None:
    """The program is named `agetty`, as a login's is."""
    program = tmp_path / "agetty"
    program.symlink_to("/bin/sleep")
    before = observe().logins
    until_s = time.monotonic() + 10
    with subprocess.Popen([program, "60"]) as running:
        name = Path(f"/proc/{running.pid}/comm")
        try:
            while time.monotonic() < until_s and name.read_text() != "agetty\n":
                time.sleep(0.01)  # the kernel names it a moment after exec succeeded
            seen = observe().logins
        finally:
            running.kill()
    assert "agetty" in seen or before  # units are told of instead, where systemd runs
