"""Metrics of the front, from its own counts: they begin anew with each front."""

from __future__ import annotations

import trio

from tdxd.core.exposition import Family
from tdxd.errors import NotReadyError
from tdxd.guest.front import Front
from tdxd.host import haproxy_stats

__all__ = ["front_families"]

_PATIENCE_S = 2.0
_CLASSES = ("1xx", "2xx", "3xx", "4xx", "5xx", "other")
_OF_FRONTENDS = (
    ("scur", "connections", "gauge", "Open connections of clients."),
    ("slim", "connections_max", "gauge", "Connections that may be open."),
    ("conn_tot", "connections_total", "counter", "Connections of clients."),
    (
        "ssl_failed_handshake",
        "tls_handshake_failures_total",
        "counter",
        "TLS handshakes that failed.",
    ),
    ("req_tot", "requests_total", "counter", "Requests."),
    ("ereq", "request_errors_total", "counter", "Malformed and broken-off requests."),
    (
        "intercepted",
        "own_answers_total",
        "counter",
        "Requests that the front answered itself: not allowed, too many, no server.",
    ),
    ("bin", "received_bytes_total", "counter", "Bytes received from clients."),
    ("bout", "sent_bytes_total", "counter", "Bytes sent to clients."),
)
_OF_BACKENDS = (
    ("econ", "connect", "no connection"),
    ("eresp", "response", "broken answer"),
    ("srv_abrt", "server_aborted", "broken off by the model server"),
    ("cli_abrt", "client_aborted", "broken off by the client"),
)


async def front_families(front: Front | None) -> list[Family]:
    """Return all families; they have no samples while no front answers."""
    rows: list[haproxy_stats.Row] = []
    ends: list[float] = []
    answers = False
    if front is not None:
        with trio.move_on_after(_PATIENCE_S):
            try:
                rows = await haproxy_stats.statistics(front.api)
                ends = await haproxy_stats.certificate_ends(front.api)
                answers = True
            except NotReadyError:
                pass  # it is ending, or hangs: tdxd_front_up says so
    up = Family("tdxd_front_up", "gauge", "Whether the front runs and answers.")
    up.add(answers)
    return [up, *_certificates(ends), *_frontends(rows), *_backends(rows)]


def _certificates(ends: list[float]) -> list[Family]:
    family = Family(
        "tdxd_front_certificate_expiry_timestamp_seconds",
        "gauge",
        "When the first certificate that the front shows ends, unix time.",
    )
    family.add(min(ends, default=None))
    return [family]


def _frontends(rows: list[haproxy_stats.Row]) -> list[Family]:
    fronts = [row for row in rows if row["svname"] == "FRONTEND"]
    families = []
    for field, name, kind, about in _OF_FRONTENDS:
        family = Family(f"tdxd_front_{name}", kind, about)  # type: ignore[arg-type]
        for row in fronts:
            family.add(_number(row, field), frontend=row["pxname"])
        families.append(family)
    answered = Family(
        "tdxd_front_responses_total",
        "counter",
        "Answers by the class of their HTTP status; gRPC tells its errors within 2xx.",
    )
    for row in fronts:
        for one in _CLASSES:
            value = _number(row, f"hrsp_{one}")
            answered.add(value, frontend=row["pxname"], code=one)
    return [*families, answered]


def _backends(rows: list[haproxy_stats.Row]) -> list[Family]:
    errors = Family(
        "tdxd_front_backend_errors_total",
        "counter",
        "Requests that failed behind the front: "
        + ", ".join(f"{kind} ({what})" for _, kind, what in _OF_BACKENDS)
        + ".",
    )
    times = Family(
        "tdxd_front_backend_response_seconds",
        "gauge",
        "Mean time to the model server's answer, of the last 1024 requests.",
    )
    for row in rows:
        if row["svname"] == "BACKEND":
            for field, kind, _ in _OF_BACKENDS:
                errors.add(_number(row, field), backend=row["pxname"], kind=kind)
            took_ms = _number(row, "rtime")
            times.add(
                None if took_ms is None else took_ms / 1000, backend=row["pxname"]
            )
    return [errors, times]


def _number(row: haproxy_stats.Row, field: str) -> int | None:
    value = row.get(field, "")
    return int(value) if value.isdigit() else None
