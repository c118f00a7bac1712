"""The configuration's files: read once, decoded, and judged by what measures them.

The bytes that are hashed are those that are decoded and used, since the disk is the host's.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import sys
from collections.abc import Sequence

import tdxd
from tdxd.core.config import Config, PlatformConfig, parse_config
from tdxd.core.config_trust import ConfigTrust, config_digest
from tdxd.core.quote import REPORT_DATA_BYTES
from tdxd.core.td_report import parse_td_report
from tdxd.errors import ConfigError, EvidenceError, HostError
from tdxd.host import machine, measured_root, rtmr, tdx_guest

__all__ = [
    "LoadedConfig",
    "check_reload",
    "digest_of",
    "load_config",
    "read_config",
    "require_trust",
]

_CA_NAME = "key_release.ca"
"""The name of the CA's file in the digest: wherever it lies, it has this role."""
_HINT = "see man tdxd.toml, or name another with --config"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A configuration, and what proves it.

    `ca_pem` is the content of `key_release.ca` where that was measured with the files; `None`:
    it is read when it is needed.
    """

    config: Config
    trust: ConfigTrust = ConfigTrust.UNMEASURED
    ca_pem: bytes | None = None


def read_config(path: str) -> Config:
    """Read a TOML file and, beside it, `*.toml` of the directory `PATH.d` without suffix.

    Raises: ConfigError.
    """
    return _parse(_read_files(path))


def digest_of(path: str, *, ca: str | None = None) -> bytes:
    """Return what MRCONFIGID must be for this configuration, 48 bytes.

    `ca` is where the CA's file lies now, if not yet where the configuration says.

    Raises: ConfigError.
    """
    files = _read_files(path)
    where = ca or _parse(files).key_release.ca
    hint = "key_release.ca is hashed, too; --ca FILE names where it lies now"
    return _digest(path, files, _read_ca(where, hint))


def load_config(path: str) -> LoadedConfig:
    """Read the configuration and find out what proves it.

    Raises: ConfigError.
    """
    files = _read_files(path)
    config = _parse(files)
    ca = config.key_release.ca
    used = [*(name for name, _content in files), ca, tdxd.__file__, sys.executable]
    if measured_root.lie_on_measured_root(used):
        return LoadedConfig(config=config, trust=ConfigTrust.ROOT_FILE_SYSTEM)
    config_id = _mr_config_id(config.platform)
    if config_id is None or not any(config_id):
        return LoadedConfig(config=config)
    hint = "MRCONFIGID says that the configuration is measured, and this file with it"
    ca_pem = _read_ca(ca, hint)
    if config_id != _digest(path, files, ca_pem):
        return LoadedConfig(config=config, trust=ConfigTrust.CONTRADICTED)
    return LoadedConfig(config=config, trust=ConfigTrust.CONFIG_ID, ca_pem=ca_pem)


def require_trust(loaded: LoadedConfig, *, always: bool = False) -> LoadedConfig:
    """Return it if it is measured, or says itself that it need not be.

    With `always` it has no say: whoever could change it could say so.

    Raises: ConfigError.
    """
    if loaded.trust is ConfigTrust.CONTRADICTED:
        raise ConfigError(
            "this configuration is unmeasured: MRCONFIGID is that of another one, for which the "
            "TD was started",
            hint="tdxd config-digest prints what MRCONFIGID must be, or zero for none; "
            "security.accept_unmeasured does not help here",
        )
    accepted = loaded.config.security.accept_unmeasured
    if loaded.trust is ConfigTrust.UNMEASURED and always:
        raise ConfigError(
            "this configuration is unmeasured, and --require-measured accepts no such one: it "
            "lies on no root file system that the kernel's command line pins, and its digest is "
            "not MRCONFIGID",
            hint="tdxd config-digest prints what MRCONFIGID must be",
        )
    if loaded.trust is ConfigTrust.UNMEASURED and not accepted:
        raise ConfigError(
            "this configuration is unmeasured: it lies on no root file system that the kernel's "
            "command line pins, and its digest is not MRCONFIGID",
            hint="tdxd config-digest prints what MRCONFIGID must be; "
            "to try things out set security.accept_unmeasured = true",
        )
    return loaded


def check_reload(before: Config, after: Config) -> None:
    """Refuse what only a restart can change.

    Raises: ConfigError.
    """
    for name in ("control", "health", "mapping", "platform"):
        if getattr(after, name) != getattr(before, name):
            text = f"[{name}] changed: a reload cannot change it"
            raise ConfigError(text, hint="restart tdxd to apply it")


def _read_files(path: str) -> list[tuple[str, bytes]]:
    pattern = glob.escape(path.removesuffix(".toml")) + ".d/*.toml"
    files = []
    for name in [path, *sorted(glob.glob(pattern))]:
        try:
            files.append((name, _read(name)))
        except OSError as exc:
            text = f"{name}: cannot be read: {exc}"
            raise ConfigError(text, hint=_HINT) from exc
    return files


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_ca(path: str, hint: str) -> bytes:
    try:
        return _read(path)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}", hint=hint) from exc


def _parse(files: Sequence[tuple[str, bytes]]) -> Config:
    texts = []
    for name, content in files:
        try:
            texts.append((name, content.decode()))
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{name}: cannot be read: {exc}", hint=_HINT) from exc
    return parse_config(texts)


def _digest(path: str, files: Sequence[tuple[str, bytes]], ca_pem: bytes) -> bytes:
    """Hash the files by their names beside the main one, so that it may be done anywhere."""
    start = os.path.dirname(path) or "."
    named = [(os.path.relpath(name, start), content) for name, content in files]
    return config_digest([*named, (_CA_NAME, ca_pem)])


def _mr_config_id(platform: PlatformConfig) -> bytes | None:
    """Return MRCONFIGID, from the TDX module alone: a quote passes through the host's hands.

    A TD asks where the kernel has it, for a configuration that is yet to be proved could name
    a file of the host's; only a simulated platform is where the configuration says.
    """
    place = PlatformConfig() if machine.is_tdx_guest() else platform
    try:
        found = rtmr.read_mr_config_id(place.rtmr)
        if found is not None:
            return found
        report = tdx_guest.td_report(place.tdx_guest, bytes(REPORT_DATA_BYTES))
        return parse_td_report(report).mr_config_id
    except (HostError, EvidenceError):
        return None  # no TDX guest, or no way to know
