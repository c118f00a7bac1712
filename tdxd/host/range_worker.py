"""A worker process: hashes, encrypts or opens ranges of payload blocks between descriptors.

It reads frames from standard input and answers each range on standard output; files are
inherited descriptors, the key comes in a frame. It ends when its standard input does. Started
and fed by `tdxd.host.workers` only.

A frame is its length as 4 bytes big-endian, then msgpack: first a map, the task; from then on
`[first block, blocks]` is a range and a map is a new task. The answer to a range is
`[status, value]`: "done" and the blocks, "bad" and the block that does not match, "short" and
the block where the input ends, or "read"/"write" and the error number.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Literal

import msgpack

from tdxd.core import sealed, verity
from tdxd.core.bundle import BLOCK_BYTES
from tdxd.core.verity import DIGEST_BYTES
from tdxd.host import libcrypto

__all__ = ["FRAME_PREFIX_BYTES", "Crypt", "Op", "Task", "crypt", "frame", "main"]

Op = Literal["hash", "encrypt", "open"]

FRAME_PREFIX_BYTES = 4
_RUN_BLOCKS = 64
"""256 KiB: the fastest size measured; a run stays in the second-level cache."""
_PR_SET_DUMPABLE = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Task:
    """What to do with ranges of blocks.

    Block n is read at `in_base` + n·4096 of `in_fd`. "encrypt" and "open" write it at
    `out_base` + n·4096 of `out_fd` (not at all if that is -1); "hash" writes digests at
    `out_base` + n·32, filled up with zeros to a whole block after each range; "open" finds the
    expected digests at `digests_base` + n·32 of `digests_fd`.
    """

    op: Op
    in_fd: int
    in_base: int
    out_fd: int
    out_base: int
    digests_fd: int = -1
    digests_base: int = 0
    key: bytes = b""
    salt: bytes = b""

    def encode(self) -> bytes:
        """Encode as one frame; the result is secret when there is a key."""
        return frame({item: getattr(self, item) for item in self.__slots__})


def frame(value: object) -> bytes:
    """Encode a value as one frame."""
    body = msgpack.packb(value)
    assert isinstance(body, bytes)
    return len(body).to_bytes(FRAME_PREFIX_BYTES, "big") + body


Crypt = Callable[[int, int], None]
"""Encrypts or decrypts from the input buffer to the output buffer: first block, blocks."""


def crypt(key: bytes, source: bytearray, target: bytearray, *, encrypt: bool) -> Crypt:
    """Return the fastest way from one buffer to another, RUN_SLACK_BYTES longer."""
    if libcrypto.available():
        return libcrypto.Xts(key, encrypt=encrypt, source=source, target=target).run
    work = sealed.encrypt_run if encrypt else sealed.decrypt_run
    run, out = memoryview(source), memoryview(target)

    def slow(first: int, blocks: int) -> None:
        work(key, first, run[: blocks * BLOCK_BYTES], out)

    return slow


def _no_key(_first: int, _blocks: int) -> None:
    msg = "no task yet"
    raise AssertionError(msg)


class _ShortReadError(Exception):
    """The input ends inside the range."""

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self.block = block


class _Worker:
    """Private buffers, and the work on one range at a time."""

    def __init__(self) -> None:
        size = _RUN_BLOCKS * BLOCK_BYTES
        self._source = bytearray(size)
        self._target = bytearray(size + sealed.RUN_SLACK_BYTES)
        self._in, self._out = memoryview(self._source), memoryview(self._target)
        self._crypt: Crypt = _no_key

    def begin(self, task: Task) -> None:
        """Set up for another task."""
        if task.op != "hash":
            source, target = self._source, self._target
            encrypt = task.op == "encrypt"
            self._crypt = crypt(task.key, source, target, encrypt=encrypt)

    def do(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        try:
            match task.op:
                case "hash":
                    return self._hash(task, first, blocks)
                case "encrypt":
                    return self._encrypt(task, first, blocks)
                case "open":
                    return self._open(task, first, blocks)
        except _ShortReadError as exc:
            return "short", exc.block

    def _read(self, task: Task, first: int, stop: int) -> memoryview:
        """Read the next run, once, into the private buffer."""
        run = self._in[: min(_RUN_BLOCKS, stop - first) * BLOCK_BYTES]
        got = 0
        while got < len(run):
            offset = task.in_base + first * BLOCK_BYTES + got
            more = os.preadv(task.in_fd, [run[got:]], offset)
            if more == 0:
                raise _ShortReadError(first + got // BLOCK_BYTES)
            got += more
        return run

    def _hash(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        digests = []
        for start in range(first, first + blocks, _RUN_BLOCKS):
            run = self._read(task, start, first + blocks)
            digests.append(verity.run_digests(task.salt, run))
        made = verity.padded(b"".join(digests))
        _write(task.out_fd, memoryview(made), task.out_base + first * DIGEST_BYTES)
        return "done", blocks

    def _encrypt(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        for start in range(first, first + blocks, _RUN_BLOCKS):
            run = self._read(task, start, first + blocks)
            self._crypt(start, len(run) // BLOCK_BYTES)
            self._write(task, start, len(run))
        return "done", blocks

    def _open(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        size, offset = blocks * DIGEST_BYTES, task.digests_base + first * DIGEST_BYTES
        digests = memoryview(os.pread(task.digests_fd, size, offset))
        for start in range(first, first + blocks, _RUN_BLOCKS):
            run = self._read(task, start, first + blocks)
            self._crypt(start, len(run) // BLOCK_BYTES)
            plain = self._out[: len(run)]
            wanted = digests[(start - first) * DIGEST_BYTES :]
            bad = sealed.first_bad_block(task.salt, plain, wanted)
            if bad >= 0:
                return "bad", start + bad
            self._write(task, start, len(run))
        return "done", blocks

    def _write(self, task: Task, first: int, size: int) -> None:
        if task.out_fd >= 0:
            offset = task.out_base + first * BLOCK_BYTES
            _write(task.out_fd, self._out[:size], offset)


class _WriteError(Exception):
    """The output refuses."""


def _write(fd: int, data: memoryview, offset: int) -> None:
    try:
        while data:
            done = os.pwrite(fd, data, offset)
            data, offset = data[done:], offset + done
    except OSError as exc:
        raise _WriteError(exc.errno) from exc


def _answer(worker: _Worker, task: Task, first: int, blocks: int) -> tuple[str, int]:
    try:
        return worker.do(task, first, blocks)
    except _WriteError as exc:
        return "write", exc.args[0]
    except OSError as exc:
        return "read", exc.errno or 0


def main() -> None:
    """Serve frames until standard input ends."""
    # The key must not be readable through /proc or end up in a core dump.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    worker, task = _Worker(), None
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(prefix := source.read(FRAME_PREFIX_BYTES)) == FRAME_PREFIX_BYTES:
        value = msgpack.unpackb(source.read(int.from_bytes(prefix, "big")))
        if isinstance(value, dict):
            task = Task(**value)
            worker.begin(task)
            continue
        assert task is not None
        sink.write(frame(_answer(worker, task, value[0], value[1])))
        sink.flush()
