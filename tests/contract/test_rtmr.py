"""What every `Rtmr` promises: the fake, and the real one on a FUSE mount as the kernel's."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core.quote import parse_quote
from tdxd.errors import HostError
from tdxd.host.ports import Rtmr
from tdxd.host.rtmr import SysfsRtmr, read_mr_config_id
from tdxd.host.tsm import ConfigfsTsm
from tdxd.sim.platform import SimPlatform
from tests.fakes import FakeRtmr
from tests.sim_process import running_sim


def simulated(directory: Path, faults: str = "") -> Path:
    """Make a platform; return its directory."""
    SimPlatform.create(directory / "p")
    path = directory / "p" / "platform.toml"
    head = path.read_text().split("[faults]")[0]
    head = re.sub(r'mr_config_id = "\w+"', f'mr_config_id = "{"c1" * 48}"', head)
    path.write_text(head + "[faults]\n" + faults)
    return directory / "p"


@pytest.fixture(params=["fake", pytest.param("sysfs", marks=pytest.mark.root)])
def rtmr(request, tmp_path: Path) -> Iterator[Rtmr]:
    if request.param == "fake":
        yield FakeRtmr()
        return
    arguments = ("--mount", tmp_path / "m", "--device-only")
    with running_sim(simulated(tmp_path), *arguments):
        yield SysfsRtmr(f"{tmp_path}/m/measurements")


def test_an_extension_is_the_hash_of_the_old_value_and_the_digest(rtmr: Rtmr) -> None:
    rtmr.check()
    for number in range(3):
        before, digest = rtmr.value(), bytes([number]) * 48
        rtmr.extend(digest)
        assert rtmr.value() == hashlib.sha384(before + digest).digest()


def test_looking_changes_nothing(rtmr: Rtmr) -> None:
    before = rtmr.value()
    rtmr.check()
    assert rtmr.value() == rtmr.value() == before


@pytest.mark.parametrize("size", [0, 32, 47, 49, 64])
def test_a_digest_of_another_size_is_refused(rtmr: Rtmr, size: int) -> None:
    before = rtmr.value()
    with pytest.raises(ValueError, match="digest"):
        rtmr.extend(bytes(size))
    assert rtmr.value() == before


@pytest.mark.root
def test_later_quotes_show_it(tmp_path: Path) -> None:
    mount = tmp_path / "m"
    with running_sim(simulated(tmp_path), "--mount", mount, "--device-only"):
        rtmr = SysfsRtmr(f"{mount}/measurements")
        rtmr.extend(b"d" * 48)
        quote = ConfigfsTsm(f"{mount}/report", f"{mount}/CCEL").quote(bytes(64))
        assert parse_quote(quote).rtmrs[3] == rtmr.value()
        assert read_mr_config_id(f"{mount}/measurements") == b"\xc1" * 48


@pytest.mark.root
def test_a_kernel_before_6_16(tmp_path: Path) -> None:
    mount = tmp_path / "m"
    directory = simulated(tmp_path, 'rtmr = "absent"')
    with running_sim(directory, "--mount", mount, "--device-only"):
        rtmr = SysfsRtmr(f"{mount}/measurements")
        for use in (rtmr.value, rtmr.check, lambda: rtmr.extend(bytes(48))):
            with pytest.raises(HostError, match="rtmr3:sha384") as caught:
                use()
            assert "Linux 6.16" in caught.value.hint
            assert 'platform.extend = "never"' in caught.value.hint
        assert read_mr_config_id(f"{mount}/measurements") is None


@pytest.mark.root
def test_a_module_that_refuses(tmp_path: Path) -> None:
    mount = tmp_path / "m"
    directory = simulated(tmp_path, 'rtmr = "fails"')
    with running_sim(directory, "--mount", mount, "--device-only"):
        rtmr = SysfsRtmr(f"{mount}/measurements")
        before = rtmr.value()
        rtmr.check()
        with pytest.raises(HostError) as caught:
            rtmr.extend(bytes(48))
        assert caught.value.errno == errno.EIO
        assert "TDX module refused" in caught.value.hint
        assert rtmr.value() == before


@pytest.mark.parametrize("size", [0, 47, 49, 5000])
def test_a_file_that_is_no_register(tmp_path: Path, size: int) -> None:
    (tmp_path / "rtmr3:sha384").write_bytes(bytes(size))
    (tmp_path / "mrconfigid").write_bytes(bytes(size))
    with pytest.raises(HostError, match="rtmr3:sha384"):
        SysfsRtmr(str(tmp_path)).value()
    with pytest.raises(HostError, match="mrconfigid"):
        read_mr_config_id(str(tmp_path))


def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "rtmr3:sha384").mkdir()
    with pytest.raises(HostError, match="Is a directory"):
        SysfsRtmr(str(tmp_path)).check()
