"""The kernel's rules for report entries and measurements, without a mount."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import threading

import pytest

from tdxd.core.quote import parse_quote
from tdxd.core.td_report import TDX_CMD_GET_REPORT0, parse_td_report
from tdxd.sim.description import Faults
from tdxd.sim.platform import SimPlatform
from tdxd.sim.tsm_entries import Quoter
from tdxd.sim.tsm_files import Handle, TsmTree
from tests.dcap import DATA


def tree_with(faults: Faults | None = None, sleep=lambda _s: None) -> TsmTree:
    plain = SimPlatform.create()
    description = dataclasses.replace(plain.description, faults=faults or Faults())
    platform = SimPlatform(plain.pki, description)
    return TsmTree(platform, Quoter(platform, sleep=sleep))


@pytest.fixture
def tree() -> TsmTree:
    one = tree_with()
    one.reports.make("a")
    return one


def opened(tree: TsmTree, path: str, flags: int = os.O_RDONLY) -> Handle:
    file = tree.file(path)
    assert file is not None, path
    return file.open(flags)


def read(tree: TsmTree, path: str) -> bytes:
    return opened(tree, path).read(1 << 20, 0)


def write(tree: TsmTree, data: bytes, name: str = "a") -> None:
    handle = opened(tree, f"/report/{name}/inblob", os.O_WRONLY)
    handle.write(data, 0)
    handle.flush()


def fails_with(number: int):
    return pytest.raises(OSError, match=os.strerror(number))


def test_one_write_gives_one_quote_and_generation_1(tree: TsmTree) -> None:
    assert read(tree, "/report/a/generation") == b"0\n"
    write(tree, DATA)
    assert parse_quote(read(tree, "/report/a/outblob")).report_data == DATA
    assert read(tree, "/report/a/generation") == b"1\n"
    assert read(tree, "/report/a/provider") == b"tdx_guest\n"


def test_nothing_is_committed_before_close(tree: TsmTree) -> None:
    handle = opened(tree, "/report/a/inblob", os.O_WRONLY)
    handle.write(DATA, 0)
    assert read(tree, "/report/a/generation") == b"0\n"
    handle.flush()
    handle.flush()  # a duplicate of the descriptor closes, too
    assert read(tree, "/report/a/generation") == b"1\n"


def test_a_file_closed_without_a_write_commits_nothing(tree: TsmTree) -> None:
    opened(tree, "/report/a/inblob", os.O_WRONLY).flush()
    assert read(tree, "/report/a/generation") == b"0\n"


def test_a_write_in_two_pieces_is_one_commit(tree: TsmTree) -> None:
    handle = opened(tree, "/report/a/inblob", os.O_WRONLY)
    assert handle.write(DATA[:40], 0) == 40
    assert handle.write(DATA[40:], 40) == 24
    handle.flush()
    assert parse_quote(read(tree, "/report/a/outblob")).report_data == DATA


def test_a_second_commit_raises_the_generation_and_changes_the_quote(
    tree: TsmTree,
) -> None:
    write(tree, DATA)
    first = read(tree, "/report/a/outblob")
    assert read(tree, "/report/a/outblob") == first
    write(tree, bytes(64))
    assert read(tree, "/report/a/generation") == b"2\n"
    assert parse_quote(read(tree, "/report/a/outblob")).report_data == bytes(64)


@pytest.mark.parametrize("size", [1, 63])
def test_too_little_report_data_fails_at_outblob(tree: TsmTree, size: int) -> None:
    write(tree, bytes(size))
    with fails_with(errno.EINVAL):
        read(tree, "/report/a/outblob")


def test_too_much_report_data_fails_at_the_write(tree: TsmTree) -> None:
    with fails_with(errno.EFBIG):
        write(tree, bytes(65))


def test_an_outblob_without_inblob_fails(tree: TsmTree) -> None:
    with fails_with(errno.EINVAL):
        read(tree, "/report/a/outblob")


def test_files_open_in_their_own_direction_alone(tree: TsmTree) -> None:
    for name, flags in (
        ("inblob", os.O_RDONLY),
        ("inblob", os.O_RDWR),
        ("outblob", os.O_WRONLY),
        ("outblob", os.O_RDWR),
        ("generation", os.O_WRONLY),
    ):
        with fails_with(errno.EACCES):
            opened(tree, f"/report/a/{name}", flags)


def test_a_blob_is_read_in_pieces(tree: TsmTree) -> None:
    write(tree, DATA)
    handle = opened(tree, "/report/a/outblob")
    pieces = handle.read(1000, 0) + handle.read(100000, 1000)
    assert pieces == read(tree, "/report/a/outblob")


def test_entries_are_made_and_removed_once(tree: TsmTree) -> None:
    with fails_with(errno.EEXIST):
        tree.reports.make("a")
    tree.reports.remove("a")
    with fails_with(errno.ENOENT):
        tree.reports.remove("a")
    assert tree.directory("/report") == []


def test_entries_are_made_below_report_alone(tree: TsmTree) -> None:
    assert tree.entry_name("/report/b") == "b"
    for path in ("/b", "/report", "/report/a/b", "/measurements/b"):
        with fails_with(errno.EPERM):
            tree.entry_name(path)


def test_there_is_an_end_to_entries() -> None:
    tree = tree_with()
    for number in range(1024):
        tree.reports.make(str(number))
    with fails_with(errno.ENOSPC):
        tree.reports.make("more")


def test_without_a_provider_no_entry_can_be_made() -> None:
    with fails_with(errno.ENXIO):
        tree_with(Faults(quote="no-provider")).reports.make("a")


def test_a_failed_quoting_service_gives_an_empty_blob() -> None:
    tree = tree_with(Faults(quote="empty"))
    tree.reports.make("a")
    write(tree, DATA)
    assert read(tree, "/report/a/outblob") == b""


def test_a_failed_quoting_service_is_an_error_to_a_newer_kernel() -> None:
    tree = tree_with(Faults(quote="error"))
    tree.reports.make("a")
    write(tree, DATA)
    with fails_with(errno.EIO):
        read(tree, "/report/a/outblob")


def test_a_silent_quoting_service_times_out_as_often_as_said() -> None:
    tree = tree_with(Faults(quote="timeout", count=2))
    tree.reports.make("a")
    write(tree, DATA)
    for _ in range(2):
        with fails_with(errno.ETIMEDOUT):
            read(tree, "/report/a/outblob")
    assert parse_quote(read(tree, "/report/a/outblob")).report_data == DATA


def test_a_second_quote_is_busy_while_one_is_in_flight() -> None:
    started, go_on = threading.Event(), threading.Event()

    def sleep(_seconds: float) -> None:
        started.set()
        assert go_on.wait(10)

    tree = tree_with(sleep=sleep)
    for name in ("a", "b"):
        tree.reports.make(name)
        write(tree, DATA, name)
    blobs: list[bytes] = []
    thread = threading.Thread(
        target=lambda: blobs.append(read(tree, "/report/a/outblob"))
    )
    thread.start()
    assert started.wait(10)
    with fails_with(errno.EBUSY):
        read(tree, "/report/b/outblob")
    go_on.set()
    thread.join(10)
    assert parse_quote(blobs[0]).report_data == DATA


def test_the_measurements_are_those_of_a_quote(tree: TsmTree) -> None:
    write(tree, DATA)
    quote = parse_quote(read(tree, "/report/a/outblob"))
    assert read(tree, "/measurements/mrtd:sha384") == quote.mr_td
    assert read(tree, "/measurements/mrconfigid") == quote.mr_config_id
    for index, value in enumerate(quote.rtmrs):
        assert read(tree, f"/measurements/rtmr{index}:sha384") == value


@pytest.mark.parametrize("index", [2, 3])
def test_writing_a_measurement_extends_it(tree: TsmTree, index: int) -> None:
    path = f"/measurements/rtmr{index}:sha384"
    before = read(tree, path)
    opened(tree, path, os.O_WRONLY).write(b"d" * 48, 0)
    assert read(tree, path) == hashlib.sha384(before + b"d" * 48).digest()


def test_firmware_registers_cannot_be_written(tree: TsmTree) -> None:
    for name in ("rtmr0:sha384", "rtmr1:sha384", "mrtd:sha384"):
        with fails_with(errno.EACCES):
            opened(tree, f"/measurements/{name}", os.O_WRONLY)


@pytest.mark.parametrize(
    ("size", "offset", "number"),
    [
        (47, 0, errno.EINVAL),
        (1, 0, errno.EINVAL),
        (47, 1, errno.EINVAL),
        (48, 47, errno.EINVAL),
        (48, 48, errno.EFBIG),
        (1, 1000, errno.EFBIG),
    ],
)
def test_an_extension_is_48_bytes_at_offset_0(
    tree: TsmTree, size: int, offset: int, number: int
) -> None:
    path = "/measurements/rtmr3:sha384"
    before = read(tree, path)
    with fails_with(number):
        opened(tree, path, os.O_WRONLY).write(b"d" * size, offset)
    assert read(tree, path) == before


def test_sysfs_cuts_a_longer_extension_at_48_bytes(tree: TsmTree) -> None:
    """As sysfs_kf_bin_write does: whoever writes more extends by the first 48 bytes."""
    path = "/measurements/rtmr3:sha384"
    before = read(tree, path)
    assert opened(tree, path, os.O_WRONLY).write(b"d" * 64, 0) == 48
    assert read(tree, path) == hashlib.sha384(before + b"d" * 48).digest()


def test_an_empty_write_extends_nothing(tree: TsmTree) -> None:
    path = "/measurements/rtmr3:sha384"
    before = read(tree, path)
    assert opened(tree, path, os.O_WRONLY).write(b"", 0) == 0
    assert read(tree, path) == before


def test_an_open_measurement_shows_the_present(tree: TsmTree) -> None:
    path = "/measurements/rtmr3:sha384"
    kept = opened(tree, path)
    before = kept.read(48, 0)
    opened(tree, path, os.O_WRONLY).write(b"d" * 48, 0)
    assert kept.read(48, 0) == hashlib.sha384(before + b"d" * 48).digest()


def test_an_extension_changes_later_quotes(tree: TsmTree) -> None:
    write(tree, DATA)
    first = parse_quote(read(tree, "/report/a/outblob"))
    opened(tree, "/measurements/rtmr3:sha384", os.O_WRONLY).write(b"d" * 48, 0)
    write(tree, DATA)
    second = parse_quote(read(tree, "/report/a/outblob"))
    assert second.rtmrs[:3] == first.rtmrs[:3]
    expected = hashlib.sha384(first.rtmrs[3] + b"d" * 48).digest()
    assert second.rtmrs[3] == expected


def test_the_files_have_the_kernels_names_sizes_and_modes(tree: TsmTree) -> None:
    names = tree.directory("/measurements")
    assert names is not None
    modes = {}
    for name in names:
        file = tree.file(f"/measurements/{name}")
        assert file is not None
        assert file.size_bytes == 48
        modes[name] = file.mode
    assert modes == {
        "mrconfigid": 0o444,
        "mrowner": 0o444,
        "mrownerconfig": 0o444,
        "mrtd:sha384": 0o444,
        "rtmr0:sha384": 0o444,
        "rtmr1:sha384": 0o444,
        "rtmr2:sha384": 0o644,
        "rtmr3:sha384": 0o644,
    }


def test_a_kernel_before_6_16_has_no_measurements() -> None:
    tree = tree_with(Faults(rtmr="absent"))
    assert tree.directory("/measurements") is None
    assert tree.file("/measurements/rtmr3:sha384") is None
    assert "measurements" not in (tree.directory("/") or [])


def test_a_refused_extension_changes_nothing() -> None:
    tree = tree_with(Faults(rtmr="fails"))
    path = "/measurements/rtmr3:sha384"
    before = read(tree, path)
    with fails_with(errno.EIO):
        opened(tree, path, os.O_WRONLY).write(b"d" * 48, 0)
    assert read(tree, path) == before


# --- the device of a TDX guest --------------------------------------------------


def get_report(tree: TsmTree, command: int = TDX_CMD_GET_REPORT0) -> bytes:
    handle = opened(tree, "/tdx_guest", os.O_RDWR)
    return handle.ioctl(command, DATA + bytes(1024))


def test_the_device_makes_a_report_over_what_it_is_given(tree: TsmTree) -> None:
    answer = get_report(tree)
    assert answer[:64] == DATA
    report = parse_td_report(answer[64:])
    assert report.report_data == DATA
    write(tree, DATA)
    quote = parse_quote(read(tree, "/report/a/outblob"))
    assert report.rtmrs == quote.rtmrs
    assert report.mr_td == quote.mr_td


def test_a_report_shows_an_extension(tree: TsmTree) -> None:
    opened(tree, "/measurements/rtmr2:sha384", os.O_WRONLY).write(b"d" * 48, 0)
    register = read(tree, "/measurements/rtmr2:sha384")
    assert parse_td_report(get_report(tree)[64:]).rtmrs[2] == register


@pytest.mark.parametrize("command", [0, TDX_CMD_GET_REPORT0 + 1, 0xC0045401])
def test_the_device_knows_one_command(tree: TsmTree, command: int) -> None:
    with fails_with(errno.ENOTTY):
        get_report(tree, command)


def test_other_files_know_no_command(tree: TsmTree) -> None:
    with fails_with(errno.ENOTTY):
        opened(tree, "/CCEL").ioctl(TDX_CMD_GET_REPORT0, bytes(1088))


def test_the_device_is_neither_read_nor_written(tree: TsmTree) -> None:
    handle = opened(tree, "/tdx_guest", os.O_RDWR)
    with fails_with(errno.EINVAL):
        handle.read(1, 0)
    with fails_with(errno.EINVAL):
        handle.write(b"x", 0)
    handle.flush()


def test_a_kernel_before_6_7_has_the_device_alone() -> None:
    tree = tree_with(Faults(tsm="absent"))
    assert tree.directory("/") == ["measurements", "tdx_guest", "CCEL"]
    assert tree.directory("/report") is None
    with fails_with(errno.EPERM):
        tree.entry_name("/report/a")


def test_a_machine_without_tdx_has_no_device() -> None:
    assert tree_with(Faults(quote="no-provider")).file("/tdx_guest") is None


def test_unknown_paths_do_not_exist(tree: TsmTree) -> None:
    for path in ("/x", "/report/b", "/report/a/x", "/measurements/x", "/report/a/b/c"):
        assert tree.file(path) is None
        assert tree.directory(path) is None


def test_the_event_log_is_a_file_at_the_top(tree: TsmTree) -> None:
    assert tree.directory("/") == ["report", "measurements", "tdx_guest", "CCEL"]
    file = tree.file("/CCEL")
    assert file is not None
    assert file.size_bytes == len(read(tree, "/CCEL"))
