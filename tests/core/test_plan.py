"""The reconcilers' decisions: every state reaches its goal or a resting state."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import plan
from tdxd.core.plan import (
    Failure,
    LeaseSeen,
    ServerSeen,
    ServingGoal,
    ServingSeen,
    ServingState,
    VolumeSeen,
    VolumeState,
    Wait,
)
from tdxd.errors import (
    ConfigError,
    DataError,
    DeniedError,
    IntegrityError,
    NotReadyError,
    PassphraseNeededError,
    TdxdError,
    UnreachableError,
    WrongPassphraseError,
)

NOW = 1000.0
TAG = (1, 2, 3)
FULL = VolumeSeen(image_tag=TAG, mapped=True, mounted=True, recorded=True)
LATER = LeaseSeen(until_s=NOW + 3600, renew_s=NOW + 1800)
OVER = LeaseSeen(until_s=NOW, renew_s=NOW - 1800)

ERRORS = [
    UnreachableError("x"),
    DeniedError("x"),
    IntegrityError("x"),
    PassphraseNeededError("x"),
    WrongPassphraseError("x"),
]


def failure(error: TdxdError, *, until_s: float = NOW + 5, tag=TAG) -> Failure:
    return Failure(error=error, attempts=1, until_s=until_s, since_s=NOW, image_tag=tag)


def do(seen: VolumeSeen, action: plan.VolumeAction) -> VolumeSeen:
    """What the world looks like after an action that succeeded."""
    match action:
        case plan.Attest():
            return dataclasses.replace(seen, keyed=True)
        case plan.AskOperator():  # nobody has come yet
            needed = failure(PassphraseNeededError("x"), tag=seen.image_tag)
            return dataclasses.replace(seen, failure=needed)
        case plan.Map():
            return dataclasses.replace(seen, keyed=False, mapped=True)
        case plan.Mount():
            return dataclasses.replace(seen, mounted=True, failure=None)
        case plan.Record():
            return dataclasses.replace(seen, recorded=True)
        case plan.Renew():
            return dataclasses.replace(seen, lease=LATER)
        case plan.Unmount():
            return dataclasses.replace(seen, mounted=False)
        case plan.Unmap():
            return dataclasses.replace(seen, mapped=False, intact=True, lease=None)
        case plan.ForgetKey():
            return dataclasses.replace(seen, keyed=False, lease=None)
    return seen


@st.composite
def leases(draw) -> LeaseSeen:
    """One that lasts, is due, is being renewed, or is over."""
    return LeaseSeen(
        until_s=NOW + draw(st.sampled_from([-1, 0, 0.5, 60])),
        renew_s=draw(st.sampled_from([None, NOW - 30, NOW, NOW + 30])),
    )


@st.composite
def volumes(draw) -> VolumeSeen:
    mapped = draw(st.booleans())
    keyed = draw(st.booleans()) and not mapped
    error = draw(st.sampled_from([None, *ERRORS]))
    until_s = draw(st.sampled_from([NOW - 1, NOW + 5]))
    return VolumeSeen(
        image_tag=draw(st.sampled_from([None, TAG, (9,)])),
        by_operator=draw(st.booleans()),
        keyed=keyed,
        mapped=mapped,
        mounted=mapped and draw(st.booleans()),
        recorded=draw(st.booleans()),
        intact=not mapped or draw(st.booleans()),
        in_use=draw(st.booleans()),
        failure=failure(error, until_s=until_s) if error else None,
        lease=draw(st.none() | leases()) if keyed or mapped else None,
    )


RESTING = {
    VolumeState.MOUNTED,
    VolumeState.ABSENT,
    VolumeState.BACKOFF,
    VolumeState.DENIED,
    VolumeState.FAILED,
    VolumeState.CLOSING,
}


@given(volumes(), st.booleans())
def test_every_volume_comes_to_rest(seen: VolumeSeen, wanted: bool) -> None:
    for _ in range(10):
        step = plan.plan_volume(wanted=wanted, seen=seen, now_s=NOW)
        if isinstance(step.action, Wait):
            assert step.state in RESTING
            if step.state is VolumeState.CLOSING:
                assert seen.in_use
            return
        seen = do(seen, step.action)
    pytest.fail("no rest after ten actions")


@given(volumes())
def test_unwanted_volume_ends_closed_once_nobody_uses_it(seen: VolumeSeen) -> None:
    seen = dataclasses.replace(seen, in_use=False)
    for _ in range(10):
        step = plan.plan_volume(wanted=False, seen=seen, now_s=NOW)
        seen = do(seen, step.action)
    assert step.state is VolumeState.ABSENT
    assert (seen.keyed, seen.mapped, seen.mounted) == (False, False, False)


@given(volumes(), st.booleans())
def test_planning_twice_names_the_same_action(seen: VolumeSeen, wanted: bool) -> None:
    first = plan.plan_volume(wanted=wanted, seen=seen, now_s=NOW)
    assert plan.plan_volume(wanted=wanted, seen=seen, now_s=NOW) == first


@given(volumes())
def test_a_resting_volume_that_failed_holds_no_key_and_no_device(
    seen: VolumeSeen,
) -> None:
    for _ in range(10):
        step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
        seen = do(seen, step.action)
    if step.state in {VolumeState.BACKOFF, VolumeState.DENIED, VolumeState.FAILED}:
        assert (seen.keyed, seen.mapped) == (False, False)


@given(volumes())
def test_a_wanted_volume_ends_mounted_recorded_and_leased_or_rests_for_a_reason(
    seen: VolumeSeen,
) -> None:
    """From everywhere, with what is used let go at once; no step is done twice for nothing."""
    seen = dataclasses.replace(seen, in_use=False)
    for _ in range(12):
        step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
        if isinstance(step.action, Wait):
            break
        changed = do(seen, step.action)
        assert changed != seen
        seen = changed
    if step.state is VolumeState.MOUNTED:
        assert (seen.mapped, seen.mounted, seen.recorded) == (True, True, True)
        assert seen.lease is None or seen.lease.until_s > NOW
        return
    assert (seen.keyed, seen.mapped, seen.mounted) == (False, False, False)
    assert seen.failure is not None or seen.image_tag is None


@given(volumes(), st.booleans())
def test_nothing_stays_open_past_its_lease(seen: VolumeSeen, wanted: bool) -> None:
    """Whoever wants it: the next step closes, or waits for the model server that uses it."""
    if not (seen.keyed or seen.mapped):
        return
    seen = dataclasses.replace(seen, lease=OVER)
    assert plan.forfeited(seen, NOW)
    step = plan.plan_volume(wanted=wanted, seen=seen, now_s=NOW)
    assert step.state is VolumeState.CLOSING
    if seen.in_use:
        assert step.action == Wait()
    else:
        assert isinstance(step.action, plan.Unmount | plan.Unmap | plan.ForgetKey)


@given(volumes())
def test_a_volume_is_never_counted_open_before_it_is_recorded(seen: VolumeSeen) -> None:
    step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
    if step.state is VolumeState.MOUNTED:
        assert seen.recorded


@given(st.floats(0, 1e7), st.floats(0, 1e7))
def test_no_renewal_waits_past_the_lease_but_for_its_last_second(
    pause_s: float, left_s: float
) -> None:
    wait_s = plan.renewal_pause_s(pause_s, left_s=left_s)
    assert wait_s <= max(1.0, left_s / 2)
    assert wait_s >= 1.0  # and they do not come without end


@pytest.mark.parametrize(
    ("seen", "state", "action"),
    [
        (
            dataclasses.replace(FULL, recorded=False),
            VolumeState.MAPPED,
            plan.Record(),
        ),
        (
            dataclasses.replace(FULL, lease=LATER),
            VolumeState.MOUNTED,
            Wait(NOW + 1800),
        ),
        (
            dataclasses.replace(
                FULL, lease=LeaseSeen(until_s=NOW + 9, renew_s=NOW + 99)
            ),
            VolumeState.MOUNTED,
            Wait(NOW + 9),
        ),
        (
            dataclasses.replace(FULL, lease=LeaseSeen(until_s=NOW + 9, renew_s=NOW)),
            VolumeState.MOUNTED,
            plan.Renew(),
        ),
        (
            dataclasses.replace(FULL, lease=LeaseSeen(until_s=NOW + 9, renew_s=None)),
            VolumeState.MOUNTED,
            Wait(NOW + 9),
        ),
        (
            dataclasses.replace(FULL, lease=OVER, in_use=True),
            VolumeState.CLOSING,
            Wait(),
        ),
        (dataclasses.replace(FULL, lease=OVER), VolumeState.CLOSING, plan.Unmount()),
        (
            VolumeSeen(image_tag=TAG, keyed=True, lease=OVER),
            VolumeState.CLOSING,
            plan.ForgetKey(),
        ),
        (
            VolumeSeen(
                image_tag=TAG,
                mapped=True,
                mounted=True,
                failure=failure(UnreachableError("x")),
            ),
            VolumeState.CLOSING,
            plan.Unmount(),
        ),
        (VolumeSeen(image_tag=None), VolumeState.ABSENT, Wait()),
        (VolumeSeen(image_tag=TAG), VolumeState.ATTESTING, plan.Attest()),
        (VolumeSeen(image_tag=TAG, keyed=True), VolumeState.KEYED, plan.Map()),
        (VolumeSeen(image_tag=TAG, mapped=True), VolumeState.MAPPED, plan.Mount()),
        (FULL, VolumeState.MOUNTED, Wait()),
        (
            VolumeSeen(image_tag=TAG, failure=failure(UnreachableError("x"))),
            VolumeState.BACKOFF,
            Wait(NOW + 5),
        ),
        (
            VolumeSeen(image_tag=TAG, failure=failure(DeniedError("x"))),
            VolumeState.DENIED,
            Wait(NOW + 5),
        ),
        (
            VolumeSeen(image_tag=(9,), failure=failure(ConfigError("x"), until_s=NOW)),
            VolumeState.FAILED,
            Wait(),
        ),
        (
            VolumeSeen(image_tag=TAG, failure=failure(IntegrityError("x"))),
            VolumeState.FAILED,
            Wait(),
        ),
        (
            VolumeSeen(image_tag=(9,), failure=failure(IntegrityError("x"))),
            VolumeState.ATTESTING,
            plan.Attest(),
        ),
        (
            VolumeSeen(image_tag=TAG, failure=failure(DeniedError("x"), until_s=NOW)),
            VolumeState.ATTESTING,
            plan.Attest(),
        ),
        (
            dataclasses.replace(FULL, intact=False),
            VolumeState.CLOSING,
            plan.Unmount(),
        ),
        (
            dataclasses.replace(FULL, intact=False, in_use=True),
            VolumeState.CLOSING,
            Wait(),
        ),
    ],
)
def test_wanted_volume(seen: VolumeSeen, state: VolumeState, action: object) -> None:
    step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
    assert (step.state, step.action) == (state, action)


BY_OPERATOR = VolumeSeen(image_tag=TAG, by_operator=True)


@given(volumes())
def test_the_key_server_is_never_asked_for_what_an_operator_brings(
    seen: VolumeSeen,
) -> None:
    seen = dataclasses.replace(seen, by_operator=True)
    for _ in range(12):
        step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
        assert not isinstance(step.action, plan.Attest)
        seen = do(seen, step.action)


@given(volumes())
def test_a_passphrase_that_an_operator_brings_opens_it_from_every_resting_state(
    seen: VolumeSeen,
) -> None:
    """As `tdxctl mount` does: the last failure is forgotten, and the key is there."""
    seen = dataclasses.replace(seen, by_operator=True, in_use=False)
    for _ in range(12):
        step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
        seen = do(seen, step.action)
    if seen.mounted or seen.image_tag is None:
        return
    seen = dataclasses.replace(seen, failure=None, keyed=True)
    for _ in range(6):
        step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
        seen = do(seen, step.action)
    assert step.state is VolumeState.MOUNTED


@pytest.mark.parametrize(
    ("seen", "state", "action"),
    [
        (BY_OPERATOR, VolumeState.FAILED, plan.AskOperator()),
        (
            dataclasses.replace(
                BY_OPERATOR, failure=failure(PassphraseNeededError("x"))
            ),
            VolumeState.FAILED,
            Wait(),
        ),
        (
            dataclasses.replace(
                BY_OPERATOR, failure=failure(WrongPassphraseError("x"), tag=(9,))
            ),
            VolumeState.FAILED,
            plan.AskOperator(),
        ),
        (
            dataclasses.replace(BY_OPERATOR, keyed=True),
            VolumeState.KEYED,
            plan.Map(),
        ),
        (
            dataclasses.replace(
                BY_OPERATOR, keyed=True, failure=failure(WrongPassphraseError("x"))
            ),
            VolumeState.CLOSING,
            plan.ForgetKey(),
        ),
        (
            dataclasses.replace(BY_OPERATOR, image_tag=None),
            VolumeState.ABSENT,
            Wait(),
        ),
    ],
)
def test_wanted_volume_of_an_operator(
    seen: VolumeSeen, state: VolumeState, action: object
) -> None:
    step = plan.plan_volume(wanted=True, seen=seen, now_s=NOW)
    assert (step.state, step.action) == (state, action)


def test_a_close_that_failed_waits_before_the_next_try() -> None:
    seen = dataclasses.replace(FULL, stuck_until_s=NOW + 1)
    step = plan.plan_volume(wanted=False, seen=seen, now_s=NOW)
    assert step.action == Wait(NOW + 1)
    later = plan.plan_volume(wanted=False, seen=seen, now_s=NOW + 1)
    assert later.action == plan.Unmount()


# --- serving ------------------------------------------------------------------

GOAL = ServingGoal(models_key="m1", front_key="f1", certificates_key="c1")
IN_PLACE = dataclasses.replace(GOAL, in_place=True)
KEPT = dataclasses.replace(GOAL, certificates_key=None)
GOALS = st.sampled_from([GOAL, IN_PLACE, KEPT])


def do_serving(
    seen: ServingSeen, action: plan.ServingAction, goal: ServingGoal
) -> ServingSeen:
    def change(slot: str, **fields: Any) -> ServingSeen:
        servers = tuple(
            dataclasses.replace(one, **fields) if one.slot == slot else one
            for one in seen.servers
        )
        return dataclasses.replace(seen, servers=servers)

    match action:
        case plan.StartServer(slot):
            assert slot not in {one.slot for one in seen.servers}
            assert goal.models_key is not None
            added = ServerSeen(slot=slot, models_key=goal.models_key)
            return dataclasses.replace(seen, servers=(*seen.servers, added))
        case plan.PollReady(slot):
            return change(slot, ready=True)
        case plan.StartFront(slot):
            return dataclasses.replace(
                seen,
                front_key=goal.front_key,
                certificates_key=goal.certificates_key,
                active=slot,
            )
        case plan.SwitchFront(slot):
            return dataclasses.replace(change(slot, drained=False), active=slot)
        case plan.RenewCertificates():
            return dataclasses.replace(seen, certificates_key=goal.certificates_key)
        case plan.DrainServer(slot):
            told = None if seen.active == slot else seen.active
            return dataclasses.replace(change(slot, drained=True), active=told)
        case plan.StopServer(slot):
            left = tuple(one for one in seen.servers if one.slot != slot)
            told = None if seen.active == slot else seen.active
            return dataclasses.replace(seen, servers=left, active=told)
        case plan.StopFront():
            return dataclasses.replace(
                seen,
                front_key=None,
                front_revoked=False,
                active=None,
                certificates_key=None,
            )
    return seen


@st.composite
def servings(draw) -> ServingSeen:
    slots = draw(st.sampled_from([(), ("a",), ("b",), ("a", "b")]))
    servers = tuple(
        ServerSeen(
            slot=slot,
            models_key=draw(st.sampled_from(["m0", "m1", "m2"])),
            ready=draw(st.booleans()),
            drained=draw(st.booleans()),
            revoked=draw(st.booleans()),
        )
        for slot in slots
    )
    front = draw(st.sampled_from([None, "f0", "f1"]))
    active = draw(st.sampled_from(["a", "b", None])) if front else None
    revoked = front is not None and draw(st.booleans())
    return ServingSeen(
        servers=servers,
        front_key=front,
        front_revoked=revoked,
        active=active,
        certificates_key=draw(st.sampled_from(["c0", "c1"])) if front else None,
    )


FAILURES = st.sampled_from(
    [None, failure(NotReadyError("x")), failure(IntegrityError("x"))]
)


def reaches(goal: ServingGoal, seen: ServingSeen) -> None:
    for _ in range(15):
        step = plan.plan_serving(goal, seen, NOW)
        if isinstance(step.action, Wait):
            break
        seen = do_serving(seen, step.action, goal)
    assert step.state is ServingState.READY
    assert goal.certificates_key in (None, seen.certificates_key)
    (server,) = seen.servers
    assert (server.models_key, server.ready, server.revoked) == ("m1", True, False)
    assert (seen.front_key, seen.active) == ("f1", server.slot)
    assert not seen.front_revoked


@given(servings(), GOALS)
def test_serving_reaches_its_goal_from_everywhere(
    seen: ServingSeen, goal: ServingGoal
) -> None:
    reaches(goal, seen)


@given(servings(), GOALS, FAILURES, FAILURES)
def test_serving_reaches_its_goal_or_rests_whatever_failed(
    seen: ServingSeen,
    goal: ServingGoal,
    failed: Failure | None,
    not_renewed: Failure | None,
) -> None:
    """Nothing is started again too soon."""
    seen = dataclasses.replace(seen, failure=failed, not_renewed=not_renewed)
    for _ in range(15):
        step = plan.plan_serving(goal, seen, NOW)
        if isinstance(step.action, Wait):
            break
        if failed is not None:
            assert not isinstance(step.action, plan.StartServer | plan.StartFront)
        seen = do_serving(seen, step.action, goal)
    assert isinstance(step.action, Wait)
    assert failed is not None or step.state is ServingState.READY


@given(servings(), FAILURES)
def test_a_new_server_that_failed_leaves_the_one_in_use_alone(
    seen: ServingSeen, failed: Failure | None
) -> None:
    """In both strategies: the one that the front routes to still runs at the end."""
    one = ServerSeen(slot="a", models_key="m0", ready=True)
    rest = tuple(one for one in seen.servers if one.slot == "b")
    seen = dataclasses.replace(
        seen,
        servers=(one, *rest),
        front_key="f1",
        active="a",
        front_revoked=False,
        failure=failed or failure(NotReadyError("x")),
    )
    for goal in (GOAL, IN_PLACE):
        now = seen
        while not isinstance(action := plan.plan_serving(goal, now, NOW).action, Wait):
            now = do_serving(now, action, goal)
        assert any(server.ready and server.slot == now.active for server in now.servers)


@given(servings(), st.lists(GOALS, max_size=6))
def test_goals_that_change_on_the_way_are_reached_all_the_same(
    seen: ServingSeen, goals: list[ServingGoal]
) -> None:
    """One step for each, then the last one: the front is never left without its server."""
    other = dataclasses.replace(GOAL, models_key="m0", in_place=True)
    for goal in [one for two in goals for one in (other, two)]:
        step = plan.plan_serving(goal, seen, NOW)
        seen = do_serving(seen, step.action, goal)
    reaches(GOAL, seen)


@given(servings())
def test_side_by_side_no_server_in_use_ends_before_another_is_ready(
    seen: ServingSeen,
) -> None:
    for _ in range(15):
        step = plan.plan_serving(GOAL, seen, NOW)
        match step.action:
            case plan.StopServer(slot) | plan.DrainServer(slot) if slot == seen.active:
                used = [one for one in seen.servers if one.slot == slot]
                assert not any(one.ready and not one.revoked for one in used)
        seen = do_serving(seen, step.action, GOAL)


@given(servings())
def test_in_place_no_server_starts_beside_another(seen: ServingSeen) -> None:
    for _ in range(15):
        step = plan.plan_serving(IN_PLACE, seen, NOW)
        if isinstance(step.action, plan.StartServer):
            assert not seen.servers
        seen = do_serving(seen, step.action, IN_PLACE)


def test_in_place_the_old_server_drains_and_stops_first() -> None:
    old = ServerSeen(slot="a", models_key="m0", ready=True)
    seen = ServingSeen(
        servers=(old,), front_key="f1", active="a", certificates_key="c1"
    )
    done = []
    for _ in range(6):
        step = plan.plan_serving(IN_PLACE, seen, NOW)
        done.append(step.action)
        seen = do_serving(seen, step.action, IN_PLACE)
    assert done == [
        plan.DrainServer("a"),
        plan.StopServer("a"),
        plan.StartServer("a"),
        plan.PollReady("a"),
        plan.SwitchFront("a"),
        Wait(),
    ]


@given(servings())
def test_servers_make_way_for_models_that_need_their_room(seen: ServingSeen) -> None:
    """The front stays with its certificate: callers hear that no server is ready."""
    goal = dataclasses.replace(GOAL, models_key=None)
    for _ in range(15):
        step = plan.plan_serving(goal, seen, NOW)
        assert not isinstance(step.action, plan.StartServer | plan.StartFront)
        if isinstance(step.action, plan.StopFront):
            assert seen.front_revoked
        seen = do_serving(seen, step.action, goal)
    assert not seen.servers
    assert isinstance(plan.plan_serving(goal, seen, NOW).action, Wait)


def test_a_server_told_to_drain_in_vain_gets_its_callers_back() -> None:
    """The goal went back to it meanwhile."""
    old = ServerSeen(slot="a", models_key="m1", ready=True, drained=True)
    seen = ServingSeen(servers=(old,), front_key="f1", certificates_key="c1")
    assert plan.plan_serving(IN_PLACE, seen, NOW).action == plan.SwitchFront("a")


def test_other_certificates_alone_restart_nothing() -> None:
    server = ServerSeen(slot="a", models_key="m1", ready=True)
    seen = ServingSeen(
        servers=(server,), front_key="f1", active="a", certificates_key="c0"
    )
    step = plan.plan_serving(GOAL, seen, NOW)
    assert (step.state, step.action) == (ServingState.READY, plan.RenewCertificates())
    refused = dataclasses.replace(seen, not_renewed=failure(NotReadyError("x")))
    rest = plan.plan_serving(GOAL, refused, NOW)
    assert (rest.state, rest.action) == (ServingState.READY, Wait(NOW + 5))
    for_good = dataclasses.replace(seen, not_renewed=failure(DataError("x")))
    assert plan.plan_serving(GOAL, for_good, NOW).action == Wait()


def test_refused_certificates_do_not_hold_up_a_new_server() -> None:
    old = ServerSeen(slot="a", models_key="m0", ready=True)
    new = ServerSeen(slot="b", models_key="m1", ready=True)
    seen = ServingSeen(
        servers=(old, new),
        front_key="f1",
        active="a",
        certificates_key="c0",
        not_renewed=failure(DataError("x")),
    )
    done = []
    for _ in range(4):
        step = plan.plan_serving(GOAL, seen, NOW)
        done.append(step.action)
        seen = do_serving(seen, step.action, GOAL)
    assert done == [
        plan.SwitchFront("b"),
        plan.DrainServer("a"),
        plan.StopServer("a"),
        Wait(),
    ]


@given(servings())
def test_serving_stops_from_everywhere_front_first(seen: ServingSeen) -> None:
    for _ in range(5):
        step = plan.plan_serving(None, seen, NOW)
        if seen.front_key is not None:
            assert step.action == plan.StopFront()
        seen = do_serving(seen, step.action, GOAL)
    assert step.state is ServingState.STOPPED
    assert not seen.servers


@given(servings())
def test_the_front_never_leaves_a_ready_server_for_one_that_is_not(
    seen: ServingSeen,
) -> None:
    for _ in range(15):
        step = plan.plan_serving(GOAL, seen, NOW)
        if isinstance(step.action, plan.SwitchFront | plan.StartFront):
            (target,) = (one for one in seen.servers if one.slot == step.action.slot)
            assert target.ready
        if isinstance(step.action, plan.StopServer):
            active = [
                one
                for one in seen.servers
                if one.slot == seen.active and one.ready and not one.revoked
            ]
            if active and step.action.slot == seen.active:
                pytest.fail("stopped the server that the front routes to")
        seen = do_serving(seen, step.action, GOAL)


@given(servings(), st.sampled_from([GOAL, None]))
def test_a_server_that_sees_a_revoked_volume_never_waits(
    seen: ServingSeen, goal: ServingGoal | None
) -> None:
    """No start, no drain and no pause comes before its end: two quick steps at most."""
    seen = dataclasses.replace(seen, failure=failure(NotReadyError("x")))
    for _ in range(4):
        if not seen.front_revoked and not any(one.revoked for one in seen.servers):
            return
        step = plan.plan_serving(goal, seen, NOW)
        assert isinstance(
            step.action, plan.SwitchFront | plan.StopServer | plan.StopFront
        )
        seen = do_serving(seen, step.action, GOAL)
    assert not seen.front_revoked
    assert not any(one.revoked for one in seen.servers)


def test_callers_of_a_revoked_volume_move_on_if_there_is_where_to() -> None:
    old = ServerSeen(slot="a", models_key="m0", ready=True, revoked=True)
    new = ServerSeen(slot="b", models_key="m1", ready=True)
    seen = ServingSeen(
        servers=(old, new), front_key="f1", active="a", certificates_key="c1"
    )
    assert plan.plan_serving(GOAL, seen, NOW).action == plan.SwitchFront("b")
    alone = dataclasses.replace(seen, servers=(old,))
    assert plan.plan_serving(GOAL, alone, NOW).action == plan.StopServer("a")


def test_serving_rests_after_a_failure_while_the_old_server_goes_on() -> None:
    old = ServerSeen(slot="a", models_key="m0", ready=True)
    seen = ServingSeen(
        servers=(old,),
        front_key="f1",
        active="a",
        failure=failure(NotReadyError("x")),
    )
    step = plan.plan_serving(GOAL, seen, NOW)
    assert (step.state, step.action) == (ServingState.BACKOFF, Wait(NOW + 5))
    later = plan.plan_serving(GOAL, seen, NOW + 5)
    assert later.action == plan.StartServer("b")


def test_in_place_nothing_is_taken_away_while_a_failure_stands() -> None:
    old = ServerSeen(slot="a", models_key="m0", ready=True)
    seen = ServingSeen(servers=(old,), front_key="f1", active="a")
    seen = dataclasses.replace(seen, failure=failure(NotReadyError("x")))
    assert plan.plan_serving(IN_PLACE, seen, NOW).action == Wait(NOW + 5)


@given(servings(), GOALS)
def test_a_front_that_ended_comes_back_on_any_ready_server(
    seen: ServingSeen, goal: ServingGoal
) -> None:
    """A new server may take minutes to load, or never start: the old one is there."""
    old = ServerSeen(slot="a", models_key="m0", ready=True)
    rest = (dataclasses.replace(one, revoked=False) for one in seen.servers[:1])
    new = tuple(one for one in rest if one.slot == "b")
    gone = dataclasses.replace(
        seen, servers=(old, *new), front_key=None, front_revoked=False, active=None
    )
    step = plan.plan_serving(goal, gone, NOW)
    assert isinstance(step.action, plan.StartFront)
    (target,) = (one for one in gone.servers if one.slot == step.action.slot)
    assert target.ready
    paused = dataclasses.replace(gone, failure=failure(NotReadyError("x")))
    while isinstance(
        action := plan.plan_serving(goal, paused, NOW).action, plan.PollReady
    ):
        paused = do_serving(paused, action, goal)  # it is not forgotten meanwhile
    assert action == Wait(NOW + 5)


def test_no_front_starts_on_a_server_that_must_go_or_has_drained() -> None:
    old = ServerSeen(slot="a", models_key="m0", ready=True, drained=True)
    new = ServerSeen(slot="b", models_key="m1")
    seen = ServingSeen(servers=(old, new))
    assert plan.plan_serving(GOAL, seen, NOW).action == plan.PollReady("b")
    bad = dataclasses.replace(old, drained=False, revoked=True)
    seen = ServingSeen(servers=(bad, new))
    assert plan.plan_serving(GOAL, seen, NOW).action == plan.StopServer("a")


def test_serving_failed_for_good_waits_for_an_operator() -> None:
    seen = ServingSeen(failure=failure(IntegrityError("x")))
    assert plan.plan_serving(GOAL, seen, NOW).state is ServingState.FAILED


# --- backoff ------------------------------------------------------------------


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.floats(1, 600))
def test_backoff_stays_between_its_bounds(
    attempts: int, jitter: float, ceiling_s: float
) -> None:
    pause_s = plan.backoff_s(attempts, ceiling_s=ceiling_s, jitter=jitter)
    assert 0.2 <= pause_s <= ceiling_s


def test_backoff_grows_to_its_ceiling() -> None:
    tops = [plan.backoff_s(n, ceiling_s=60, jitter=0.999) for n in range(1, 10)]
    assert all(one <= two for one, two in itertools.pairwise(tops))
    assert tops[-1] == pytest.approx(60, rel=0.01)
