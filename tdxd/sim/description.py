"""The description of a simulated TD: `platform.toml`, written by `tdx-sim init`, edited by hand.

A change takes effect when the next `tdx-sim` command reads the file: as when a TD boots anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
from pathlib import Path
from typing import Literal

from tdxd.core.decode import decode
from tdxd.core.eventlog import Event
from tdxd.core.quote import td_attributes_bytes
from tdxd.errors import ConfigError, HostError

__all__ = [
    "DEFAULT_DESCRIPTION",
    "Description",
    "EventDescription",
    "Faults",
    "TcbDescription",
    "TdDescription",
    "load_description",
    "parse_description",
]

EVENT_TYPES = {
    "EV_NO_ACTION": 0x3,
    "EV_SEPARATOR": 0x4,
    "EV_EVENT_TAG": 0x6,
    "EV_IPL": 0xD,
    "EV_EFI_VARIABLE_DRIVER_CONFIG": 0x80000001,
    "EV_EFI_VARIABLE_BOOT": 0x80000002,
    "EV_EFI_BOOT_SERVICES_APPLICATION": 0x80000003,
    "EV_EFI_ACTION": 0x80000007,
    "EV_EFI_PLATFORM_FIRMWARE_BLOB2": 0x8000000A,
    "EV_EFI_HANDOFF_TABLES2": 0x8000000B,
}
"""Source: TCG PC Client Platform Firmware Profile 1.06, section 10.4.1."""


def _check_hex(name: str, value: str, size_bytes: int) -> None:
    try:
        found = len(bytes.fromhex(value))
    except ValueError:
        raise ValueError(f"{name} is not hex: {value[:20]!r}") from None
    if found != size_bytes:
        raise ValueError(f"{name} is {found} bytes long, not {size_bytes}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventDescription:
    """One measurement of the boot; its digest is SHA-384 of `data` as UTF-8."""

    rtmr: int
    type: str
    data: str

    def __post_init__(self) -> None:
        if not 0 <= self.rtmr <= 3:
            raise ValueError(f"rtmr is {self.rtmr}, not 0 to 3")
        if self.type not in EVENT_TYPES:
            known = ", ".join(EVENT_TYPES)
            raise ValueError(f"unknown event type {self.type!r}; known are {known}")

    def event(self) -> Event:
        """Return the event as it stands in the log."""
        data = self.data.encode()
        return Event(
            rtmr=self.rtmr,
            type=EVENT_TYPES[self.type],
            digest=hashlib.sha384(data).digest(),
            data=data,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TdDescription:
    """The TD's fixed fields, in hex. With `rtmrs` set there is no event log."""

    mrtd: str = hashlib.sha384(b"tdx-sim firmware 1").hexdigest()
    mr_seam: str = hashlib.sha384(b"tdx-sim TDX module").hexdigest()
    mr_config_id: str = "00" * 48
    mr_owner: str = "00" * 48
    mr_owner_config: str = "00" * 48
    td_attributes: tuple[str, ...] = ("SEPT_VE_DISABLE",)
    xfam: str = "e702060000000000"
    tee_tcb_svn: str = "0d010400000000000000000000000000"
    quote_version: Literal[4, 5] = 4
    rtmrs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mrtd", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config"):
            _check_hex(name, getattr(self, name), 48)
        _check_hex("xfam", self.xfam, 8)
        _check_hex("tee_tcb_svn", self.tee_tcb_svn, 16)
        td_attributes_bytes(self.td_attributes)
        if len(self.rtmrs) not in (0, 4):
            raise ValueError(f"rtmrs has {len(self.rtmrs)} entries, not 4")
        for value in self.rtmrs:
            _check_hex("rtmrs", value, 48)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TcbDescription:
    """What the collateral says of the platform."""

    status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    evaluation_data_number: int = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong when a quote is asked for.

    `quote`: "empty" is a quoting service that failed, "error" the same to a kernel of 2026 (EIO),
    "timeout" one that never answered (ETIMEDOUT), "oversize" one whose quote has 20,000 bytes,
    "too-large" one whose quote is more than the kernel takes (EFBIG), "no-provider" a kernel
    without TDX. The first `count` quotes fail so, or all of them if it is 0. `delay_s` is how
    long a quote takes.

    `tsm`: "absent" is a kernel before 6.7, without configfs-tsm. `rtmr`: "absent" is a kernel
    before 6.16, without measurement files; "fails" is a TDX module that refuses every extension
    (EIO). `report`: "fails" is a TDX module that makes no TD report (EIO), "other-data" one over
    other report data.

    `qgs` is how a QGS on a socket answers: "error" reports `qgs_error`, "no-quote" success
    without a quote, "split" sends single bytes, "swapped" a length of the wrong byte order,
    "swapped-header" such a header, "oversize" announces 2 GiB, "hang-up" ends in mid-answer,
    "minor-0" is an old one, "other-type" answers another question.
    """

    quote: Literal[
        "none", "empty", "error", "timeout", "oversize", "too-large", "no-provider"
    ] = "none"
    count: int = 0
    delay_s: float = 0.0
    tsm: Literal["none", "absent"] = "none"
    rtmr: Literal["none", "absent", "fails"] = "none"
    report: Literal["none", "fails", "other-data"] = "none"
    qgs: Literal[
        "none",
        "error",
        "no-quote",
        "split",
        "swapped",
        "swapped-header",
        "oversize",
        "hang-up",
        "minor-0",
        "other-type",
    ] = "none"
    qgs_error: int = 0x12001

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}, less than 0")
        if not 0 <= self.delay_s <= 60:
            raise ValueError(f"delay_s is {self.delay_s}, not 0 to 60")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The whole of `platform.toml`."""

    td: TdDescription = TdDescription()
    event: tuple[EventDescription, ...] = ()
    tcb: TcbDescription = TcbDescription()
    faults: Faults = Faults()

    def __post_init__(self) -> None:
        if self.td.rtmrs and self.event:
            raise ValueError("give td.rtmrs or [[event]], not both")


