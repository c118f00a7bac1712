"""The text of the front's configuration. It holds no secret: keys are descriptors of memory files.

The front listens on sockets that the daemon made and hands down, so a restarted front loses
no queued connection. Source: HAProxy 2.6 configuration manual §3.1, §4.2, §5.1, §5.2, §7.3.
"""

from __future__ import annotations

import dataclasses
import math

from tdxd.core.serving_config import ServingConfig
from tdxd.host.haproxy_refusals import grpc_errors, refuse

__all__ = [
    "BACKENDS",
    "METRICS_PATH",
    "REST_PORTS",
    "FrontSpec",
    "configuration",
    "rest_port",
    "server_address",
]

BACKENDS = ("models", "models_rest")
"""Both have a server for each slot."""
REST_PORTS = {"a": 8501, "b": 8502}
"""Of the model servers, on the loopback interface of their network namespace."""
METRICS_PATH = "/monitoring/prometheus/metrics"

_NAME = "[^/:%.][^/:%]*"
_REST_VERSION = f"(/versions/[0-9]+|/labels/{_NAME})?"
_REST_INFERENCE = f"^/v1/models/{_NAME}{_REST_VERSION}:(predict|classify|regress)$"
_REST_STATUS = f"^/v1/models/{_NAME}{_REST_VERSION}(/metadata)?$"
_ASKS_EVIDENCE = """\
    acl evidence path /.well-known/tdxd/evidence
    acl get method GET
"""
_RATE_TABLE = """\
backend clients
    stick-table type ipv6 size 100k expire 10s store http_req_rate(1s)

"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrontSpec:
    """Descriptors and paths that the configuration names, and the settings.

    `active` is the slot that gets the streams at start: "a" or "b".
    """

    config: ServingConfig
    grpc_fd: int
    certificate_fd: int
    admin_fd: int
    serve_dir: str
    active: str
    rest_fd: int | None = None
    client_ca_fd: int | None = None
    service_path: str
    """Where `haproxy_refusals.service_text` lies."""
    evidence_path: str | None = None
    """The daemon's socket that gives evidence of this guest; `None`: nobody may ask."""


def server_address(serve_dir: str, slot: str) -> str:
    """Return the path of the model server's socket in a slot."""
    return f"{serve_dir}/{slot}/model.sock"


def rest_port(slot: str) -> int:
    """Return the port of the model server's REST interface in a slot."""
    return REST_PORTS[slot]


def configuration(spec: FrontSpec) -> str:
    """Return the configuration file.

    Only inference and read-only status methods pass: TensorFlow Serving itself lets any client
    unload all models. A refused method gets gRPC status 12 (UNIMPLEMENTED), as if it did not
    exist; without a model server the status is 14 (UNAVAILABLE).
    """
    parts = [_general(spec), _grpc(spec)]
    if spec.rest_fd is not None:
        parts.append(_rest(spec))
    if spec.evidence_path is not None:
        parts.append(_evidence(spec.evidence_path))
    if spec.config.client_requests_per_s is not None:
        parts.append(_RATE_TABLE)
    parts.append(_backends(spec))
    return "".join(parts)


def _general(spec: FrontSpec) -> str:
    config = spec.config
    level = "info" if config.access_log else "notice"
    sessions = "" if spec.client_ca_fd is None else "    tune.ssl.cachesize 0\n"
    quiet = "" if config.access_log else "    option dontlog-normal\n"
    return f"""\
global
    lua-load {spec.service_path}
    tune.lua.service-timeout 60s
    log fd@2 format raw daemon {level}
    stats socket fd@{spec.admin_fd} level admin
    maxconn {config.max_connections}
    hard-stop-after {max(1, round(config.drain_timeout_s))}s
    ssl-default-bind-options ssl-min-ver TLSv1.3
{sessions}\
    tune.h2.initial-window-size 1048576

defaults
    mode http
    log global
{quiet}    log-format "access client=%ci method=%HM path=%HPO status=%ST slot=%s \
end=%tsc in=%U out=%B ms=%Ta"
    timeout connect 5s
    timeout client {_ms(config.client_timeout_s)}
    timeout server {_ms(config.request_timeout_s)}
    timeout http-request 10s
    timeout http-keep-alive {_ms(config.idle_timeout_s)}

"""


