"""What of a guest is protected, and what is not: facts of a machine in, plain sentences out.

On the measured image everything is protected. A plain distribution, to try things out on, is
told in every status what it lacks.
"""

from __future__ import annotations

import dataclasses

from tdxd.core.config import Config, PlatformConfig, parse_address
from tdxd.core.config_trust import ConfigTrust

__all__ = [
    "Observed",
    "Protection",
    "RootFact",
    "judge",
    "opens_a_shell",
    "quotes_elsewhere",
]

_SHELLS = {
    *("systemd.debug_shell", "rd.systemd.debug_shell", "rd.shell", "rd.break"),
    *("break", "single", "s", "S", "1", "-s", "rescue", "rd.rescue"),
    *("emergency", "-b", "rd.emergency", "SYSTEMD_SULOGIN_FORCE"),
}
"""Words of the command line that open a shell; systemd takes - and _ in them for the same.

Source: kernel-command-line(7), systemd-debug-generator(8), dracut.cmdline(7), initramfs-tools(7);
systemd, src/basic/proc-cmdline.c and runlevel_to_target: what stands behind "--" is read, too.
"""
_UNIT_WORDS = ("systemd.unit", "systemd.wants")
_SHELL_UNITS = {"rescue", "emergency", "debug-shell"}
_OFF = {"0", "no", "off", "false", "n", "f"}
_IMAGE_HINT = "boot the measured guest image: docs/guest-image.md"
_NO_LOCKDOWN = ("none", "")


@dataclasses.dataclass(frozen=True, slots=True)
class RootFact:
    """The root file system; `measured`: dm-verity checks it by the command line's root hash."""

    kind: str
    writable: bool
    measured: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What is seen of a machine, before anybody judges it."""

    tdx_cpu: bool
    root: RootFact
    command_line: str
    swap: tuple[str, ...]
    logins: tuple[str, ...]
    """Running units, or programs, that let a person in."""
    ports: tuple[int, ...]
    """TCP ports that listen on more than loopback."""
    agents: tuple[str, ...]
    """Installed programs by which a host commands a guest."""
    lockdown: str | None
    """The kernel's lockdown: none, integrity or confidentiality; `None`: it has none to show."""


@dataclasses.dataclass(frozen=True, slots=True)
class Protection:
    """One matter: whether it is protected, in words, and what to do if not."""

    name: str
    protected: bool
    text: str
    hint: str = ""


def judge(
    observed: Observed, config: Config, trust: ConfigTrust
) -> tuple[Protection, ...]:
    """Judge every matter, the gravest first."""
    return (
        _tdx(observed, config.platform),
        _root(observed.root),
        _trust(trust),
        _swap(observed),
        _logins(observed),
        _ports(observed, config),
        _agents(observed),
        _lockdown(observed),
        _volumes(config),
    )


def quotes_elsewhere(platform: PlatformConfig) -> bool:
    """Say whether quotes are asked for in another place than the kernel's: a simulator's."""
    usual = PlatformConfig()
    return (platform.tsm, platform.tdx_guest) != (usual.tsm, usual.tdx_guest)


def opens_a_shell(command_line: str) -> tuple[str, ...]:
    """Return the words of a kernel's command line that open a shell to who has the console."""
    return tuple(word for word in command_line.split() if _is_shell(word))


def _is_shell(word: str) -> bool:
    name, _, value = word.replace('"', "").partition("=")
    if name in ("init", "rdinit"):
        return value.endswith("sh")
    alike = name.replace("-", "_") if "." in name else name
    if alike.removeprefix("rd.") in _UNIT_WORDS:
        return value.rpartition(".")[0] in _SHELL_UNITS
    return alike in _SHELLS and value.lower() not in _OFF


def _tdx(observed: Observed, platform: PlatformConfig) -> Protection:
    elsewhere = quotes_elsewhere(platform)
    if observed.tdx_cpu and not elsewhere:
        text = "this machine is a guest that Intel TDX protects"
        return Protection("tdx", protected=True, text=text)
    if elsewhere:
        what = "is a TDX guest, but" if observed.tdx_cpu else "is no TDX guest, and"
        return Protection(
            "tdx",
            protected=False,
            text=f"this machine {what} its quotes come from a place of their own",
            hint="nothing here is protected: of use for trying things out only",
        )
    return Protection(
        "tdx",
        protected=False,
        text="this machine is no TDX guest: its CPU has no flag tdx_guest in /proc/cpuinfo",
        hint="the host must start it as one (QEMU: -object tdx-guest, on an Intel CPU with TDX)",
    )


