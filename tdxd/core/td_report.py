"""TDREPORT, the 1024 bytes that the TDX module makes for one TD: offsets, reading, writing.

It carries a MAC by a key of this one CPU and no signature: only a quoting enclave of the same
platform can check it, so nothing here proves anything to anybody else.

Source: Intel TDX module ABI, TDREPORT_STRUCT; Linux arch/x86/include/uapi/asm and
drivers/virt/coco/guest/tdx-guest.c.
"""

from __future__ import annotations

from tdxd.core.quote import REPORT_DATA_BYTES, TdReport
from tdxd.errors import EvidenceMalformedError

__all__ = [
    "TDX_CMD_GET_REPORT0",
    "TD_REPORT_BYTES",
    "TD_REPORT_REQUEST_BYTES",
    "encode_td_report",
    "parse_td_report",
]

TD_REPORT_BYTES = 1024
TD_REPORT_REQUEST_BYTES = REPORT_DATA_BYTES + TD_REPORT_BYTES
"""The ioctl's argument: 64 bytes of report data in, the TDREPORT out."""
TDX_CMD_GET_REPORT0 = 0xC0000000 | TD_REPORT_REQUEST_BYTES << 16 | ord("T") << 8 | 1
"""_IOWR('T', 1, struct tdx_report_req): 0xC4405401."""

_TYPE_TDX = 0x81
_REPORT_MAC_STRUCT = 0
_VERSION = 2
"""0: no service TD is bound; 1: the field of service TDs counts."""
_REPORT_DATA = 128
_TEE_TCB_INFO = 256
_TCB_SVN = _TEE_TCB_INFO + 8
_MR_SEAM = _TEE_TCB_INFO + 24
_MR_SIGNER_SEAM = _TEE_TCB_INFO + 72
_SEAM_ATTRIBUTES = _TEE_TCB_INFO + 120
_TCB_SVN2 = _TEE_TCB_INFO + 128
_TD_INFO = 512
_XFAM = _TD_INFO + 8
_MR_TD = _TD_INFO + 16
_MR_CONFIG_ID = _TD_INFO + 64
_MR_OWNER = _TD_INFO + 112
_MR_OWNER_CONFIG = _TD_INFO + 160
_RTMR0 = _TD_INFO + 208
_SERVICE_TD = _TD_INFO + 400
_VALID_TCB_INFO = bytes.fromhex("ff01000000000000")
"""Which fields of TEE_TCB_INFO are filled in: all that TDX 1.0 has."""


def parse_td_report(data: bytes) -> TdReport:
    """Read the fields that a quote would hold, too. Nothing in them is proved.

    Raises: EvidenceMalformedError for another size, or a report that no TDX module made.
    """
    if len(data) != TD_REPORT_BYTES:
        text = f"TD report is {len(data)} bytes long, not {TD_REPORT_BYTES}"
        raise EvidenceMalformedError(text)
    if data[_REPORT_MAC_STRUCT] != _TYPE_TDX:
        text = f"TD report is of type {data[0]:#04x}, not {_TYPE_TDX:#04x} (TDX)"
        raise EvidenceMalformedError(text)

    def field(start: int, size: int = 48) -> bytes:
        return data[start : start + size]

    return TdReport(
        tee_tcb_svn=field(_TCB_SVN, 16),
        mr_seam=field(_MR_SEAM),
        mr_signer_seam=field(_MR_SIGNER_SEAM),
        seam_attributes=field(_SEAM_ATTRIBUTES, 8),
        td_attributes=field(_TD_INFO, 8),
        xfam=field(_XFAM, 8),
        mr_td=field(_MR_TD),
        mr_config_id=field(_MR_CONFIG_ID),
        mr_owner=field(_MR_OWNER),
        mr_owner_config=field(_MR_OWNER_CONFIG),
        rtmrs=(
            field(_RTMR0),
            field(_RTMR0 + 48),
            field(_RTMR0 + 96),
            field(_RTMR0 + 144),
        ),
        report_data=field(_REPORT_DATA, REPORT_DATA_BYTES),
        tee_tcb_svn2=field(_TCB_SVN2, 16),
        mr_service_td=field(_SERVICE_TD) if data[_VERSION] else None,
    )


def encode_td_report(report: TdReport, *, mac: bytes) -> bytes:
    """Lay a report out as the TDX module does, with the 32 bytes of `mac` in the place of its MAC.

    The two hashes that the MAC covers are left zero: nobody but the module needs them.
    """
    data = bytearray(TD_REPORT_BYTES)
    data[:4] = bytes((_TYPE_TDX, 0, report.mr_service_td is not None, 0))
    for start, value in (
        (_REPORT_DATA, report.report_data),
        (224, mac),
        (_TEE_TCB_INFO, _VALID_TCB_INFO),
        (_TCB_SVN, report.tee_tcb_svn),
        (_MR_SEAM, report.mr_seam),
        (_MR_SIGNER_SEAM, report.mr_signer_seam),
        (_SEAM_ATTRIBUTES, report.seam_attributes),
        (_TCB_SVN2, report.tee_tcb_svn2 or report.tee_tcb_svn),
        (_TD_INFO, report.td_attributes),
        (_XFAM, report.xfam),
        (_MR_TD, report.mr_td),
        (_MR_CONFIG_ID, report.mr_config_id),
        (_MR_OWNER, report.mr_owner),
        (_MR_OWNER_CONFIG, report.mr_owner_config),
        (_RTMR0, b"".join(report.rtmrs)),
        (_SERVICE_TD, report.mr_service_td or bytes(48)),
    ):
        data[start : start + len(value)] = value
    return bytes(data)
