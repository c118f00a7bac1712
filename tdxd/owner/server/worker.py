"""One worker process of the key server: answers on the shared port until it is told to end.

It says one line of JSON on standard output, that it is ready or why it is not, and then lines of
what it counted; it ends in order at SIGTERM, and when its standard input ends, which means that the
parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tdxd.core.config import Address, parse_address
from tdxd.errors import TdxdError
from tdxd.host import machine
from tdxd.host.log import configure
from tdxd.owner.server.assembly import opened_server
from tdxd.owner.server.metrics import Tally
from tdxd.owner.server.rpc_server import RpcServer

__all__ = ["main"]

_STOP_S = 5.0
_TELL_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Run a worker; the arguments are STORE, HOST:PORT, the number of workers, KEK or ""."""
    directory, listen, workers, kek = arguments
    machine.harden()
    configure()
    try:
        with opened_server(
            Path(directory),
            int(workers),
            Path(kek) if kek else None,
            tally=(tally := Tally()),
        ) as server:
            asyncio.run(_serve(server, parse_address(listen), tally))
    except TdxdError as exc:
        _say({"error": exc.message, "hint": exc.hint, "code": exc.exit_code})
        return exc.exit_code
    return 0


def _say(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def _serve(server: RpcServer, address: Address, tally: Tally) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_reader(0, _parent_gone, ended)
    port = await server.start(address)
    # What was made up to here stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    _say({"ready": str(Address(address.host, port))})
    os.set_blocking(1, False)
    telling = asyncio.create_task(_tell(tally))
    await ended.wait()
    await server.stop(_STOP_S)
    telling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await telling


async def _tell(tally: Tally) -> None:
    """Tell the parent every second what has changed, and once more at the end."""
    told, left = b"", b""
    with contextlib.suppress(BrokenPipeError):
        while True:
            try:
                await asyncio.sleep(_TELL_S)
            finally:
                line = tally.line()
                if not left and line != told:
                    told = left = line
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(1, left) :] if left else b""


def _parent_gone(ended: asyncio.Event) -> None:
    if not os.read(0, 1):
        asyncio.get_running_loop().remove_reader(0)
        ended.set()
