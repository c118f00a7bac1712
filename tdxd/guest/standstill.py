"""Standstill: nothing of the daemon is half done, so that its program can be replaced.

Whatever may not be cut in two runs inside `running`, or between `enter` and `leave`. While the
daemon is frozen nothing new may begin: reconcilers and listeners wait in `passage`.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from socket import socket

import trio

from tdxd.errors import ReexecError
from tdxd.guest.changes import Changes

__all__ = ["SILENT_S", "Standstill", "serve"]

SILENT_S = 30.0
"""A reconciler that has not looked for this long hangs, unless an action is under way."""


class Standstill:
    """Counts what is under way, and lets nothing more begin while frozen."""

    def __init__(self) -> None:
        self.frozen = False
        self._under_way: collections.Counter[str] = collections.Counter()
        self._changed = Changes()

    def enter(self, what: str) -> None:
        """Count one piece of work, named as in "… is under way"."""
        self._under_way[what] += 1

    def leave(self, what: str) -> None:
        """Count it no more."""
        self._under_way -= collections.Counter([what])
        self._changed.ring()

    @contextlib.contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Count what is done inside."""
        self.enter(what)
        try:
            yield
        finally:
            self.leave(what)

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Do not count the caller itself, which is one of `what`."""
        self.leave(what)
        try:
            yield
        finally:
            self.enter(what)

    async def passage(self) -> None:
        """Return when work may begin. What was planned before may be out of date then."""
        while self.frozen:
            await self._changed.after(self._changed.count)

    async def until_frozen(self) -> None:
        """Return once nothing new may begin."""
        while not self.frozen:
            await self._changed.after(self._changed.count)

    def freeze(self) -> None:
        """Let nothing new begin."""
        self.frozen = True
        self._changed.ring()

    async def reached(self, limit_s: float) -> None:
        """Return once nothing is under way.

        Raises: ReexecError after `limit_s`, naming what is; or if it was released meanwhile.
        """
        with trio.move_on_after(limit_s):
            while self._under_way and self.frozen:
                await self._changed.after(self._changed.count)
        if not self.frozen:
            raise ReexecError("tdxd is stopping")
        if self._under_way:
            what = ", ".join(sorted(self._under_way))
            raise ReexecError(
                f"still under way after {limit_s:g} s: {what}", hint="try again later"
            )

    def release(self) -> None:
        """Let things begin again; harmless when not frozen."""
        self.frozen = False
        self._changed.ring()


class _GatedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts nothing while frozen: callers wait in the socket's queue, which outlives an exec.

    An accepted connection is under way at once, before any other task can run.
    """

    def __init__(self, listener: socket, standstill: Standstill, what: str) -> None:
        self._inner = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        self._standstill, self._what = standstill, what

    async def accept(self) -> trio.SocketStream:
        await self._standstill.passage()
        stream = await self._inner.accept()
        self._standstill.enter(self._what)
        return stream

    async def aclose(self) -> None:
        await self._inner.aclose()


async def serve(
    listener: socket,
    answer: Callable[[trio.SocketStream], Awaitable[None]],
    *,
    standstill: Standstill,
    what: str,
) -> None:
    """Answer each connection in a task of its own, until cancelled."""

    async def one(stream: trio.SocketStream) -> None:
        try:
            await answer(stream)
        finally:
            standstill.leave(what)

    await trio.serve_listeners(one, [_GatedListener(listener, standstill, what)])
