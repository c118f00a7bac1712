"""QGS over AF_VSOCK, through the kernel's own loopback: the same answers as on a Unix socket.

Skipped where the kernel has no loopback for vsock; the guest tests run it where there is one.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core.qgs import QgsAddress
from tdxd.core.quote import parse_quote
from tdxd.errors import EvidenceUnavailableError
from tdxd.host.attempts import TransientError
from tdxd.host.evidence import EitherTsm
from tdxd.host.qgs import request_quote, resolve
from tdxd.host.tdx_guest import IoctlTsm
from tdxd.host.tsm import ConfigfsTsm
from tdxd.sim.platform import SimPlatform
from tests.contract.test_tsm import make_platform
from tests.dcap import DATA
from tests.sim_process import running_sim

LOCAL = 1
"""VMADDR_CID_LOCAL."""
PORTS = itertools.count(40000 + os.getpid() % 10000)
TIMEOUT_S = 10.0


def loopback() -> bool:
    """Say whether this kernel's vsock reaches itself."""
    try:
        with socket.socket(socket.AF_VSOCK) as server:
            server.bind((LOCAL, next(PORTS)))
            server.listen()
            with socket.socket(socket.AF_VSOCK) as client:
                client.settimeout(5)
                client.connect(server.getsockname())
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not loopback(), reason="no vsock loopback: vsock_loopback"),
]


@pytest.fixture
def where() -> QgsAddress:
    return QgsAddress(cid=LOCAL, port=next(PORTS))


@pytest.fixture
def served(tmp_path: Path, where: QgsAddress, request) -> Iterator[Path]:
    """A platform with its device and a QGS on vsock; the parameter is its faults."""
    make_platform(tmp_path / "p", getattr(request, "param", ""), events=True)
    arguments = ("--mount", tmp_path / "m", "--device-only", "--qgs", str(where))
    with running_sim(tmp_path / "p", *arguments) as sim:
        assert sim.ready["qgs"] == str(where)
        yield tmp_path / "m"


def ioctl(mount: Path, where: QgsAddress, **more: float) -> IoctlTsm:
    attempts = int(more.pop("attempts", 1))
    timeout_s = more.pop("timeout_s", TIMEOUT_S)
    return IoctlTsm(
        f"{mount}/tdx_guest",
        where,
        f"{mount}/CCEL",
        attempts=attempts,
        timeout_s=timeout_s,
    )


@pytest.mark.parametrize(
    "served", ["", 'qgs = "split"', 'qgs = "minor-0"'], indirect=True
)
def test_a_quote_comes_by_ioctl_and_vsock(served: Path, where: QgsAddress) -> None:
    tsm = ioctl(served, where)
    for number in range(3):
        data = bytes([number]) * 64
        assert parse_quote(tsm.quote(data)).report_data == data


def test_an_extension_shows_in_the_next_quote(served: Path, where: QgsAddress) -> None:
    register = served / "measurements/rtmr3:sha384"
    with register.open("r+b", buffering=0) as file:
        file.write(b"d" * 48)
    quote = parse_quote(ioctl(served, where).quote(DATA))
    assert quote.rtmrs[3] == register.read_bytes()


@pytest.mark.parametrize("served", ['tsm = "absent"'], indirect=True)
def test_an_old_kernel_is_served_without_a_setting(
    served: Path, where: QgsAddress
) -> None:
    device = f"{served}/tdx_guest"
    configfs = ConfigfsTsm(f"{served}/report", "")
    tsm = EitherTsm(configfs, ioctl(served, where), device=device)
    assert parse_quote(tsm.quote(DATA)).report_data == DATA


@pytest.mark.parametrize(
    ("served", "words"),
    [
        ('qgs = "error"\nqgs_error = 0x12003', "does not run on its platform"),
        ('qgs = "no-quote"', "empty quote"),
        ('qgs = "swapped"', "announces a message"),
        ('qgs = "oversize"', "of 2147483647 bytes"),
        ('qgs = "other-type"', "of type 3"),
        ('qgs = "hang-up"', "hung up"),
    ],
    indirect=["served"],
)
def test_each_wrong_answer_is_named(
    served: Path, where: QgsAddress, words: str
) -> None:
    with pytest.raises(EvidenceUnavailableError, match=words):
        ioctl(served, where).quote(DATA)


@pytest.mark.parametrize("served", ['quote = "timeout"\ncount = 1'], indirect=True)
def test_a_silent_service_costs_the_deadline_and_the_next_answer_counts(
    served: Path, where: QgsAddress
) -> None:
    began_s = time.monotonic()
    quote = ioctl(served, where, attempts=2, timeout_s=2.0).quote(DATA)
    assert parse_quote(quote).report_data == DATA
    assert 2.0 <= time.monotonic() - began_s < 20


def test_where_nobody_listens_the_host_is_asked_to(where: QgsAddress) -> None:
    report = SimPlatform.create().td_report(DATA)
    with pytest.raises(EvidenceUnavailableError, match=str(where)) as caught:
        request_quote(where, report, timeout_s=TIMEOUT_S)
    assert "QGS" in caught.value.hint


def test_the_port_of_intels_file_is_used(
    tmp_path: Path, served: Path, where: QgsAddress
) -> None:
    conf = tmp_path / "tdx-attest.conf"
    conf.write_text(f"# QGS\nport = {where.port}\n")
    resolved = resolve(QgsAddress(cid=LOCAL), conf_path=str(conf))
    assert resolved == where
    assert ioctl(served, resolved).quote(DATA)


def test_a_listener_that_never_accepts_cannot_hang_the_guest(
    where: QgsAddress,
) -> None:
    report = SimPlatform.create().td_report(DATA)
    with socket.socket(socket.AF_VSOCK) as deaf:
        deaf.bind((LOCAL, where.port))
        deaf.listen(1)
        began_s = time.monotonic()
        with pytest.raises((EvidenceUnavailableError, TransientError)):
            request_quote(where, report, timeout_s=1.0)
        assert time.monotonic() - began_s < 15
