"""`Tsm` in this process: the simulated platform without a file system."""

from __future__ import annotations

from tdxd.core.quote import MAX_QUOTE_BYTES
from tdxd.errors import EvidenceUnavailableError
from tdxd.sim.platform import SimPlatform
from tdxd.sim.tsm_entries import Quoter

__all__ = ["FakeTsm"]


class FakeTsm:
    """Answers as `ConfigfsTsm` does, with the faults of the platform's description."""

    def __init__(self, platform: SimPlatform, *, attempts: int = 4) -> None:
        self.platform = platform
        self._quoter = Quoter(platform)
        self._attempts = attempts

    def quote(self, report_data: bytes) -> bytes:
        if len(report_data) != 64:
            raise ValueError(f"report data is {len(report_data)} bytes long, not 64")
        if not self._quoter.has_provider:
            raise EvidenceUnavailableError("mkdir: no provider", hint="tdx_guest")
        quote = self._try(report_data)
        if not quote:
            text = "outblob is empty: the host's quoting service failed"
            raise EvidenceUnavailableError(text, hint="the host must run QGS")
        if len(quote) > MAX_QUOTE_BYTES:
            text = f"outblob is longer than {MAX_QUOTE_BYTES} bytes"
            raise EvidenceUnavailableError(text, hint="what made it is no QGS")
        return quote

    def event_log(self) -> bytes:
        return self.platform.event_log

    def _try(self, report_data: bytes) -> bytes:
        for left in reversed(range(self._attempts)):
            try:
                return self._quoter.quote(report_data)
            except OSError as exc:
                if not left:
                    text = f"read outblob: {exc.strerror}"
                    raise EvidenceUnavailableError(text, hint="the host's QGS") from exc
        raise AssertionError("attempts is at least 1")
