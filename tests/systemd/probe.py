"""Does, with the product's own code, one of each thing that the daemon's capabilities are for.

Run by test_capabilities.py in a process of its own that has some of them.
"""

from __future__ import annotations

import sys

import trio

from tdxd.core.config import Address
from tdxd.guest.listener import listen_tcp
from tdxd.guest.server_start import _fresh_directory
from tdxd.host import mount
from tdxd.host.ports import ChildSpec
from tdxd.host.proc import CellChildren

USER = "nobody"


async def start_and_stop_a_child(directory: str) -> None:
    children = CellChildren()
    cell = children.make_cell(hide=directory, binds=[])
    argv = ("sh", "-c", "grep CapBnd /proc/self/status; exec sleep 60")
    spec = ChildSpec(name="probe", argv=argv, user=USER, cell=cell)
    child = children.spawn(spec)
    line = await anext(aiter(child.lines()))
    if line != "CapBnd:\t0000000000000000":  # setpriv cannot drop it, and says nothing
        sys.exit(f"the child says: {line}")
    await child.stop(5)


def main() -> None:
    directory, port = sys.argv[1], int(sys.argv[2])
    mount.isolate()
    _fresh_directory(f"{directory}/serve/socket", USER, USER)
    listen_tcp(Address("127.0.0.1", port)).close()
    trio.run(start_and_stop_a_child, directory)
    print("done")


if __name__ == "__main__":
    main()
