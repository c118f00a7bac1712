"""A worker process: hashes, encrypts, decrypts or opens ranges of blocks between descriptors.

It reads frames from standard input and answers each range on standard output; files are
inherited descriptors, the key comes in a frame. It ends when its standard input does. Started
and fed by `tdxd.host.workers` only.

A frame is its length as 4 bytes big-endian, then msgpack: first a map, the task; from then on
`[first block, blocks]` is a range and a map is a new task. The answer to a range is
`[status, value]`: "done" and the blocks, "bad" and the block that does not match, "short" and
the block where the input ends, or "read"/"write" and the error number.

What it imports counts: work begins when the last import is done.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable, Sequence

import msgpack

from tdxd.core.runs import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    DIGESTS_PER_BLOCK,
    RUN_SLACK_BYTES,
    decrypt_run,
    encrypt_run,
    first_bad_digest,
    padded,
)
from tdxd.host import libcrypto

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Op = Literal["hash", "encrypt", "open", "decrypt"]

__all__ = [
    "FRAME_PREFIX_BYTES",
    "Crypt",
    "Task",
    "blocks_of",
    "crypt",
    "frame",
    "main",
]

FRAME_PREFIX_BYTES = 4
_RUN_BLOCKS = 64
"""256 KiB: the fastest size measured; a run stays in the second-level cache."""
_GAP_BYTES = 64
"""Room before each plain block for the salt, so that one call hashes both."""
_PR_SET_DUMPABLE = 4


class Task:
    """What to do with ranges of blocks.

    Block n is read at `in_base` + n·4096 of `in_fd`. "encrypt", "open" and "decrypt" write it at
    `out_base` + n·4096 of `out_fd` (not at all if that is -1); "hash" writes digests at
    `out_base` + n·32, filled up with zeros to a whole block after each range.

    "open" finds the digests of the blocks in the hash blocks that begin at `leaf_block` and are
    opened like any other; their own digests are at `digests_base` + n·32 of `digests_fd`. If
    `leaf_block` is -1, those are the digests of the blocks. "decrypt" verifies nothing: it is for
    foreign volumes, whose encryption sectors may have 512 bytes.
    """

    __slots__ = (
        "digests_base",
        "digests_fd",
        "in_base",
        "in_fd",
        "key",
        "leaf_block",
        "op",
        "out_base",
        "out_fd",
        "salt",
        "sector_bytes",
    )

    def __init__(
        self,
        *,
        op: Op,
        in_fd: int,
        in_base: int,
        out_fd: int,
        out_base: int,
        digests_fd: int = -1,
        digests_base: int = 0,
        leaf_block: int = -1,
        key: bytes = b"",
        salt: bytes = b"",
        sector_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.op: Op = op
        self.in_fd, self.in_base = in_fd, in_base
        self.out_fd, self.out_base = out_fd, out_base
        self.digests_fd, self.digests_base = digests_fd, digests_base
        self.leaf_block = leaf_block
        self.key, self.salt = key, salt
        self.sector_bytes = sector_bytes

    def encode(self) -> bytes:
        """Encode as one frame; the result is secret when there is a key."""
        return frame({item: getattr(self, item) for item in self.__slots__})


def frame(value: object) -> bytes:
    """Encode a value as one frame."""
    body = msgpack.packb(value)
    assert isinstance(body, bytes)
    return len(body).to_bytes(FRAME_PREFIX_BYTES, "big") + body


def blocks_of(buffer: bytearray, gap_bytes: int = 0) -> list[memoryview]:
    """Return the whole blocks of a buffer, each after a gap."""
    view, step = memoryview(buffer), gap_bytes + BLOCK_BYTES
    starts = range(gap_bytes, len(buffer) - BLOCK_BYTES + 1, step)
    return [view[start : start + BLOCK_BYTES] for start in starts]


Crypt = Callable[[int, int], None]
"""Encrypts or decrypts source blocks into target blocks: first block, blocks."""


def crypt(
    key: bytes,
    sources: Sequence[memoryview],
    targets: Sequence[memoryview],
    *,
    encrypt: bool,
    sector_bytes: int = BLOCK_BYTES,
) -> Crypt:
    """Return the fastest way from some blocks to others."""
    if libcrypto.available():
        return libcrypto.Xts(
            key,
            encrypt=encrypt,
            sources=sources,
            targets=targets,
            sector_bytes=sector_bytes,
        ).run
    work = encrypt_run if encrypt else decrypt_run
    room = memoryview(bytearray(BLOCK_BYTES + RUN_SLACK_BYTES))

    def slow(first: int, blocks: int) -> None:
        pairs = list(zip(sources, targets, strict=True))[:blocks]
        for number, (source, target) in enumerate(pairs, first):
            work(key, number, source, room, sector_bytes=sector_bytes)
            target[:] = room[:BLOCK_BYTES]

    return slow


def _no_key(_first: int, _blocks: int) -> None:
    msg = "no task yet"
    raise AssertionError(msg)


class _ShortReadError(Exception):
    """The input ends inside the range."""

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self.block = block


class _BadBlockError(Exception):
    """A block is not what its digest says."""

    def __init__(self, block: int) -> None:
        super().__init__(block)
        self.block = block


class _Worker:
    """Private buffers, and the work on one range at a time.

    Plain blocks have a gap before each, where the salt stands.
    """

    def __init__(self) -> None:
        flat = bytearray(_RUN_BLOCKS * BLOCK_BYTES)
        self._flat = blocks_of(flat)
        self._gapped = bytearray(_RUN_BLOCKS * (_GAP_BYTES + BLOCK_BYTES))
        self._blocks = blocks_of(self._gapped, _GAP_BYTES)
        self._salted: list[memoryview] = []
        self._crypt: Crypt = _no_key

    def begin(self, task: Task) -> None:
        """Set up for another task."""
        view, size = memoryview(self._gapped), len(task.salt)
        ends = range(_GAP_BYTES, len(view), _GAP_BYTES + BLOCK_BYTES)
        self._salted = [view[end - size : end + BLOCK_BYTES] for end in ends]
        for end in ends:
            view[end - size : end] = task.salt
        if task.op != "hash":
            self._crypt = crypt(
                task.key,
                self._flat,
                self._blocks,
                encrypt=task.op == "encrypt",
                sector_bytes=task.sector_bytes,
            )

    def do(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        try:
            match task.op:
                case "hash":
                    return self._hash(task, first, blocks)
                case "encrypt" | "decrypt":
                    return self._convert(task, first, blocks)
                case "open":
                    return self._open(task, first, blocks)
        except _ShortReadError as exc:
            return "short", exc.block
        except _BadBlockError as exc:
            return "bad", exc.block

    def _hash(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        digests = []
        for start, count in _runs(first, blocks):
            _read(task, start, self._blocks[:count])
            digests.append(self._digests(count))
        made = padded(b"".join(digests))
        _write(task.out_fd, [memoryview(made)], task.out_base + first * DIGEST_BYTES)
        return "done", blocks

    def _convert(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        for start, count in _runs(first, blocks):
            _read(task, start, self._flat[:count])
            self._crypt(start, count)
            self._write(task, start, count)
        return "done", blocks

    def _open(self, task: Task, first: int, blocks: int) -> tuple[str, int]:
        wanted = memoryview(self._wanted(task, first, blocks))
        for start, count in _runs(first, blocks):
            digests = wanted[(start - first) * DIGEST_BYTES :]
            self._open_run(task, start, count, digests)
            self._write(task, start, count)
        return "done", blocks

    def _wanted(self, task: Task, first: int, blocks: int) -> bytes:
        """Return the digests of a range, which begins where a hash block's digests do."""
        if task.leaf_block < 0:
            return _digests_at(task, first, blocks)
        leaf, count = first // DIGESTS_PER_BLOCK, -(-blocks // DIGESTS_PER_BLOCK)
        digests = memoryview(_digests_at(task, leaf, count))
        self._open_run(task, task.leaf_block + leaf, count, digests)
        return b"".join(self._blocks[:count])

    def _open_run(self, task: Task, first: int, count: int, wanted: memoryview) -> None:
        """Leave a run decrypted and verified in the plain blocks."""
        _read(task, first, self._flat[:count])
        self._crypt(first, count)
        bad = first_bad_digest(self._digests(count), wanted)
        if bad >= 0:
            raise _BadBlockError(first + bad)

    def _digests(self, count: int) -> bytes:
        sha256 = hashlib.sha256
        return b"".join([sha256(block).digest() for block in self._salted[:count]])

    def _write(self, task: Task, first: int, count: int) -> None:
        if task.out_fd >= 0:
            offset = task.out_base + first * BLOCK_BYTES
            _write(task.out_fd, self._blocks[:count], offset)


