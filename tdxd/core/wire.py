"""The control protocol: frames between `tdxd` and `tdxctl`, without any I/O.

A frame is a 4-byte big-endian length and that many bytes of msgpack, at most 1 MiB. A request
is `{v, id, verb, args}`; replies are `{v, id, more, …}`: any number with `more` true (progress,
events, keep-alives), then one with `more` false that holds `result` or `error`.

Imports no more than msgpack: `tdxctl` must start fast.
"""

from __future__ import annotations

import msgpack

from tdxd.errors import EX_SOFTWARE, RemoteProtocolError, TdxdError

__all__ = [
    "MAX_FRAME_BYTES",
    "VERBS",
    "VERSION",
    "FrameReader",
    "RemoteError",
    "encode_frame",
    "error_reply",
    "parse_request",
    "raise_error",
    "reply",
    "request",
]

VERSION = 1
MAX_FRAME_BYTES = 1024 * 1024
_HEADER_BYTES = 4

VERBS = {
    "status": False,
    "events": False,
    "wait": False,
    "health": False,
    "version": False,
    "doctor": True,
    "mount": True,
    "unmount": True,
    "reload": True,
    "retry": True,
    "reexec": True,
}
"""Every verb, and whether it needs uid 0: it changes something, or (`doctor`) asks the host."""


class RemoteError(TdxdError):
    """An error that the daemon reported; carries the daemon's code and exit code."""

    def __init__(self, code: str, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.remote_code = code
        self._exit_code = exit_code

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # per instance here
        """The exit code of the error's class in the daemon."""
        return self._exit_code


def encode_frame(message: dict[str, object]) -> bytes:
    """Encode one message with its length.

    Raises: RemoteProtocolError if it is longer than `MAX_FRAME_BYTES`.
    """
    body: bytes = msgpack.packb(message, use_bin_type=True)
    _check_length(len(body))
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


def _check_length(length: int) -> None:
    if length > MAX_FRAME_BYTES:
        raise RemoteProtocolError(
            f"control frame of {length} bytes, at most {MAX_FRAME_BYTES} allowed"
        )


class FrameReader:
    """Splits a byte stream into messages: `feed` bytes, then take `messages`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, object]]:
        """Take bytes in; return the messages that are now whole.

        Raises: RemoteProtocolError for a frame that is too long or is no msgpack map.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= _HEADER_BYTES:
            length = int.from_bytes(self._buffer[:_HEADER_BYTES], "big")
            _check_length(length)
            end = _HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            messages.append(_decode(bytes(self._buffer[_HEADER_BYTES:end])))
            del self._buffer[:end]
        return messages

    @property
    def half_read(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer)


def _decode(body: bytes) -> dict[str, object]:
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        raise RemoteProtocolError("control frame is not valid msgpack") from exc
    if not isinstance(message, dict):
        raise RemoteProtocolError("control frame is not a msgpack map")
    if message.get("v") != VERSION:
        raise RemoteProtocolError(
            f"control protocol version {message.get('v')!r}, this program speaks {VERSION}",
            hint="use the tdxctl that came with this tdxd",
        )
    return message


def request(
    verb: str, args: dict[str, object], *, request_id: int = 1
) -> dict[str, object]:
    """Make a request."""
    return {"v": VERSION, "id": request_id, "verb": verb, "args": args}


def parse_request(message: dict[str, object]) -> tuple[int, str, dict[str, object]]:
    """Return (id, verb, args) of a request.

    Raises: RemoteProtocolError for an unknown verb or a wrong type.
    """
    request_id, verb, args = message.get("id"), message.get("verb"), message.get("args")
    if not isinstance(request_id, int) or not isinstance(args, dict):
        raise RemoteProtocolError("control request without a number or arguments")
    if not isinstance(verb, str) or verb not in VERBS:
        raise RemoteProtocolError(
            f"unknown command {str(verb)[:40]!r}", hint="known: " + " ".join(VERBS)
        )
    return request_id, verb, args


def reply(request_id: int, *, more: bool, **body: object) -> dict[str, object]:
    """Make a reply frame."""
    return {"v": VERSION, "id": request_id, "more": more, **body}


def error_reply(request_id: int, exc: TdxdError) -> dict[str, object]:
    """Make the last reply of a request that failed."""
    error = {
        "code": exc.code,
        "message": exc.message,
        "hint": exc.hint,
        "exit": exc.exit_code,
    }
    return reply(request_id, more=False, error=error)


def raise_error(error: object) -> None:
    """Raise what an `error` field reports.

    Raises: RemoteError, always.
    """
    fields = error if isinstance(error, dict) else {}
    exit_code = fields.get("exit")
    raise RemoteError(
        str(fields.get("code", "error")),
        str(fields.get("message", "the daemon reported an error without a text")),
        str(fields.get("hint", "")),
        exit_code if isinstance(exit_code, int) else EX_SOFTWARE,
    )
