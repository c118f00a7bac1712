"""What `/metrics` shows of the daemon: states from its status, counts from its events.

Counts begin anew with each program of the daemon, as Prometheus expects of a restart. Labels are
ids from the configuration and words of ours, never anything that a stranger sent.
"""

from __future__ import annotations

from typing import Any

import trio

from tdxd.core.exposition import Family, text
from tdxd.core.plan import ServingState, VolumeState
from tdxd.guest.daemon import Daemon
from tdxd.guest.exchanges import RELEASED
from tdxd.guest.front_metrics import front_families
from tdxd.host.process_stat import process_families

__all__ = ["metrics_text"]

_OFF = "off"
_VOLUME_VALUES = (
    ("generation", "generation", "gauge", "Generation that is open."),
    ("size_bytes", "size_bytes", "gauge", "Size of what is open."),
    (
        "bytes_read",
        "read_bytes_total",
        "counter",
        "Bytes read from the device since it was mapped.",
    ),
    (
        "lease_left_s",
        "lease_left_seconds",
        "gauge",
        "How long a volume may be open without a renewal; none without a lease.",
    ),
    ("required", "required", "gauge", "Whether readiness waits for the volume."),
    ("wanted", "wanted", "gauge", "Whether the volume is wanted open."),
)
_VOLUME_ERRORS = (
    ("error", "error", "1 while this error keeps a volume from being open."),
    ("lease_error", "lease_error", "1 while this error keeps a lease from renewal."),
)
_VOLUME_EVENTS = (
    ("volume.mounted", "mounts_total", "How often a volume was mounted.", False),
    ("volume.failed", "failures_total", "Failures to open or keep a volume.", True),
    ("lease.renewed", "lease_renewals_total", "Leases that were renewed.", False),
    ("lease.not_renewed", "lease_failures_total", "Failed renewals of leases.", True),
    ("lease.expired", "lease_expiries_total", "Leases that ran out.", False),
)


async def metrics_text(daemon: Daemon) -> str:
    """Return everything in Prometheus' text format."""
    shown = daemon.status()
    return text(
        [
            *_daemon(daemon, shown),
            *_volumes(daemon, shown["volumes"]),
            *_attestations(daemon),
            *_serving(daemon, shown["serving"]),
            *await front_families(daemon.serving.front),
            *process_families(),
        ]
    )


def _daemon(daemon: Daemon, shown: dict[str, Any]) -> list[Family]:
    build = Family("tdxd_build_info", "gauge", "1; what runs stands in the labels.")
    build.add(1, version=shown["version"], mapper=shown["mapper"])
    measured = Family(
        "tdxd_config_info", "gauge", "1; what vouches for the configuration."
    )
    measured.add(1, trust=shown["config"])
    ready = Family("tdxd_ready", "gauge", "Whether everything that is required serves.")
    ready.add(shown["ready"])
    reexecs = Family(
        "tdxd_reexecs_total", "counter", "How often the program was replaced in place."
    )
    reexecs.add(shown["reexecs"])
    silence = Family(
        "tdxd_reconciler_silence_seconds",
        "gauge",
        "How long ago the slowest reconciler looked; below 0 while it works on purpose.",
    )
    silence.add(trio.current_time() - min(daemon.beats()))
    return [build, measured, ready, reexecs, silence]


def _volumes(daemon: Daemon, shown: list[dict[str, Any]]) -> list[Family]:
    """Return what is told of each volume, by that of its generations which is there to stay."""
    by_id: dict[str, dict[str, Any]] = {}
    for one in sorted(shown, key=lambda one: bool(one["leaving"])):
        if one["newer_than"] is None:
            by_id.setdefault(one["id"], one)
    volumes = [by_id[name] for name in sorted(by_id)]
    states = Family(
        "tdxd_volume_state", "gauge", "1 for the state that a volume is in, else 0."
    )
    about = Family(
        "tdxd_volume_info", "gauge", "1; how an open volume is read, in the labels."
    )
    for one in volumes:
        states.add_state(one["state"], _values(VolumeState), volume=one["id"])
        if one["mapper"] is not None:
            about.add(
                1,
                volume=one["id"],
                kind=one["kind"],
                mapper=one["mapper"],
                integrity=one["integrity"],
            )
    families = [states, about]
    for field, name, kind, words in _VOLUME_VALUES:
        family = Family(f"tdxd_volume_{name}", kind, words)  # type: ignore[arg-type]
        for one in volumes:
            family.add(one[field], volume=one["id"])
        families.append(family)
    for field, name, words in _VOLUME_ERRORS:
        family = Family(f"tdxd_volume_{name}", "gauge", words)
        for one in volumes:
            if one[field] is not None:
                family.add(1, volume=one["id"], code=one[field]["code"])
        families.append(family)
    families.append(_rollovers(shown, [one["id"] for one in volumes]))
    return [*families, *_volume_counts(daemon, {one["id"] for one in volumes})]