def _grpc(spec: FrontSpec) -> str:
    limit = spec.config.max_request_bytes
    asked = spec.evidence_path is not None
    alpn = "h2,http/1.1" if asked else "h2"
    evidence = _ASKS_EVIDENCE if asked else ""
    use = "    use_backend evidence if evidence get\n" if asked else ""
    allowed = "or evidence get" if asked else ""
    none = "!evidence" if asked else ""
    rated = spec.config.client_requests_per_s is not None
    return f"""\
frontend grpc
    bind fd@{spec.grpc_fd} {_tls(spec)} alpn {alpn}
{grpc_errors()}\
{_health()}\
    acl http2 req.ver 2.0
    acl inference path_beg /tensorflow.serving.PredictionService/
    acl inference path /tensorflow.serving.ModelService/GetModelStatus
    acl inference path /grpc.health.v1.Health/Check
{evidence}\
{refuse("method", f"unless inference http2 {allowed}")}\
{_rate(spec)}\
{refuse("rate", _over_rate(spec)) if rated else ""}\
{refuse("length", _longer_than(limit))}\
{refuse("server", f"if {none} {_without_server('models')}")}\
{use}\
    default_backend models

"""


def _rest(spec: FrontSpec) -> str:
    limit = spec.config.max_request_bytes
    metrics = f"    acl reads path {METRICS_PATH}\n" if spec.config.monitoring else ""
    many = ""
    if spec.config.client_requests_per_s is not None:
        error = _rest_error(429, "too many requests from this address")
        many = f"    {error} {_over_rate(spec)}\n"
    return f"""\
frontend rest
    bind fd@{spec.rest_fd} {_tls(spec)} alpn h2,http/1.1
{_health()}\
    acl posts path_reg -i {_REST_INFERENCE}
    acl reads path_reg -i {_REST_STATUS}
{metrics}\
    {_rest_error(404, "not allowed here")} unless posts or reads
    {_rest_error(405, "POST a request for inference")} if posts !{{ method POST }}
    {_rest_error(405, "GET the status")} if !posts !{{ method GET }}
{_rate(spec)}\
{many}\
    {_rest_error(411, "a request must tell its length")} if posts \
!{{ req.hdr(content-length) -m found }}
    {_rest_error(413, f"request longer than {limit} bytes")} {_longer_than(limit)}
    {_rest_error(503, "no model server is ready")} if {_without_server("models_rest")}
    default_backend models_rest

"""


def _evidence(path: str) -> str:
    """Return the way to the daemon, where quotes are made: slowly, and few at a time."""
    return f"""\
backend evidence
    timeout server 45s
    timeout queue 10s
    server tdxd unix@{path} maxconn 8

"""


def _backends(spec: FrontSpec) -> str:
    grpc = {
        slot: f"unix@{server_address(spec.serve_dir, slot)} proto h2"
        for slot in REST_PORTS
    }
    rest = {slot: f"127.0.0.1:{port}" for slot, port in REST_PORTS.items()}
    made = ""
    for name, servers in zip(BACKENDS, (grpc, rest), strict=True):
        made += f"backend {name}\n"
        for slot, address in servers.items():
            disabled = "" if slot == spec.active else " disabled"
            made += f"    server {slot} {address}{disabled}\n"
        made += "\n"
    return made


def _tls(spec: FrontSpec) -> str:
    tls = f"ssl crt /dev/fd/{spec.certificate_fd}"
    if spec.client_ca_fd is not None:
        # A session that goes on is not verified again: not by other authorities either.
        tls += f" ca-file /dev/fd/{spec.client_ca_fd} verify required no-tls-tickets"
    return tls


def _health() -> str:
    """Answer a balancer that asks for nothing but whether a model server is ready."""
    answer = "http-request return content-type text/plain"
    return (
        f"    {answer} status 200 string ok if {{ path /healthz }} {{ nbsrv(models) gt 0 }}\n"
        f"    {answer} status 503 string no if {{ path /healthz }}\n"
    )


def _without_server(backend: str) -> str:
    """Return the condition that no server is there; a front that ends counts none any more."""
    return f"{{ nbsrv({backend}) eq 0 }} !{{ stopping }}"


def _rate(spec: FrontSpec) -> str:
    if spec.config.client_requests_per_s is None:
        return ""
    return "    http-request track-sc0 src table clients\n"


def _over_rate(spec: FrontSpec) -> str:
    return f"if {{ sc_http_req_rate(0) gt {spec.config.client_requests_per_s} }}"


def _longer_than(limit: int) -> str:
    return f"if {{ req.hdr_val(content-length) gt {limit} }}"


def _rest_error(status: int, message: str) -> str:
    """Answer as TensorFlow Serving's REST interface tells an error."""
    return (
        f"http-request return status {status} content-type application/json "
        f"""string '{{ "error": "{message}" }}'"""
    )


def _ms(seconds: float) -> str:
    return f"{max(1, math.ceil(seconds * 1000))}ms"
