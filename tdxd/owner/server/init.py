"""Makes a key server's store directory, and reads its keys back."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from tdxd.core import hpke
from tdxd.core.config import parse_address
from tdxd.core.keyrelease import TOKEN_KEY_BYTES
from tdxd.core.secret import Secret
from tdxd.errors import ConfigError, HostError, UsageError
from tdxd.owner import authority
from tdxd.owner.appraisal.appraise import load_root
from tdxd.owner.collateral.config import INTEL_PCS_URL
from tdxd.owner.files import read_bytes, read_private, write_private, write_public
from tdxd.owner.server.config import CONFIG_NAME
from tdxd.owner.server.signing_keys import pin_line, publish_first, read_signing_keys
from tdxd.owner.server.token_keys import wrap_token_key
from tdxd.owner.store.kek import PUBLIC_NAME, create_kek
from tdxd.owner.store.store import Store

__all__ = [
    "GuestPin",
    "InitOptions",
    "ServerTls",
    "guest_pin",
    "init_store",
    "read_tls",
]

CA_NAME = "ca.pem"
_CA_KEY = "ca.key"
_SERVER = "server.pem"
_SERVER_KEY = "server.key"
_SIMULATED_ROOT = "simulated-root.der"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """What `tdx-keyd init` is told; `names` are DNS names and IP addresses of the server."""

    names: tuple[str, ...]
    listen: str
    collateral_url: str = INTEL_PCS_URL
    simulated_root: Path | None = None
    simulated_collateral_url: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuestPin:
    """What a guest's config needs: `ca` is a file, `signing_key` its `ed25519:` line."""

    ca: str
    signing_key: str
    servers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ServerTls:
    """The server's PEM files."""

    certificate_pem: bytes
    key_pem: bytes


def init_store(
    directory: Path, options: InitOptions, random_bytes: Callable[[int], bytes]
) -> GuestPin:
    """Make the directory with all keys, the config and an empty database.

    Raises: UsageError, ConfigError for a directory that is not empty, HostError.
    """
    deployment = random_bytes(16).hex()
    try:
        port = parse_address(options.listen).port
    except ValueError as exc:
        raise UsageError(f"--listen: {exc}") from exc
    ca_key, ca = authority.make_authority(deployment)
    server_key, server = authority.issue_server(ca_key, ca, options.names)
    root_der = _simulated_root(options)
    _empty_directory(directory)
    write_private(directory / _CA_KEY, authority.key_pem(ca_key))
    write_public(directory / CA_NAME, ca.public_bytes(Encoding.PEM))
    write_private(directory / _SERVER_KEY, authority.key_pem(server_key))
    write_public(directory / _SERVER, server.public_bytes(Encoding.PEM))
    publish_first(directory, random_bytes)
    with Secret(random_bytes(hpke.SEED_BYTES)) as seed:
        create_kek(directory, seed)
    if root_der is not None:
        write_public(directory / _SIMULATED_ROOT, root_der)
    config = _config_text(options, deployment)
    write_public(directory / CONFIG_NAME, config.encode())
    _create_database(directory, random_bytes(TOKEN_KEY_BYTES))
    servers = tuple(
        f"[{n}]:{port}" if ":" in n else f"{n}:{port}" for n in options.names
    )
    return guest_pin(directory, servers)


def guest_pin(directory: Path, servers: Sequence[str]) -> GuestPin:
    """Return what a guest must pin.

    Raises: HostError, ConfigError.
    """
    return GuestPin(
        ca=str((directory / CA_NAME).resolve()),
        signing_key=pin_line(read_signing_keys(directory)[0]),
        servers=tuple(servers),
    )


def _create_database(directory: Path, token_key: bytes) -> None:
    public = read_bytes(directory / PUBLIC_NAME)
    row = wrap_token_key(public, token_key, int(time.time()))
    with Store.create(directory) as store, store.transaction() as change:
        change.add_token_key(row)


def read_tls(directory: Path) -> ServerTls:
    """Read the server's certificate and key.

    Raises: HostError, ConfigError.
    """
    return ServerTls(
        certificate_pem=read_bytes(directory / _SERVER),
        key_pem=read_private(directory / _SERVER_KEY),
    )


def _simulated_root(options: InitOptions) -> bytes | None:
    path = options.simulated_root
    if path is None:
        return None
    root = load_root(read_bytes(path), simulated=True, source=str(path))
    return root.der


def _empty_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = sorted(os.listdir(directory))
    except OSError as exc:
        raise HostError.of("make directory", str(directory), exc) from exc
    if taken:
        raise ConfigError(
            f"{directory} is not empty: it holds {taken[0]}",
            hint="a store's keys are never overwritten; name a new directory",
        )


def _config_text(options: InitOptions, deployment: str) -> str:
    text = f"""\
# The key server of this directory. Unknown keys are errors; secrets lie in files of their own.
listen = "{options.listen}"
deployment = "{deployment}"

[collateral]
url = "{options.collateral_url}"
"""
    if options.simulated_root is None:
        return text
    url = options.simulated_collateral_url or options.collateral_url
    return f"""{text}
# Quotes of a simulated platform, for volumes whose policy says simulated = true.
[[root]]
file = "{_SIMULATED_ROOT}"
simulated = true
collateral_url = "{url}"
"""
