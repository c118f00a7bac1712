"""The table [platform]."""

from __future__ import annotations

from typing import Any

import pytest

from tdxd.core.config import PlatformConfig


def test_the_defaults_are_the_kernels_own_places() -> None:
    config = PlatformConfig()
    assert config.evidence == "auto"
    assert config.tsm == "/sys/kernel/config/tsm/report"
    assert config.tdx_guest == "/dev/tdx_guest"
    assert config.qgs == "vsock:2"
    assert config.event_log == "/sys/firmware/acpi/tables/data/CCEL"
    assert config.rtmr == "/sys/devices/virtual/misc/tdx_guest/measurements"


@pytest.mark.parametrize("name", ["tsm", "tdx_guest", "event_log", "rtmr"])
def test_a_path_is_absolute(name: str) -> None:
    changed: dict[str, Any] = {name: "x/y"}
    with pytest.raises(ValueError, match=f"{name} 'x/y' is not an absolute path"):
        PlatformConfig(**changed)


@pytest.mark.parametrize("qgs", ["4050", "vsock:2:port", "unix:qgs", ""])
def test_an_address_of_qgs_is_checked_at_the_start(qgs: str) -> None:
    with pytest.raises(ValueError, match="is not vsock:CID"):
        PlatformConfig(qgs=qgs)


@pytest.mark.parametrize("qgs", ["vsock:2", "vsock:2:4050", "unix:/run/qgs.sock"])
def test_each_kind_of_address_is_taken(qgs: str) -> None:
    assert PlatformConfig(qgs=qgs).qgs == qgs
