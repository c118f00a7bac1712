"""Rules for the two logs: what they accept, and that each refuses where it cannot judge."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from typing import Any

import pytest

from tdxd.core.bundle import Manifest
from tdxd.core.check import Check
from tdxd.core.decode import decode
from tdxd.core.event_rules import (
    EventLogRules,
    EventMatch,
    LogAppraisal,
    OnlyEvents,
    ReferenceLog,
    RuntimeEventRule,
    RuntimeRules,
    appraise_logs,
    reference_log,
)
from tdxd.core.eventlog import Event, encode_event_log, parse_event_log
from tdxd.core.foreign import ForeignManifest
from tdxd.core.policy import RtmrSet
from tdxd.core.quote import TdReport, parse_quote
from tdxd.core.runtime_log import (
    VOLUME_EVENT,
    RuntimeEvent,
    encode_runtime_log,
    volume_event,
)
from tdxd.errors import ConfigError
from tests.boot_log import (
    BOOT,
    COMMAND_LINE,
    event,
    load_options,
    report_of,
    rtmr_set,
    separator,
)
from tests.vectors import VECTORS, needs_vectors, quote_bytes

REFERENCE = reference_log("image", BOOT)
MANIFEST = Manifest(
    volume_id="resnet",
    generation=3,
    payload_offset_bytes=4096,
    data_blocks=1,
    hash_blocks=0,
    root_hash=bytes(32),
    salt=bytes(32),
)
SERVED = volume_event(MANIFEST)
KNOWN = {("resnet", 3, MANIFEST.digest())}
COS = "go-tdx-guest-cos-113-tdx-quote-00b252"
LIVE = "attestation-rs-tdx_quote_live-3ab56d"


def judge(
    events: Sequence[Event] | None = BOOT,
    runtime: Sequence[RuntimeEvent] = (),
    *,
    rules: EventLogRules | None = None,
    runtime_rules: RuntimeRules | None = None,
    report: TdReport | None = None,
    references: Sequence[ReferenceLog] = (REFERENCE,),
    sets: Sequence[RtmrSet] | None = None,
) -> LogAppraisal:
    """Appraise logs against the report that fits them, or another."""
    return appraise_logs(
        rules or EventLogRules(),
        runtime_rules or RuntimeRules(),
        references,
        report or report_of(events or (), runtime),
        b"" if events is None else encode_event_log(events, size_bytes=8192),
        encode_runtime_log(runtime),
        lambda *served: served in KNOWN,
        sets=(rtmr_set(),) if sets is None else sets,
    )


def why_not(appraisal: LogAppraisal) -> dict[str, str]:
    return {one.name: one.actual for one in appraisal.checks if not one.ok}


def check(appraisal: LogAppraisal, name: str) -> Check:
    (found,) = [one for one in appraisal.checks if one.name == name]
    return found


# --- replay --------------------------------------------------------------------


def test_logs_that_fit_the_quote_pass() -> None:
    got = judge(runtime=[SERVED])
    assert not why_not(got)
    assert got.initial_rtmr3 == bytes(48)
    assert [one.name for one in got.checks] == [
        "event_log_present",
        "event_log_replay",
        "runtime_log",
        "runtime_events",
    ]


def test_initial_rtmr3_is_what_the_boot_left_there() -> None:
    boot = (*BOOT, event(3, 6, b"LEAA"))
    got = judge(boot, [SERVED], sets=[rtmr_set(events=boot)], references=())
    assert not why_not(got)
    assert got.initial_rtmr3 == report_of(boot).rtmrs[3]


def test_without_logs_the_values_of_the_quote_stand() -> None:
    report = report_of(BOOT, [SERVED])
    got = judge(None, report=report)
    assert not why_not(got)
    assert got.initial_rtmr3 == report.rtmrs[3]


def test_a_runtime_log_alone_starts_from_zero() -> None:
    report = report_of(BOOT, [SERVED])
    got = judge(None, [SERVED], report=report)
    assert not why_not(got)
    assert got.initial_rtmr3 == bytes(48)


def test_a_required_log_that_is_absent_is_refused() -> None:
    got = judge(None, rules=EventLogRules(required=True))
    assert why_not(got) == {"event_log_present": "no event log"}
    assert not why_not(judge(rules=EventLogRules(required=True)))


@pytest.mark.parametrize("register", range(4))
def test_a_register_that_does_not_replay_is_named(register: int) -> None:
    good = report_of().rtmrs
    one, two, three, four = (
        b"x" * 48 if index == register else value for index, value in enumerate(good)
    )
    report = dataclasses.replace(report_of(), rtmrs=(one, two, three, four))
    refused = why_not(judge(report=report, references=()))
    if register < 3:
        assert refused == {
            "event_log_replay": f"rtmr{register} replays to {good[register].hex()}"
        }
    else:
        assert refused == {"runtime_log": f"{bytes(48).hex()} by 0 runtime events"}


def test_a_malformed_log_is_one_check() -> None:
    report = report_of()
    args = (EventLogRules(), RuntimeRules(), (), report)
    for name, logs in (("event_log", (b"x", b"")), ("runtime_log", (b"", b"x"))):
        got = appraise_logs(*args, *logs, lambda *_: True, sets=())
        assert list(why_not(got)) == [name]
        assert got.initial_rtmr3 == report.rtmrs[3]


def test_an_event_that_claims_mrtd_is_refused() -> None:
    lie = event(-1, 0xD, b"MRTD was extended")
    text = why_not(judge((*BOOT, lie)))["event_log_replay"]
    assert text.startswith("log entry 13 claims to extend MRTD: EV_IPL")


@needs_vectors
@pytest.mark.parametrize("name", [COS, LIVE])
def test_real_logs_pass_with_their_quotes(name: str) -> None:
    log = (VECTORS / "quotes" / name / "ccel.bin").read_bytes()
    report = parse_quote(quote_bytes(name))
    events = parse_event_log(log)
    sets = [rtmr_set(name, events)]
    rules = EventLogRules(required=True)
    references = [reference_log(name, events)]
    args = (rules, RuntimeRules(), references, report)
    assert not why_not(appraise_logs(*args, log, b"", lambda *_: False, sets=sets))


@needs_vectors
@pytest.mark.parametrize(
    ("name", "partial", "registers", "told"),
    [
        (COS, "d3d761", ["rtmr0", "rtmr1"], "another: log entry 1: 1411da909afb9068"),
        (LIVE, "5e9004", ["rtmr2"], "another: log entry 17: 47f68b638aaa"),
    ],
)
def test_doctored_real_logs_are_refused_by_the_event(
    name: str, partial: str, registers: list[str], told: str
) -> None:
    folder = VECTORS / "quotes" / name
    enrolled = parse_event_log((folder / "ccel.bin").read_bytes())
    log = (folder / f"ccel-partial-{partial}.bin").read_bytes()
    report = parse_quote(quote_bytes(name))
    args = (EventLogRules(), RuntimeRules(), [reference_log(name, enrolled)], report)
    got = appraise_logs(
        *args, log, b"", lambda *_: False, sets=[rtmr_set(name, enrolled)]
    )
    refused = why_not(got)
    assert set(refused) == {"event_log_replay", "event_log"}
    wrong = refused["event_log_replay"].split(", ")
    assert [one.split()[0] for one in wrong] == registers
    assert told in refused["event_log"]


@needs_vectors
def test_a_real_log_of_another_boot_is_refused_without_a_reference() -> None:
    name = "evidence-api-quote-3f49cf"
    log = (VECTORS / "quotes" / name / "ccel-partial-8faacd.bin").read_bytes()
    report = parse_quote(quote_bytes(name))
    args = (EventLogRules(), RuntimeRules(), (), report)
    got = appraise_logs(*args, log, b"", lambda *_: False, sets=())
    assert why_not(got)["event_log_replay"].startswith("rtmr2 replays to")


# --- departure -----------------------------------------------------------------


def test_a_departure_is_told_against_the_nearest_set() -> None:
    other = (*BOOT[:8], event(2, 0xD, b"x"))
    sets = [rtmr_set("other", (separator(0),)), rtmr_set()]
    references = [reference_log("other", other), REFERENCE]
    booted = (*BOOT[:-1], event(1, 0x80000007, b"Exit Boot Services Failed"))
    got = judge(booted, sets=sets, references=references)
    told = check(got, "event_log")
    assert "rtmr1, event 4 of 4: another: log entry 12" in told.actual
    assert told.actual.endswith("EV_EFI_ACTION Exit Boot Services Failed")
    assert told.expected.endswith("Exit Boot Services Returned with Success (image)")


def test_no_departure_is_told_without_a_reference_of_the_set() -> None:
    booted = BOOT[:-1]
    for references in ((), (reference_log("another name", BOOT),)):
        got = judge(booted, references=references)
        assert not why_not(
            got
        )  # the log proves the quote; the registers' own check refuses it
    assert not why_not(judge(booted, sets=()))


def test_a_set_without_reference_does_not_depart_from_anothers() -> None:
    booted = BOOT[:-1]
    assert not why_not(judge(booted, sets=[rtmr_set(), rtmr_set("second", booted)]))


# --- require -------------------------------------------------------------------

SECURE = EventMatch(register=0, variable="SecureBoot", value="01")
LINE = EventMatch(register=2, text=COMMAND_LINE)


def required(match: EventMatch, events: Sequence[Event] = BOOT) -> Check:
    rules = EventLogRules(require=(match,))
    got = judge(events, rules=rules, sets=(), references=())
    return check(got, "event_log.require[0]")


@pytest.mark.parametrize(
    "match",
    [
        SECURE,
        LINE,
        EventMatch(register=1, text="Calling EFI Application from Boot Option"),
        EventMatch(register=1, digest=BOOT[7].digest.hex()),
    ],
)
def test_a_required_event_that_was_measured(match: EventMatch) -> None:
    assert required(match).ok


@pytest.mark.parametrize(
    ("match", "actual"),
    [
        (
            EventMatch(register=0, variable="SecureBoot", value=""),
            "no such event before the separator, log entry 3",
        ),
        (EventMatch(register=2, text=COMMAND_LINE + " "), "no such event in rtmr2"),
        (EventMatch(register=1, text=COMMAND_LINE), "no such event in rtmr1"),
        (EventMatch(register=3, digest="ab" * 48), "no such event in rtmr3"),
    ],
)
def test_a_required_event_that_was_not(match: EventMatch, actual: str) -> None:
    assert not required(match).ok
    assert required(match).actual == actual


def test_load_options_of_linux_are_required_by_their_text() -> None:
    boot = (load_options("quiet ro"),)
    assert required(EventMatch(register=2, text="quiet ro"), boot).ok
    assert not required(EventMatch(register=2, text="quiet"), boot).ok


def test_variables_need_a_separator_behind_them() -> None:
    found = required(SECURE, BOOT[:3])
    assert found.actual == "no separator ends the variables"


# --- forbid and only -----------------------------------------------------------


def forbidden(match: EventMatch, events: Sequence[Event] | None = BOOT) -> Check:
    got = judge(events, rules=EventLogRules(forbid=(match,)))
    return check(got, "event_log.forbid[0]")


def test_a_forbidden_event() -> None:
    off = EventMatch(register=0, variable="SecureBoot", value="00")
    assert forbidden(off).ok
    assert forbidden(off).expected == "not rtmr0: variable SecureBoot = 00"
    assert forbidden(LINE).actual == "log entry 10"
    assert forbidden(dataclasses.replace(LINE, register=1)).ok


@pytest.mark.parametrize(
    "rules",
    [
        EventLogRules(require=(LINE,)),
        EventLogRules(require=(SECURE,)),
        EventLogRules(forbid=(LINE,)),
        EventLogRules(only=(OnlyEvents(register=3, events=()),)),
    ],
)
def test_without_a_log_no_rule_passes(rules: EventLogRules) -> None:
    assert len(why_not(judge(None, rules=rules))) == 1


def only(events: Sequence[Event], *places: Sequence[bytes]) -> Check:
    listed = tuple(tuple(one.hex() for one in place) for place in places)
    item = OnlyEvents(register=1, events=listed)
    got = judge(events, rules=EventLogRules(only=(item,)), sets=())
    return check(got, "event_log.only[0]")


def test_only_listed_events_in_order() -> None:
    mine = [one.digest for one in BOOT if one.rtmr == 1]
    places = [[digest, b"z" * 48] for digest in mine]
    assert only(BOOT, *places).ok
    assert only(BOOT, *places[:-1]).actual == "4 events"
    assert only(BOOT, *places, [b"z" * 48]).actual == "4 events"
    swapped = [places[1], places[0], *places[2:]]
    assert only(BOOT, *swapped).actual.startswith("log entry 5: ")


# --- the runtime log -----------------------------------------------------------


def runtime_problem(rules: RuntimeRules, *events: RuntimeEvent) -> str:
    found = check(judge(runtime=events, runtime_rules=rules), "runtime_events")
    return "" if found.ok else found.actual


def test_volumes_that_a_guest_may_serve_already() -> None:
    assert not runtime_problem(RuntimeRules(), SERVED)
    assert not runtime_problem(RuntimeRules(volumes=("bert", "resnet")), SERVED)
    assert runtime_problem(RuntimeRules(volumes=("bert",)), SERVED) == (
        "runtime event 0: volume resnet generation 3 is not allowed"
    )
    assert runtime_problem(RuntimeRules(volumes=()), SERVED)
    other = volume_event(dataclasses.replace(MANIFEST, data_blocks=2))
    assert runtime_problem(RuntimeRules(), SERVED, other) == (
        "runtime event 1: volume resnet generation 3 has a manifest that is not in the store"
    )


def test_a_volume_that_an_operator_opens_must_be_named() -> None:
    """With a passphrase of his own: no store knows what is in it."""
    scratch = ForeignManifest(volume_id="scratch", generation=1)
    events = (SERVED, volume_event(scratch))
    named = RuntimeRules(volumes=("resnet",), operator_volumes=("scratch",))
    assert not runtime_problem(named, *events)
    for rules in (RuntimeRules(), RuntimeRules(operator_volumes=("other",))):
        assert runtime_problem(rules, *events) == (
            "runtime event 1: volume scratch generation 1 has a manifest that is not in the store"
        )


DIGEST = MANIFEST.digest().hex()


@pytest.mark.parametrize(
    ("expect", "ok"),
    [
        ("resnet", True),
        (f"resnet:{DIGEST}", True),
        (f"resnet:{DIGEST.upper()}", True),
        (f"resnet:{'00' * 32}", False),
        ("bert", False),
    ],
)
def test_a_volume_that_must_be_served(expect: str, ok: bool) -> None:
    rules = RuntimeRules(expect=(expect,))
    found = check(judge(runtime=[SERVED], runtime_rules=rules), "runtime_volume")
    assert found.ok is ok
    named = "resnet" in expect
    assert found.actual == (f"resnet:{DIGEST}" if named else "volumes resnet")
    nothing = check(judge(runtime=[], runtime_rules=rules), "runtime_volume")
    assert not nothing.ok
    assert nothing.actual == "volumes none"


def test_the_generation_served_last_counts() -> None:
    """RTMR3 keeps what was served before: that is history, not what answers now."""
    newer = dataclasses.replace(MANIFEST, generation=MANIFEST.generation + 1)
    events = [SERVED, volume_event(newer)]
    for manifest, ok in ((MANIFEST, False), (newer, True)):
        rules = RuntimeRules(expect=(f"resnet:{manifest.digest().hex()}",))
        found = check(judge(runtime=events, runtime_rules=rules), "runtime_volume")
        assert found.ok is ok
    back = [*events, SERVED]
    rules = RuntimeRules(expect=(f"resnet:{DIGEST}",))
    assert check(judge(runtime=back, runtime_rules=rules), "runtime_volume").ok


def test_a_malformed_volume_event_is_none_that_is_served() -> None:
    bad = RuntimeEvent(name="tdxd/volume", payload=b"resnet")
    rules = RuntimeRules(expect=("resnet",))
    table = judge(runtime=[bad], runtime_rules=rules)
    assert not check(table, "runtime_volume").ok
    assert not check(table, "runtime_events").ok


@pytest.mark.parametrize(
    "text", ["", "A B", "m:", "m:00", f"m:{'g' * 64}", f":{'0' * 64}"]
)
def test_an_expected_volume_is_an_id_and_perhaps_a_digest(text: str) -> None:
    with pytest.raises(ValueError, match=r"id|hex"):
        RuntimeRules(expect=(text,))


def test_the_store_is_not_asked_for_more_after_the_first_unknown_volume() -> None:
    asked = []

    def unknown(*served: object) -> bool:
        asked.append(served)
        return False

    report = report_of(BOOT, [SERVED] * 9)
    got = appraise_logs(
        EventLogRules(),
        RuntimeRules(),
        (),
        report,
        b"",
        encode_runtime_log([SERVED] * 9),
        unknown,
        sets=(),
    )
    assert "runtime_events" in why_not(got)
    assert asked == [("resnet", 3, MANIFEST.digest())]


def test_other_events_must_be_listed() -> None:
    one = RuntimeEvent(name="compose-hash", payload=b"\xab")
    rule = RuntimeEventRule(name="compose-hash", payload=("ab",))
    assert runtime_problem(RuntimeRules(), one, one) == (
        "runtime event 0: compose-hash is not allowed"
    )
    assert not runtime_problem(RuntimeRules(allow=(rule,)), one, one)
    another = RuntimeEvent(name="compose-hash", payload=b"\xac")
    assert runtime_problem(RuntimeRules(allow=(rule,)), another) == (
        "runtime event 0: compose-hash has another payload, of 1 bytes"
    )
    anything = RuntimeEventRule(name="compose-hash")
    assert not runtime_problem(RuntimeRules(allow=(anything,)), one, another)


def test_a_required_runtime_event_stands_once() -> None:
    one = RuntimeEvent(name="app-id", payload=b"")
    rules = RuntimeRules(allow=(RuntimeEventRule(name="app-id", required=True),))
    assert not runtime_problem(rules, one)
    assert runtime_problem(rules) == "0 events app-id, not 1"
    assert runtime_problem(rules, one, one) == "2 events app-id, not 1"


def test_a_volume_event_of_another_payload_is_refused() -> None:
    bad = RuntimeEvent(name=VOLUME_EVENT, payload=b"")
    assert "not valid msgpack" in runtime_problem(RuntimeRules(), bad)


# --- the policy file -----------------------------------------------------------

POLICY = f"""
required = true

