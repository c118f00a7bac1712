"""A quote generation service for the simulated platform, on a Unix socket or AF_VSOCK.

It signs what bears the platform's MAC, and can answer wrongly in every way that a client must
withstand (`faults` of the platform's description).
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import time

from tdxd.core import qgs
from tdxd.core.qgs import QgsAddress
from tdxd.errors import EvidenceError, HostError, UsageError
from tdxd.sim.platform import SimPlatform
from tdxd.sim.tsm_entries import OVERSIZE_BYTES

__all__ = ["QgsServer"]

_IDLE_S = 60.0
_INVALID_PARAMETER = 0x00012003
_UNEXPECTED = 0x00012001


class QgsServer:
    """Serves from the moment it is made until `close`."""

    def __init__(self, platform: SimPlatform, address: QgsAddress) -> None:
        self._platform = platform
        self._faults = platform.description.faults
        self._lock = threading.Lock()
        self._asked = 0
        self._closed = threading.Event()
        self.address = address
        self._server = _listen(self, address)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="qgs", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the socket's file."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self.address.path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)

    def converse(self, sock: socket.socket) -> None:
        """Answer the requests of one connection, as a thread of its own."""
        sock.settimeout(_IDLE_S)
        with contextlib.suppress(OSError, EOFError):
            while True:
                length = int.from_bytes(_exactly(sock, qgs.LENGTH_BYTES), "big")
                if length > qgs.MAX_MESSAGE_BYTES:
                    return
                self._answer(sock, _exactly(sock, length))

    def _answer(self, sock: socket.socket, message: bytes) -> None:
        with self._lock:
            self._asked += 1
            over = 0 < self._faults.count < self._asked
        time.sleep(self._faults.delay_s)
        fault = "none" if over else self._faults.quote
        if fault == "timeout":
            self._closed.wait(_IDLE_S)
            raise EOFError
        if fault in {"empty", "error"}:
            sock.sendall(qgs.encode_frame(qgs.quote_response(b"", error=_UNEXPECTED)))
            return
        if fault in {"oversize", "too-large"}:
            quote = bytes(OVERSIZE_BYTES)
            sock.sendall(qgs.encode_frame(qgs.quote_response(quote)))
            return
        self._send(sock, self._response(message), "none" if over else self._faults.qgs)

    def _response(self, message: bytes) -> bytes:
        try:
            _minor, report = qgs.parse_quote_request(message)
            return qgs.quote_response(self._platform.quote_of(report))
        except (EvidenceError, UsageError):
            return qgs.quote_response(b"", error=_INVALID_PARAMETER)

    def _send(self, sock: socket.socket, response: bytes, fault: str) -> None:
        if fault == "error":
            response = qgs.quote_response(b"", error=self._faults.qgs_error)
        elif fault == "no-quote":
            response = qgs.quote_response(b"")
        frame = _spoilt(qgs.encode_frame(response), fault)
        if fault == "split":
            for byte in frame:
                sock.sendall(bytes((byte,)))
        elif fault == "hang-up":
            sock.sendall(frame[: len(frame) // 2])
            raise EOFError
        else:
            sock.sendall(frame)


def _spoilt(frame: bytes, fault: str) -> bytes:
    """Return the frame with one thing wrong: length at 0, minor version at 6, type at 8."""
    if fault == "swapped":
        return frame[3::-1] + frame[4:]
    if fault == "swapped-header":
        return frame[:4] + frame[5:3:-1] + frame[7:5:-1] + frame[8:]
    if fault == "oversize":
        return b"\x7f\xff\xff\xff" + frame[4:]
    if fault == "minor-0":
        return frame[:6] + bytes(2) + frame[8:]
    if fault == "other-type":
        return frame[:8] + b"\x03" + frame[9:]
    return frame


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _listen(qgs_server: QgsServer, address: QgsAddress) -> socketserver.TCPServer:
    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            qgs_server.converse(self.request)

    class Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
        address_family = socket.AF_VSOCK if address.path is None else socket.AF_UNIX
        daemon_threads = True
        block_on_close = False

    where: object = address.path or (address.cid, address.port or qgs.DEFAULT_PORT)
    try:
        return Listener(where, Connection)  # type: ignore[arg-type]
    except OSError as exc:
        hint = "loopback over vsock needs the module vsock_loopback, and CID 1"
        raise HostError.of("listen", str(address), exc, hint=hint) from exc
