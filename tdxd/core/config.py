"""The daemon's configuration: TOML text becomes one immutable value, decoded once.

Nothing in it is secret, no environment variable changes it, and no default weakens security.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import tomllib
from collections.abc import Iterable
from typing import Literal

from tdxd.core.address import Address, parse_address
from tdxd.core.decode import decode
from tdxd.core.positive import check_positive
from tdxd.core.qgs import parse_qgs_address
from tdxd.core.serving_config import (
    BatchingConfig,
    ServedModelConfig,
    ServingConfig,
)
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import ConfigError

__all__ = [
    "Address",
    "BatchingConfig",
    "Config",
    "ControlConfig",
    "HealthConfig",
    "KeyReleaseConfig",
    "MapperConfig",
    "PlatformConfig",
    "SecurityConfig",
    "ServedModelConfig",
    "ServingConfig",
    "VolumeConfig",
    "parse_address",
    "parse_config",
    "parse_signing_key",
]

_SIGNING_KEY_PREFIX = "ed25519:"


def parse_signing_key(text: str) -> bytes:
    """Return the 32 raw bytes of `ed25519:BASE64` (RFC 8032, section 5.1.5).

    Raises: ValueError, naming the text.
    """
    try:
        if not text.startswith(_SIGNING_KEY_PREFIX):
            raise binascii.Error
        raw = base64.b64decode(text.removeprefix(_SIGNING_KEY_PREFIX), validate=True)
    except binascii.Error as exc:
        msg = f"signing key {text!r} is not ed25519:BASE64"
        raise ValueError(msg) from exc
    if len(raw) != 32:
        msg = f"signing key {text!r} has {len(raw)} bytes, not 32"
        raise ValueError(msg)
    return raw


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeyReleaseConfig:
    """Whom to ask for keys, and how the answer is recognised.

    `servers` are tried in order under one pin: `ca` is a PEM file, `signing_key` one or several
    raw Ed25519 public keys (`ed25519:BASE64`), of which any may sign (so that they can rotate).
    """

    servers: tuple[str, ...]
    ca: str
    signing_key: str | None = None
    signing_keys: tuple[str, ...] = ()
    timeout_s: float = 15.0
    """Deadline of one exchange with one server."""
    backoff_max_s: float = 60.0
    """Ceiling of the full-jitter exponential backoff."""
    denied_retry_s: float = 300.0
    """Shortest wait after a refusal by policy; the longest is three times as long."""
    secret_poll_s: float = 3600.0
    """How often a secret of its own is asked for, in case that there is a newer generation."""

    def __post_init__(self) -> None:
        if not self.servers:
            msg = "servers is empty"
            raise ValueError(msg)
        for server in self.servers:
            parse_address(server)
        if not self.accepted_signing_keys():
            msg = "signing_key is missing: without a pin no answer can be trusted"
            raise ValueError(msg)
        check_positive(
            self, "timeout_s", "backoff_max_s", "denied_retry_s", "secret_poll_s"
        )

    def accepted_signing_keys(self) -> tuple[bytes, ...]:
        """Return the raw 32-byte keys, `signing_key` first."""
        one = () if self.signing_key is None else (self.signing_key,)
        return tuple(parse_signing_key(text) for text in one + self.signing_keys)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """Where the kernel offers quotes, the event log and the measurement registers.

    `evidence`: `configfs` asks for quotes by configfs-tsm (Linux 6.7 and later), `ioctl` takes a
    TD report from `tdx_guest` and has the host's quoting service at `qgs` sign it; `auto`:
    configfs where it has a provider.
    """

    evidence: Literal["auto", "configfs", "ioctl"] = "auto"
    tsm: str = "/sys/kernel/config/tsm/report"
    tdx_guest: str = "/dev/tdx_guest"
    qgs: str = "vsock:2"
    event_log: str = "/sys/firmware/acpi/tables/data/CCEL"
    rtmr: str = "/sys/devices/virtual/misc/tdx_guest/measurements"
    extend: Literal["required", "if-possible", "never"] = "required"
    """Whether RTMR3 is extended with each volume before it is served; `required`: or not served."""
    runtime_log: str = "/run/tdxd-record/runtime-log"
    """What RTMR3 was extended with in this boot: a file that must live as long as the boot."""

    def __post_init__(self) -> None:
        for name in ("tsm", "tdx_guest", "event_log", "rtmr", "runtime_log"):
            path = getattr(self, name)
            if not path.startswith("/"):
                msg = f"{name} {path!r} is not an absolute path"
                raise ValueError(msg)
        parse_qgs_address(self.qgs)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VolumeConfig:
    """One volume: `image` is a path or a glob; `required` decides readiness.

    `passphrase` says who brings that of a `luks2` volume; one that is `writable` is mounted for
    writing, which only the mapper `dm` can.
    """

    id: str
    image: str
    required: bool = True
    kind: Literal["sealed", "luks2"] = "sealed"
    passphrase: Literal["key-server", "operator"] = "key-server"  # noqa: S105 — no secret
    writable: bool = False

    def __post_init__(self) -> None:
        check_volume_id(self.id)
        if self.kind == "sealed" and self.by_operator:
            msg = f"passphrase 'operator' is for kind 'luks2', {self.id} is sealed"
            raise ValueError(msg)
        if self.kind == "sealed" and self.writable:
            msg = f"writable is for kind 'luks2', {self.id} is sealed"
            raise ValueError(msg)
        if not self.image.startswith("/"):
            msg = f"image {self.image!r} is not an absolute path"
            raise ValueError(msg)

    @property
    def by_operator(self) -> bool:
        """Whether an operator brings the passphrase."""
        return self.passphrase == "operator"  # noqa: S105 — no secret


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MapperConfig:
    """How images are opened.

    `dm`: by the kernel's dm-crypt and dm-verity. `memory`: decrypted and verified whole into
    sealed memory. `auto`: `dm` where the kernel has a device mapper.
    """

    mapper: Literal["auto", "dm", "memory"] = "auto"
    memory_limit_bytes: int = 8 * 2**30
    """Largest image that the `memory` mapper takes; it costs that much RAM."""

    def __post_init__(self) -> None:
        check_positive(self, "memory_limit_bytes")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """Address of `/livez`, `/readyz` and `/metrics`; absent: none."""

    listen: str | None = None

    def __post_init__(self) -> None:
        if self.listen is not None:
            parse_address(self.listen)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """Paths of the control socket and of the daemon's runtime directory."""

    socket: str = "/run/tdxd.sock"
    runtime_dir: str = "/run/tdxd"
    group: str | None = "tdxd"
    """Group that may look (mode 0660); `None` in code, or a missing group: root only."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Deliberate relaxations; each stands in every `status`."""

    accept_unmeasured: bool = False
    """Start though nothing proves this config to the key server (design of trust)."""
    accept_swap: bool = False
    """Start though this machine has swap, where key material can land."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration."""

    key_release: KeyReleaseConfig
    platform: PlatformConfig = PlatformConfig()
    volume: tuple[VolumeConfig, ...] = ()
    mapping: MapperConfig = MapperConfig()
    serving: ServingConfig | None = None
    health: HealthConfig = HealthConfig()
    control: ControlConfig = ControlConfig()
    security: SecurityConfig = SecurityConfig()

    def __post_init__(self) -> None:
        ids = [volume.id for volume in self.volume]
        for name in ids:
            if ids.count(name) > 1:
                msg = f"volume id {name!r} stands twice"
                raise ValueError(msg)
        writable = [volume.id for volume in self.volume if volume.writable]
        if writable and self.mapping.mapper == "memory":
            msg = f"writable volume {writable[0]!r} needs mapping.mapper 'dm', not 'memory'"
            raise ValueError(msg)
        tls = self.serving.tls_volume if self.serving else None
        if tls is not None and tls not in ids:
            msg = f"serving.tls_volume {tls!r} is no configured volume"
            raise ValueError(msg)
        by_secret = self.serving is not None and self.serving.tls_secret is not None
        if self.serving and tls is None and not by_secret and len(ids) > 1:
            msg = f"serving.tls_volume is missing: which of {', '.join(ids)} has the certificate"
            raise ValueError(msg)
        for secret in self.secret_ids:
            if secret in ids:
                msg = f"{secret!r} is a volume and a secret: their ids are of one kind"
                raise ValueError(msg)

    def volume_named(self, volume_id: str) -> VolumeConfig | None:
        """Return the volume with this id."""
        return next((item for item in self.volume if item.id == volume_id), None)

    @property
    def secret_ids(self) -> tuple[str, ...]:
        """The secrets of their own that are needed, each once."""
        if self.serving is None:
            return ()
        named = (self.serving.tls_secret, self.serving.client_ca_secret)
        return tuple(dict.fromkeys(one for one in named if one is not None))

    @property
    def tls_volume(self) -> str | None:
        """The volume that supplies the certificate: the named one, or the only one, or none."""
        if self.serving is None or self.serving.tls_secret is not None:
            return None
        if self.serving.tls_volume is not None:
            return self.serving.tls_volume
        return self.volume[0].id if len(self.volume) == 1 else None


def parse_config(files: Iterable[tuple[str, str]]) -> Config:
    """Merge TOML texts, given as (file name, text) in order, and decode them.

    Tables merge key by key, later files win; `[[volume]]` lists are joined.

    Raises: ConfigError, naming the file or the key path.
    """
    merged: dict[str, object] = {}
    names = []
    for name, text in files:
        names.append(name)
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as exc:
            msg = f"{name}: not valid TOML: {exc}"
            raise ConfigError(msg) from exc
        _merge(merged, table)
    return decode(Config, merged, source=", ".join(names) or "config")


def _merge(into: dict[str, object], table: dict[str, object]) -> None:
    for key, value in table.items():
        have = into.get(key)
        if isinstance(have, dict) and isinstance(value, dict):
            _merge(have, value)
        elif key == "volume" and isinstance(have, list) and isinstance(value, list):
            have.extend(value)
        else:
            into[key] = value
