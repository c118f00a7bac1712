"""Refusals of gRPC calls that clients can read, also in the middle of a long request.

HAProxy's own answer to a request that has not arrived whole is followed by RST_STREAM(CANCEL), and
a client then says CANCELLED, whatever the answer was (tried with 2.6: each time, from 300 KB on).
So a service in Lua, which every distribution's HAProxy has, takes the rest first, to its very end
if it is at most twice as long as a request may be.

Source: HAProxy 2.6 configuration manual, http-request use-service; Lua API, AppletHTTP;
"gRPC over HTTP2", section Responses, Trailers-Only.
"""

from __future__ import annotations

from typing import Final

__all__ = ["grpc_errors", "refuse", "service_text"]

_REFUSALS: Final = {
    "method": (12, "method not allowed here"),
    "rate": (8, "too many requests from this address"),
    "length": (8, "request longer than {limit} bytes"),
    "server": (14, "no model server is ready"),
}
_ERRORS: Final = (
    (400, 13, "malformed request"),
    (408, 4, "the request did not arrive in time"),
    (500, 13, "error in the front"),
    (502, 14, "the model server broke the connection off"),
    (503, 14, "the model server is not there"),
    (504, 4, "the model server did not answer in time"),
)
"""HAProxy's own errors, and the status of gRPC that says the same."""

_SERVICE = """\
local limit = {limit}
local refusals = {{
{refusals}}}

core.register_service("refuse", "http", function(applet)
    local taken = 0
    repeat
        local chunk = applet:receive(65536)
        local size = chunk and #chunk or 0
        taken = taken + size
    until size == 0 or taken > 2 * limit
    local refusal = refusals[applet:get_var("txn.refused")]
    applet:set_status(200)
    applet:add_header("content-type", "application/grpc")
    applet:add_header("content-length", "0")
    applet:add_header("grpc-status", refusal[1])
    applet:add_header("grpc-message", refusal[2])
    applet:start_response()
end)
"""


def refuse(name: str, condition: str) -> str:
    """Return the rules that refuse a call, for one of the reasons known here."""
    assert name in _REFUSALS
    return (
        f"    http-request set-var(txn.refused) str({name}) {condition}\n"
        f"    http-request use-service lua.refuse {condition}\n"
    )


def service_text(limit: int) -> str:
    """Return the service; it takes at most about `limit` bytes of a request that it refuses."""
    refusals = "".join(
        f'    {name} = {{ "{status}", "{message.format(limit=limit)}" }},\n'
        for name, (status, message) in _REFUSALS.items()
    )
    return _SERVICE.format(limit=limit, refusals=refusals)


def grpc_errors() -> str:
    """Return the rules that give HAProxy's own errors a status of gRPC."""
    return "".join(
        f"    http-error status {http} hdr grpc-status {status} "
        f'hdr grpc-message "{message}"\n'
        for http, status, message in _ERRORS
    )
