"""Structured logs: to journald in its own protocol, else to standard error.

Source: systemd's "Native Journal Protocol".
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import MutableMapping

import structlog

__all__ = ["configure"]

_JOURNAL_SOCKET = "/run/systemd/journal/socket"
_PRIORITY = {"debug": "7", "info": "6", "warning": "4", "error": "3", "critical": "2"}


def configure() -> None:
    """Send every log event to the journal if standard error goes there, else to it as text."""
    journal = _to_journal()
    last: list[structlog.typing.Processor]
    if journal:
        last = [_JournalRenderer()]
    else:
        last = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ]
    structlog.configure(
        processors=[structlog.processors.add_log_level, *last],
        logger_factory=_JournalLogger.make
        if journal
        else structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _to_journal() -> bool:
    """Say whether standard error is the stream that JOURNAL_STREAM names (systemd.exec(5))."""
    stream = os.environ.pop("JOURNAL_STREAM", "")
    seen = os.fstat(2)
    return stream == f"{seen.st_dev}:{seen.st_ino}" and os.path.exists(_JOURNAL_SOCKET)


class _JournalRenderer:
    """Turns an event into journal fields: TDXD_EVENT=, TDXD_VOLUME=, … and a MESSAGE=."""

    def __call__(
        self, _logger: object, _method: str, event: MutableMapping[str, object]
    ) -> bytes:
        level = str(event.pop("level", "info"))
        name = str(event.pop("event", ""))
        words = [name] + [f"{key}={value}" for key, value in event.items()]
        fields = {
            "MESSAGE": " ".join(words),
            "PRIORITY": _PRIORITY.get(level, "6"),
            "SYSLOG_IDENTIFIER": "tdxd",
            "TDXD_EVENT": name,
        }
        for key, value in event.items():
            fields[f"TDXD_{key.upper()}"] = str(value)
        return b"".join(_field(key, value) for key, value in fields.items())


def _field(key: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" in data:
        size = len(data).to_bytes(8, "little")
        return key.encode() + b"\n" + size + data + b"\n"
    return key.encode() + b"=" + data + b"\n"


class _JournalLogger:
    """Sends one datagram per event; falls back to standard error when the journal is away."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        )

    @classmethod
    def make(cls, *_args: object) -> _JournalLogger:
        return cls()

    def msg(self, message: bytes) -> None:
        try:
            self._socket.sendto(message, _JOURNAL_SOCKET)
        except OSError:
            sys.stderr.buffer.write(message)

    debug = info = warning = error = critical = msg
