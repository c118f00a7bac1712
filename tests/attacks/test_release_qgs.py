"""A host that lies where a guest asks for evidence: no hang, no memory, a named error."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdxd.core.qgs import QgsAddress, encode_frame, quote_response
from tdxd.core.quote import parse_quote
from tdxd.errors import EvidenceUnavailableError
from tdxd.host.attempts import TransientError
from tdxd.host.event_log import read_event_log
from tdxd.host.qgs import request_quote
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA

REPORT = bytes(1024)
FAILS = (EvidenceUnavailableError, TransientError)


@contextlib.contextmanager
def hostile(
    directory: Path, act: Callable[[socket.socket], None]
) -> Iterator[QgsAddress]:
    """Listen, take one request, and do what `act` does."""
    path = str(directory / "qgs")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(2048)
                    act(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield QgsAddress(path=path)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
    Path(path).unlink()


def test_a_service_that_trickles_cannot_outlast_the_deadline(tmp_path: Path) -> None:
    def trickle(connection: socket.socket) -> None:
        for byte in encode_frame(quote_response(bytes(1000))):
            connection.sendall(bytes((byte,)))
            time.sleep(0.05)

    began_s = time.monotonic()
    with hostile(tmp_path, trickle) as where:
        with pytest.raises(TransientError, match="no answer within"):
            request_quote(where, REPORT, timeout_s=0.4)
        assert time.monotonic() - began_s < 3


def test_a_service_that_never_stops_sending_is_read_to_the_announced_end(
    tmp_path: Path,
) -> None:
    def flood(connection: socket.socket) -> None:
        connection.sendall(encode_frame(quote_response(b"q" * 100)))
        connection.settimeout(1)
        while True:
            connection.sendall(bytes(65536))

    with hostile(tmp_path, flood) as where:
        assert request_quote(where, REPORT, timeout_s=5) == b"q" * 100


def test_a_service_that_never_reads_cannot_hang_the_guest(tmp_path: Path) -> None:
    path = str(tmp_path / "deaf")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        began_s = time.monotonic()
        with pytest.raises(TransientError):
            request_quote(QgsAddress(path=path), REPORT, timeout_s=0.3)
        assert time.monotonic() - began_s < 3


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=400))
def test_no_bytes_of_a_host_do_worse_than_a_named_error(
    tmp_path: Path, data: bytes
) -> None:
    with (
        hostile(tmp_path, lambda connection: connection.sendall(data)) as where,
        contextlib.suppress(*FAILS),
    ):
        assert request_quote(where, REPORT, timeout_s=5)


def test_a_quote_of_another_td_is_only_ever_worth_its_report_data(
    tmp_path: Path,
) -> None:
    """The client passes it on; the report data tells the key server that it is not ours."""
    other = SimPlatform.create().quote(bytes(64))
    act = encode_frame(quote_response(other))
    with hostile(tmp_path, lambda connection: connection.sendall(act)) as where:
        quote = request_quote(where, REPORT, timeout_s=5)
    assert parse_quote(quote).report_data != DATA


def test_an_event_log_of_100_mb_is_refused_after_1_mib(tmp_path: Path) -> None:
    path = tmp_path / "CCEL"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(EvidenceUnavailableError, match="longer than 1048576"):
        read_event_log(str(path))


def test_an_event_log_without_end_is_refused() -> None:
    with pytest.raises(EvidenceUnavailableError, match="longer than 1048576"):
        read_event_log("/dev/zero")
