"""`tdx-keyd policy`, `explain` and `appraise` as a person types them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from tdxd.cli import keyd_explain
from tdxd.cli.tdx_keyd import main
from tdxd.core.check import Check, failed, passed
from tdxd.core.policy import parse_policy
from tdxd.errors import DeniedError
from tdxd.owner.appraisal import judge
from tdxd.sim.platform import SimPlatform
from tests.judged import NOW, Court, policy_of
from tests.keyserver import Guest, make_bundle, opened_owner
from tests.vectors import VECTORS, expected, needs_vectors

DATA = bytes(range(64))


@pytest.fixture
def keyd(capfd, monkeypatch):
    def run(*argv, code=0):
        """Return standard output and standard error."""
        monkeypatch.setattr(sys, "argv", ["tdx-keyd", *map(str, argv)])
        capfd.readouterr()
        returned = main()
        out, err = capfd.readouterr()
        assert returned == code, err
        return out, err

    return run


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


@pytest.fixture
def files(tmp_path, platform):
    """The evidence of a guest in files, by option."""
    made = {
        "--quote": platform.quote(DATA),
        "--event-log": platform.event_log,
        "--collateral": platform.collateral_json(NOW).encode(),
        "--root": platform.root_pem.encode(),
    }
    paths = {}
    for option, content in made.items():
        path = tmp_path / option.strip("-")
        path.write_bytes(content)
        paths[option] = path
    return paths


@pytest.fixture
def policy(keyd, files, tmp_path):
    path = tmp_path / "enrolled.toml"
    keyd(
        "policy",
        "enroll",
        *options(files, "--quote", "--event-log"),
        "--simulated",
        "-o",
        path,
    )
    return path


def options(files, *names):
    return [word for name in names for word in (name, files[name])]


def trial(files, policy):
    every = options(files, "--quote", "--event-log", "--collateral", "--root")
    return ["appraise", *every, "--policy", policy, "--at", NOW]


# --- enroll, check, diff ------------------------------------------------------


def test_enroll_writes_a_valid_policy(keyd, files, platform):
    argv = [
        "policy",
        "enroll",
        *options(files, "--quote", "--event-log"),
        "--simulated",
    ]
    out, err = keyd(*argv, "--name", "image-2026-11")
    parsed = parse_policy(out)
    assert parsed.tdx.rtmr[0].name == "image-2026-11"
    assert parsed.tdx.platforms == (platform.pki.identity.ppid.hex(),)
    assert err == ""
    out, err = keyd(*argv, "--platform", "any")
    assert parse_policy(out).tdx.platforms == ("any",)
    assert err.startswith(
        "warning: tdx.platforms: any machine may run this guest\n  hint: "
    )


def test_enroll_overwrites_nothing(keyd, files, policy):
    argv = ["policy", "enroll", *options(files, "--quote"), "--simulated", "-o", policy]
    before = policy.read_text()
    assert "enrolled.toml exists" in keyd(*argv, code=64)[1]
    assert policy.read_text() == before


def test_enroll_refuses_a_debug_guest(keyd, files, platform):
    bits = (1 << 28 | 1).to_bytes(8, "little")
    files["--quote"].write_bytes(platform.quote(DATA, td_attributes=bits))
    argv = ["policy", "enroll", *options(files, "--quote"), "--simulated"]
    out, err = keyd(*argv, code=65)
    assert out == ""
    assert "DEBUG is set: no policy can accept such a guest" in err


def test_check_prints_warnings_and_errors(keyd, policy):
    out, _ = keyd("policy", "check", policy)
    assert out.startswith(f"{policy}: valid, 4 warning(s)\nwarning: tdx.simulated: ")
    plain = json.loads(keyd("policy", "check", policy, "--json")[0])
    assert plain["valid"] is True
    assert plain["warnings"][0]["path"] == "tdx.simulated"
    policy.write_text(policy.read_text().replace("platforms", "platform"))
    err = keyd("policy", "check", policy, code=78)[1]
    assert "tdx.platform: unknown key" in err
    assert "did you mean 'platforms'" in err


def test_diff_shows_what_becomes_looser(keyd, policy, tmp_path):
    store = tmp_path / "store"
    keyd("init", store, "--name", "127.0.0.1")
    bundle = tmp_path / "v.bundle"
    bundle.write_bytes(make_bundle("v").encode())
    keyd("add", store, bundle, "--policy", policy)
    same = "policy of v, version 1: the file means the same\n"
    assert keyd("policy", "diff", store, "v", policy)[0] == same
    text = policy.read_text().replace("[release]", "[release]\nmax_per_hour = 5")
    text = text.replace(
        'tcb_status = ["UpToDate"]', 'tcb_status = ["OutOfDate", "UpToDate"]'
    )
    policy.write_text(text)
    out, _ = keyd("policy", "diff", store, "v", policy)
    assert out == (
        "policy of v, version 1: 2 change(s), 1 of them let more pass\n"
        "LOOSER + tdx.tcb_status: OutOfDate\n"
        "       + release.max_per_hour: 5\n"
    )
    plain = json.loads(keyd("policy", "diff", store, "v", policy, "--json")[0])
    assert [one["looser"] for one in plain["changes"]] == [True, False]
    assert "has no policy" in keyd("policy", "diff", store, "w", policy, code=65)[1]


# --- appraise -----------------------------------------------------------------


def test_appraise_accepts_the_enrolled_guest(keyd, files, policy):
    out, err = keyd(*trial(files, policy))
    assert err == ""
    assert out.startswith("ACCEPTED: every check passed\n\nCHECK ")
    assert "FAIL" not in out
    plain = json.loads(keyd(*trial(files, policy), "--json")[0])
    assert plain["accepted"] is True
    assert all(check["ok"] for check in plain["checks"])


def test_appraise_shows_what_is_wrong_first(keyd, files, policy, platform):
    files["--quote"].write_bytes(platform.quote(DATA, mr_td=b"\1" * 48))
    out, _ = keyd(*trial(files, policy), code=77)
    lines = out.splitlines()
    assert lines[0] == "REFUSED: the guest's firmware is another one (MRTD)"
    assert lines[1].startswith("to do: if it is yours: tdx-keyd policy enroll")
    assert lines[4].split()[:2] == ["mr_td", "FAIL"]
    whole = "".join(line.split()[-1] for line in lines[4:7])
    assert whole == "01" * 48
    assert lines[7].strip() == "bytes 0 to 47 of 48 differ"
    assert all(len(line) <= 120 for line in lines)
    plain = json.loads(keyd(*trial(files, policy), "--json", code=77)[0])
    assert not plain["accepted"]
    assert plain["conclusion"] == "the guest's firmware is another one (MRTD)"


def test_appraise_names_the_event_that_departs(keyd, files, policy):
    log = files["--event-log"].read_bytes()
    files["--event-log"].write_bytes(
        log.replace(b"initial RAM disk 1", b"initial RAM disk 2")
    )
    assert keyd(*trial(files, policy))[0].startswith(
        "ACCEPTED"
    )  # data alone proves nothing
    digest = log.index(b"initial RAM disk 1") - 4 - 48
    bad = bytearray(log)
    bad[digest] ^= 1
    files["--event-log"].write_bytes(bytes(bad))
    out, _ = keyd(*trial(files, policy), code=77)
    assert "first event that departs: rtmr2, event 2 of 2: " in out


def test_appraise_compares_report_data_where_given(keyd, files, policy):
    argv = trial(files, policy)
    keyd(*argv, "--report-data", DATA.hex())
    out, _ = keyd(*argv, "--report-data", "00" * 64, code=77)
    assert out.startswith("REFUSED: the quote was made for another request\n")
    assert "is not 64 bytes in hex" in keyd(*argv, "--report-data", "00", code=64)[1]


def test_appraise_judges_as_of_a_time(keyd, files, policy):
    argv = trial(files, policy)[:-1]
    keyd(*argv, "2026-09-21T14:13:20Z")
    out, _ = keyd(*argv, NOW + 40 * 86400, code=77)
    assert "collateral_dates" in out
    far = ("999999999999", "9999-12-31T23:59:59-12:00", "1950-01-01T00:00:00Z")
    for bad in ("soon", "2026-09-21T14:13:20", "-5", *far):
        assert "is no moment" in keyd(*argv[:-1], f"--at={bad}", code=64)[1]


def test_appraise_under_intels_root(keyd, files, policy):
    argv = [
        word for word in trial(files, policy) if word not in ("--root", files["--root"])
    ]
    assert keyd(*argv, code=77)[0].startswith("REFUSED: ")


def test_appraise_without_a_tdx_quote(keyd, files, policy):
    files["--quote"].write_bytes(b"junk")
    out, _ = keyd(*trial(files, policy), code=77)
    assert out.startswith("REFUSED: what the guest sent is no TDX quote\n")


@needs_vectors
def test_appraise_a_real_quote(keyd, tmp_path):
    name = "go-tdx-guest-cos-113-tdx-quote-00b252"
    folder = VECTORS / "quotes" / name
    evidence = ["--quote", folder / "quote.bin", "--event-log", folder / "ccel.bin"]
    policy = tmp_path / "real.toml"
    keyd("policy", "enroll", *evidence, "-o", policy)
    for case in expected(name)["verifications"]:
        files = ["--collateral", VECTORS / case["collateral"], "--policy", policy]
        good = case["status"] == "UpToDate"
        argv = ["appraise", *evidence, *files, "--at", case["now"]]
        out, _ = keyd(*argv, code=0 if good else 77)
        word = "ACCEPTED" if good else "REFUSED: the platform's patch level"
        assert out.startswith(word)


# --- the table ----------------------------------------------------------------


def test_every_reason_has_its_words(tmp_path):
    """No check of the product's own is explained by nothing but its name."""
    names = {check.name for check in Court(tmp_path).checks()}
    names |= set(judge._REASONS) | {"event_log", "runtime_log", "not_before"}
    for name in names:
        why = keyd_explain.conclusion([failed(name, "a", "b")])
        assert why is not None
        assert why.what != "a check failed", name
        assert why.todo


