"""What `status`, the health probes and the metrics show: plain values made from the reconcilers."""

from __future__ import annotations

import dataclasses
from typing import Any

import trio

from tdxd import __version__
from tdxd.core.bundle import Manifest
from tdxd.core.config import Config
from tdxd.core.foreign import ForeignManifest
from tdxd.core.plan import Failure, ServingState, VolumeState
from tdxd.errors import EX_NOPERM, EX_TEMPFAIL, EX_UNAVAILABLE, Retry
from tdxd.guest import isolation, protection
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.named_secrets import NamedSecrets, ShownSecret
from tdxd.guest.reconciler import VolumeReconciler
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.serving import ServingReconciler
from tdxd.host.ports import MappedVolume

__all__ = ["failing", "failure_exit_code", "kept", "readiness", "status"]


def status(
    *,
    loaded: LoadedConfig,
    record: RuntimeRecord,
    started: str,
    reexecs: int,
    pid: int,
    mapper: str,
    volumes: list[VolumeReconciler],
    serving: ServingReconciler,
    secrets: NamedSecrets,
) -> dict[str, Any]:
    """Return the whole status; nothing in it is secret."""
    config = loaded.config
    ready, reasons = readiness(config, volumes, serving)
    return {
        "version": __version__,
        "pid": pid,
        "since": started,
        "reexecs": reexecs,
        "ready": ready,
        "reasons": reasons,
        "config": loaded.trust.value,
        "protection": protection.shown(loaded),
        "runtime": record.status(),
        "swap_accepted": config.security.accept_swap,
        "mapper": mapper,
        "key_servers": list(config.key_release.servers),
        "volumes": [_volume(one) for one in volumes],
        "secrets": [_secret(one) for one in secrets.shown()],
        "serving": _serving(config, serving),
    }


def readiness(
    config: Config, volumes: list[VolumeReconciler], serving: ServingReconciler
) -> tuple[bool, list[str]]:
    """Return whether all that is required serves, and in words what does not."""
    reasons = [
        f"volume {one.spec.id} is {one.state.value}"
        for one in volumes
        if one.spec.required and not one.leaving and not _is_open(one, volumes)
    ]
    there = {one.spec.id for one in volumes if not one.leaving}
    reasons += [
        f"volume {spec.id} is closing"  # to be opened as it is configured now
        for spec in config.volume
        if spec.required and spec.id not in there
    ]
    if config.serving is not None and not serving.serving:
        reasons.append(f"serving is {serving.state.value}")
    return not reasons, reasons


def _missing(config: Config, volumes: list[VolumeReconciler]) -> list[VolumeReconciler]:
    """Return what keeps it from being ready; what is to come back closes as it was configured."""
    required = {spec.id for spec in config.volume if spec.required}
    return [
        one
        for one in volumes
        if (one.spec.required or one.spec.id in required) and not _is_open(one, volumes)
    ]


def _is_open(one: VolumeReconciler, volumes: list[VolumeReconciler]) -> bool:
    """Say whether any generation of it is open, and stays so."""
    return any(
        other.mounted and not other.leaving
        for other in volumes
        if other.spec.id == one.spec.id
    )


def kept(
    volumes: list[VolumeReconciler], serving: ServingReconciler, secrets: NamedSecrets
) -> list[str]:
    """Return in words what of the last change failed, while what was there before goes on."""
    failures = [
        (f"volume {one.spec.id}", one.failure)
        for one in volumes
        if one.newer_than is not None and not one.leaving
    ]
    failures += [(f"secret {one.id}", one.failure) for one in secrets.shown()]
    failures.append(("serving", serving.standing))
    failures.append(("certificates", serving.not_renewed))
    return [f"{what}: {one.error.message}" for what, one in failures if one is not None]


def failing(
    config: Config, volumes: list[VolumeReconciler], serving: ServingReconciler
) -> bool:
    """Say whether what is not ready has an error to show, or no file to open.

    Where nothing is open, and need not be, there is nothing to serve either.
    """
    missing = _missing(config, volumes)
    absent = VolumeState.ABSENT
    if missing:
        return all(one.failure is not None or one.state is absent for one in missing)
    return serving.failure is not None or not any(one.mounted for one in volumes)


def failure_exit_code(
    config: Config, volumes: list[VolumeReconciler], serving: ServingReconciler
) -> int:
    """Return the exit code for "not ready": 77 denied, the error's own for failed, else 75."""
    failures = [one.failure for one in _missing(config, volumes)]
    if not serving.serving:
        failures.append(serving.failure)
    standing = [one.error for one in failures if one is not None]
    for error in standing:
        if error.retry in (Retry.OPERATOR, Retry.NEVER):
            return error.exit_code
    if any(error.retry is Retry.SLOW for error in standing):
        return EX_NOPERM
    return EX_TEMPFAIL if standing else EX_UNAVAILABLE


