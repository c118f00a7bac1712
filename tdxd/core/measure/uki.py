"""A unified kernel image of systemd-stub: its parts, and what its stub and kernel measure.

Whether a program measures to RTMRs is told by the GUID of EFI_CC_MEASUREMENT_PROTOCOL in it:
without, it cannot find the protocol. systemd-stub has it since version 256, Linux since 6.9.

Source: systemd, src/fundamental/uki.h (order of the sections), src/boot/measure.c, src/boot/stub.c;
Linux, drivers/firmware/efi/libstub/efi-stub-helper.c (tagged events).
"""

from __future__ import annotations

import dataclasses
import re
import uuid

from tdxd.core.measure.pe import PeImage, Section, authenticode_sha384, parse_pe
from tdxd.core.showing import shown
from tdxd.errors import DataError

__all__ = ["Uki", "parse_uki"]

_MEASURED = (
    (".linux", 252),
    (".osrel", 252),
    (".cmdline", 252),
    (".initrd", 252),
    (".ucode", 256),
    (".splash", 252),
    (".dtb", 252),
    (".uname", 253),
    (".sbat", 253),
    (".pcrpkey", 252),
    (".profile", 257),
    (".dtbauto", 257),
    (".hwids", 257),
    (".efifw", 258),
)
"""In the order in which they are measured, and the version that began to."""
_PARTS = (*(name for name, _ in _MEASURED), ".pcrsig")
_OLDEST, _NEWEST = 252, 257
_VERSION = re.compile(rb"#### LoaderInfo: systemd-stub (\d{1,4})([^#]{0,80}) ####")
_CC_PROTOCOL = uuid.UUID("96751a3d-72f4-41a6-a794-ed5d0e67ae6b").bytes_le
_LOAD_OPTIONS, _INITRD = b"LOADED_IMAGE::LoadOptions", b"Linux initrd"
_STARTS_ITSELF = 258
_ADDS_ARCHIVES = 256
"""From here on the stub may hand archives of its own to the kernel behind .initrd."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Uki:
    """A UKI; `version` is that of its stub.

    `stub_to_rtmr` and `kernel_to_rtmr` say whether each knows how to extend RTMRs;
    `kernel_measures_options` and `kernel_measures_initrd` what the kernel's EFI stub measures.
    """

    image: PeImage
    version: int
    version_text: str
    stub_to_rtmr: bool
    kernel_to_rtmr: bool
    kernel_measures_options: bool
    kernel_measures_initrd: bool

    @property
    def digest(self) -> bytes:
        """What firmware measures when it loads it, 48 bytes."""
        return authenticode_sha384(self.image)

    def section(self, name: str) -> bytes | None:
        """Return a section as it lies in memory, None if there is none."""
        one = self._part(name)
        return None if one is None else self.image.memory_of(one)

    def _part(self, name: str) -> Section | None:
        for one in self.image.sections:
            if one.name == name and one.memory_bytes:
                return one
        return None

    @property
    def measured_sections(self) -> tuple[str, ...]:
        """The sections that the stub measures, in that order."""
        return tuple(
            name
            for name, since in _MEASURED
            if self.version >= since and self._part(name) is not None
        )

    @property
    def starts_kernel_itself(self) -> bool:
        """Whether the stub may start the kernel without firmware, which then measures nothing."""
        return self.version >= _STARTS_ITSELF

    @property
    def known_rules(self) -> bool:
        """Whether it is known what a stub of this version measures."""
        return self.version <= _NEWEST

    def load_options(self) -> bytes | None:
        """Return what the kernel gets and measures as its command line, in UTF-16 with its NUL.

        None where it depends on the boot, or where versions clean up the text differently.
        """
        raw = self.section(".cmdline")
        if raw is None:
            return None
        try:
            text = raw.split(b"\0", 1)[0].decode()
        except UnicodeDecodeError:
            return None
        plain = text.isascii() and text.isprintable() and text == text.strip()
        return (text + "\0").encode("utf-16-le") if plain and text else None

    def initrd(self) -> bytes | None:
        """Return what the kernel gets as its initrd; None if the stub makes some of it."""
        adds = self.version >= _ADDS_ARCHIVES
        if adds or self.section(".pcrsig") or self.section(".pcrpkey"):
            return None
        return self.section(".initrd")


def parse_uki(data: bytes, *, source: str = "UKI") -> Uki:
    """Read a UKI.

    Raises: DataError for another kind of PE image, and for versions too old to be known.
    """
    image = parse_pe(data, source=source)
    names = [one.name for one in image.sections]
    _refuse_doubles(names, source)
    own = b"".join(_own(image))
    version = _VERSION.search(own)
    if version is None or ".linux" not in names:
        text = f"{source} is no unified kernel image of systemd-stub"
        hint = "only a UKI that firmware starts itself can be computed; enroll others"
        raise DataError(text, hint=hint)
    number = int(version[1])
    if number < _OLDEST:
        text = f"{source} has systemd-stub {number}, older than {_OLDEST}"
        raise DataError(text, hint="make the UKI with a newer stub")
    kernel = b"".join(
        image.content_of(one) for one in image.sections if one.name == ".linux"
    )
    return Uki(
        image=image,
        version=number,
        version_text=shown((version[1] + version[2]).decode("ascii", "replace"), 84),
        stub_to_rtmr=_knows_cc(own),
        kernel_to_rtmr=_knows_cc(kernel),
        kernel_measures_options=_LOAD_OPTIONS in kernel,
        kernel_measures_initrd=_INITRD in kernel,
    )


def _refuse_doubles(names: list[str], source: str) -> None:
    for name in _PARTS:
        if names.count(name) > 1:
            text = f"{source} has {names.count(name)} sections {name}"
            hint = "images of several profiles boot in several ways: enroll them"
            raise DataError(text, hint=hint)


def _own(image: PeImage) -> list[bytes]:
    """Return the sections of the stub itself."""

    def is_own(section: Section) -> bool:
        return section.name not in _PARTS

    return [image.content_of(one) for one in image.sections if is_own(one)]


def _knows_cc(program: bytes) -> bool:
    """Find the protocol's GUID, whole or as the two numbers of a compiler."""
    return _CC_PROTOCOL[:8] in program and _CC_PROTOCOL[8:] in program
