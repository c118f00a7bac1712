"""The state that goes over an exec: it comes back as it was, and anything else is refused."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.bundle import Manifest
from tdxd.core.config import VolumeConfig
from tdxd.core.decode import decode, plain
from tdxd.core.foreign import ForeignManifest
from tdxd.core.plan import Failure, ServingState, VolumeState
from tdxd.errors import DataError, DeniedError, Retry, TdxdError
from tdxd.guest import handover
from tdxd.guest.handover import decode_state, descriptors, encode_state
from tdxd.guest.last_error import LastError
from tdxd.guest.leased import Lease
from tdxd.host.content import Model
from tdxd.host.ports import HandedChild, MappedVolume

TEXT = st.text(max_size=12)
COUNT = st.integers(0, 2**40)
FD = st.integers(-1, 1000)
OPEN_FD = st.integers(0, 1000)
AGE = st.floats(-1e6, 1e6, allow_nan=False)
ID = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True).filter(
    lambda text: text.strip(".") != ""
)


def many(one: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(one, max_size=2).map(tuple)


MANIFEST = st.builds(
    Manifest,
    volume_id=ID,
    generation=st.integers(1, 2**63 - 1),
    payload_offset_bytes=st.integers(1, 2**20).map(lambda blocks: blocks * 4096),
    data_blocks=st.integers(1, 2**40),
    hash_blocks=st.integers(0, 2**40),
    root_hash=st.binary(min_size=32, max_size=32),
    salt=st.binary(min_size=32, max_size=32),
)
FOREIGN = st.builds(
    ForeignManifest,
    volume_id=ID,
    generation=st.integers(1, 2**63 - 1),
    header_sha256=st.sampled_from([b"", b"h" * 32]),
)
CHILD = st.builds(
    HandedChild,
    name=TEXT,
    pid=COUNT,
    pid_fd=FD,
    output_fd=FD,
    mount_fd=FD,
    net_fd=FD,
    unread=st.binary(max_size=9),
)
SERVED = st.builds(
    handover.ServedVolume, volume_id=TEXT, generation=COUNT, mount_point=TEXT
)
VOLUME = st.builds(
    handover.HandedVolume,
    spec=st.builds(
        VolumeConfig,
        id=ID,
        image=TEXT.map(lambda text: "/" + text),
        required=st.booleans(),
        kind=st.just("luks2"),
        passphrase=st.sampled_from(["key-server", "operator"]),
        writable=st.booleans(),
    )
    | st.builds(VolumeConfig, id=ID, image=st.just("/m.img")),
    wanted=st.booleans(),
    leaving=st.booleans(),
    state=st.sampled_from([one.value for one in VolumeState]),
    since=TEXT,
    image=st.none() | TEXT,
    mapped=st.none()
    | st.builds(
        MappedVolume,
        manifest=MANIFEST | FOREIGN,
        device=TEXT,
        mapper=st.sampled_from(["dm", "memory"]),
        fd=FD,
        writable=st.booleans(),
        payload_bytes=COUNT,
    ),
    lease=st.none() | st.builds(Lease, until_s=AGE, renew_s=AGE),
    failure=st.none()
    | st.builds(
        handover.HandedFailure,
        code=TEXT,
        retry=st.sampled_from([one.value for one in Retry]),
        exit_code=COUNT,
        message=TEXT,
        hint=TEXT,
        attempts=COUNT,
        age_s=AGE,
        left_s=AGE,
        image_tag=st.none() | many(COUNT),
    ),
    read_before=COUNT,
    last_error=st.none()
    | st.builds(LastError, time=TEXT, code=TEXT, message=TEXT, hint=TEXT),
)
SERVER = st.builds(
    handover.HandedServer,
    slot=st.sampled_from("ab"),
    key=TEXT,
    volumes=many(SERVED),
    models=many(st.builds(Model, name=TEXT, versions=many(COUNT))),
    child=CHILD,
    socket_path=TEXT,
    ready=st.booleans(),
    drained=st.booleans(),
    age_s=AGE,
    drain_left_s=st.none() | AGE,
    lines=many(TEXT),
)
FRONT = st.builds(
    handover.HandedFront,
    key=TEXT,
    active=TEXT,
    child=CHILD,
    admin_path=TEXT,
    lines=many(TEXT),
)
LISTENER = st.builds(handover.HandedListener, address=TEXT, fd=OPEN_FD)
EVENT = st.fixed_dictionaries(
    {"seq": COUNT, "time": TEXT, "level": TEXT, "event": TEXT},
    optional={"more": st.none() | TEXT | COUNT},
)
STATE = st.builds(
    handover.State,
    runtime_dir=TEXT,
    mount_namespace=COUNT,
    mapper=TEXT,
    control=st.none() | LISTENER,
    health=st.none() | LISTENER,
    evidence=st.none() | LISTENER,
    daemon=st.builds(
        handover.HandedDaemon,
        version=TEXT,
        reexecs=COUNT,
        started=TEXT,
        volumes=many(VOLUME),
        serving=st.builds(
            handover.HandedServing,
            state=st.sampled_from([one.value for one in ServingState]),
            since=TEXT,
            restarts=COUNT,
            wanted=many(SERVED),
            servers=many(SERVER),
            front=st.none() | FRONT,
            listener=st.none() | LISTENER,
        ),
        events=st.builds(
            handover.HandedEvents,
            count=COUNT,
            kept=st.lists(EVENT, max_size=2).map(msgpack.packb),
        ),
        secrets=many(
            st.builds(
                handover.HandedSecret,
                secret_id=ID,
                generation=COUNT,
                content=TEXT,
                sha256=TEXT,
                since=TEXT,
                fd=FD,
                lease=st.none() | st.builds(Lease, until_s=AGE, renew_s=AGE),
            )
        ),
    ),
)


@given(STATE)
def test_it_comes_back_as_it_was(state: handover.State) -> None:
    assert decode_state(encode_state(state)) == state


@given(STATE)
def test_every_descriptor_is_found(state: handover.State) -> None:
    serving = state.daemon.serving
    listeners = (state.control, state.health, state.evidence, serving.listener)
    children = [one.child for one in serving.servers]
    children += [serving.front.child] if serving.front else []
    wanted = [one.fd for one in listeners if one is not None]
    wanted += [one.mapped.fd for one in state.daemon.volumes if one.mapped]
    wanted += [one.fd for one in state.daemon.secrets]
    for one in children:
        wanted += [one.pid_fd, one.output_fd, one.mount_fd, one.net_fd]
    assert sorted(descriptors(state)) == sorted(fd for fd in wanted if fd >= 0)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^handed over state: "):
        decode_state(data)


PLAIN = st.recursive(
    st.none() | st.booleans() | COUNT | AGE | TEXT | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)


@given(STATE, st.data())
def test_a_changed_value_is_refused_or_of_the_right_type(
    state: handover.State, data: st.DataObject
) -> None:
    """Any one field anywhere is replaced; what comes out is a state, or a clear error."""
    value = plain(state)
    places: list[tuple[dict[str, object], str]] = []

    def walk(inner: object) -> None:
        if isinstance(inner, dict):
            places.extend((inner, key) for key in inner)
            for one in inner.values():
                walk(one)
        elif isinstance(inner, list):
            for one in inner:
                walk(one)

    walk(value)
    where, key = data.draw(st.sampled_from(places))
    where[key] = data.draw(PLAIN)
    try:
        found = decode_state(msgpack.packb(value))
    except DataError as exc:
        assert exc.message.startswith("handed over state: ")  # noqa: PT017
    else:
        assert isinstance(found, handover.State)


@given(STATE)
def test_a_truncated_state_is_refused(state: handover.State) -> None:
    data = encode_state(state)
    for size in range(0, len(data), max(1, len(data) // 50)):
        with pytest.raises(DataError):
            decode_state(data[:size])


@pytest.mark.parametrize("found", [0, 1, 5, "2", None, []])
def test_another_format_is_named_before_anything_else(found: object) -> None:
    with pytest.raises(DataError) as caught:
        decode_state(msgpack.packb({"format": found, "unheard": "of"}))
    assert caught.value.message == (
        f"handed over state: format {found!r}, this program knows 2, 3, 4"
    )


def test_a_failure_means_the_same_on_another_clock() -> None:
    error = DeniedError("policy says no", hint="ask the owner")
    failure = Failure(
        error=error, attempts=3, since_s=90, until_s=400, image_tag=(1, 2)
    )
    found = handover.HandedFailure.of(failure, 100).failure(7000)
    assert (found.since_s, found.until_s, found.attempts) == (6990, 7300, 3)
    assert found.image_tag == (1, 2)
    for name in ("code", "retry", "exit_code", "message", "hint"):
        assert getattr(found.error, name) == getattr(error, name)
    assert isinstance(found.error, TdxdError)


NEW_IN = {
    3: {
        "": {"evidence"},
        "front": {"served_key"},
        "volumes": {"read_before", "last_error"},
        "spec": {"kind", "passphrase", "writable"},
        "mapped": {"writable", "payload_bytes"},
        "serving": {"rest_listener"},
    },
    4: {
        "daemon": {"secrets"},
        "front": {"sources", "certificate_sha256"},
        "volumes": {"newer_than", "opened"},
    },
}
"""What each format brought, by the key of the record that has it."""


def as_format(number: int, value: object, within: str = "") -> object:
    if isinstance(value, dict):
        gone = {
            key
            for newer, records in NEW_IN.items()
            if newer > number
            for key in records.get(within, set())
        }
        return {
            key: as_format(number, one, key)
            for key, one in value.items()
            if key not in gone
        }
    if isinstance(value, list):
        return [as_format(number, one, within) for one in value]
    return value


@pytest.mark.parametrize("number", [2, 3])
@given(state=STATE)
def test_the_state_of_an_older_program_is_adopted(
    number: int, state: handover.State
) -> None:
    """An upgrade closes nothing."""
    older = as_format(number, plain(state))
    assert isinstance(older, dict)
    found = decode_state(msgpack.packb({**older, "format": number}, use_bin_type=True))
    for before, after in zip(state.daemon.volumes, found.daemon.volumes, strict=True):
        assert after.spec.id == before.spec.id
        assert number > 2 or after.spec.kind == "sealed"
        if before.mapped is not None and isinstance(before.mapped.manifest, Manifest):
            assert after.mapped is not None
            assert after.mapped.manifest == before.mapped.manifest
            assert after.mapped.device == before.mapped.device
        assert number > 2 or after.last_error is None
        assert after.newer_than is None
    if found.daemon.serving.front is not None:
        assert found.daemon.serving.front.sources == ()


def test_a_new_field_with_a_default_needs_no_new_format() -> None:
    """The state of an older program lacks it."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Newer:
        address: str
        fd: int
        backlog: int = 7

    older = plain(handover.HandedListener(address="a", fd=3))
    assert decode(Newer, older, source="x") == Newer(address="a", fd=3)
