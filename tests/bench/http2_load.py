"""Sends one recorded gRPC request over and over, cheaply: HTTP/2 written out by hand.

A grpcio client costs a fifth of what the server spends on a release, and here both run on the same
cores. This one keeps some calls in flight on each of its connections and looks at no more of an
answer than its end; whether the answers were good is seen elsewhere, in the audit log.
Source: RFC 9113 (frames), RFC 7541 section 6.2.2 (literal header fields without indexing).
"""

from __future__ import annotations

import selectors
import socket
import ssl
import struct
import time
from pathlib import Path
from typing import Self

from tdxd.core.config import Address

__all__ = ["Load"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_FRAME_MAX = 16384
_WINDOW = 2**30
_READ_BYTES = 256 * 1024


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    head = struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream)
    return head + body


def _literal(name: bytes, value: bytes) -> bytes:
    assert len(name) < 127
    assert len(value) < 127
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


class _Connection:
    """One connection, with its streams in flight and its credit for sending."""

    def __init__(self, address: Address, ca_pem: Path, path: str) -> None:
        context = ssl.create_default_context(cafile=str(ca_pem))
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection((address.host, address.port), 10)
        self.socket = context.wrap_socket(plain, server_hostname=address.host)
        self.fields = b"".join(
            _literal(name, value)
            for name, value in (
                (b":method", b"POST"),
                (b":scheme", b"https"),
                (b":path", path.encode()),
                (b":authority", address.host.encode()),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
            )
        )
        self.credit = 65535
        self.stream = 1
        self.in_flight = 0
        self.ended = False
        self.unread = b""
        wide = struct.pack(">HI", 4, _WINDOW)  # SETTINGS_INITIAL_WINDOW_SIZE
        start = _frame(_SETTINGS, 0, 0, wide)
        start += _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW))
        self.socket.sendall(_PREFACE + start)

    def send(self, message: bytes) -> None:
        """Begin a call."""
        body = b"\0" + struct.pack(">I", len(message)) + message
        parts = [body[at : at + _FRAME_MAX] for at in range(0, len(body), _FRAME_MAX)]
        frames = [_frame(_HEADERS, _END_HEADERS, self.stream, self.fields)]
        frames += [_frame(_DATA, 0, self.stream, part) for part in parts[:-1]]
        frames.append(_frame(_DATA, _END_STREAM, self.stream, parts[-1]))
        self.socket.sendall(b"".join(frames))
        self.credit -= len(body)
        self.stream += 2
        self.in_flight += 1

    def receive(self) -> int:
        """Read what is there; return how many calls have ended."""
        data = self.unread + self.socket.recv(_READ_BYTES)
        while self.socket.pending():
            data += self.socket.recv(_READ_BYTES)
        if not data:
            raise RuntimeError("the server closed a connection")
        at, done = 0, 0
        while len(data) - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if len(data) - at - 9 < size:
                break
            kind, flags = data[at + 3], data[at + 4]
            done += self._take(kind, flags, data[at + 5 : at + 9 + size])
            at += 9 + size
        self.unread = data[at:]
        return done

    def _take(self, kind: int, flags: int, rest: bytes) -> int:
        stream, body = int.from_bytes(rest[:4], "big"), rest[4:]
        if kind == _WINDOW_UPDATE and stream == 0:
            self.credit += int.from_bytes(body, "big")
        elif kind in {_SETTINGS, _PING} and not flags & _ACK:
            answer = body if kind == _PING else b""
            self.socket.sendall(_frame(kind, _ACK, 0, answer))
        elif kind == _GOAWAY:
            self.ended = True
        elif kind in {_HEADERS, _DATA} and flags & _END_STREAM:
            self.in_flight -= 1
            return 1
        return 0


class Load:
    """Connections that call one method; a context."""

    def __init__(
        self,
        address: Address,
        ca_pem: Path,
        path: str,
        *,
        connections: int,
        streams: int,
    ) -> None:
        self._streams = streams
        self._selector = selectors.DefaultSelector()
        self._connections = [
            _Connection(address, ca_pem, path) for _ in range(connections)
        ]
        for one in self._connections:
            self._selector.register(one.socket, selectors.EVENT_READ, one)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._selector.close()
        for one in self._connections:
            one.socket.close()

    def run(self, message: bytes, *, calls: int) -> float:
        """Make so many calls and return the wall time of the last nine tenths, in seconds."""
        begun, done, tenth_s = 0, 0, 0.0
        while done < calls:
            for one in self._connections:
                while (
                    begun < calls
                    and one.in_flight < self._streams
                    and one.credit > len(message) + 5
                ):
                    one.send(message)
                    begun += 1
            for key, _ in self._selector.select(30):
                done += key.data.receive()
            if not tenth_s and done >= calls // 10:
                tenth_s, first = time.perf_counter(), done
        return (time.perf_counter() - tenth_s) * calls / (calls - first)
