"""One simulated TD: its measurements, its quotes, and the collateral that goes with them."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import threading
from pathlib import Path
from typing import Any

from tdxd.core.eventlog import encode_event_log, extend, replay
from tdxd.core.quote import TdReport, td_attributes_bytes
from tdxd.core.td_report import encode_td_report, parse_td_report
from tdxd.errors import HostError, UsageError
from tdxd.sim.collateral import Collateral, TcbState, make_collateral
from tdxd.sim.description import (
    DEFAULT_DESCRIPTION,
    Description,
    load_description,
    parse_description,
)
from tdxd.sim.pki import Pki, load_pki, make_pki, save_pki
from tdxd.sim.quotes import QuoteShape, build_quote, split_overrides
from tdxd.sim.sgx_extension import PckIdentity

__all__ = ["SimPlatform"]

FMSPC = b"\x00SIM\x00\x00"
"""No family of Intel's."""
CPU_SVNS = bytes.fromhex("04040202040100050000000000000000")
PCE_SVN = 11
_EVENT_LOG_BYTES = 16384
_DESCRIPTION_NAME = "platform.toml"
_PKI_NAME = "pki"
_GUEST_RTMRS = (2, 3)
"""The registers that Linux lets a guest extend."""


class SimPlatform:
    """A TD on a platform with its own root CA.

    Threads may share one. The RTMRs start as the boot events left them.
    """

    def __init__(self, pki: Pki, description: Description) -> None:
        self.pki = pki
        self.description = description
        td = description.td
        events = [one.event() for one in description.event]
        self.event_log = encode_event_log(events, size_bytes=_EVENT_LOG_BYTES)
        self._rtmrs = list(replay(events))
        if td.rtmrs:
            self.event_log = b""
            self._rtmrs = [bytes.fromhex(value) for value in td.rtmrs]
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls, directory: Path | None = None, *, description: Description | None = None
    ) -> SimPlatform:
        """Make a platform with new keys, in memory or also in a new directory.

        The directory gets the default `platform.toml`; `description` serves in memory only.

        Raises: HostError; UsageError if the directory holds a platform already.
        """
        pki = make_pki(_random_identity())
        if directory is not None:
            save_pki(pki, directory / _PKI_NAME)
            _write(directory / _DESCRIPTION_NAME, DEFAULT_DESCRIPTION)
        default = parse_description(DEFAULT_DESCRIPTION, source=_DESCRIPTION_NAME)
        return cls(pki, description or default)

    @classmethod
    def load(cls, directory: Path) -> SimPlatform:
        """Read what `create` made, with the edits since.

        Raises: HostError, ConfigError, DataError.
        """
        description = load_description(directory / _DESCRIPTION_NAME)
        return cls(load_pki(directory / _PKI_NAME), description)

    @property
    def root_der(self) -> bytes:
        """Return the root CA's certificate: what a key server pins."""
        return self.pki.root.der

    @property
    def root_pem(self) -> str:
        """Return the root CA's certificate as PEM."""
        return self.pki.root.pem

    @property
    def fmspc(self) -> str:
        """Return the platform's family, as PCS spells it: 12 digits, upper case."""
        return self.pki.identity.fmspc.hex().upper()

    @property
    def rtmrs(self) -> tuple[bytes, bytes, bytes, bytes]:
        """Return RTMR0 to RTMR3 as they stand now."""
        with self._lock:
            rtmr0, rtmr1, rtmr2, rtmr3 = self._rtmrs
        return rtmr0, rtmr1, rtmr2, rtmr3

    def extend_rtmr(self, index: int, digest: bytes) -> None:
        """Extend RTMR2 or RTMR3 by a 48-byte digest, as a guest may.

        Raises: UsageError for another register or size.
        """
        if index not in _GUEST_RTMRS:
            raise UsageError(f"a guest cannot extend RTMR{index}, only RTMR2 and RTMR3")
        if len(digest) != 48:
            raise UsageError(f"RTMR digest is {len(digest)} bytes long, not 48")
        with self._lock:
            self._rtmrs[index] = extend(self._rtmrs[index], digest)

    def report(self, report_data: bytes = bytes(64)) -> TdReport:
        """Return the TD report over 64 bytes of report data.

        Raises: UsageError for another size.
        """
        if len(report_data) != 64:
            raise UsageError(f"report data is {len(report_data)} bytes long, not 64")
        td = self.description.td
        return TdReport(
            tee_tcb_svn=bytes.fromhex(td.tee_tcb_svn),
            mr_seam=bytes.fromhex(td.mr_seam),
            mr_signer_seam=bytes(48),
            seam_attributes=bytes(8),
            td_attributes=td_attributes_bytes(td.td_attributes),
            xfam=bytes.fromhex(td.xfam),
            mr_td=bytes.fromhex(td.mrtd),
            mr_config_id=bytes.fromhex(td.mr_config_id),
            mr_owner=bytes.fromhex(td.mr_owner),
            mr_owner_config=bytes.fromhex(td.mr_owner_config),
            rtmrs=self.rtmrs,
            report_data=report_data,
        )

    def quote(self, report_data: bytes, **overrides: Any) -> bytes:
        """Return a quote; `overrides` are fields of `TdReport` and of `QuoteShape`.

        Raises: UsageError for report data that is not 64 bytes; TypeError for an unknown field.
        """
        of_report, of_shape = split_overrides(overrides)
        report = dataclasses.replace(self.report(report_data), **of_report)
        shape = QuoteShape(version=self.description.td.quote_version)
        return build_quote(self.pki, report, dataclasses.replace(shape, **of_shape))

    def td_report(self, report_data: bytes) -> bytes:
        """Return the TDREPORT over 64 bytes of report data, with this platform's MAC.

        Raises: UsageError for another size.
        """
        report = self.report(report_data)
        bare = encode_td_report(report, mac=bytes(32))
        return encode_td_report(report, mac=self._report_mac(bare))

    def quote_of(self, td_report: bytes) -> bytes:
        """Return a quote over a TDREPORT, as the quoting enclave makes it.

        Raises: UsageError for one that this platform did not make.
        """
        report = parse_td_report(td_report)
        bare = encode_td_report(report, mac=bytes(32))
        made = encode_td_report(report, mac=self._report_mac(bare))
        if not hmac.compare_digest(made, td_report):
            raise UsageError("the TD report's MAC is not this platform's")
        shape = QuoteShape(version=self.description.td.quote_version)
        return build_quote(self.pki, report, shape)

    def _report_mac(self, bare: bytes) -> bytes:
        """Return the MAC by a key that stays with the platform, as with its CPU."""
        secret = self.pki.attestation.private_numbers().private_value.to_bytes(
            32, "big"
        )
        return hmac.digest(
            hashlib.sha256(b"TD report" + secret).digest(), bare, "sha256"
        )

    def collateral(self, now_s: int, **overrides: Any) -> Collateral:
        """Sign fresh collateral; `overrides` are fields of `TcbState`."""
        tcb = self.description.tcb
        state = TcbState(
            tcb_status=tcb.status,
            advisory_ids=tcb.advisories,
            eval_data_number=tcb.evaluation_data_number,
        )
        return make_collateral(
            self.pki,
            tee_tcb_svn=bytes.fromhex(self.description.td.tee_tcb_svn),
            now_s=now_s,
            state=dataclasses.replace(state, **overrides),
        )

    def collateral_json(self, now_s: int, **overrides: Any) -> str:
        """Return `collateral` in the form of `dcap_qvl.QuoteCollateralV3.from_json`."""
        return self.collateral(now_s, **overrides).to_json()


def _random_identity() -> PckIdentity:
    return PckIdentity(
        ppid=os.urandom(16),
        platform_instance_id=os.urandom(16),
        fmspc=FMSPC,
        pce_id=bytes(2),
        cpu_svns=CPU_SVNS,
        pce_svn=PCE_SVN,
    )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise HostError.of("write", str(path), exc) from exc