def _volume(one: VolumeReconciler) -> dict[str, Any]:
    mapped, left_s, told = one.device.mapped, one.lease.left_s, one.last_error
    shown: dict[str, Any] = {
        "id": one.spec.id,
        "state": one.state.value,
        "since": one.since,
        "required": one.spec.required,
        "wanted": one.wanted,
        "leaving": one.leaving,
        "kind": one.spec.kind,
        "generation": one.generation,
        "newer_than": one.newer_than,
        "image": one.device.image or one.spec.image,
        "mapper": mapped.mapper if mapped else None,
        "integrity": _integrity(mapped),
        "header": _header(mapped),
        "writable": mapped.writable if mapped else one.spec.writable,
        "size_bytes": _size_bytes(mapped),
        "bytes_read": one.device.bytes_read,
        "device": mapped.device if mapped else None,
        "lease_left_s": None if left_s is None else round(left_s, 1),
        "lease_error": _failure(one.lease.failure),
        "error": _failure(one.failure),
        "last_error": dataclasses.asdict(told) if told else None,
    }
    if one.wanted and one.absent:
        text = f"no file matches {one.spec.image}"
        hint = "copy the image there; it is opened by itself"
        shown["error"] = {"code": "volume-missing", "message": text, "hint": hint}
    return shown


def _secret(one: ShownSecret) -> dict[str, Any]:
    return {
        "id": one.id,
        "generation": one.generation,
        "content": one.content,
        "sha256": one.sha256,
        "since": one.since,
        "lease_left_s": one.lease_left_s,
        "error": _failure(one.failure),
    }


def _header(mapped: MappedVolume | None) -> str | None:
    """Say whether the image's header is the very one that the owner knows; foreign volumes only."""
    if mapped is None or not isinstance(mapped.manifest, ForeignManifest):
        return None
    return "pinned" if mapped.manifest.header_sha256 else "any"


def _integrity(mapped: MappedVolume | None) -> str | None:
    """Say what stands against a change of the image: nothing, for a foreign volume."""
    if mapped is None:
        return None
    if isinstance(mapped.manifest, ForeignManifest):
        return "none"
    return "dm-verity" if mapped.mapper == "dm" else "verified"


def _size_bytes(mapped: MappedVolume | None) -> int | None:
    if mapped is None:
        return None
    if not mapped.payload_bytes and isinstance(mapped.manifest, Manifest):
        return mapped.manifest.payload_bytes  # an older program opened it
    return mapped.payload_bytes


def _serving(config: Config, serving: ServingReconciler) -> dict[str, Any]:
    front = serving.front
    servers = [
        {
            "slot": one.slot,
            "pid": one.child.pid,
            "ready": one.ready,
            "active": front is not None and front.active == one.slot,
            "models": [
                {"name": model.name, "versions": list(model.versions)}
                for model in one.models
            ],
            "last_line": one.lines[-1] if one.lines else None,
        }
        for one in serving.servers.values()
    ]
    steady = serving.state is ServingState.READY
    return {
        "state": serving.state.value if config.serving else "off",
        "since": serving.since,
        "listen": config.serving.listen if config.serving else None,
        "front_pid": front.child.pid if front else None,
        "servers": servers,
        "restarts": serving.restarts,
        "rest_listen": config.serving.rest_listen if config.serving else None,
        "isolation": isolation.shown(config.serving, serving.limits_problem)
        if config.serving
        else None,
        "strategy": config.serving.strategy if config.serving else None,
        "certificate": _certificate(serving),
        "error": None if steady else _failure(serving.failure),
    }


def _certificate(serving: ServingReconciler) -> dict[str, Any] | None:
    """Say which certificate the front shows, and what keeps it from showing a newer one."""
    front = serving.front
    if front is None:
        return None
    return {
        "sha256": front.certificate_sha256[:16],
        "from": list(front.sources),
        "error": _failure(serving.not_renewed),
    }


def _failure(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    wait_s = max(0.0, failure.until_s - trio.current_time())
    final = failure.error.retry in (Retry.OPERATOR, Retry.NEVER)
    return {
        "code": failure.error.code,
        "message": failure.error.message,
        "hint": failure.error.hint,
        "attempts": failure.attempts,
        "retry_in_s": None if final else round(wait_s, 1),
    }
