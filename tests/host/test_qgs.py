"""The client of QGS against the simulated service: each answer that it may get."""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path

import pytest

from tdxd.core.qgs import QgsAddress
from tdxd.core.quote import parse_quote
from tdxd.errors import EvidenceUnavailableError, UsageError
from tdxd.host.attempts import TransientError
from tdxd.host.qgs import request_quote, resolve
from tdxd.sim.description import Faults
from tdxd.sim.platform import SimPlatform
from tdxd.sim.qgs import QgsServer
from tests.dcap import DATA


@pytest.fixture(scope="module")
def platform() -> SimPlatform:
    return SimPlatform.create()


@pytest.fixture
def ask(platform: SimPlatform, tmp_path: Path):
    """Ask a service with some faults for a quote."""
    servers: list[QgsServer] = []

    def one(timeout_s: float = 5.0, report: bytes | None = None, **faults) -> bytes:
        if not servers:
            description = dataclasses.replace(
                platform.description, faults=Faults(**faults)
            )
            faulty = SimPlatform(platform.pki, description)
            servers.append(QgsServer(faulty, QgsAddress(path=str(tmp_path / "qgs"))))
        td_report = platform.td_report(DATA) if report is None else report
        return request_quote(servers[0].address, td_report, timeout_s=timeout_s)

    yield one
    for server in servers:
        server.close()
    assert not (tmp_path / "qgs").exists()


@pytest.mark.parametrize("fault", ["none", "split", "minor-0"])
def test_a_quote_comes_in_whatever_pieces(ask, fault: str) -> None:
    assert parse_quote(ask(qgs=fault)).report_data == DATA


@pytest.mark.parametrize(
    ("fault", "words", "hint"),
    [
        ("no-quote", "empty quote", "qgsd"),
        ("swapped", "announces a message of", "byte order"),
        ("swapped-header", "version 256.256", "byte order"),
        ("oversize", "announces a message of 2147483647 bytes", "does not speak"),
        ("other-type", "of type 3", "does not speak"),
        ("error", "0x00012001", "qgsd"),
    ],
)
def test_an_answer_without_a_quote_is_named(
    ask, fault: str, words: str, hint: str
) -> None:
    with pytest.raises(EvidenceUnavailableError, match=words) as caught:
        ask(qgs=fault)
    assert hint in caught.value.hint


def test_each_error_code_reaches_the_text(ask) -> None:
    with pytest.raises(EvidenceUnavailableError, match="out of memory"):
        ask(qgs="error", qgs_error=0x12002)


def test_a_service_that_hangs_up_may_do_better_next_time(ask) -> None:
    with pytest.raises(TransientError, match="hung up after"):
        ask(qgs="hang-up")


def test_a_silent_service_costs_the_deadline_and_no_more(ask) -> None:
    began_s = time.monotonic()
    with pytest.raises(TransientError, match=r"no answer within 0\.3 s"):
        ask(0.3, quote="timeout")
    assert 0.25 < time.monotonic() - began_s < 3


def test_a_slow_service_is_waited_for(ask) -> None:
    assert parse_quote(ask(delay_s=0.5)).report_data == DATA


def test_the_service_signs_only_its_own_platforms_reports(
    ask, platform: SimPlatform
) -> None:
    other = SimPlatform.create().td_report(DATA)
    with pytest.raises(EvidenceUnavailableError, match="does not run on its platform"):
        ask(report=other)
    changed = bytearray(platform.td_report(DATA))
    changed[720] ^= 1
    with pytest.raises(EvidenceUnavailableError, match="invalid"):
        ask(report=bytes(changed))
    with pytest.raises(UsageError, match="MAC"):
        platform.quote_of(bytes(changed))


def test_a_version_5_quote_says_the_same_by_both_ways(platform: SimPlatform) -> None:
    td = dataclasses.replace(platform.description.td, quote_version=5)
    newer = SimPlatform(platform.pki, dataclasses.replace(platform.description, td=td))
    by_report = parse_quote(newer.quote_of(newer.td_report(DATA)))
    assert by_report == parse_quote(newer.quote(DATA))


@pytest.mark.parametrize(
    ("path", "hint"), [("absent", "run QGS"), ("stale", "nobody listens")]
)
def test_where_nobody_listens_the_host_is_asked_to(
    tmp_path: Path, platform: SimPlatform, path: str, hint: str
) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    where = QgsAddress(path=str(tmp_path / path))
    with pytest.raises(EvidenceUnavailableError, match=f"unix:{tmp_path}") as caught:
        request_quote(where, platform.td_report(DATA), timeout_s=5)
    assert hint in caught.value.hint


def test_without_a_vsock_device_the_error_names_cid_and_port(
    platform: SimPlatform,
) -> None:
    where = QgsAddress(cid=1, port=40506)
    with pytest.raises(
        (EvidenceUnavailableError, TransientError), match="vsock:1:40506"
    ):
        request_quote(where, platform.td_report(DATA), timeout_s=5)


def test_the_port_is_the_machines_unless_named(tmp_path: Path) -> None:
    conf = tmp_path / "tdx-attest.conf"
    bare = QgsAddress(cid=2)

    def port(address: QgsAddress) -> int | None:
        return resolve(address, conf_path=str(conf)).port

    assert port(bare) == 4050
    conf.write_text("port = 4099\n")
    assert port(bare) == 4099
    assert port(QgsAddress(cid=2, port=1)) == 1
    conf.write_bytes(b"\xff" * 10)
    assert port(bare) == 4050
    unix = QgsAddress(path="/x")
    assert resolve(unix, conf_path=str(conf)) is unix
