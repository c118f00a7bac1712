"""Quotes without configfs-tsm: a TDREPORT from /dev/tdx_guest, signed by the host's QGS.

Source: Linux include/uapi/linux/tdx-guest.h and drivers/virt/coco/tdx-guest (6.2 and later).
"""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial

from tdxd.core.qgs import QgsAddress
from tdxd.core.quote import REPORT_DATA_BYTES
from tdxd.core.td_report import (
    TD_REPORT_REQUEST_BYTES,
    TDX_CMD_GET_REPORT0,
    parse_td_report,
)
from tdxd.errors import EvidenceMalformedError, EvidenceUnavailableError
from tdxd.host.attempts import (
    ANSWER_S,
    ATTEMPTS,
    PAUSE_S,
    TransientError,
    quote_by_attempts,
)
from tdxd.host.event_log import read_event_log
from tdxd.host.qgs import request_quote

__all__ = ["IoctlTsm", "read_td_report", "td_report"]

_HINTS = {
    errno.ENOENT: "modprobe tdx_guest, in a TDX guest with Linux 6.2 or later",
    errno.ENODEV: "modprobe tdx_guest, in a TDX guest with Linux 6.2 or later",
    errno.ENOTTY: "this is not the device of a TDX guest",
    errno.EACCES: "only root may ask for TD reports",
    errno.EPERM: "only root may ask for TD reports",
    errno.EIO: "the TDX module refused to make a report",
}
_TRANSIENT = (errno.EBUSY, errno.EINTR)


def td_report(device: str, report_data: bytes) -> bytes:
    """Return the TDREPORT over 64 bytes of report data, 1024 bytes; asked for several times.

    Raises: EvidenceUnavailableError.
    """
    return quote_by_attempts(
        partial(read_td_report, device),
        report_data,
        attempts=ATTEMPTS,
        pause_s=PAUSE_S,
    )


def read_td_report(device: str, report_data: bytes) -> bytes:
    """Return the TDREPORT over 64 bytes of report data, 1024 bytes; the TDX module makes it.

    Raises: EvidenceUnavailableError, also for an answer that is no TD report; TransientError.
    """
    request = bytearray(TD_REPORT_REQUEST_BYTES)
    request[:REPORT_DATA_BYTES] = report_data
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, TDX_CMD_GET_REPORT0, request, True)
        finally:
            os.close(fd)
    except OSError as exc:
        hint = _HINTS.get(exc.errno or 0, "")
        text = f"TD report from {device}: {exc.strerror}"
        error = EvidenceUnavailableError(text, hint=hint)
        raise (TransientError(error) if exc.errno in _TRANSIENT else error) from exc
    report = bytes(request[REPORT_DATA_BYTES:])
    try:
        found = parse_td_report(report).report_data
    except EvidenceMalformedError as exc:
        raise EvidenceUnavailableError(f"{device}: {exc.message}") from exc
    if found != report_data:
        text = f"TD report from {device} is over other report data than was given"
        raise EvidenceUnavailableError(text)
    return report


class IoctlTsm:
    """Implements `Tsm` on the device of a TDX guest, a QGS and a CCEL data file.

    A transient failure is tried again, `attempts` times in all, `pause_s` apart; QGS has
    `timeout_s` each time, as long as the kernel waits for it by configfs-tsm.
    """

    def __init__(
        self,
        device: str,
        qgs: QgsAddress,
        event_log_path: str,
        *,
        attempts: int = ATTEMPTS,
        pause_s: float = PAUSE_S,
        timeout_s: float = ANSWER_S,
    ) -> None:
        self._device, self._qgs = device, qgs
        self._event_log_path = event_log_path
        self._attempts, self._pause_s = attempts, pause_s
        self._timeout_s = timeout_s

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes of report data; blocks while the host makes it.

        Raises: EvidenceUnavailableError; ValueError for report data of another size.
        """
        return quote_by_attempts(
            self._quote_once,
            report_data,
            attempts=self._attempts,
            pause_s=self._pause_s,
        )

    def event_log(self) -> bytes:
        """Return the CCEL data, at most 1 MiB; empty if this platform has none.

        Raises: EvidenceUnavailableError.
        """
        return read_event_log(self._event_log_path)

    def _quote_once(self, report_data: bytes) -> bytes:
        report = read_td_report(self._device, report_data)
        return request_quote(self._qgs, report, timeout_s=self._timeout_s)
