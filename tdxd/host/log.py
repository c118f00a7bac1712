"""Structured logs by structlog: to journald in its own protocol, else to standard error.

Source: systemd's "Native Journal Protocol".
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """Let imports of a module fail meanwhile."""
    have = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # documented: then import fails
    try:
        yield
    finally:
        del sys.modules[name]
        if have is not None:
            sys.modules[name] = have


# structlog loads rich where an owner's tool brought it, to colour tracebacks that are not shown
# here; that alone takes half as long as trio, and a tenth of the daemon's memory.
with _absent("rich"):
    import structlog

__all__ = ["Write", "configure", "journal_entry", "open_log", "text_line"]

Write = Callable[[Mapping[str, object]], None]
"""Writes one event: `time`, `level`, `event`, then the event's own fields."""

_JOURNAL_SOCKET = "/run/systemd/journal/socket"
_PRIORITY = {"debug": "7", "info": "6", "warning": "4", "error": "3", "critical": "2"}
_HEAD = ("seq", "time", "level", "event")


def configure() -> None:
    """Send every structlog event of this process to the journal, or to standard error."""
    journal = _to_journal()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            _render_journal if journal else _render_text,
        ],
        logger_factory=_journal_logger if journal else _text_logger,
        cache_logger_on_first_use=True,
    )


def open_log() -> Write:
    """Return a function that logs an event through structlog."""
    log = structlog.get_logger()

    def write(item: Mapping[str, object]) -> None:
        fields = {key: item[key] for key in item if key not in _HEAD}
        getattr(log, str(item["level"]))(item["event"], **fields)

    return write


def _render_text(_logger: object, _method: str, event: Mapping[str, object]) -> str:
    return text_line(event)


def _render_journal(
    _logger: object, _method: str, event: Mapping[str, object]
) -> bytes:
    return journal_entry(event)


def _text_logger(*_args: object) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)


def _journal_logger(*_args: object) -> _JournalLogger:
    return _JournalLogger()


class _JournalLogger:
    """Sends one datagram per event; to standard error when the journal is away."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        )

    def msg(self, message: bytes) -> None:
        try:
            self._socket.sendto(message, _JOURNAL_SOCKET)
        except OSError:
            sys.stderr.buffer.write(message)

    debug = info = warning = error = critical = msg


def _to_journal() -> bool:
    """Say whether standard error is the stream that JOURNAL_STREAM names (systemd.exec(5))."""
    stream = os.environ.pop("JOURNAL_STREAM", "")
    seen = os.fstat(2)
    return stream == f"{seen.st_dev}:{seen.st_ino}" and os.path.exists(_JOURNAL_SOCKET)


def text_line(item: Mapping[str, object]) -> str:
    """Return an event as one line: time, level, name, fields; control characters escaped."""
    return f"{item['time']} [{item['level']}] {_words(item)}"


def _words(item: Mapping[str, object]) -> str:
    fields = [f"{key}={_printable(item[key])}" for key in item if key not in _HEAD]
    return " ".join([str(item["event"]), *fields])


def _printable(value: object) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)


def journal_entry(item: Mapping[str, object]) -> bytes:
    """Return an event as a journal datagram: TDXD_EVENT=, TDXD_VOLUME=, … and a MESSAGE=."""
    fields = {
        "MESSAGE": _words(item),
        "PRIORITY": _PRIORITY[str(item["level"])],
        "SYSLOG_IDENTIFIER": "tdxd",
        "TDXD_EVENT": str(item["event"]),
    }
    for key, value in item.items():
        if key not in _HEAD:
            fields[f"TDXD_{key.upper()}"] = str(value)
    return b"".join(_field(key, value) for key, value in fields.items())


def _field(key: str, value: str) -> bytes:
    """Encode one field; with its length if it has several lines."""
    data = value.encode(errors="replace")
    if b"\n" in data:
        size = len(data).to_bytes(8, "little")
        return key.encode() + b"\n" + size + data + b"\n"
    return key.encode() + b"=" + data + b"\n"
