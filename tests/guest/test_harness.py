"""The harness itself: what it promises to the tests that use it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contrib.guest.machine import Machine
from tests.guest.conftest import Slot

pytestmark = [pytest.mark.guest, pytest.mark.root]


def test_commands_bring_back_code_and_both_streams(bare: Machine) -> None:
    done = bare.run("echo out; echo err >&2; exit 7", check=False)
    assert (done.code, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert bare.run("kill -9 $$", check=False).code == -9
    with pytest.raises(AssertionError, match="exit 3"):
        bare.run("exit 3")
    assert bare.output("id -u; uname -r; cat /sys/class/tty/console/active") != ""


def test_a_command_that_hangs_is_killed(bare: Machine) -> None:
    with pytest.raises(TimeoutError, match="sleep 987"):
        bare.run("sleep 987", timeout_s=2)
    assert bare.run("pgrep -f 'sleep 98[7]'", check=False).code == 1


def test_files_go_in_and_out_unchanged(bare: Machine) -> None:
    data = os.urandom(5 * 2**20 + 3)
    bare.write_file("/root/data", data)
    assert bare.read_file("/root/data") == data


def test_much_output_arrives_whole(bare: Machine) -> None:
    done = bare.run("seq 1 200000")
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 200001))


def test_the_cable_can_be_pulled(bare: Machine) -> None:
    card = bare.output("ls /sys/class/net | grep -v lo")
    bare.wait_until(f"ip -4 route show dev {card} | grep 10.0.2.0/24")
    bare.set_link(up=False)
    bare.wait_until(f"grep 0 /sys/class/net/{card}/carrier || [ $? = 2 ]", timeout_s=10)
    bare.wait_until(f"! ip -4 route show dev {card} | grep 10.0.2.0/24", timeout_s=10)
    bare.set_link(up=True)
    bare.wait_until(f"ip -4 route show dev {card} | grep 10.0.2.0/24", timeout_s=30)


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server on this machine that sends back what it gets, a connection at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    while data := peer.recv(65536):
                        peer.sendall(data.upper())

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


ASK = """python3 -c '
import socket, sys
with socket.create_connection(("keys.example", 50051), 10) as sock:
    sock.sendall(b"hello" * 40000)
    sock.shutdown(socket.SHUT_WR)
    got = b""
    while data := sock.recv(65536): got += data
print(len(got), got[:5].decode())'"""


def test_the_key_server_is_reached_while_it_runs(bare: Machine, echo_port: int) -> None:
    bare.wait_until("ip -4 route | grep 10.0.2.0/24")
    assert "200000" not in bare.run(ASK, check=False).stdout
    bare.route_keys_to(echo_port)
    assert bare.output(ASK) == "200000 HELLO"
    assert bare.output(ASK) == "200000 HELLO"  # each connection is a new one
    bare.route_keys_to(None)
    assert "200000" not in bare.run(ASK, check=False).stdout


def test_there_is_no_other_way_out(bare: Machine, echo_port: int) -> None:
    bare.wait_until("ip -4 route | grep 10.0.2.0/24")
    assert "default" not in bare.output("ip -4 route")
    knock = f"timeout 5 bash -c 'echo > /dev/tcp/10.0.2.2/{echo_port}'"
    assert bare.run(knock, check=False).code != 0


def test_its_ports_are_reached_from_here(bare: Machine) -> None:
    serve = "systemd-run -q --unit=web python3 -m http.server 9640 --bind ::"
    bare.run(serve)
    deadline = time.monotonic() + 30
    answer = b""
    while not answer.startswith(b"HTTP/") and time.monotonic() < deadline:
        try:
            with socket.create_connection(
                ("127.0.0.1", bare.health_port), timeout=5
            ) as sock:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = sock.recv(100)
        except OSError:
            time.sleep(0.3)
    bare.run("systemctl stop web")
    assert answer.startswith(b"HTTP/1.0 200")


def test_a_byte_changed_on_this_side_is_seen_inside(bare: Machine) -> None:
    before = bare.output("sha256sum /srv/victim")
    disk = bare.disk("delivery")
    assert disk.read("/victim")[50000:50008] == b"abcdefg\n"
    disk.flip("/victim", 50001)
    assert bare.output("sha256sum /srv/victim") == before  # still in its page cache
    bare.run("echo 3 > /proc/sys/vm/drop_caches")
    seen = bare.output("dd if=/srv/victim bs=1 skip=50000 count=8 status=none")
    assert seen == "accdefg"


def test_the_journal_is_read_as_fields(bare: Machine) -> None:
    bare.run("logger -t harness -p user.warning 'a word'")
    (entry,) = bare.journal("-t harness", fields=["MESSAGE", "PRIORITY"])
    assert (entry["MESSAGE"], entry["PRIORITY"]) == ("a word", "4")


def test_a_power_cut_keeps_what_was_synced(slot: Slot, bare: Machine) -> None:
    bare.run("echo kept > /root/kept; sync; logger -t harness before the cut; sleep 2")
    bare.run("echo lost > /root/lost")
    boot_id = bare.output("cat /proc/sys/kernel/random/boot_id")
    process = Path(f"/proc/{bare.pid}")
    bare.power_cut()
    assert not process.exists()
    bare.boot()
    assert bare.output("cat /proc/sys/kernel/random/boot_id") != boot_id
    assert bare.output("cat /root/kept") == "kept"
    assert "lost" not in bare.run("cat /root/lost", check=False).stdout
    told = bare.journal("-t harness", boot="-1", fields=["MESSAGE"])
    assert "before the cut" in [entry["MESSAGE"] for entry in told]
    assert b"Linux version" not in bare.serial_log.read_bytes()  # quiet, but there


def test_an_orderly_reboot_and_a_boot_without_network(bare: Machine) -> None:
    bare.run("echo written > /root/written")  # not synced: the shutdown does it
    bare.shut_down()
    assert not bare.running
    bare.boot(link_up=False)
    assert bare.output("cat /root/written") == "written"
    assert bare.until_booted() in {"running", "degraded"}
    assert "10.0.2.0/24" not in bare.output("ip -4 route")
    bare.set_link(up=True)
    bare.wait_until("ip -4 route | grep 10.0.2.0/24", timeout_s=30)


@pytest.mark.ends_the_guest
def test_a_panic_ends_the_machine_and_nothing_is_left(
    slot: Slot, bare: Machine
) -> None:
    process, directory = Path(f"/proc/{bare.pid}"), bare.directory
    assert "qemu" in (process / "comm").read_text()
    crash = ["-c", "echo c > /proc/sysrq-trigger"]
    bare.agent.execute("guest-exec", path="sh", arg=crash)
    deadline = time.monotonic() + 30
    while bare.running and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not bare.running
    assert "sysrq" in bare.serial_tail()
    slot.clear()
    assert not process.exists()
    assert not directory.exists()