[[require]]
register = 0
variable = "SecureBoot"
value = "01"

[[require]]
register = 2
text = "{COMMAND_LINE}"

[[forbid]]
register = 0
variable = "SecureBoot"
value = "00"

[[only]]
register = 3
events = [["{"ab" * 48}", "{"cd" * 48}"]]
"""


def test_rules_are_read_from_toml() -> None:
    rules = decode(EventLogRules, tomllib.loads(POLICY), source="policy")
    assert rules == EventLogRules(
        required=True,
        require=(SECURE, LINE),
        forbid=(EventMatch(register=0, variable="SecureBoot", value="00"),),
        only=(OnlyEvents(register=3, events=(("ab" * 48, "cd" * 48),)),),
    )
    table = tomllib.loads(
        'volumes = ["resnet"]\n[[allow]]\nname = "app-id"\npayload = ["00"]\n'
        "required = true"
    )
    assert decode(RuntimeRules, table, source="policy") == RuntimeRules(
        volumes=("resnet",),
        allow=(RuntimeEventRule(name="app-id", payload=("00",), required=True),),
    )


def variable_rule(**changed: Any) -> dict[str, Any]:
    rule = {"register": 0, "variable": "SecureBoot", "value": "01"} | changed
    return {"require": [rule]}


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (variable_rule(register=4), "register 4 is not 0 to 3"),
        (variable_rule(variable="Boot0001"), "variable 'Boot0001' is not one of Sec"),
        (variable_rule(value="1"), "value '1' is not lower-case hex"),
        (variable_rule(text="x"), "exactly one of variable, text and digest"),
        (variable_rule(variable=""), "exactly one of variable, text and digest"),
        ({"require": [{"register": 0, "variable": "PK"}]}, "a variable needs a value"),
        ({"require": [{"register": 0, "text": "a", "value": ""}]}, "needs a value"),
        ({"forbid": [{"register": 0, "digest": "ab"}]}, "'ab' is not 48 bytes"),
        ({"only": [{"register": 9, "events": []}]}, "register 9 is not 0 to 3"),
        ({"only": [{"register": 0, "events": [[]]}]}, "events.0. is empty"),
        ({"only": [{"register": 0, "events": [["x"]]}]}, "'x' is not 48 bytes"),
        ({"only": [{"register": 0, "events": []}] * 2}, "a register is listed twice"),
        ({"requires": []}, "requires: unknown key"),
    ],
)
def test_rules_that_could_not_work_are_refused(table: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        decode(EventLogRules, table, source="policy")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"allow": [{"name": VOLUME_EVENT}]}, "are ruled by volumes"),
        ({"allow": [{"name": "a b"}]}, "name 'a b' is not"),
        ({"allow": [{"name": "a", "payload": ["0"]}]}, "payload '0' is not"),
        ({"allow": [{"name": "a"}, {"name": "a"}]}, "a name is listed twice"),
    ],
)
def test_runtime_rules_that_could_not_work_are_refused(
    table: object, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        decode(RuntimeRules, table, source="policy")
