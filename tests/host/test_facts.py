"""The doctor's look at a machine: on another root, and on this very machine."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tdxd.core.config import PlatformConfig
from tdxd.host.evidence_facts import gather_evidence, table_of
from tdxd.host.facts import MachineFacts, gather_machine
from tdxd.host.in_time import in_time
from tests.contract.test_tsm import make_platform
from tests.core.test_ccel import table
from tests.sim_process import running_sim


def write(root: Path, path: str, text: str = "") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def look(root: Path) -> MachineFacts:
    return gather_machine(group=None, user=None, root=str(root))


def test_an_empty_machine_has_nothing(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert not found.loop
    assert found.file_systems == frozenset()
    assert found.memory_bytes == 0
    assert found.unit == "no-systemd"


def test_a_guest_is_seen_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal:       2048 kB\nMemFree: 1 kB\n")
    write(tmp_path, "proc/filesystems", "nodev\tproc\n\terofs\n")
    write(tmp_path, "dev/loop-control")
    found = look(tmp_path)
    assert found.loop
    assert found.file_systems == {"erofs"}
    assert found.memory_bytes == 2 * 2**20


def test_a_file_system_may_be_a_module(tmp_path: Path) -> None:
    modules = f"lib/modules/{os.uname().release}/modules.dep"
    write(tmp_path, modules, "kernel/fs/erofs/erofs.ko.xz: kernel/lib/x.ko\n")
    assert look(tmp_path).file_systems == {"erofs"}


def test_the_unit_is_enabled_by_its_link(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert look(tmp_path).unit == "absent"
    write(tmp_path, "usr/lib/systemd/system/tdxd.service")
    assert look(tmp_path).unit == "disabled"
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "tdxd.service").symlink_to("/nowhere")
    assert look(tmp_path).unit == "enabled"


def test_groups_and_users_are_looked_up() -> None:
    found = gather_machine(group="root", user="root")
    assert (found.group, found.user) == (True, True)
    found = gather_machine(group="no-such-group", user="no-such-user")
    assert (found.group, found.user) == (False, False)


def test_this_machine_is_seen() -> None:
    found = gather_machine(group=None, user=None)
    assert found.kernel == os.uname().release
    assert found.memory_bytes > 2**20
    assert abs(found.clock_s - time.time()) < 60
    assert found.clock_s > found.built_s


# --- evidence ------------------------------------------------------------------


def test_a_machine_without_evidence_is_told_all_of_it(tmp_path: Path) -> None:
    nowhere = PlatformConfig(
        tsm=str(tmp_path / "report"),
        tdx_guest=str(tmp_path / "tdx_guest"),
        event_log=str(tmp_path / "data/CCEL"),
        rtmr=str(tmp_path / "measurements"),
    )
    found = gather_evidence(nowhere)
    assert not found.report_dir
    assert not found.provider
    assert not found.device
    assert found.quote is not None
    assert "mkdir" in found.quote.message
    assert (found.event_log, found.event_log_bytes) == (None, 0)
    assert found.rtmr is not None
    assert (found.table, found.table_problem) == (None, None)


@pytest.mark.root
def test_a_whole_platform_has_no_problem(tmp_path: Path) -> None:
    make_platform(tmp_path / "p", "", events=True)
    mount = tmp_path / "m"
    with running_sim(tmp_path / "p", "--mount", mount, "--device-only"):
        config = PlatformConfig(
            tsm=f"{mount}/report",
            tdx_guest=f"{mount}/tdx_guest",
            event_log=f"{mount}/CCEL",
            rtmr=f"{mount}/measurements",
        )
        before = (mount / "measurements/rtmr3:sha384").read_bytes()
        found = gather_evidence(config)
        assert (mount / "measurements/rtmr3:sha384").read_bytes() == before
        assert list((mount / "report").iterdir()) == []
    assert (found.quote, found.event_log, found.rtmr) == (None, None, None)
    assert found.report_dir
    assert found.provider
    assert found.device
    assert found.quote_bytes > 1000
    assert found.event_log_bytes == 16384


def test_the_table_stands_beside_the_data(tmp_path: Path) -> None:
    usual = PlatformConfig().event_log
    assert table_of(usual) == "/sys/firmware/acpi/tables/CCEL"
    assert table_of("/elsewhere/log") is None
    (tmp_path / "data").mkdir()
    config = PlatformConfig(event_log=f"{tmp_path}/data/CCEL", tsm=f"{tmp_path}/none")
    (tmp_path / "CCEL").write_bytes(table(log_bytes=4096))
    found = gather_evidence(config)
    assert found.table is not None
    assert found.table.log_bytes == 4096
    (tmp_path / "CCEL").write_bytes(table(kind=1))
    found = gather_evidence(config)
    assert found.table_problem is not None
    assert "type 1" in found.table_problem.message


# --- time ----------------------------------------------------------------------


def test_calls_run_side_by_side_and_late_ones_are_given_up() -> None:
    held = threading.Event()
    began_s = time.monotonic()
    late = in_time([lambda: 1, lambda: held.wait(20), lambda: "x"], 0.3)
    assert time.monotonic() - began_s < 5
    assert late == [1, None, "x"]
    held.set()
    assert in_time([], 1) == []