def test_words_of_a_guest_cannot_move_the_cursor():
    check = failed("quote_format", "a\x1b[2J", "b\r\x07\x9b\u202e")
    text = "\n".join(keyd_explain.table([check]))
    assert text.isprintable() or "\n" in text
    assert not {"\x1b", "\r", "\x07", "\x9b", "\u202e"} & set(text)


def test_long_lists_end():
    many = " or ".join(f"{index:032x}" for index in range(100))
    text = list(keyd_explain.table([failed("platform", many, "ff" * 16)]))
    assert len(text) < 20
    assert "more lines: --json" in text[-1]


def test_bytes_that_differ_are_told():
    want = bytearray(48)
    have = bytearray(48)
    have[7] = have[30] = 1
    check = failed("rtmr1", f"{want.hex()} (image-1)", have.hex())
    assert "bytes 7 to 30 of 48 differ" in "\n".join(keyd_explain.table([check]))


def test_alternatives_stand_below_each_other():
    check = failed("mr_td", f"{'11' * 48} or {'22' * 48}", "33" * 48)
    lines = list(keyd_explain.table([check]))
    assert [line.split()[0] for line in lines[2:8]] == [
        "11" * 16,
        "11" * 16,
        "or",
        *["22" * 16] * 3,
    ]


def test_nothing_failed():
    assert keyd_explain.conclusion([passed("quote", "a", "a")]) is None
    assert isinstance(passed("quote", "a", "a"), Check)


