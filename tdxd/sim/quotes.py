"""Build TDX quotes of version 4 and 5 that a verifier accepts under the simulator's root.

Every signed field can be set, so that a test can make what a real platform never would.

Source: Intel TDX DCAP Quoting Library API, appendix A.3 and A.4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from tdxd.core.quote import TEE_TYPE_TDX, BodyKind, TdReport
from tdxd.sim.pki import Pki, public_raw, sign_raw

__all__ = ["QuoteShape", "build_quote", "encode_report"]

QE_VENDOR_ID = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
"""Intel's, in every quote of version 3 to 5."""
_ZERO48 = bytes(48)
_BODY_TYPES = {BodyKind.TD10: 2, BodyKind.TD15: 3, BodyKind.TD15_EX: 4}
_TD15_EX_REST_BYTES = 885 - 648 - 33
_CERTIFICATION_QE_REPORT = 6
_CERTIFICATION_PCK_CHAIN = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuoteShape:
    """All of a quote but its TD report; the defaults make a good one.

    `attestation_key` and `pck_key` sign in place of the platform's own; `pck_chain_pem` stands in
    place of its chain; `qe_report_data` (64 bytes) in place of the binding of the attestation key.
    """

    version: int = 4
    body: BodyKind | None = None
    tee_type: int = TEE_TYPE_TDX
    key_type: int = 2
    qe_vendor_id: bytes = QE_VENDOR_ID
    qe_attributes: bytes = bytes.fromhex("15000000000000000700000000000000")
    qe_misc_select: int = 0
    qe_mr_signer: bytes = hashlib.sha256(b"tdx-sim quoting enclave's signer").digest()
    qe_mr_enclave: bytes = hashlib.sha256(b"tdx-sim quoting enclave").digest()
    qe_isv_prod_id: int = 2
    qe_isv_svn: int = 4
    qe_auth_data: bytes = bytes(range(32))
    qe_report_data: bytes | None = None
    attestation_key: ec.EllipticCurvePrivateKey | None = None
    pck_key: ec.EllipticCurvePrivateKey | None = None
    pck_chain_pem: str | None = None

    @property
    def kind(self) -> BodyKind:
        """Return the body's layout: TD 1.0 in version 4, TD 1.5 in version 5, unless set."""
        if self.body is not None:
            return self.body
        return BodyKind.TD10 if self.version == 4 else BodyKind.TD15


def build_quote(pki: Pki, report: TdReport, shape: QuoteShape) -> bytes:
    """Return the signed quote."""
    body = encode_report(report, shape.kind)
    header = struct.pack(
        "<HHIHH16s20s",
        shape.version,
        shape.key_type,
        shape.tee_type,
        0,
        0,
        shape.qe_vendor_id,
        bytes(20),
    )
    if shape.version == 5:
        header += struct.pack("<HI", _BODY_TYPES[shape.kind], len(body))
    key = shape.attestation_key or pki.attestation
    signature = sign_raw(key, header + body) + public_raw(key.public_key())
    signature += _sized(_CERTIFICATION_QE_REPORT, _qe_part(pki, key, shape))
    return header + body + struct.pack("<I", len(signature)) + signature


def encode_report(report: TdReport, kind: BodyKind) -> bytes:
    """Return the TD report in one of its three layouts (584, 648 or 885 bytes)."""
    body = b"".join(
        (
            report.tee_tcb_svn,
            report.mr_seam,
            report.mr_signer_seam,
            report.seam_attributes,
            report.td_attributes,
            report.xfam,
            report.mr_td,
            report.mr_config_id,
            report.mr_owner,
            report.mr_owner_config,
            *report.rtmrs,
            report.report_data,
        )
    )
    if kind is not BodyKind.TD10:
        body += report.tee_tcb_svn2 or report.tee_tcb_svn
        body += report.mr_service_td or _ZERO48
    if kind is BodyKind.TD15_EX:
        body += bytes([report.vmid or 0]) + (report.td_id or bytes(32))
        body += report.ex_tail or bytes(_TD15_EX_REST_BYTES)
    return body


def _qe_part(pki: Pki, key: ec.EllipticCurvePrivateKey, shape: QuoteShape) -> bytes:
    """Return the quoting enclave's report, signed by the PCK, and the PCK chain."""
    binding = hashlib.sha256(public_raw(key.public_key()) + shape.qe_auth_data).digest()
    report = struct.pack(
        "<16sI28s16s32s32s32s96sHH60s64s",
        bytes(16),
        shape.qe_misc_select,
        b"",
        shape.qe_attributes,
        shape.qe_mr_enclave,
        b"",
        shape.qe_mr_signer,
        b"",
        shape.qe_isv_prod_id,
        shape.qe_isv_svn,
        b"",
        shape.qe_report_data or binding,
    )
    chain = shape.pck_chain_pem or pki.pck_chain_pem
    return (
        report
        + sign_raw(shape.pck_key or pki.pck.key, report)
        + struct.pack("<H", len(shape.qe_auth_data))
        + shape.qe_auth_data
        + _sized(_CERTIFICATION_PCK_CHAIN, chain.encode() + b"\0")
    )


def _sized(kind: int, content: bytes) -> bytes:
    return struct.pack("<HI", kind, len(content)) + content


def split_overrides(overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide keyword arguments into those of `TdReport` and those of `QuoteShape`.

    Raises: TypeError for a name of neither.
    """
    report_names = {field.name for field in dataclasses.fields(TdReport)}
    shape_names = {field.name for field in dataclasses.fields(QuoteShape)}
    unknown = set(overrides) - report_names - shape_names
    if unknown:
        raise TypeError(f"no such field of a quote: {', '.join(sorted(unknown))}")
    report = {name: overrides[name] for name in overrides if name in report_names}
    shape = {name: overrides[name] for name in overrides if name in shape_names}
    return report, shape
