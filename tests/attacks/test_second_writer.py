"""Attack: another program writes into the configfs-tsm entry between our write and our read."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tdxd.core.quote import parse_quote
from tdxd.errors import EvidenceUnavailableError
from tdxd.host.tsm import ConfigfsTsm
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA
from tests.sim_process import running_sim


def swap_once(reports: Path) -> None:
    """Wait for the first entry whose report data is committed, and replace them."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for entry in reports.iterdir():
            if (entry / "generation").read_text() == "1\n":
                (entry / "inblob").write_bytes(b"evil" * 16)
                return
        time.sleep(0.005)
    raise AssertionError("no quote was asked for")


@pytest.mark.root
@pytest.mark.parametrize("attempts", [1, 2])
def test_attack_swapped_report_data(tmp_path: Path, attempts: int) -> None:
    """The swap shows in `generation`; it is refused, or the quote asked for anew."""
    SimPlatform.create(tmp_path / "p")
    path = tmp_path / "p" / "platform.toml"
    path.write_text(path.read_text().replace("delay_s = 0.0", "delay_s = 0.4"))
    mount = tmp_path / "m"
    with running_sim(tmp_path / "p", "--mount", mount, "--device-only"):
        thread = threading.Thread(target=swap_once, args=(mount / "report",))
        thread.start()
        tsm = ConfigfsTsm(f"{mount}/report", "", attempts=attempts)
        if attempts == 1:
            with pytest.raises(EvidenceUnavailableError, match="another program wrote"):
                tsm.quote(DATA)
        else:
            assert parse_quote(tsm.quote(DATA)).report_data == DATA
        thread.join(10)
