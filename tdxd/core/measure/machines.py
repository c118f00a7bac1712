"""What firmware of a kind of machine measures of a boot, as far as kinds differ.

Read from the sources of edk2, and from real logs: Google's and Alibaba's firmware differ from
upstream's, and upstream's from what it was.
"""

from __future__ import annotations

import dataclasses

from tdxd.errors import UsageError

__all__ = ["MACHINES", "VIRTUAL_TPM", "Machine", "machine"]

_RTMR_OF_PCR = {1: 0, 7: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
"""Source: UEFI 2.10, section 38.4.1; PCR 8 to 15 are RTMR2, and PCR 0 is MRTD."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One kind of machine.

    `tpm`: the registers are the PCRs of a TPM, not RTMRs. `separators` are those that get the
    separator when firmware starts the first boot option; `boot_variables` is the one that gets
    BootOrder and Boot####. `mrtd`: MRTD follows from the firmware file in QEMU's way.
    """

    name: str
    summary: str
    tpm: bool = False
    separators: tuple[int, ...] = (1,)
    boot_variables: int = 0
    mrtd: bool = True

    def register(self, pcr: int) -> int:
        """Return the register that gets what a TPM's PCR would."""
        return pcr if self.tpm else _RTMR_OF_PCR.get(pcr, 2)

    @property
    def predicted(self) -> tuple[int, ...]:
        """The registers whose events follow from the image, but for single ones."""
        return (2, 3, 4, 5, 6, 8, 9, *range(11, 16)) if self.tpm else (1, 2)

    @property
    def register_name(self) -> str:
        """What to call one of its registers."""
        return "pcr" if self.tpm else "rtmr"


MACHINES = {
    one.name: one
    for one in (
        Machine(
            name="edk2",
            summary="QEMU and KVM with OVMF of today",
        ),
        Machine(
            name="edk2-old",
            summary="QEMU and KVM with OVMF that extends its separator to RTMR0, as Ubuntu's did",
            separators=(0,),
        ),
        Machine(
            name="google",
            summary="Google Cloud, C3 with TDX; MRTD is in Google's signed endorsement",
            mrtd=False,
        ),
        Machine(
            name="alibaba",
            summary="Alibaba Cloud; its boot variables, which name its disk, are in RTMR1",
            boot_variables=1,
            mrtd=False,
        ),
    )
}
VIRTUAL_TPM = Machine(
    name="virtual-tpm",
    summary="OVMF with a TPM in place of TDX, for tests",
    tpm=True,
    separators=tuple(range(2, 7)),
    boot_variables=1,
    mrtd=False,
)


def machine(name: str) -> Machine:
    """Return the kind of this name.

    Raises: UsageError.
    """
    if name not in MACHINES:
        known = ", ".join(MACHINES)
        raise UsageError(f"machine {name!r} is not known", hint=f"one of {known}")
    return MACHINES[name]
