"""Each finding of the doctor by the facts that lead to it; facts are changed one by one."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from tdxd.core import keyrelease
from tdxd.core.ccel import CcelTable
from tdxd.core.config import (
    Config,
    KeyReleaseConfig,
    MapperConfig,
    PlatformConfig,
    SecurityConfig,
    ServingConfig,
    VolumeConfig,
)
from tdxd.core.config_trust import ConfigTrust
from tdxd.core.protection import Observed, RootFact
from tdxd.guest import doctor
from tdxd.guest.doctor_evidence import has_length_fix
from tdxd.guest.finding import Facts, Finding, ImageFact
from tdxd.host.evidence_facts import EvidenceFacts
from tdxd.host.facts import MachineFacts, Problem
from tdxd.host.key_server_facts import KeyServerFacts
from tdxd.proto import keyrelease_pb2

PIN = bytes(range(32))
PIN_TEXT = "ed25519:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
CONFIG = Config(
    key_release=KeyReleaseConfig(
        servers=("keys.example:50051",), ca="/etc/ca.pem", signing_key=PIN_TEXT
    ),
    volume=(VolumeConfig(id="m", image="/srv/m.img"),),
    serving=ServingConfig(),
)
MACHINE = MachineFacts(
    uid=0,
    kernel="6.18.21",
    device_mapper=True,
    loop=True,
    file_systems=frozenset({"erofs"}),
    memory_bytes=8 * 2**30,
    unit="enabled",
    group=True,
    user=True,
    clock_s=2e9,
    clock_set=True,
    built_s=1e9,
)
OBSERVED = Observed(
    tdx_cpu=True,
    root=RootFact("erofs", writable=False, measured=True),
    command_line="roothash=00 lockdown=integrity",
    swap=(),
    logins=(),
    ports=(8500,),
    agents=(),
    lockdown="integrity",
)
EVIDENCE = EvidenceFacts(
    configfs=True,
    module=True,
    report_dir=True,
    provider=True,
    device=True,
    quote=None,
    quote_bytes=5006,
    quote_s=0.04,
    event_log_bytes=65536,
)


def challenge(pin: bytes = PIN) -> bytes:
    response = keyrelease_pb2.ChallengeResponse(
        token=b"t", signing_key_sha256=keyrelease.signing_key_id(pin)
    )
    return response.SerializeToString()


SERVER = KeyServerFacts(
    server="keys.example:50051",
    step="answered",
    challenge=challenge(),
    clock_ahead_s=1.0,
)
HEALTHY = Facts(
    config=CONFIG,
    trust=ConfigTrust.CONFIG_ID,
    machine=MACHINE,
    observed=OBSERVED,
    evidence=EVIDENCE,
    ca=None,
    servers=(SERVER,),
    haproxy="/usr/sbin/haproxy",
    model_server="/usr/bin/tensorflow_model_server",
    model_server_problem=None,
    images=(ImageFact("m", "/srv/m.img", (2**30,)),),
)


def changed(**changes: Any) -> Facts:
    """Return the healthy facts, but for some, by the names of what they are made of."""
    facts = HEALTHY
    for name, value in changes.items():
        for part in ("machine", "observed", "evidence"):
            record = getattr(facts, part)
            if name in {field.name for field in dataclasses.fields(record)}:
                new = dataclasses.replace(record, **{name: value})
                facts = dataclasses.replace(facts, **{part: new})
                break
        else:
            if name in {field.name for field in dataclasses.fields(Config)}:
                config = dataclasses.replace(facts.config, **{name: value})
                facts = dataclasses.replace(facts, config=config)
            else:
                facts = dataclasses.replace(facts, **{name: value})
    return facts


def found(name: str, facts: Facts) -> Finding:
    """Return the one finding of that name, after a look at what each must have."""
    findings = doctor.diagnose(facts)
    for one in findings:
        assert one.text
        assert "\n" not in one.text + one.todo
        assert bool(one.todo) == (one.level != "ok"), one
    matching = [one for one in findings if one.name == name]
    assert len(matching) == 1, [one.name for one in findings]
    return matching[0]


def test_a_healthy_guest_has_nothing_but_ok() -> None:
    findings = doctor.diagnose(HEALTHY)
    assert {one.level for one in findings} == {"ok"}, findings
    assert doctor.report(findings)["exit"] == 0


SIMULATED = PlatformConfig(tsm="/run/sim/report", tdx_guest="/run/sim/tdx_guest")
IOCTL = PlatformConfig(evidence="ioctl")
NO_RTMR = Problem("open rtmr3:sha384: no such file", "Linux 6.16")

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    # name of the finding, what is wrong, level, words
    ("tdx", {"tdx_cpu": False}, "fail", "no flag tdx_guest"),
    ("tdx", {"tdx_cpu": False, "platform": SIMULATED}, "warn", "a place of their own"),
    ("quotes-by", {"provider": False, "platform": IOCTL}, "ok", "signed by QGS"),
    ("quotes-by", {"provider": False}, "ok", "signed by QGS at vsock:2"),
    (
        "quotes-by",
        {"device": False, "platform": IOCTL},
        "fail",
        "no device /dev/tdx_guest",
    ),
    (
        "quotes-by",
        {"provider": False, "device": False},
        "fail",
        "has no provider of TDX quotes",
    ),
    (
        "quotes-by",
        {"provider": False, "device": False, "report_dir": False, "configfs": False},
        "fail",
        "configfs is not mounted",
    ),
    (
        "quotes-by",
        {"provider": False, "device": False, "report_dir": False, "module": False},
        "fail",
        "module tdx_guest is not loaded",
    ),
    (
        "quotes-by",
        {"provider": False, "device": False, "report_dir": False},
        "fail",
        "this kernel has no /sys/kernel/config/tsm/report",
    ),
    (
        "quotes-by",
        {"provider": False, "platform": PlatformConfig(evidence="configfs")},
        "fail",
        "has no provider",
    ),
    ("quote", {"quote": Problem("QGS is silent")}, "fail", "no quote: QGS is silent"),
    ("quote", {"quote_s": 9.0}, "warn", r"took 9\.0 s"),
    ("event-log", {"event_log_bytes": 0}, "warn", "no event log at /sys/firmware"),
    (
        "event-log",
        {"event_log": Problem("CCEL is longer than 1048576 bytes")},
        "fail",
        "longer than",
    ),
    (
        "event-log",
        {"table_problem": Problem("ACPI table CCEL has a wrong checksum")},
        "fail",
        "checksum",
    ),
    (
        "event-log",
        {"table": CcelTable(4096, 1)},
        "fail",
        "65536 bytes long, ACPI says 4096",
    ),
    ("event-log", {"table": CcelTable(65536, 1)}, "ok", "65536 bytes"),
    ("rtmr3", {"rtmr": NO_RTMR}, "fail", "cannot be extended"),
    (
        "rtmr3",
        {"rtmr": NO_RTMR, "platform": PlatformConfig(extend="never")},
        "warn",
        "cannot be extended",
    ),
    ("kernel", {"kernel": "6.18.20-cloud"}, "warn", "CVE-2026-31470"),
    ("config", {"volume": ()}, "warn", "names no volume"),
    ("trust", {"trust": ConfigTrust.UNMEASURED}, "fail", "unmeasured"),
    (
        "trust",
        {
            "trust": ConfigTrust.CONTRADICTED,
            "security": SecurityConfig(accept_unmeasured=True),
        },
        "fail",
        "of another configuration",
    ),
    (
        "trust",
        {
            "trust": ConfigTrust.UNMEASURED,
            "security": SecurityConfig(accept_unmeasured=True),
        },
        "warn",
        "accepts that",
    ),
    ("root", {"uid": 1000}, "warn", "uid 1000"),
    ("swap", {"swap": ("/dev/vda2",)}, "fail", "swaps to /dev/vda2"),
    (
        "swap",
        {"swap": ("/swap",), "security": SecurityConfig(accept_swap=True)},
        "warn",
        "accepts that",
    ),
    ("rootfs", {"root": RootFact("ext4", True, False)}, "warn", "measured by nothing"),
    ("logins", {"logins": ("ssh.service",)}, "warn", r"by ssh\.service"),
    ("ports", {"ports": (22, 8500)}, "warn", "on TCP port 22$"),
    ("lockdown", {"lockdown": None}, "warn", "lockdown is off"),
    (
        "volumes",
        {"volume": (VolumeConfig(id="old", image="/srv/o.img", kind="luks2"),)},
        "warn",
        "integrity: none for volume old",
    ),
    ("mapper", {"file_systems": frozenset()}, "fail", "no erofs"),
    ("mapper", {"loop": False}, "fail", "/dev/loop-control"),
    ("mapper", {"device_mapper": False}, "warn", "decrypted whole"),
    (
        "mapper",
        {"device_mapper": False, "mapping": MapperConfig(mapper="dm")},
        "fail",
        "no device mapper answers",
    ),
    (
        "mapper",
        {"device_mapper": False, "mapping": MapperConfig(mapper="memory")},
        "ok",
        "by memory",
    ),
    ("unit", {"unit": "disabled"}, "warn", "does not start with the machine"),
    ("unit", {"unit": "absent"}, "warn", "no tdxd.service"),
    ("unit", {"unit": "no-systemd"}, "warn", "systemd does not run"),
    ("agents", {"agents": ("cloud-init",)}, "warn", "cloud-init"),
    ("group", {"group": False}, "warn", "no group tdxd"),
    ("user", {"user": False}, "fail", "no user tdxd-serve"),
    ("front", {"haproxy": None}, "fail", "no program haproxy"),
    (
        "model-server",
        {"model_server_problem": Problem("no model server is installed", "install")},
        "fail",
        "no model server",
    ),
    (
        "image m",
        {"images": (ImageFact("m", "/srv/m.img", ()),)},
        "warn",
        "no file matches",
    ),
    (
        "image m",
        {"device_mapper": False, "memory_bytes": 2**29},
        "fail",
        r"takes 512\.0 MiB",
    ),
    ("memory", {"memory_bytes": 2**29}, "warn", r"1024\.0 MiB together"),
    ("key-server", {"ca": Problem("key_release.ca /x: none", "copy")}, "fail", "/x"),
    ("clock", {"servers": (), "clock_s": 1.0}, "warn", "was installed"),
    ("clock", {"servers": (), "clock_set": False}, "warn", "no time service"),
    ("clock", {"servers": (), "clock_set": None}, "ok", "nothing says"),
]


@pytest.mark.parametrize(("name", "changes", "level", "words"), CASES)
def test_each_fact_leads_to_its_finding(
    name: str, changes: dict[str, Any], level: str, words: str
) -> None:
    facts = changed(**changes)
    one = found(name, facts)
    assert one.level == level
    assert re.search(words, one.text), one.text
    expected = 69 if any(x.level == "fail" for x in doctor.diagnose(facts)) else 0
    assert doctor.report(doctor.diagnose(facts))["exit"] == expected
    assert level != "fail" or expected == 69


NAME = "key-server keys.example:50051"


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("name", "its name is not found"),
        ("connection", "cannot be reached"),
        ("certificate", "does not prove itself to key_release.ca"),
        ("challenge", "does not answer as a key server"),
    ],
)
def test_each_step_to_the_key_server_has_its_words(step: Any, words: str) -> None:
    failed = KeyServerFacts(
        server=SERVER.server, step=step, problem=Problem("why", "do this")
    )
    one = found(NAME, changed(servers=(failed,)))
    assert (one.level, one.todo) == ("fail", "do this")
    assert words in one.text


def test_another_signing_key_is_a_pin_that_does_not_fit() -> None:
    other = dataclasses.replace(SERVER, challenge=challenge(bytes(32)))
    one = found(NAME, changed(servers=(other,)))
    assert one.level == "fail"
    assert f"sha256:{keyrelease.signing_key_id(bytes(32)).hex()}" in one.text
    assert "tdx-keyd init" in one.todo


def test_a_challenge_that_is_none_is_named() -> None:
    other = dataclasses.replace(SERVER, challenge=b"\xff")
    assert found(NAME, changed(servers=(other,))).level == "fail"


def test_a_dead_key_server_beside_a_good_one_is_a_warning() -> None:
    dead = KeyServerFacts(
        server="dead.example:1", step="name", problem=Problem("why", "do this")
    )
    facts = changed(servers=(dead, SERVER))
    one = found("key-server dead.example:1", facts)
    assert one.level == "warn"
    assert "another one answers" in one.text
    assert found(NAME, facts).level == "ok"
    assert doctor.report(doctor.diagnose(facts))["exit"] == 0


@pytest.mark.parametrize(
    ("ahead_s", "words"),
    [
        (86400.0 * 3653, "3653 days ahead of"),
        (-86400.0 * 3653, "3653 days behind"),
        (7200.0 * 2, "4 hours ahead of"),
        (-200.0, "3 minutes behind"),
        (90.0, "90 seconds ahead of"),
    ],
)
def test_a_clock_far_off_harms_users_and_not_keys(ahead_s: float, words: str) -> None:
    off = dataclasses.replace(SERVER, clock_ahead_s=ahead_s)
    one = found("clock", changed(servers=(off,)))
    assert one.level == "warn"
    assert words in one.text
    assert "keys do not depend on this clock" in one.text
    assert "users' certificates" in one.text


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.6.99", True),
        ("6.7", False),
        ("6.12.79", False),
        ("6.12.80-1-amd64", True),
        ("6.13.1", False),
        ("6.18.20", False),
        ("6.18.44-fc", True),
        ("6.19.10", False),
        ("6.19.11", True),
        ("7.0.0", True),
        ("7.0.0-rc1", True),
        ("strange", None),
    ],
)
def test_the_kernels_with_the_length_fix(release: str, expected: bool | None) -> None:
    assert has_length_fix(release) is expected


def test_a_report_holds_plain_values_alone() -> None:
    shown = doctor.report(doctor.diagnose(changed(tdx_cpu=False)))
    assert shown["exit"] == 69
    for one in shown["findings"]:
        assert set(one) == {"name", "level", "text", "todo"}
        assert all(isinstance(value, str) for value in one.values())
