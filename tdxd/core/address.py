"""TCP addresses as they stand in configurations: `HOST:PORT` or `[IPv6]:PORT`."""

from __future__ import annotations

import dataclasses

__all__ = ["Address", "parse_address"]


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """A TCP address: host (a name, or an address without brackets) and port 0-65535."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parse `HOST:PORT` or `[IPv6]:PORT`.

    Raises: ValueError, naming the text.
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if not separator or not bare or (":" in bare) != bracketed:
        msg = f"{text!r} is not HOST:PORT or [IPV6]:PORT"
        raise ValueError(msg)
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        msg = f"port {port!r} in {text!r} is not 0 to 65535"
        raise ValueError(msg)
    return Address(bare, int(port))