def _root(root: RootFact) -> Protection:
    what = f"the root file system ({root.kind}, {'writable' if root.writable else 'read-only'})"
    if root.measured and not root.writable:
        text = f"{what} is checked by the root hash on the kernel's command line"
        return Protection("rootfs", protected=True, text=text)
    text = (
        f"{what} is measured by nothing: who changes it on the host gets the same quote"
    )
    return Protection("rootfs", protected=False, text=text, hint=_IMAGE_HINT)


def _trust(trust: ConfigTrust) -> Protection:
    if trust is ConfigTrust.CONTRADICTED:
        text = "config: unmeasured, MRCONFIGID is that of another configuration"
        hint = "start the TD with what tdxd config-digest prints, or mend the configuration"
        return Protection("trust", protected=False, text=text, hint=hint)
    if trust is ConfigTrust.UNMEASURED:
        text = "config: unmeasured, no quote proves it to the key server or to users"
        hint = (
            "put it on a root file system that dm-verity pins, or set MRCONFIGID: "
            "tdxd config-digest"
        )
        return Protection("trust", protected=False, text=text, hint=hint)
    return Protection("trust", protected=True, text=f"config: {trust.value}")


def _swap(observed: Observed) -> Protection:
    if not observed.swap:
        return Protection("swap", protected=True, text="there is no swap")
    areas = ", ".join(observed.swap)
    text = f"this machine swaps to {areas}: keys and models could land there"
    hint = "swapoff -a, and take it out of /etc/fstab"
    return Protection("swap", protected=False, text=text, hint=hint)


def _logins(observed: Observed) -> Protection:
    ways = (*observed.logins, *opens_a_shell(observed.command_line))
    if not ways:
        text = "no login, SSH server or debug shell is there"
        return Protection("logins", protected=True, text=text)
    text = f"a person can get in by {', '.join(ways)}"
    hint = f"systemctl mask them, or {_IMAGE_HINT}"
    return Protection("logins", protected=False, text=text, hint=hint)


def _ports(observed: Observed, config: Config) -> Protection:
    ours = {config.health.listen}
    if config.serving is not None:
        ours |= {config.serving.listen, config.serving.rest_listen}
    known = {parse_address(one).port for one in ours if one is not None}
    others = sorted(set(observed.ports) - known)
    if not others:
        text = "nothing but the front and health takes connections"
        return Protection("ports", protected=True, text=text)
    numbers = ", ".join(map(str, others))
    text = f"other programs take connections, on TCP port {numbers}"
    hint = "stop them: what is taken over through them reads models and keys"
    return Protection("ports", protected=False, text=text, hint=hint)


def _agents(observed: Observed) -> Protection:
    if not observed.agents:
        text = "no agent of the host's is installed"
        return Protection("agents", protected=True, text=text)
    names = ", ".join(observed.agents)
    hint = (
        "take it out of the image, or be sure that the policy pins an image that has it"
    )
    text = f"the host can command this guest by {names}"
    return Protection("agents", protected=False, text=text, hint=hint)


def _lockdown(observed: Observed) -> Protection:
    if observed.lockdown is None or observed.lockdown in _NO_LOCKDOWN:
        text = "kernel lockdown is off: root can put other code into the running kernel"
        hint = "lockdown=integrity on the kernel's command line"
        return Protection("lockdown", protected=False, text=text, hint=hint)
    text = f"kernel lockdown is {observed.lockdown}"
    return Protection("lockdown", protected=True, text=text)


def _volumes(config: Config) -> Protection:
    foreign = [one.id for one in config.volume if one.kind == "luks2"]
    if not foreign:
        text = "every volume is verified to be what its owner sealed"
        return Protection("volumes", protected=True, text=text)
    names = ", ".join(foreign)
    text = f"integrity: none for volume {names}: the host can change what is in it"
    hint = "seal its content: tdx-seal create"
    return Protection("volumes", protected=False, text=text, hint=hint)
