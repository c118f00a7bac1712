"""The cache of collateral: in memory, on disk, bounded, beside others, never back below a floor."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from tdxd.core import hpke
from tdxd.core.secret import Secret
from tdxd.errors import DataError, HostError, UnavailableError
from tdxd.owner.appraisal.appraise import appraise, intel_root, read_quote
from tdxd.owner.collateral.bundle import CollateralSet, encode_bundle, parse_bundle
from tdxd.owner.collateral.cache import CollateralCache, SetRules, prepare
from tdxd.owner.collateral.files import CollateralFiles, Problem
from tdxd.owner.collateral.floors import StoreFloors
from tdxd.owner.collateral.roots import trust_of
from tdxd.owner.store.kek import create_kek
from tdxd.owner.store.store import Store
from tdxd.sim.platform import SimPlatform
from tests.collateral import (
    DAY,
    NOW,
    MemoryFloors,
    Service,
    a_set,
    cache_of,
    failed,
    root_of,
    trust,
    verdict,
)
from tests.vectors import VECTORS, expected, needs_vectors, quote_bytes, quote_names


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


@pytest.fixture
def service(platform):
    return Service(platform)


@pytest.fixture
def made(service, platform, tmp_path):
    """Make caches over one directory: each is what a restart or another process sees."""

    def make(floors=None, fetch=service, **changes):
        return cache_of(fetch, tmp_path, platform, floors, **changes)

    return make


@pytest.fixture
def store(tmp_path):
    directory = tmp_path / "store"
    directory.mkdir()
    with Secret(os.urandom(hpke.SEED_BYTES)) as seed:
        create_kek(directory, seed)
    with Store.create(directory) as one:
        yield one


def ask(cache, platform, now_s=NOW):
    return cache.get(platform.fmspc, "platform", now_s)


# --- in memory ----------------------------------------------------------------


def test_second_question_is_answered_from_the_cache(made, service, platform):
    cache = made()
    first = ask(cache, platform)
    assert first.ok
    assert ask(cache, platform, NOW + 59) is first
    assert service.asked == 1


def test_newer_collateral_is_looked_for_every_day(made, service, platform):
    cache = made()
    first = ask(cache, platform)
    service.now_s = NOW + DAY
    ask(cache, platform, NOW + DAY - 1)
    assert service.asked == 1
    second = ask(cache, platform, NOW + DAY)
    assert second.issued_s == first.issued_s + DAY
    assert service.asked == 2


def test_unexpired_set_is_used_on_while_the_service_is_down(made, service, platform):
    cache = made()
    first = ask(cache, platform)
    service.down = True
    for later in (DAY, DAY + 1, 29 * DAY):
        got = ask(cache, platform, NOW + later)
        assert got.ok
        assert got.issued_s == first.issued_s
    assert service.asked == 3  # the second question came within the pause


def test_expired_set_is_never_used(made, service, platform):
    cache = made()
    ask(cache, platform)
    service.down = True
    last = NOW - 3600 + 30 * DAY
    assert ask(cache, platform, last - 1).ok
    with pytest.raises(UnavailableError, match="down"):
        ask(cache, platform, last)


def test_clock_that_goes_back_before_the_issue(made, service, platform):
    cache = made()
    ask(cache, platform)
    got = ask(cache, platform, NOW - 3601)
    assert "issued" in failed(got)["collateral_dates"]


def test_expired_set_from_the_service_is_refused(made, platform):
    got = ask(made(), platform, NOW + 31 * DAY)
    assert list(failed(got)) == ["collateral_dates"]


def test_failure_is_remembered_for_a_while(made, service, platform):
    service.down = True
    cache = made()
    for later in (0, 10, 29):
        with pytest.raises(UnavailableError):
            ask(cache, platform, NOW + later)
    assert service.asked == 1
    service.down = False
    assert ask(cache, platform, NOW + 30).ok


def test_refusal_is_remembered_for_a_while(made, service, platform):
    service.state = {"signer": "pck"}
    cache = made()
    for later in (0, 29):
        got = ask(cache, platform, NOW + later)
        assert "tcb_info_signer" in failed(got)
    assert service.asked == 1
    service.state = {}
    assert ask(cache, platform, NOW + 30).ok


def test_bad_set_does_not_replace_a_good_one(made, service, platform):
    cache = made()
    first = ask(cache, platform)
    service.state = {"signer": "pck"}
    got = ask(cache, platform, NOW + DAY)
    assert got.ok
    assert got.issued_s == first.issued_s
    assert service.asked == 2
    assert ask(made(), platform, NOW + DAY + 60).ok  # nor on disk


def test_many_failing_families_do_not_fill_the_memory(made, service, tmp_path):
    service.down = True
    cache = made()
    for number in range(70):
        with pytest.raises(UnavailableError):
            cache.get(f"{number:012d}", "platform", NOW)
    assert len(cache._failures) == 64
    assert len(list((tmp_path / "collateral").iterdir())) == 64


def test_malformed_collateral_is_unavailable(made, platform):
    with pytest.raises(UnavailableError, match="malformed"):
        ask(made(fetch=lambda *_: "{}"), platform)


def test_set_that_became_too_old_is_not_used(made, service, platform):
    cache = made(rules=SetRules(max_age_s=2 * DAY))
    assert ask(cache, platform).ok
    service.down = True
    assert ask(cache, platform, NOW + DAY).ok
    with pytest.raises(UnavailableError, match="down"):
        ask(cache, platform, NOW + 2 * DAY)


# --- one fetch at a time ------------------------------------------------------


class Gate:
    """A service whose answers wait until the test lets them go."""

    def __init__(self, service):
        self.service = service
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, fmspc, ca):
        self.entered.release()
        assert self.open.wait(20)
        return self.service(fmspc, ca)


def test_many_questions_make_one_fetch(made, service, platform):
    gate = Gate(service)
    cache = made(fetch=gate)
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(ask(cache, platform)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    assert gate.entered.acquire(timeout=20)
    gate.open.set()
    for thread in threads:
        thread.join(20)
    assert len(got) == 6
    assert all(one.ok for one in got)
    assert service.asked == 1


def test_nobody_waits_for_a_newer_set_while_one_is_there(made, service, platform):
    gate = Gate(service)
    gate.open.set()
    cache = made(fetch=gate)
    first = ask(cache, platform)
    gate.open.clear()
    thread = threading.Thread(target=ask, args=(cache, platform, NOW + DAY))
    thread.start()
    assert gate.entered.acquire(timeout=20)
    assert gate.entered.acquire(timeout=20)
    assert ask(cache, platform, NOW + DAY).issued_s == first.issued_s  # at once
    gate.open.set()
    thread.join(20)
    assert service.asked == 2


def test_slow_strangers_do_not_hold_up_everybody(made, service, platform):
    """Two fetches at once; a third question is answered "not now" instead of waiting."""
    gate = Gate(service)
    cache = made(fetch=gate)

    def stranger(fmspc):
        cache.get(fmspc, "platform", NOW)

    threads = [
        threading.Thread(target=stranger, args=(f"{number:012d}",))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
        assert gate.entered.acquire(timeout=20)
    with pytest.raises(UnavailableError, match="2 others are being fetched"):
        ask(cache, platform)
    gate.open.set()
    for thread in threads:
        thread.join(20)
    assert ask(cache, platform).ok


def test_waiting_for_another_ends(made, service, platform):
    gate = Gate(service)
    cache = made(fetch=gate, patience_s=0.1)
    thread = threading.Thread(target=ask, args=(cache, platform))
    thread.start()
    assert gate.entered.acquire(timeout=20)
    with pytest.raises(UnavailableError, match="takes too long"):
        ask(cache, platform)
    gate.open.set()
    thread.join(20)


# --- on disk ------------------------------------------------------------------


def test_restart_needs_no_service(made, service, platform):
    first = ask(made(), platform)
    service.down = True
    got = ask(made(), platform, NOW + 60)
    assert got.ok
    assert dict(got.fields) == dict(first.fields)
    assert service.asked == 1


def test_file_is_private_and_of_the_stores_owner(made, platform, tmp_path):
    ask(made(), platform)
    directory = tmp_path / "collateral"
    (file,) = directory.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_uid == tmp_path.stat().st_uid
    assert file.name.endswith(f"-{platform.fmspc}-platform.set")


@pytest.mark.root
def test_root_writes_for_the_user_of_the_service(made, platform, tmp_path):
    os.chown(tmp_path, 12345, 12345)
    ask(made(), platform)
    directory = tmp_path / "collateral"
    (file,) = directory.iterdir()
    assert (directory.stat().st_uid, file.stat().st_gid) == (12345, 12345)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_file_is_fetched_anew(made, service, platform, tmp_path, damage):
    ask(made(), platform)
    (file,) = (tmp_path / "collateral").iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    other = encode_bundle([a_set(SimPlatform.create())])
    file.write_bytes(
        {"flip": data, "cut": data[:-9], "empty": b"", "other": other}[damage]
    )
    assert ask(made(), platform).ok
    assert service.asked == 2


def test_file_that_expired_meanwhile(made, service, platform):
    ask(made(), platform)
    service.down = True
    with pytest.raises(UnavailableError):
        ask(made(), platform, NOW + 31 * DAY)


def test_another_process_fetched_it(made, service, platform):
    """Its file is noticed within a minute, and saves the question."""
    mine, other = made(), made()
    ask(mine, platform)
    service.now_s = NOW + DAY
    newer = ask(other, platform, NOW + DAY)
    assert service.asked == 2
    got = ask(mine, platform, NOW + DAY)
    assert got.issued_s == newer.issued_s
    assert service.asked == 2


def test_many_processes_write_at_once(made, service, platform, tmp_path):
    caches = [made() for _ in range(4)]
    threads = [threading.Thread(target=ask, args=(cache, platform)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    files = CollateralFiles(tmp_path, root_of(platform).key_sha384)
    assert files.read(platform.fmspc, "platform")
    assert len(list((tmp_path / "collateral").iterdir())) == 1


def test_disk_that_cannot_be_written(made, service, platform, tmp_path):
    (tmp_path / "collateral").write_text("no directory")
    cache = made()
    assert ask(cache, platform).ok
    assert ask(cache, platform, NOW + 61).ok
    assert service.asked == 1
    service.down = True
    with pytest.raises(UnavailableError):
        ask(made(), platform)


def test_number_of_files_is_bounded(platform, tmp_path):
    files = CollateralFiles(tmp_path, root_of(platform).key_sha384)
    import dataclasses

    one = a_set(platform)
    for number in range(66):
        files.write(dataclasses.replace(one, fmspc=f"{number:012d}"))
    kept = files.questions()
    assert len(kept) == 64
    assert kept[0] == (f"{2:012d}", "platform")


def test_half_written_files_of_a_crash_go_away(made, platform, tmp_path):
    ask(made(), platform)
    left, busy = (tmp_path / "collateral" / name for name in (".new-a", ".new-b"))
    for path in (left, busy):
        path.write_text("half")
    os.utime(left, (1, 1))
    made().accept(a_set(platform), NOW)
    assert not left.exists()
    assert busy.exists()  # another process may be writing it


def test_problem_is_noted_and_forgotten(made, service, platform, tmp_path):
    files = CollateralFiles(tmp_path, root_of(platform).key_sha384)
    service.down = True
    with pytest.raises(UnavailableError):
        ask(made(), platform)
    problem = files.problem(platform.fmspc, "platform")
    assert problem is not None
    assert (problem.at_s, problem.message) == (NOW, "collateral: down")
    service.down = False
    ask(made(), platform, NOW + 30)
    assert files.problem(platform.fmspc, "platform") is None


def test_problem_file_with_junk_in_it(platform, tmp_path):
    files = CollateralFiles(tmp_path, root_of(platform).key_sha384)
    problem = Problem(fmspc="0" * 12, ca="platform", at_s=1, message="m", hint="h")
    files.note_problem(problem)
    assert files.problem("0" * 12, "platform") == problem
    (file,) = (tmp_path / "collateral").iterdir()
    for junk in (b"", b"[]", b"{}", b"\xff", b'{"at_s":"x","message":1,"hint":2}'):
        file.write_bytes(junk)
        assert files.problem("0" * 12, "platform") is None


def test_file_under_the_name_of_another(platform, tmp_path):
    files = CollateralFiles(tmp_path, root_of(platform).key_sha384)
    files.write(a_set(platform))
    (file,) = (tmp_path / "collateral").iterdir()
    file.rename(str(file).replace(platform.fmspc, "0" * 12))
    with pytest.raises(DataError, match="another set than its name says"):
        files.read("0" * 12, "platform")


def test_store_that_cannot_be_written(platform, tmp_path):
    files = CollateralFiles(tmp_path / "gone", root_of(platform).key_sha384)
    with pytest.raises(HostError):
        files.write(a_set(platform))


# --- offline ------------------------------------------------------------------


def test_offline_nothing_is_fetched(made, platform):
    cache = made(fetch=None)
    with pytest.raises(UnavailableError, match="none was imported") as caught:
        ask(cache, platform)
    assert "collateral import" in caught.value.hint
    assert cache.accept(a_set(platform), NOW).ok
    assert ask(cache, platform, NOW).ok
    assert ask(cache, platform, NOW + 29 * DAY).ok
    with pytest.raises(UnavailableError, match="none was imported"):
        ask(cache, platform, NOW + 30 * DAY)


def test_imported_set_is_seen_by_the_running_server(made, platform):
    running, verb = made(fetch=None), made(fetch=None)
    verb.accept(a_set(platform), NOW)
    first = ask(running, platform)
    verb.accept(a_set(platform, NOW + 10 * DAY), NOW + 10 * DAY)
    assert ask(running, platform, NOW + 10 * DAY).issued_s > first.issued_s


# --- floors -------------------------------------------------------------------


def test_floors_go_up_and_never_down(made, service, platform):
    floors = MemoryFloors()
    service.state = {"eval_data_number": 20}
    cache = made(floors)
    ask(cache, platform)
    low = dict(floors.values)
    service.state = {"eval_data_number": 21}
    ask(cache, platform, NOW + DAY)
    assert sum(floors.values.values()) == sum(low.values()) + 2
    service.state = {"eval_data_number": 19}
    assert ask(cache, platform, NOW + 2 * DAY).tcb_evaluation == 21
    assert sum(floors.values.values()) == sum(low.values()) + 2


@pytest.mark.parametrize(
    "state",
    [{"eval_data_number": 19}, {"pck_crl_number": 4}, {"root_crl_number": 4}],
)
def test_floors_hold_over_a_restart(made, service, platform, store, state):
    """In the store: a new process with an empty disk cache refuses what was newer before."""
    service.state = {"pck_crl_number": 5, "root_crl_number": 5}
    assert ask(made(StoreFloors(store)), platform).ok
    service.state |= state
    with Store.open(store._path.parent) as again:
        other = SimPlatform(platform.pki, platform.description)
        files = CollateralFiles(store._path.parent, trust(platform).key_sha384)
        cache = made(StoreFloors(again), files=files)
        got = ask(cache, other, NOW + 60)
    assert list(failed(got)) == ["collateral_floor"]


def test_floor_that_another_worker_raised(made, service, platform, store):
    """A worker that holds the older set drops it within a minute and gets the newer one."""
    mine = made(StoreFloors(store))
    with Store.open(store._path.parent) as again:
        other = made(StoreFloors(again))
        ask(mine, platform)
        ask(other, platform)
        service.state = {"eval_data_number": 21}
        assert ask(other, platform, NOW + DAY).tcb_evaluation == 21
    service.down = True
    assert ask(mine, platform, NOW + DAY).tcb_evaluation == 21


def test_two_families_renewed_apart_last_while_the_service_is_down(
    made, service, platform
):
    """Each set has the lists of its own day; the older one must not fall below the newer."""
    cache = made()
    ask(cache, platform)
    other = "0" * 11 + "1"
    service.now_s = NOW + 5 * DAY
    service.state = {"fmspc": bytes.fromhex(other)}
    assert cache.get(other, "platform", NOW + 5 * DAY).ok
    service.down = True
    for later in (5 * DAY, 29 * DAY):
        assert ask(cache, platform, NOW + later).ok
        assert cache.get(other, "platform", NOW + later).ok


def test_floor_above_the_set_in_memory(made, service, platform):
    floors = MemoryFloors()
    cache = made(floors)
    ask(cache, platform)
    floors.values = {name: value + 1 for name, value in floors.values.items()}
    assert ask(cache, platform, NOW + 59).ok
    assert list(failed(ask(cache, platform, NOW + 60))) == ["collateral_floor"]


def test_set_on_disk_below_a_floor_is_not_loaded(made, service, platform):
    floors = MemoryFloors()
    ask(made(floors), platform)
    floors.values = {name: value + 1 for name, value in floors.values.items()}
    service.down = True
    with pytest.raises(UnavailableError, match="down"):
        ask(made(floors), platform)


def test_equal_numbers_write_nothing(made, service, platform, store):
    cache = made(StoreFloors(store))
    ask(cache, platform)
    before = store.floors()
    assert len(before) == 6
    changes = store._sqlite.total_changes
    StoreFloors(store).raise_to(before)
    assert store._sqlite.total_changes == changes


def test_unverified_set_raises_no_floor(made, service, platform, store):
    service.state = {
        "signer": "pck",
        "eval_data_number": 10**6,
        "pck_crl_number": 10**6,
    }
    assert not ask(made(StoreFloors(store)), platform).ok
    assert store.floors() == {}


def test_set_of_the_future_raises_no_floor(made, service, platform, store):
    service.state = {"issued_s": NOW + DAY, "eval_data_number": 30}
    assert not ask(made(StoreFloors(store)), platform).ok
    assert store.floors() == {}


def test_a_quote_passes_with_what_the_cache_gives(made, platform):
    assert verdict(made(), platform).verified


# --- real collateral ------------------------------------------------------------


@needs_vectors
@pytest.mark.parametrize("name", quote_names())
def test_real_quotes_pass_with_real_collateral_out_of_a_bundle(name, tmp_path):
    """Intel's sets are taken in offline, and the verdict is the one that was recorded."""
    wanted = expected(name)
    report, exact = read_quote(quote_bytes(name))
    root = intel_root()
    taken = 0
    for number, case in enumerate(wanted["verifications"]):
        if not case["ok"] or not wanted["intel_production_root"]:
            continue
        prepared = prepare((VECTORS / case["collateral"]).read_text())
        given = CollateralSet(
            root=root.key_sha384,
            fmspc=wanted["fmspc"],
            ca=wanted["ca"],
            source="vectors",
            fetched_s=case["now"],
            collateral=dict(prepared.fields),
        )
        (one,) = parse_bundle(encode_bundle([given]), source="bundle")
        directory = tmp_path / str(number)
        directory.mkdir()
        cache = CollateralCache(
            None,
            trust=trust_of(root),
            floors=MemoryFloors(),
            files=CollateralFiles(directory, root.key_sha384),
            rules=SetRules(),
            refresh_s=DAY,
            source="vectors",
        )
        assert failed(cache.accept(one, case["now"])) == {}, case
        got = cache.get(wanted["fmspc"], wanted["ca"], case["now"])
        verified = appraise(exact, report, got, case["now"], root).verified
        assert verified is not None
        assert verified.tcb_status == case["status"]
        taken += 1
    if not taken:
        pytest.skip("no recorded verdict accepts it under Intel's production root")
