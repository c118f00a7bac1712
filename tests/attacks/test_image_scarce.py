"""What mapping needs runs out: memory, descriptors, loop devices. It fails and leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxd.errors import HostError, Retry
from tdxd.host import loop
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.ports import Mapper
from tdxd.host.workers import Workers
from tests import reference_image
from tests.attacks.images import opened
from tests.contract.test_mapper import MAPPERS, needs_dm
from tests.leftovers import nothing_left
from tests.reference_image import Reference

pytestmark = pytest.mark.root

DATA_BLOCKS = 140
TREE_END_BYTES = (DATA_BLOCKS + 1) * 4096
"""The top of the tree stands behind the data; workers read the leaves themselves."""


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    with nothing_left(str(tmp_path)):
        yield


@pytest.fixture(params=["memory", pytest.param("dm", marks=needs_dm)])
def mapper(request) -> Mapper:
    return MAPPERS[request.param]()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Reference:
    place = tmp_path_factory.mktemp("sealed") / "m.img"
    data = os.urandom(DATA_BLOCKS * 4096)
    return reference_image.seal(data, place, volume_id="contract")


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """Lower a limit of this process and of the children that it starts."""
    old, hard = resource.getrlimit(what)
    resource.setrlimit(what, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (old, hard))


def refused(mapper: Mapper, image: Reference) -> HostError:
    error = opened(mapper, image.path, image).refused
    assert isinstance(error, HostError), error
    assert error.retry is Retry.BACKOFF
    return error


def test_memory_that_takes_no_hash_tree(image):
    """The plaintext's file refuses a write in this process, as when memory is short."""
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)
    with limited(resource.RLIMIT_FSIZE, DATA_BLOCKS * 4096 + 100):
        assert refused(mapper, image).errno == errno.EFBIG


def test_memory_that_takes_half_a_hash_block(image):
    """A write of some bytes only is not taken for the whole."""
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)
    with limited(resource.RLIMIT_FSIZE, TREE_END_BYTES - 100):
        assert refused(mapper, image).errno == errno.EFBIG


def test_memory_that_takes_no_data(image, monkeypatch):
    """The same in a worker."""
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)
    run = Workers.run

    def limited_run(*args: object, **more: object) -> None:
        pids = [one.pid for one in args[0]._processes]  # type: ignore[attr-defined]
        for pid in pids:
            limit = (100 * 4096 + 7, resource.RLIM_INFINITY)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
        run(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Workers, "run", limited_run)
    assert refused(mapper, image).errno == errno.EFBIG


def descriptors() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("spare", range(8))
def test_too_few_descriptors(mapper, image, spare):
    """Wherever the next one is missing, the error says so."""
    gaps = max(descriptors()) + 1 - len(descriptors())
    fillers = [os.open(os.devnull, os.O_RDONLY) for _ in range(gaps + 4)]
    limit = max(descriptors()) + 1 + spare
    try:
        with limited(resource.RLIMIT_NOFILE, limit):
            outcome = opened_or_refused(mapper, image)
    finally:
        for fd in fillers:
            os.close(fd)
    assert outcome is None or outcome.errno == errno.EMFILE


def opened_or_refused(mapper: Mapper, image: Reference) -> HostError | None:
    error = opened(mapper, image.path, image).refused
    assert error is None or isinstance(error, HostError), error
    return error


LOOP_FAULTS: dict[str, Callable[[Path], str]] = {
    "no control": lambda place: str(place / "none"),
    "a control that is none": lambda place: "/dev/null",
}


@pytest.mark.parametrize("fault", LOOP_FAULTS)
def test_no_loop_device_to_be_had(mapper, image, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(loop, "_CONTROL", LOOP_FAULTS[fault](tmp_path))
    assert refused(mapper, image).hint


def test_loop_devices_that_others_always_take_first(mapper, image, monkeypatch):
    monkeypatch.setattr(loop, "_BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(loop, "_try", lambda *_: None)
    assert refused(mapper, image).errno == errno.EBUSY