def parse_description(text: str, *, source: str) -> Description:
    """Read the TOML text of a `platform.toml`; `source` starts every message.

    Raises: ConfigError.
    """
    try:
        mapping = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{source}: {exc}") from exc
    return decode(Description, mapping, source=source)


def load_description(path: Path) -> Description:
    """Read a `platform.toml`.

    Raises: ConfigError, HostError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        hint = f"make the platform first: tdx-sim init {path.parent}"
        raise HostError.of("read", str(path), exc, hint=hint) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 text") from exc
    return parse_description(text, source=str(path))


DEFAULT_DESCRIPTION = f"""\
# A simulated TD. tdx-sim reads this file when it starts, as a TD boots.

[td]
mrtd = "{TdDescription().mrtd}"
td_attributes = ["SEPT_VE_DISABLE"]   # add "DEBUG" to make a TD that no owner should trust
mr_config_id = "{"00" * 48}"
quote_version = 4                     # 5: with a TD 1.5 report
# rtmrs = ["…", "…", "…", "…"]        # instead of the events below; then there is no event log

# The boot, in order. Each event extends one RTMR with the SHA-384 of its data.
[[event]]
rtmr = 0
type = "EV_EFI_PLATFORM_FIRMWARE_BLOB2"
data = "virtual firmware volume 1"
[[event]]
rtmr = 0
type = "EV_EFI_VARIABLE_DRIVER_CONFIG"
data = "SecureBoot=1"
[[event]]
rtmr = 0
type = "EV_SEPARATOR"
data = ""
[[event]]
rtmr = 1
type = "EV_EFI_BOOT_SERVICES_APPLICATION"
data = "unified kernel image 1"
[[event]]
rtmr = 1
type = "EV_EFI_ACTION"
data = "Exit Boot Services Invocation"
[[event]]
rtmr = 2
type = "EV_EVENT_TAG"
data = "command line: root=/dev/dm-0 ro roothash=1"
[[event]]
rtmr = 2
type = "EV_EVENT_TAG"
data = "initial RAM disk 1"

[tcb]
status = "UpToDate"                   # or OutOfDate, ConfigurationNeeded, Revoked …
advisories = []
evaluation_data_number = 20

[faults]
quote = "none"                        # or empty, error, timeout, oversize, too-large, no-provider
count = 0                             # so many quotes fail, then all is well; 0: all fail
delay_s = 0.0
tsm = "none"                          # or absent: a kernel before 6.7, without configfs-tsm
rtmr = "none"                         # or absent: a kernel before 6.16; fails: no extension works
report = "none"                       # or fails, other-data: the TDX module's TD report
qgs = "none"                          # or error, no-quote, split, swapped, swapped-header,
                                      # oversize, hang-up, minor-0, other-type: QGS on a socket
qgs_error = 0x12001
"""
