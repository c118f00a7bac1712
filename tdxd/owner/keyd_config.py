"""The key server's configuration: `keyd.toml` in its store directory, decoded strictly."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

from tdxd.core.config import parse_address
from tdxd.core.decode import decode
from tdxd.core.keyrelease import TOKEN_LIFETIME_MAX_S
from tdxd.errors import ConfigError
from tdxd.owner.files import read_text
from tdxd.owner.pcs import INTEL_PCS_URL

__all__ = ["CONFIG_NAME", "CollateralConfig", "KeydConfig", "RootConfig", "read_config"]

CONFIG_NAME = "keyd.toml"


def _check_url(name: str, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
        raise ValueError(f"{name} {value!r} is not an http or https address")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CollateralConfig:
    """Where Intel's collateral comes from: a PCS or a PCCS."""

    url: str = INTEL_PCS_URL
    root_crl_url: str | None = None
    timeout_s: float = 10.0
    """For all requests of one set together."""
    refresh_s: float = 86400.0
    """A newer set is looked for this often; an unexpired one is used on if there is none."""

    def __post_init__(self) -> None:
        _check_url("url", self.url)
        _check_url("root_crl_url", self.root_crl_url)
        if self.timeout_s <= 0 or self.refresh_s <= 0:
            raise ValueError("timeout_s and refresh_s must be greater than 0")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RootConfig:
    """Another root CA than Intel's: a simulated platform, and never anything else.

    `file` is its certificate, PEM or DER, relative to the store directory.
    """

    file: str
    simulated: bool
    collateral_url: str

    def __post_init__(self) -> None:
        _check_url("collateral_url", self.collateral_url)
        if not self.simulated:
            raise ValueError(
                "simulated must be true: only Intel's root makes real platforms"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeydConfig:
    """The whole configuration; `deployment` is 16 bytes in hex, equal on all replicas."""

    listen: str
    deployment: str
    token_lifetime_s: int = 60
    collateral: CollateralConfig = CollateralConfig()
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
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc
    return decode(KeydConfig, table, source=str(path))
