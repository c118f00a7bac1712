"""The key server's configuration: `keyd.toml` in its store directory, decoded strictly."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from pathlib import Path

from tdxd.core.config import parse_address
from tdxd.core.decode import decode
from tdxd.core.keyrelease import TOKEN_LIFETIME_MAX_S
from tdxd.errors import ConfigError
from tdxd.owner.audit.config import AuditConfig
from tdxd.owner.collateral.config import CollateralConfig, check_url
from tdxd.owner.files import read_text
from tdxd.owner.server.limits import LimitsConfig

__all__ = [
    "CONFIG_NAME",
    "CollateralConfig",
    "KeydConfig",
    "KeysConfig",
    "MetricsConfig",
    "RootConfig",
    "ServeConfig",
    "read_config",
]

CONFIG_NAME = "keyd.toml"
_WORKERS_MAX = 64
_AUTO = "auto"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RootConfig:
    """Another root CA than Intel's: a simulated platform, and never anything else.

    `file` is its certificate, PEM or DER, relative to the store directory.
    """

    file: str
    simulated: bool
    collateral_url: str

    def __post_init__(self) -> None:
        check_url("collateral_url", self.collateral_url)
        if not self.simulated:
            raise ValueError(
                "simulated must be true: only Intel's root makes real platforms"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The `[serve]` table: `workers` processes share the port, one core each.

    0, or "auto" in the file, is one for each core.
    """

    workers: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= _WORKERS_MAX:
            text = f'workers {self.workers} is not 1 to {_WORKERS_MAX} or "{_AUTO}"'
            raise ValueError(text)

    def processes(self) -> int:
        """Return how many workers run on this machine."""
        return self.workers or min(_WORKERS_MAX, len(os.sched_getaffinity(0)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeysConfig:
    """The `[keys]` table: a new key for challenge tokens is made this often."""

    rotate_token_s: float = 86400.0

    def __post_init__(self) -> None:
        if not 600 <= self.rotate_token_s <= 10**9:
            raise ValueError(f"rotate_token_s {self.rotate_token_s} is less than 600")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """The `[metrics]` table; without it nothing is shown. Whoever reaches it may read."""

    listen: str = "127.0.0.1:9641"

    def __post_init__(self) -> None:
        parse_address(self.listen)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeydConfig:
    """The whole configuration; `deployment` is 16 bytes in hex, equal on all replicas."""

    listen: str
    deployment: str
    token_lifetime_s: int = 60
    serve: ServeConfig = dataclasses.field(default_factory=ServeConfig)
    limits: LimitsConfig = dataclasses.field(default_factory=LimitsConfig)
    keys: KeysConfig = dataclasses.field(default_factory=KeysConfig)
    audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)
    collateral: CollateralConfig = dataclasses.field(default_factory=CollateralConfig)
    metrics: MetricsConfig | None = None
    root: tuple[RootConfig, ...] = ()

    def __post_init__(self) -> None:
        parse_address(self.listen)
        if not re.fullmatch(r"[0-9a-f]{32}", self.deployment):
            raise ValueError(f"deployment {self.deployment!r} is not 16 bytes in hex")
        if not 1 <= self.token_lifetime_s <= TOKEN_LIFETIME_MAX_S:
            raise ValueError(
                f"token_lifetime_s {self.token_lifetime_s} is not 1 to "
                f"{TOKEN_LIFETIME_MAX_S}"
            )


def read_config(directory: Path) -> KeydConfig:
    """Read `keyd.toml` of a store directory.

    Raises: ConfigError, naming the key path; HostError.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(
            f"{directory} is no key server store: {CONFIG_NAME} is missing",
            hint=f"tdx-keyd init {directory} --name HOST makes one",
        )
    try:
        table = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc
    serve = table.get("serve")
    if isinstance(serve, dict) and serve.get("workers") == _AUTO:
        serve["workers"] = 0
    return decode(KeydConfig, table, source=str(path))
