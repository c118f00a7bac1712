"""Several volumes that are opened at once take no more memory than need be, and there is."""

from __future__ import annotations

import errno
import os
import threading
import tracemalloc
from collections.abc import Callable

import pytest

from tdxd.core import luks2_read
from tdxd.core.foreign import ForeignManifest
from tdxd.errors import HostError
from tdxd.host import image_file, luks2_map, machine
from tdxd.host.workers import never
from tests import luks2_genuine
from tests.attacks.luks2_forgery import Luks2File

LIMIT_S = 30.0


def test_a_header_is_held_once(tmp_path):
    """How long it is, is the host's to say; ten volumes are opened at once."""
    size = luks2_read.REGION_MAX_BYTES
    file = Luks2File(bytearray(luks2_genuine.make_image(tmp_path / "x").read_bytes()))
    document = file.document
    document["segments"]["0"]["offset"] = str(size)
    file.put(document)
    image = tmp_path / "large"
    image.write_bytes(file.data)
    os.truncate(image, size + 4096)
    manifest = ForeignManifest(volume_id="x", generation=1)
    with image_file.open_file(str(image)) as fd:
        tracemalloc.start()
        try:
            opened = luks2_map.read_foreign(str(image), fd, manifest)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert opened.region == image.read_bytes()[:size]
    assert most < size * 1.1


@pytest.fixture
def memory(monkeypatch) -> luks2_map._Memory:
    """A machine with 100 bytes to spare."""
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 114)
    return luks2_map._Memory()


def in_a_thread(
    memory: luks2_map._Memory, size: int, cancelled: Callable[[], bool] = never
) -> tuple[threading.Thread, threading.Event, list[HostError]]:
    """Ask for memory; the event is set once it is had, the list holds the refusal."""
    got, refused = threading.Event(), []

    def work() -> None:
        try:
            with memory.promised(size, "x", cancelled):
                got.set()
        except HostError as exc:
            refused.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, got, refused


def test_two_that_fit_have_it_at_once(memory):
    with memory.promised(60, "x", never):
        thread, got, _ = in_a_thread(memory, 40)
        assert got.wait(LIMIT_S)
        thread.join(LIMIT_S)


def test_one_that_does_not_fit_waits_for_the_other(memory):
    with memory.promised(60, "x", never):
        thread, got, refused = in_a_thread(memory, 41)
        thread.join(0.3)
        assert thread.is_alive()
        assert not got.is_set()
    assert got.wait(LIMIT_S)
    thread.join(LIMIT_S)
    assert not refused


def test_an_eighth_of_the_memory_is_left_to_others(memory):
    """A header that asks for all there is would have somebody killed for it."""
    assert luks2_map.spare_memory_bytes() == 100


def test_one_that_never_fits_is_refused_when_it_is_alone(memory):
    with pytest.raises(HostError, match="unlock x: Cannot allocate memory") as caught:
        memory.promised(101, "x", never).__enter__()
    assert caught.value.hint == "its keyslot takes 101 bytes, 100 can be had"
    with memory.promised(100, "x", never):
        pass


def test_waiting_can_be_called_off(memory):
    stop = threading.Event()
    with memory.promised(60, "x", never):
        thread, got, refused = in_a_thread(memory, 41, stop.is_set)
        stop.set()
        thread.join(LIMIT_S)
        assert not got.is_set()
    assert [one.errno for one in refused] == [errno.ECANCELED]


def test_what_fails_gives_its_memory_back(memory):
    with pytest.raises(KeyError), memory.promised(100, "x", never):
        raise KeyError
    with memory.promised(100, "x", never):
        pass
