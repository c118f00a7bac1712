"""Reads the claims of dcap-qvl: what it verified, in the words of `core.appraisal`."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

from tdxd.core.appraisal import PckFlags, VerifiedQuote
from tdxd.core.quote import TdReport

__all__ = ["read_claims"]

_RTMR_NAMES = tuple(f"rt_mr{index}" for index in range(4))
_EX_TAIL_NAMES = (
    "dev_info",
    "init_service_td_hash",
    "init_service_td_attributes",
    "init_cpu_svn",
    "init_tee_tcb_svn",
    "init_tee_fmspc",
    "cur_service_td_hash",
    "cur_service_td_attributes",
)
_PLAIN_NAMES = frozenset(field.name for field in dataclasses.fields(TdReport)) - {
    "rtmrs",
    "ex_tail",
}


def read_claims(
    claims: dict[str, Any], verified_at_s: int, *, simulated: bool
) -> VerifiedQuote:
    """Read the claims of a quote that was verified as of `verified_at_s` (unix time)."""
    platform = claims["platform"]
    pck = platform["pck"]
    return VerifiedQuote(
        report=_report_of(claims["report"]),
        verified_at_s=verified_at_s,
        tcb_status=claims["tcb"]["status"],
        tcb_date_s=_tcb_date_s(platform["tcb_date_tag"], claims["qe"]["tcb_level"]),
        advisory_ids=tuple(claims["tcb"]["advisory_ids"]),
        tcb_evaluation=claims["tcb"]["eval_data_number"],
        ppid=bytes(pck["ppid"]).hex(),
        fmspc=bytes(pck["fmspc"]).hex().upper(),
        flags=PckFlags(
            dynamic_platform=_flag(pck["dynamic_platform"]),
            smt=_flag(pck["smt_enabled"]),
            cached_keys=_flag(pck["cached_keys"]),
        ),
        root_key_sha384=bytes(platform["root_key_id"]).hex(),
        simulated=simulated,
    )


def _report_of(layers: dict[str, Any]) -> TdReport:
    """Read the report as dcap-qvl read it; TD 1.5 and 1.5-ex wrap the older one as `base`."""
    fields: dict[str, Any] = {}
    (layer,) = layers.values()
    while layer:
        fields |= {key: value for key, value in layer.items() if key != "base"}
        layer = layer.get("base")
    plain: dict[str, Any] = {
        name: bytes.fromhex(value) if isinstance(value, str) else value
        for name, value in fields.items()
        if name in _PLAIN_NAMES
    }
    if _EX_TAIL_NAMES[0] in fields:
        plain["ex_tail"] = bytes.fromhex("".join(fields[key] for key in _EX_TAIL_NAMES))
    rtmr0, rtmr1, rtmr2, rtmr3 = (bytes.fromhex(fields[key]) for key in _RTMR_NAMES)
    return TdReport(rtmrs=(rtmr0, rtmr1, rtmr2, rtmr3), **plain)


def _tcb_date_s(tag_s: int, qe_level: dict[str, Any]) -> int:
    """Return the date that counts for grace.

    dcap-qvl's tag is the older of the levels of platform and TDX module. The quoting enclave's
    level counts only where it is behind itself.
    """
    if qe_level["tcbStatus"] == "UpToDate":
        return tag_s
    date = dt.datetime.fromisoformat(qe_level["tcbDate"])
    return min(tag_s, int(date.timestamp()))


def _flag(value: object) -> bool | None:
    """Read a property that the PCK certificate of a single-package platform may leave out."""
    return {"True": True, "False": False}.get(str(value))
