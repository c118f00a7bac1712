"""Sign the collateral of the simulated platform: TCB info, QE identity, revocation lists.

Source: Intel PCS API version 4: TCB info version 3 of TDX, enclave identity version 2. The JSON is
signed as its exact compact bytes.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

from tdxd.core.showing import when
from tdxd.sim.pki import Pki, Signer, make_crl
from tdxd.sim.quotes import QuoteShape
from tdxd.sim.sgx_extension import PckIdentity

__all__ = ["Collateral", "TcbState", "make_collateral"]

_DAY_S = 86400
_VALID_S = 30 * _DAY_S
"""As long as Intel's."""
SignerName = Literal["tcb_signer", "pck"]
Revocable = Literal["pck", "pck_ca", "tcb_signer"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TcbState:
    """What the collateral says of the platform; times are seconds since 1970.

    `issued_s` is one hour before now unless set, `next_update_s` 30 days after it. `signer`
    names the key that signs TCB info and QE identity: "pck" is a forgery. The QE identity's
    evaluation number and the CRLs' times of issue are those of the TCB info unless set.
    """

    tcb_status: str = "UpToDate"
    advisory_ids: tuple[str, ...] = ()
    module_status: str = "UpToDate"
    qe_status: str = "UpToDate"
    tcb_date_s: int = 1755043200  # 2025-08-13
    eval_data_number: int = 20
    issued_s: int | None = None
    next_update_s: int | None = None
    fmspc: bytes | None = None
    signer: SignerName = "tcb_signer"
    qe_eval_data_number: int | None = None
    pck_crl_number: int = 1
    root_crl_number: int = 1
    pck_crl_issued_s: int | None = None
    root_crl_issued_s: int | None = None
    revoked: tuple[Revocable, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Collateral:
    """Signed collateral, in the parts that a PCCS serves. CRLs are DER, signatures 64 bytes."""

    pck_crl_issuer_chain: str
    root_ca_crl: bytes
    pck_crl: bytes
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: bytes
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: bytes

    def to_json(self) -> str:
        """Return the form that `dcap_qvl.QuoteCollateralV3.from_json` reads."""
        values = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        plain = {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in values.items()
        }
        return json.dumps(plain)


def make_collateral(
    pki: Pki, *, tee_tcb_svn: bytes, now_s: int, state: TcbState
) -> Collateral:
    """Sign a set for the platform of `pki`, whose TDX module is at `tee_tcb_svn`."""
    issued = now_s - 3600 if state.issued_s is None else state.issued_s
    ends = issued + _VALID_S if state.next_update_s is None else state.next_update_s
    revoked = {name: getattr(pki, name).certificate for name in state.revoked}
    pck = [revoked[name] for name in revoked if name == "pck"]
    others = [revoked[name] for name in revoked if name != "pck"]
    dates = {"issueDate": when(issued), "nextUpdate": when(ends)}
    tcb_info = _compact(_tcb_info(pki.identity, tee_tcb_svn, dates, state))
    qe_identity = _compact(_qe_identity(dates, state))
    signer: Signer = getattr(pki, state.signer)
    chain = pki.tcb_chain_pem if state.signer == "tcb_signer" else pki.pck_chain_pem
    root_crl = make_crl(
        pki.root,
        number=state.root_crl_number,
        revoked=others,
        this_update_s=_or(state.root_crl_issued_s, issued),
        next_update_s=ends,
    )
    pck_crl = make_crl(
        pki.pck_ca,
        number=state.pck_crl_number,
        revoked=pck,
        this_update_s=_or(state.pck_crl_issued_s, issued),
        next_update_s=ends,
    )
    return Collateral(
        pck_crl_issuer_chain=pki.pck_ca_chain_pem,
        root_ca_crl=root_crl,
        pck_crl=pck_crl,
        tcb_info_issuer_chain=chain,
        tcb_info=tcb_info,
        tcb_info_signature=signer.sign_raw(tcb_info.encode()),
        qe_identity_issuer_chain=chain,
        qe_identity=qe_identity,
        qe_identity_signature=signer.sign_raw(qe_identity.encode()),
    )


def _tcb_info(
    identity: PckIdentity, tee_tcb_svn: bytes, dates: dict[str, str], state: TcbState
) -> dict[str, object]:
    module = {
        "mrsigner": "00" * 48,
        "attributes": "00" * 8,
        "attributesMask": "FF" * 8,
    }
    level = {
        "sgxtcbcomponents": [{"svn": svn} for svn in identity.cpu_svns],
        "pcesvn": identity.pce_svn,
        "tdxtcbcomponents": [{"svn": svn} for svn in tee_tcb_svn],
    }
    major = tee_tcb_svn[1]
    module_level = _level({"isvsvn": tee_tcb_svn[0]}, state.module_status, (), state)
    named = {"id": f"TDX_{major:02X}", **module, "tcbLevels": [module_level]}
    return {
        "id": "TDX",
        "version": 3,
        **dates,
        "fmspc": (state.fmspc or identity.fmspc).hex().upper(),
        "pceId": identity.pce_id.hex().upper(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": state.eval_data_number,
        "tdxModule": module,
        "tdxModuleIdentities": [named],
        "tcbLevels": [_level(level, state.tcb_status, state.advisory_ids, state)],
    }


def _qe_identity(dates: dict[str, str], state: TcbState) -> dict[str, object]:
    good = QuoteShape()
    return {
        "id": "TD_QE",
        "version": 2,
        **dates,
        "tcbEvaluationDataNumber": _or(
            state.qe_eval_data_number, state.eval_data_number
        ),
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": good.qe_mr_signer.hex().upper(),
        "isvprodid": good.qe_isv_prod_id,
        "tcbLevels": [_level({"isvsvn": good.qe_isv_svn}, state.qe_status, (), state)],
    }


def _level(
    tcb: object, status: str, advisories: tuple[str, ...], state: TcbState
) -> dict[str, object]:
    level = {"tcb": tcb, "tcbDate": when(state.tcb_date_s), "tcbStatus": status}
    return {**level, "advisoryIDs": list(advisories)} if advisories else level


def _or(chosen: int | None, default: int) -> int:
    return default if chosen is None else chosen


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
