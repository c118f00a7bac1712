"""The device of a TDX guest: where it is not, and where it answers wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdxd.core.config import PlatformConfig
from tdxd.core.qgs import QgsAddress
from tdxd.core.td_report import parse_td_report
from tdxd.errors import EvidenceUnavailableError
from tdxd.host.evidence import EitherTsm, make_tsm
from tdxd.host.tdx_guest import IoctlTsm, read_td_report
from tdxd.host.tsm import ConfigfsTsm
from tests.contract.test_tsm import make_platform
from tests.dcap import DATA
from tests.sim_process import running_sim

NOWHERE = QgsAddress(path="/nonexistent/qgs")


def test_a_guest_without_the_device_is_told_what_to_load(tmp_path: Path) -> None:
    tsm = IoctlTsm(str(tmp_path / "tdx_guest"), NOWHERE, "")
    with pytest.raises(EvidenceUnavailableError, match="No such file") as caught:
        tsm.quote(DATA)
    assert "modprobe tdx_guest" in caught.value.hint


def test_another_device_is_named() -> None:
    with pytest.raises(EvidenceUnavailableError, match="/dev/null") as caught:
        read_td_report("/dev/null", DATA)
    assert "not the device of a TDX guest" in caught.value.hint


def test_report_data_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="63 bytes"):
        IoctlTsm(str(tmp_path), NOWHERE, "").quote(bytes(63))


@pytest.mark.root
def test_a_report_is_over_the_data_given(tmp_path: Path) -> None:
    make_platform(tmp_path / "p", "", events=True)
    with running_sim(tmp_path / "p", "--mount", tmp_path / "m", "--device-only"):
        report = read_td_report(str(tmp_path / "m/tdx_guest"), DATA)
    assert parse_td_report(report).report_data == DATA


@pytest.mark.root
@pytest.mark.parametrize(
    ("fault", "words"),
    [("fails", "Input/output error"), ("other-data", "over other report data")],
)
def test_a_module_that_makes_no_right_report_is_named(
    tmp_path: Path, fault: str, words: str
) -> None:
    make_platform(tmp_path / "p", f'report = "{fault}"', events=True)
    with (
        running_sim(tmp_path / "p", "--mount", tmp_path / "m", "--device-only"),
        pytest.raises(EvidenceUnavailableError, match=words),
    ):
        read_td_report(str(tmp_path / "m/tdx_guest"), DATA)


@pytest.mark.parametrize(
    ("evidence", "kind"),
    [("configfs", ConfigfsTsm), ("ioctl", IoctlTsm), ("auto", EitherTsm)],
)
def test_the_config_chooses_the_way(evidence, kind: type) -> None:
    assert isinstance(make_tsm(PlatformConfig(evidence=evidence)), kind)


def test_without_either_configfs_says_what_is_missing(tmp_path: Path) -> None:
    config = PlatformConfig(
        tsm=str(tmp_path / "report"), tdx_guest=str(tmp_path / "tdx_guest")
    )
    with pytest.raises(EvidenceUnavailableError, match="mkdir") as caught:
        make_tsm(config).quote(DATA)
    assert "Linux 6.7" in caught.value.hint
