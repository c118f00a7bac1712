"""A guest's daemon as its operator and its users see it: tdxctl, the journal, the front."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from contrib.guest.agent import Result
from contrib.guest.machine import Machine
from tests.guest.world import GuestWorld

__all__ = ["Holdings", "Observed"]

SERVING_S = 300.0
"""A model server under software emulation takes about a minute until it serves."""
RUNTIME_DIR = "/run/tdxd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdings:
    """What the daemon holds of the guest's kernel."""

    mappings: tuple[str, ...]
    loops: tuple[str, ...]
    children: tuple[int, ...]
    networks: int

    def counts(self) -> tuple[int, int, int]:
        return len(self.mappings), len(self.loops), len(self.children)


class Observed:
    """The daemon in one running machine."""

    def __init__(self, machine: Machine, world: GuestWorld) -> None:
        self.machine, self.world = machine, world

    # --- as its operator ---

    def ctl(self, *args: str, check: bool = True, timeout_s: float = 200) -> Result:
        command = " ".join(("tdxctl", *args))
        return self.machine.run(command, check=check, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """The status; empty while no daemon answers."""
        done = self.ctl("status", "--json", check=False)
        shown: dict[str, Any] = json.loads(done.stdout) if done.code == 0 else {}
        return shown

    def volume(self) -> dict[str, Any]:
        volumes = self.status().get("volumes") or [{"state": None, "error": None}]
        shown: dict[str, Any] = volumes[0]
        return shown

    def attempts(self) -> int:
        error = self.volume()["error"]
        return int(error["attempts"]) if error else 0

    def serving(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.status().get("serving") or {}
        return shown

    def server_pid(self) -> int | None:
        servers = self.serving().get("servers") or []
        return int(servers[0]["pid"]) if servers else None

    def main_pid(self) -> int:
        return int(self.machine.output("systemctl show -P MainPID tdxd.service"))

    def until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = 120
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"timed out: {what}; {self.status()}"
            time.sleep(0.3)

    def until_volume(self, *states: str, timeout_s: float = 120) -> None:
        self.until(
            lambda: self.volume()["state"] in states, f"volume {states}", timeout_s
        )

    def is_ready(self) -> bool:
        """Ask as a load balancer does: tdxctl takes more than a second here."""
        url = f"http://127.0.0.1:{self.machine.health_port}/readyz"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return int(answer.status) == 200
        except OSError:
            return False

    def until_serving(self) -> None:
        if self.is_ready():
            return
        limit = str(SERVING_S)
        done = self.ctl(
            "wait", "--timeout", limit, check=False, timeout_s=SERVING_S + 20
        )
        if done.code:
            told = self.ctl("events", check=False).stdout[-3000:]
            pytest.fail(f"{done.stdout}{done.stderr}\n{told}")

    def until_pid_changes(self, old: int, *, timeout_s: float = 60) -> None:
        self.until(lambda: self.main_pid() not in (0, old), "a new daemon", timeout_s)
        self.until(lambda: bool(self.status()), "the new daemon answers", timeout_s)

    def restart(self) -> None:
        """Start the daemon anew, and wait until its volume is open."""
        self.machine.run("systemctl restart tdxd.service", timeout_s=120)
        self.until_volume("mounted")

    def events(self, name: str, *matches: str) -> list[dict[str, Any]]:
        """Journal entries of one event of the daemon in this boot, oldest first."""
        return self.machine.journal(f"TDXD_EVENT={name}", *matches)

    def said(self) -> str:
        """All that the unit said in this boot."""
        return self.machine.output("journalctl -q --no-pager -b -u tdxd.service -o cat")

    def holdings(self) -> Holdings:
        """Mappings, loop devices, children and network namespaces of the daemon now."""
        script = (
            "cat /sys/block/dm-*/dm/uuid 2>/dev/null | sort; echo --; "
            "ls -d /sys/block/loop*/loop 2>/dev/null; echo --; "
            "grep -vx $(systemctl show -P MainPID tdxd) "
            "/sys/fs/cgroup/system.slice/tdxd.service/cgroup.procs; echo --; "
            "lsns -t net -n -o NS | wc -l"
        )
        told = self.machine.run(script, check=False).stdout
        mappings, loops, children, networks = (
            one.split() for one in told.split("--\n")
        )
        return Holdings(
            mappings=tuple(mappings),
            loops=tuple(loops),
            children=tuple(int(pid) for pid in children),
            networks=int(networks[0]),
        )

    # --- what it opened ---

    def in_its_mounts(self, command: str, *, check: bool = True) -> Result:
        """Run a command where the daemon's private mounts are seen."""
        inside = f"nsenter --mount --target {self.main_pid()} -- sh -c '{command}'"
        return self.machine.run(inside, check=check, timeout_s=120)

    def read_all(self) -> Result:
        """Read every file of the mounted volume, from the disk."""
        self.machine.run("sync; echo 3 > /proc/sys/vm/drop_caches")
        find = f"find {RUNTIME_DIR}/volumes -type f -exec cat {{}} + > /dev/null"
        return self.in_its_mounts(find, check=False)

    # --- as a user of the model ---

    def predict(self) -> subprocess.CompletedProcess[str]:
        return self.world.predict(self.machine, "--timeout", "60")

    def predict_ok(self) -> None:
        done = self.predict()
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["outputs"]["y"]["values"] == [[3, 5, 7, 9]]
