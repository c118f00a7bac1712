"""The place of the image fails or hangs: errors of the disk, reads of a minute."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.errors import BusyError, HostError, IntegrityError, Retry, TdxdError
from tdxd.host.dm_map import DmMapper
from tdxd.host.ports import Mapper
from tdxd.host.workers import never
from tests import reference_image
from tests.attacks.faulty_file import FaultyFile, faulty_file
from tests.attacks.images import Outcome, opened, read_blocks
from tests.contract.test_mapper import MAPPERS, needs_dm
from tests.leftovers import nothing_left
from tests.reference_image import PAYLOAD_OFFSET, Reference

pytestmark = pytest.mark.root
pytest.importorskip("mfusepy", reason="mfusepy is not installed")

DATA_BLOCKS = 140
LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, mounted: FaultyFile) -> Iterator[None]:
    with nothing_left(str(tmp_path)):
        yield


@pytest.fixture(params=["memory", pytest.param("dm", marks=needs_dm)])
def mapper(request) -> Mapper:
    return MAPPERS[request.param]()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Reference:
    """Nobody changes it: sealing takes long where the kernel is emulated."""
    place = tmp_path_factory.mktemp("sealed") / "m.img"
    data = os.urandom(DATA_BLOCKS * 4096)
    return reference_image.seal(data, place, volume_id="contract")


@pytest.fixture(scope="module")
def mounted(image: Reference, tmp_path_factory) -> Iterator[FaultyFile]:
    with faulty_file(image.path, tmp_path_factory.mktemp("faulty") / "mnt") as made:
        yield made


@pytest.fixture
def file(mounted: FaultyFile) -> Iterator[FaultyFile]:
    yield mounted
    mounted.heal()


def block(number: int, count: int = 1) -> tuple[int, int]:
    start = PAYLOAD_OFFSET + number * 4096
    return start, start + count * 4096


def test_a_disk_error_under_the_root_is_told(mapper, image, file):
    file.fail(*block(DATA_BLOCKS))
    with pytest.raises(HostError) as caught:
        mapper.map_volume(str(file.path), image.bundle, cancelled=never)
    assert caught.value.errno == errno.EIO
    assert str(file.path) in caught.value.message
    assert caught.value.retry is Retry.BACKOFF
    file.heal()
    mapper.unmap(mapper.map_volume(str(file.path), image.bundle, cancelled=never))


def test_a_header_that_cannot_be_read_changes_nothing(mapper, image, file):
    """The proof that nothing of it is read: not one byte of it can be."""
    file.fail(0, PAYLOAD_OFFSET)
    assert opened(mapper, file.path, image).harmless


@pytest.mark.parametrize(
    ("wrong", "unreadable"),
    [
        (block(7), {7}),
        (block(DATA_BLOCKS - 1), {DATA_BLOCKS - 1}),
        (block(DATA_BLOCKS + 1), set(range(128))),
    ],
    ids=["data", "last data", "leaf"],
)
def test_a_disk_error_is_no_change_of_the_image(mapper, image, file, wrong, unreadable):
    """The memory mapper tries again later; under dm-verity the volume stays open and heals."""
    file.fail(*wrong)
    outcome = opened(mapper, file.path, image)
    if mapper.name == "memory":
        assert isinstance(outcome.refused, HostError)
        assert outcome.refused.errno == errno.EIO
        assert str(file.path) in outcome.refused.message
        assert outcome.refused.retry is Retry.BACKOFF
    else:
        # Blocks that the kernel asked for in the same request may fail with them, once.
        assert outcome.unreadable >= unreadable
        assert outcome.intact
    file.heal()
    assert opened(mapper, file.path, image).harmless


@needs_dm
def test_a_disk_error_that_passes_is_forgotten(image, file):
    """Under one and the same mapping: the block is right again, and was never a wrong one."""
    mapper = DmMapper()
    mapped = mapper.map_volume(str(file.path), image.bundle, cancelled=never)
    try:
        file.fail(*block(7))
        assert 7 in read_blocks(mapped, image.data)
        assert mapper.intact(mapped)
        file.heal()
        assert read_blocks(mapped, image.data) == frozenset()
        assert mapper.intact(mapped)
    finally:
        mapper.unmap(mapped)


def test_a_file_that_says_more_than_it_gives(mapper, image, file):
    """Its size is right, but reads end early: what a loop device fills up with zeros is found."""
    file.end(PAYLOAD_OFFSET + 100 * 4096)
    outcome = opened(mapper, file.path, image)
    if outcome.refused is not None:
        assert isinstance(outcome.refused, IntegrityError)
    else:
        assert mapper.name == "dm"
        assert outcome.unreadable >= set(range(100, DATA_BLOCKS))
        assert not outcome.intact


def test_a_read_that_hangs_holds_up_no_other_volume(mapper, image, file, tmp_path):
    """Another image is opened, read and closed meanwhile; then the read is answered."""
    other = reference_image.seal(
        image.data[: 20 * 4096], tmp_path / "o.img", volume_id="contract-other"
    )
    file.hang(*block(DATA_BLOCKS))
    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(opened(mapper, file.path, image))
    )
    thread.start()
    file.until_something_hangs()
    assert opened(mapper, other.path, other).harmless
    assert outcomes == []
    file.heal()
    thread.join(LIMIT_S)
    assert [one.harmless for one in outcomes] == [True]


def test_a_mapping_is_called_off_while_a_read_hangs(mapper, image, file):
    """It ends as cancelled once the read is answered, and leaves nothing."""
    file.hang(*block(DATA_BLOCKS))
    stop = threading.Event()
    errors: list[TdxdError] = []

    def work() -> None:
        try:
            mapper.map_volume(str(file.path), image.bundle, cancelled=stop.is_set)
        except TdxdError as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    file.until_something_hangs()
    stop.set()
    file.heal()
    thread.join(LIMIT_S)
    (error,) = errors
    assert isinstance(error, HostError)
    assert error.errno == errno.ECANCELED


def test_a_worker_whose_read_hangs_is_called_off(image, file):
    """SIGKILL does not end a read that the file system has begun: nobody must wait for it."""
    file.hang(*block(7))
    hangs = threading.Event()

    def cancelled() -> bool:
        if not hangs.is_set():
            file.until_something_hangs()
            hangs.set()
            threading.Timer(0.2, file.heal).start()
        return True

    mapper = MAPPERS["memory"]()
    with pytest.raises(HostError) as caught:
        mapper.map_volume(str(file.path), image.bundle, cancelled=cancelled)
    assert caught.value.errno == errno.ECANCELED


@needs_dm
def test_a_reader_that_hangs_holds_up_no_status(image, file, tmp_path):
    """What the daemon asks of a mapping answers while a read below it hangs."""
    mapper = DmMapper()
    mapped = mapper.map_volume(str(file.path), image.bundle, cancelled=never)
    read: list[frozenset[int]] = []
    thread = threading.Thread(
        target=lambda: read.append(read_blocks(mapped, image.data))
    )
    try:
        file.hang(*block(100))
        thread.start()
        file.until_something_hangs()
        assert mapper.intact(mapped)
        with pytest.raises(BusyError):
            mapper.unmap(mapped)
        assert read == []
        file.heal()
        thread.join(LIMIT_S)
        assert read == [frozenset()]
        assert mapper.intact(mapped)
    finally:
        file.heal()
        mapper.unmap(mapped)
