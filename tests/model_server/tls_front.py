"""TLS before a unix socket: what the front does for the model server, in a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["tls_front"]


@contextlib.contextmanager
def tls_front(pem: Path, socket: Path) -> Iterator[str]:
    """Yield HOST:PORT of a TLS listener that passes bytes to and from the unix socket."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.set_alpn_protocols(["h2"])
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()
    address: list[str] = []
    up = threading.Event()

    async def serve() -> None:
        def accept(reader, writer):
            return join(reader, writer, socket)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
        async with server:
            address.append(f"localhost:{server.sockets[0].getsockname()[1]}")
            up.set()
            await ended.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert up.wait(10)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


async def join(reader, writer, socket: Path) -> None:
    other_reader, other_writer = await asyncio.open_unix_connection(socket)
    async with asyncio.TaskGroup() as group:
        group.create_task(pump(reader, other_writer))
        group.create_task(pump(other_reader, writer))


async def pump(reader, writer) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # the other side has gone: so shall this one
    finally:
        writer.close()
