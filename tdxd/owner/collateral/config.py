"""The `[collateral]` table of the key server's configuration."""

from __future__ import annotations

import dataclasses
import re
import urllib.parse

__all__ = ["INTEL_PCS_URL", "CollateralConfig", "check_url"]

INTEL_PCS_URL = "https://api.trustedservices.intel.com"
_INTEL_HOSTS = ".trustedservices.intel.com"


def check_url(name: str, value: str | None) -> None:
    """Raise ValueError for an address that collateral cannot be fetched from."""
    if value is None:
        return
    wrong = f"{name} {value!r} is not an http or https address"
    if not value.isascii() or not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", value):
        raise ValueError(wrong)
    try:
        parts = urllib.parse.urlsplit(value)
        host, _port = parts.hostname or "", parts.port
    except ValueError as exc:
        raise ValueError(f"{wrong}: {exc}") from exc
    if parts.query or parts.fragment:
        raise ValueError(f"{name} {value!r} has a query or a fragment")
    if parts.scheme == "http" and host.endswith(_INTEL_HOSTS):
        raise ValueError(f"{name} {value!r}: Intel is asked over https only")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CollateralConfig:
    """Where Intel's collateral comes from, and for how long it is good.

    Collateral proves itself by Intel's signatures, so plain http to a PCCS gives nothing away; a
    PCCS can only be silent, or late, and `refresh_s`, `max_age_s` and `crl_rollback_s` bound that.
    """

    url: str = INTEL_PCS_URL
    root_crl_url: str | None = None
    tls_ca: str | None = None
    """CA certificates (PEM file, relative to the store) of a PCCS; else those of the system."""
    timeout_s: float = 10.0
    """For all requests of one set together."""
    refresh_s: float = 86400.0
    """A newer set is looked for this often; an unexpired one is used on if there is none."""
    offline: bool = False
    """Nothing is fetched: sets come by `tdx-keyd collateral import` only."""
    max_age_s: float | None = None
    """TCB info, QE identity and PCK CRL older than this are refused, though not expired."""
    crl_rollback_s: float = 604800.0
    """A CRL may be this much older than the newest one ever seen: sets are renewed one by one, and
    an unexpired one must last while its source is down."""

    def __post_init__(self) -> None:
        check_url("url", self.url)
        check_url("root_crl_url", self.root_crl_url)
        if self.timeout_s <= 0 or self.refresh_s <= 0:
            raise ValueError("timeout_s and refresh_s must be greater than 0")
        if self.max_age_s is not None and self.max_age_s <= 0:
            raise ValueError(f"max_age_s {self.max_age_s} is not greater than 0")
        if self.crl_rollback_s < 0:
            raise ValueError(f"crl_rollback_s {self.crl_rollback_s} is less than 0")