def test_help_of_appraise_needs_no_heavy_import():
    script = (
        "import sys, tdxd.cli.tdx_keyd as m\n"
        "try: m.run_command(['appraise', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'sqlalchemy', 'dcap_qvl', 'cryptography'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0


async def test_explain_names_the_event_that_departs(keyd, tmp_path):
    """A guest that boots another command line, before a running server."""
    with opened_owner(tmp_path) as owner:
        owner.add("v", policy=policy_of(owner.platform))
        description = owner.platform.description
        at = next(index for index, one in enumerate(description.event) if one.rtmr == 2)
        events = list(description.event)
        events[at] = dataclasses.replace(events[at], data="command line: init=/bin/sh")
        changed = dataclasses.replace(description, event=tuple(events))
        guest = Guest(SimPlatform(owner.platform.pki, changed))
        assert isinstance((await owner.fetch("v", tsm=guest))["v"], DeniedError)
        denial = owner.last().denial_id
        out, _ = keyd("explain", owner.directory, denial)
        plain = json.loads(keyd("explain", owner.directory, denial, "--json")[0])
    lines = out.splitlines()
    assert lines[0] == "DENIED: kernel command line or initrd differ (RTMR2)"
    assert lines[1].startswith("first event that departs: rtmr2, event 1 of 2: another")
    assert f"log entry {at}" in lines[1]
    assert lines[2] == "also failed: event_log"
    assert lines[3].startswith("to do: ")
    assert plain["conclusion"] == lines[0].removeprefix("DENIED: ")
    assert plain["denial_id"] == denial
    failed_rows = [line.split()[0] for line in lines if " FAIL " in line]
    assert failed_rows == ["rtmr2", "event_log"]
