"""Asks Intel's quote generation service for a quote, over AF_VSOCK or a Unix socket.

Source: Intel DCAP, tdx_attest.c.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time

from tdxd.core import qgs
from tdxd.core.qgs import QgsAddress
from tdxd.errors import EvidenceMalformedError, EvidenceUnavailableError
from tdxd.host.attempts import TransientError

__all__ = ["ATTEST_CONF", "request_quote", "resolve"]

ATTEST_CONF = "/etc/tdx-attest.conf"
_CONF_MAX_BYTES = 65536
_HINTS = {
    errno.EAFNOSUPPORT: (
        "the kernel has no vsock (modprobe vsock), or the service may open none (man tdxd)"
    ),
    errno.ENODEV: "this guest has no vsock device: the host must give it one (vhost-vsock)",
    errno.ECONNRESET: "nobody listens there: the host must run QGS (qgsd) on this port",
    errno.ECONNREFUSED: "nobody listens there: the host must run QGS (qgsd)",
    errno.ENOENT: "nobody listens there: the host must run QGS (qgsd)",
    errno.EACCES: "only root may ask for quotes",
}
_SILENT_HINT = "the host's QGS does not answer; on the host: journalctl -u qgsd"


def resolve(address: QgsAddress, *, conf_path: str = ATTEST_CONF) -> QgsAddress:
    """Fill in the vsock port: that of /etc/tdx-attest.conf, or 4050, which is Intel's."""
    if address.path is not None or address.port is not None:
        return address
    text = ""
    with contextlib.suppress(OSError), open(conf_path, "rb") as file:
        text = file.read(_CONF_MAX_BYTES).decode(errors="replace")
    port = qgs.port_of_attest_conf(text)
    return QgsAddress(cid=address.cid, port=port or qgs.DEFAULT_PORT)


def request_quote(address: QgsAddress, td_report: bytes, *, timeout_s: float) -> bytes:
    """Have a TDREPORT of 1024 bytes signed; all of it takes `timeout_s` at most.

    Raises: EvidenceUnavailableError, also for an answer that is no QGS's; TransientError for
        silence, and a connection that was cut.
    """
    where = resolve(address)
    deadline_s = time.monotonic() + timeout_s
    frame = qgs.encode_frame(qgs.quote_request(td_report))
    try:
        with _connect(where, timeout_s) as sock:
            _limit(sock, deadline_s)
            sock.sendall(frame)
            prefix = _receive(sock, qgs.LENGTH_BYTES, deadline_s)
            message = _receive(sock, qgs.frame_length(prefix), deadline_s)
        return qgs.parse_quote_response(message)
    except TimeoutError as exc:
        text = f"QGS at {where}: no answer within {timeout_s:g} s"
        error = EvidenceUnavailableError(text, hint=_SILENT_HINT)
        raise TransientError(error) from exc
    except EOFError as exc:
        error = EvidenceUnavailableError(f"QGS at {where}: {exc}", hint=_SILENT_HINT)
        raise TransientError(error) from exc
    except OSError as exc:
        hint = _HINTS.get(exc.errno or 0, "")
        text = f"QGS at {where}: {exc.strerror or exc}"
        raise EvidenceUnavailableError(text, hint=hint) from exc
    except EvidenceMalformedError as exc:
        raise _not_qgs(where, exc) from exc


def _not_qgs(
    where: QgsAddress, exc: EvidenceMalformedError
) -> EvidenceUnavailableError:
    hint = exc.hint or "what listens there does not speak QGS's protocol"
    return EvidenceUnavailableError(f"{where}: {exc.message}", hint=hint)


def _connect(where: QgsAddress, timeout_s: float) -> socket.socket:
    family = socket.AF_VSOCK if where.path is None else socket.AF_UNIX
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        sock.connect((where.cid, where.port) if where.path is None else where.path)
    except BaseException:
        sock.close()
        raise
    return sock


def _receive(sock: socket.socket, size: int, deadline_s: float) -> bytes:
    """Receive exactly `size` bytes, in however many pieces they come."""
    data = bytearray()
    while len(data) < size:
        _limit(sock, deadline_s)
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError(f"it hung up after {len(data)} of {size} bytes")
        data += part
    return bytes(data)


def _limit(sock: socket.socket, deadline_s: float) -> None:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(left_s)