def _runs(first: int, blocks: int) -> list[tuple[int, int]]:
    """Cut a range into runs: first block and blocks of each."""
    stop = first + blocks
    starts = range(first, stop, _RUN_BLOCKS)
    return [(start, min(_RUN_BLOCKS, stop - start)) for start in starts]


def _digests_at(task: Task, first: int, count: int) -> bytes:
    offset = task.digests_base + first * DIGEST_BYTES
    return os.pread(task.digests_fd, count * DIGEST_BYTES, offset)


def _read(task: Task, first: int, into: Sequence[memoryview]) -> None:
    """Read the next run, once, into private blocks."""
    start = task.in_base + first * BLOCK_BYTES
    size, got = len(into) * BLOCK_BYTES, 0
    while got < size:
        more = os.preadv(task.in_fd, _rest(into, got), start + got)
        if more == 0:
            raise _ShortReadError(first + got // BLOCK_BYTES)
        got += more


def _rest(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """Return what is left of some buffers after the first `done` bytes."""
    if done == 0:
        return buffers
    left = []
    for buffer in buffers:
        if done < len(buffer):
            left.append(buffer[done:])
        done = max(0, done - len(buffer))
    return left


class _WriteError(Exception):
    """The output refuses."""


def _write(fd: int, data: Sequence[memoryview], offset: int) -> None:
    size, done = sum(map(len, data)), 0
    try:
        while done < size:
            done += os.pwritev(fd, _rest(data, done), offset + done)
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
    # Nothing is left to write: the interpreter need not take itself apart.
    os._exit(0)
