"""A virtual machine in software emulation: boot it, run commands in it, take its power away."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contrib.guest.agent import Agent, Result
from contrib.guest.build_image import GuestImage
from contrib.guest.disk import Disk
from contrib.guest.qmp import Qmp

__all__ = ["Machine"]

FORWARD = Path(__file__).with_name("forward.py")
FRONT_PORT, HEALTH_PORT, KEY_PORT = 8500, 9640, 50051
KEY_ADDRESS = "10.0.2.100"
BOOT_S = 300.0
LIFE_S = 1800.0
"""Longest time between power on and off; then it is killed, whatever it does."""
# Without the string instructions, by which the kernel clears and copies pages (erms here, rep_good
# below): they are emulated a byte or word at a time. And without five levels of page tables.
CPU = "max,la57=off,svm=off,erms=off"
# No text that nobody reads; no defences of a CPU that is a program; time read without leaving the
# emulated CPU, not from a chip; a panic ends the machine.
APPEND = (
    "root=/dev/vda rw console=ttyS0 quiet panic=-1"
    " mitigations=off nokaslr tsc=reliable clearcpuid=112"
)


class Machine:
    """One guest: its disks outlive a boot, so that power can be cut.

    Start it from the main thread: QEMU ends with the thread that started it. In the guest's network
    10.0.2.100:50051 is the key server; the guest's ports 8500 and 9640 are `front_port` and
    `health_port` on 127.0.0.1.
    """

    def __init__(
        self,
        directory: Path,
        image: GuestImage,
        *,
        disks: Sequence[Disk] = (),
        memory_mib: int = 3072,
        append: str = "",
        options: Sequence[str] = (),
    ) -> None:
        self.directory, self.image, self.disks = directory, image, tuple(disks)
        self.memory_mib, self.append, self.options = memory_mib, append, tuple(options)
        self.serial_log = directory / "serial.log"
        self.front_port, self.health_port = _free_port(), _free_port()
        self.boot_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: threading.Timer | None = None
        self._agent: Agent | None = None
        self._qmp: Qmp | None = None
        directory.mkdir()
        self.root_format = "qcow2"
        self.root = Disk(name="root", path=directory / "root.qcow2")
        backing = ["-b", str(image.root), "-F", "raw"]
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *backing, self.root.path],
            check=True,
            timeout=60,
        )

    # --- power ---

    def boot(self, *, timeout_s: float = BOOT_S, link_up: bool = True) -> None:
        """Switch on and wait until the guest runs commands (the rest of its boot goes on)."""
        start = time.monotonic()
        self.switch_on(link_up=link_up)
        self.until_answers(timeout_s=timeout_s)
        self.boot_s = time.monotonic() - start
        print(f"guest: answers {self.boot_s:.1f} s after power on")

    def switch_on(self, *, link_up: bool = True) -> None:
        """Start QEMU, paused until its network is as wanted."""
        assert not self.running, "the machine is on"
        for name in ("agent", "qmp"):
            (self.directory / name).unlink(missing_ok=True)
        with (self.directory / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._watchdog = threading.Timer(LIFE_S, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        deadline = time.monotonic() + 30
        try:
            self._qmp = Qmp(self.directory / "qmp", deadline)
            self._agent = Agent(self.directory / "agent", deadline)
            self.set_link(up=link_up)
            self.qmp("cont")
        except BaseException:
            self.power_cut()
            raise

    def until_answers(self, *, timeout_s: float = BOOT_S) -> None:
        """Wait for the guest agent.

        Raises: AssertionError, with the end of the serial log.
        """
        try:
            self.agent.sync(time.monotonic() + timeout_s)
        except (TimeoutError, ConnectionError) as exc:
            told = self.serial_tail()
            raise AssertionError(f"the guest does not answer: {exc!r}\n{told}") from exc

    def power_cut(self) -> None:
        """Kill QEMU: what the guest has not synced is lost; the disks stay."""
        if self._watchdog:
            self._watchdog.cancel()
        for connection in (self._agent, self._qmp):
            if connection:
                connection.close()
        self._agent = self._qmp = None
        if self._process:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def shut_down(self, *, timeout_s: float = 90) -> None:
        """Let the guest stop its services and switch itself off."""
        self._end("systemctl --no-block poweroff", timeout_s)

    def reboot(self, *, timeout_s: float = 90) -> None:
        """Let the guest stop its services, and boot it again."""
        self._end("systemctl --no-block reboot", timeout_s)
        self.boot()

    def _end(self, command: str, timeout_s: float) -> None:
        self.run(command)
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command}: still on\n{self.serial_tail()}") from None
        finally:
            self.power_cut()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        """Switch off and remove the disks."""
        self.power_cut()
        shutil.rmtree(self.directory)

    # --- inside ---

    @property
    def agent(self) -> Agent:
        assert self._agent is not None, "the machine is off"
        return self._agent

    def run(
        self, shell_command: str, *, timeout_s: float = 60, check: bool = True
    ) -> Result:
        """Run a command as root in the guest; with `check` it must succeed."""
        result = self.agent.run(shell_command, timeout_s=timeout_s)
        if check:
            assert result.code == 0, f"{shell_command}: {result}"
        return result

    def output(self, shell_command: str, *, timeout_s: float = 60) -> str:
        """Return what a command that must succeed prints, without white space around it."""
        return self.run(shell_command, timeout_s=timeout_s).stdout.strip()

    def wait_until(self, shell_command: str, *, timeout_s: float = 60) -> Result:
        """Repeat a command until it succeeds."""
        deadline = time.monotonic() + timeout_s
        while (result := self.run(shell_command, check=False)).code != 0:
            assert time.monotonic() < deadline, f"{shell_command}: {result}"
            time.sleep(0.3)
        return result

    def until_booted(self, *, timeout_s: float = BOOT_S) -> str:
        """Wait for the end of the boot; return `running`, or `degraded` if a unit failed."""
        command = "systemctl is-system-running --wait"
        return self.run(command, timeout_s=timeout_s, check=False).stdout.strip()

    def read_file(self, path: str) -> bytes:
        """About 0.6 MB/s; what is bigger comes faster on a disk."""
        return self.agent.read_file(path)

    def write_file(self, path: str, data: bytes) -> None:
        self.agent.write_file(path, data)

    def journal(
        self, *matches: str, boot: str = "0", fields: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the entries of one boot; `matches` are FIELD=VALUE or options like `-u UNIT`."""
        shown = f"--output-fields={','.join(fields)}" if fields else ""
        words = f"journalctl -q --no-pager -o json -b {boot} {shown}"
        lines = self.output(" ".join([words, *matches]), timeout_s=120).splitlines()
        return [json.loads(line) for line in lines]

    # --- around it ---

    def qmp(self, command: str, **arguments: Any) -> Any:
        assert self._qmp is not None, "the machine is off"
        return self._qmp.execute(command, **arguments)

    def set_link(self, *, up: bool) -> None:
        """Plug the network cable in or out."""
        self.qmp("set_link", name="nic", up=up)

    def route_keys_to(self, port: int | None) -> None:
        """Say where on this machine the key server listens; `None`: nowhere."""
        file = self.directory / "keys.port"
        if port is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(str(port))

    def disk(self, name: str) -> Disk:
        return next(one for one in self.disks if one.name == name)

    def serial_tail(self, lines: int = 60) -> str:
        """Return the end of what the guest and QEMU said."""
        told = []
        for name in ("qemu.log", "serial.log"):
            with contextlib.suppress(FileNotFoundError):
                text = (self.directory / name).read_text(errors="replace")
                told += text.splitlines()[-lines:]
        return "\n".join(told)

    # --- QEMU's command line ---

    def command(self) -> list[str]:
        """Return what switches it on."""
        return [
            *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-no-reboot"),
            *("-machine", "pc,hpet=off", "-accel", "tcg,thread=multi"),
            *("-smp", "2", "-m", f"{self.memory_mib}M", "-display", "none", "-S"),
            *self.booted_by(),
            *("-chardev", f"file,id=serial,path={self.serial_log},append=on"),
            *("-serial", "chardev:serial"),
            *("-qmp", f"unix:{self.directory}/qmp,server=on,wait=off"),
            *(
                "-chardev",
                f"socket,id=agent,path={self.directory}/agent,server=on,wait=off",
            ),
            *("-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            *("-device", "virtio-rng-pci"),
            *self._network(),
            *self._drive(self.root, self.root_format),
            *(word for disk in self.disks for word in self._drive(disk, "raw")),
            *self.options,
        ]

    def booted_by(self) -> list[str]:
        """Return the processor, and what it runs first."""
        return [
            *("-cpu", CPU),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)),
            *("-append", f"{APPEND} {self.append}".strip()),
        ]

    def _network(self) -> list[str]:
        forward = f"/usr/bin/python3 -IS {FORWARD} {self.directory}/keys.port"
        ports = {self.front_port: FRONT_PORT, self.health_port: HEALTH_PORT}
        parts = [
            "user,id=net,restrict=on,ipv6=off",
            *(f"hostfwd=tcp:127.0.0.1:{ours}-:{its}" for ours, its in ports.items()),
            f"guestfwd=tcp:{KEY_ADDRESS}:{KEY_PORT}-cmd:{forward}",
        ]
        device = "virtio-net-pci,id=nic,netdev=net,romfile="
        return ["-netdev", ",".join(parts), "-device", device]

    @staticmethod
    def _drive(disk: Disk, form: str) -> list[str]:
        """Through this machine's page cache, so that both sides see each other's writes at once."""
        mode = "on" if disk.read_only else "off"
        where = f"file={disk.path},format={form},readonly={mode}"
        return [
            *("-drive", f"{where},if=none,id={disk.name},cache=unsafe"),
            *("-device", f"virtio-blk-pci,drive={disk.name},serial={disk.name}"),
        ]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port
