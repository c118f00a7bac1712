"""Tells when the kernel gains a route: then a network may have come up.

A plain netlink socket: cancellable, and without a library's import time.
Source: rtnetlink(7); groups and message types from linux/rtnetlink.h.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import trio

from tdxd.errors import HostError

__all__ = ["gained"]

_RTMGRP_IPV4_ROUTE = 0x40
_RTMGRP_IPV6_ROUTE = 0x400
_RTM_NEWROUTE = 24
_TYPE = slice(4, 6)
"""nlmsg_type in struct nlmsghdr: two bytes in the machine's order, after the length."""


async def gained() -> AsyncIterator[None]:
    """Yield each time routes were added.

    Raises: HostError if there is no netlink.
    """
    try:
        raw = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC,
            socket.NETLINK_ROUTE,
        )
        raw.bind((0, _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_ROUTE))
    except OSError as exc:
        raise HostError.of("listen on", "netlink routes", exc) from exc
    raw.setblocking(False)
    with trio.socket.from_stdlib_socket(raw) as sock:
        while True:
            try:
                data = await sock.recv(65536)
            except OSError:  # ENOBUFS: messages were lost, so there may be a route
                yield
                continue
            if int.from_bytes(data[_TYPE], "little") == _RTM_NEWROUTE:
                yield