def _rollovers(shown: list[dict[str, Any]], ids: list[str]) -> Family:
    words = "Whether a newer generation cannot take over from the open one."
    family = Family("tdxd_volume_rollover_failing", "gauge", words)
    failing = {
        one["id"]
        for one in shown
        if one["newer_than"] is not None and one["error"] is not None
    }
    for volume_id in ids:
        family.add(volume_id in failing, volume=volume_id)
    return family


def _volume_counts(daemon: Daemon, known: set[str]) -> list[Family]:
    """Count events; a volume that has had none counts 0, so that the first is an increase.

    Without a code "volume.failed" tells of the state, which is no further failure.
    """
    families = []
    for event, name, words, by_code in _VOLUME_EVENTS:
        family = Family(f"tdxd_volume_{name}", "counter", words)
        found = [
            (volume, code, count)
            for (kind, volume, code), count in sorted(daemon.events.by_kind.items())
            if kind == event and volume in known and bool(code) == by_code
        ]
        for volume, code, count in found:
            family.add(count, volume=volume, **({"code": code} if by_code else {}))
        if not by_code:
            for volume in sorted(known - {one[0] for one in found}):
                family.add(0, volume=volume)
        families.append(family)
    return families


def _attestations(daemon: Daemon) -> list[Family]:
    exchanges = daemon.attester.exchanges
    total = Family(
        "tdxd_attestations_total",
        "counter",
        f'Exchanges with key servers by outcome: "{RELEASED}" or the code of the error.',
    )
    for code in sorted({RELEASED, *exchanges.outcomes}):
        total.add(exchanges.outcomes[code], code=code)
    took = Family(
        "tdxd_attestation_duration_seconds",
        "histogram",
        "Time of an exchange with the key servers, the quote included.",
    )
    took.add_histogram(exchanges.durations_s)
    evidence = Family(
        "tdxd_endpoint_evidence_total",
        "counter",
        "Answers to clients that asked for evidence of this guest.",
    )
    for result, count in daemon.evidence.items():
        evidence.add(count, result=result)
    return [total, took, evidence]


def _serving(daemon: Daemon, shown: dict[str, Any]) -> list[Family]:
    states = Family(
        "tdxd_serving_state", "gauge", "1 for the state that serving is in, else 0."
    )
    states.add_state(shown["state"], [*_values(ServingState), _OFF])
    restarts = Family(
        "tdxd_serving_restarts_total",
        "counter",
        "Model servers and fronts that ended by themselves.",
    )
    restarts.add(shown["restarts"])
    servers = Family(
        "tdxd_serving_server_ready",
        "gauge",
        "Whether the model server of a slot has all its models.",
    )
    for one in shown["servers"]:
        servers.add(one["ready"], slot=one["slot"])
    error = Family("tdxd_serving_error", "gauge", "1 while this error stands.")
    if shown["error"] is not None:
        error.add(1, code=shown["error"]["code"])
    failures = Family(
        "tdxd_serving_failures_total", "counter", "Failures to start or keep serving."
    )
    for (event, _volume, code), count in sorted(daemon.events.by_kind.items()):
        if event == "serving.failed" and code:
            failures.add(count, code=code)
    return [states, restarts, servers, error, failures, *_renewals(daemon, shown)]


def _renewals(daemon: Daemon, shown: dict[str, Any]) -> list[Family]:
    renewals = Family(
        "tdxd_front_certificate_renewals_total",
        "counter",
        "How often a running front took other certificates.",
    )
    renewals.add(daemon.events.by_kind[("front.certificates_renewed", "", "")])
    error = Family(
        "tdxd_front_certificate_error",
        "gauge",
        "1 while this error keeps the front from showing a newer certificate.",
    )
    certificate = shown["certificate"]
    if certificate is not None and certificate["error"] is not None:
        error.add(1, code=certificate["error"]["code"])
    return [renewals, error]


def _values(states: type[VolumeState | ServingState]) -> list[str]:
    return [one.value for one in states]
