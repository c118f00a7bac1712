"""What every `Tsm` promises: the fake, and the real ones on a FUSE mount with the kernel's rules.

The real ones: configfs-tsm; the ioctl of the device with a QGS on a Unix socket; and the choice
between them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxd.core.eventlog import parse_event_log, replay
from tdxd.core.qgs import parse_qgs_address
from tdxd.core.quote import parse_quote
from tdxd.errors import EvidenceUnavailableError
from tdxd.host.evidence import EitherTsm
from tdxd.host.ports import Tsm
from tdxd.host.tdx_guest import IoctlTsm
from tdxd.host.tsm import ConfigfsTsm
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA, NOW, verify
from tests.fake_tsm import FakeTsm
from tests.sim_process import running_sim

Make = Callable[..., Tsm]
NO_FAULTS = 'quote = "none"'


def make_platform(directory: Path, faults: str, events: bool) -> SimPlatform:
    SimPlatform.create(directory)
    path = directory / "platform.toml"
    text = path.read_text().split("[faults]")[0] + "[faults]\n" + faults
    if not events:
        text = text.split("[[event]]")[0] + "[faults]\n" + faults
        text = text.replace("[td]", "[td]\nrtmrs = " + str(["00" * 48] * 4))
    path.write_text(text)
    return SimPlatform.load(directory)


REAL = ("configfs", "ioctl")


def real_tsm(kind: str, ready: dict[str, str]) -> Tsm:
    """Return the real thing on what a simulator offers, with short waits."""
    mount = Path(ready["mount"])
    configfs = ConfigfsTsm(f"{mount}/report", f"{mount}/CCEL", pause_s=0.05)
    ioctl = IoctlTsm(
        f"{mount}/tdx_guest",
        parse_qgs_address(ready["qgs"]),
        f"{mount}/CCEL",
        pause_s=0.05,
        timeout_s=1.5,  # emulated machines are slow
    )
    if kind == "configfs":
        return configfs
    if kind == "ioctl":
        return ioctl
    return EitherTsm(configfs, ioctl, device=f"{mount}/tdx_guest")


@pytest.fixture(
    params=["fake", *(pytest.param(kind, marks=pytest.mark.root) for kind in REAL)]
)
def make(request, tmp_path: Path) -> Iterator[Make]:
    """Makes one Tsm on a platform at `tmp_path / "p"`."""
    with contextlib.ExitStack() as stack:

        def one(faults: str = NO_FAULTS, *, events: bool = True) -> Tsm:
            platform = make_platform(tmp_path / "p", faults, events)
            if request.param == "fake":
                return FakeTsm(platform)
            sim = stack.enter_context(whole_sim(tmp_path))
            return real_tsm(request.param, sim)

        yield one
        stack.close()
        assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@contextlib.contextmanager
def whole_sim(directory: Path) -> Iterator[dict[str, str]]:
    """Run the device and the QGS of the platform at `directory / "p"`."""
    mount, qgs = directory / "m", f"unix:{directory}/q"
    arguments = ("--mount", mount, "--device-only", "--qgs", qgs)
    with running_sim(directory / "p", *arguments) as sim:
        yield {"mount": str(mount), **sim.ready}


def test_a_quote_binds_the_report_data_and_verifies(make: Make, tmp_path: Path) -> None:
    quote = make().quote(DATA)
    assert parse_quote(quote).report_data == DATA
    platform = SimPlatform.load(tmp_path / "p")
    collateral = platform.collateral_json(NOW)
    assert verify(quote, collateral, platform.root_der) == "UpToDate"


def test_each_quote_is_over_its_own_data(make: Make) -> None:
    tsm = make()
    for number in range(4):
        data = bytes([number]) * 64
        assert parse_quote(tsm.quote(data)).report_data == data


def test_the_event_log_replays_to_the_quote(make: Make) -> None:
    tsm = make()
    assert (
        replay(parse_event_log(tsm.event_log())) == parse_quote(tsm.quote(DATA)).rtmrs
    )


def test_without_an_event_log_it_is_empty(make: Make) -> None:
    assert make(events=False).event_log() == b""


def test_report_data_of_another_size_is_refused(make: Make) -> None:
    tsm = make()
    for size in (0, 63, 65):
        with pytest.raises(ValueError, match="not 64"):
            tsm.quote(bytes(size))


@pytest.mark.parametrize(
    "fault", ["empty", "error", "timeout", "oversize", "too-large", "no-provider"]
)
def test_a_platform_that_gives_no_quote_is_unavailable(make: Make, fault: str) -> None:
    tsm = make(f'quote = "{fault}"')
    with pytest.raises(EvidenceUnavailableError) as caught:
        tsm.quote(DATA)
    assert caught.value.hint


def test_a_passing_timeout_is_overcome(make: Make) -> None:
    tsm = make('quote = "timeout"\ncount = 2')
    assert parse_quote(tsm.quote(DATA)).report_data == DATA


def test_an_extension_shows_in_later_quotes(make: Make, tmp_path: Path) -> None:
    """Whichever way quotes are made: the measurement files change them."""
    tsm = make()
    if isinstance(tsm, FakeTsm):
        tsm.platform.extend_rtmr(3, b"d" * 48)
    else:
        path = tmp_path / "m/measurements/rtmr3:sha384"
        with path.open("r+b", buffering=0) as file:
            assert file.write(b"d" * 48) == 48
    expected = hashlib.sha384(bytes(48) + b"d" * 48).digest()
    assert parse_quote(tsm.quote(DATA)).rtmrs[3] == expected


# --- the choice between the two ------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (NO_FAULTS, ConfigfsTsm),
        ('tsm = "absent"', IoctlTsm),
        ('quote = "no-provider"', ConfigfsTsm),  # it is the one that explains best
    ],
)
def test_auto_takes_configfs_where_it_has_a_provider(
    tmp_path: Path, faults: str, expected: type
) -> None:
    make_platform(tmp_path / "p", faults, events=True)
    with whole_sim(tmp_path) as ready:
        tsm = real_tsm("auto", ready)
        assert isinstance(tsm, EitherTsm)
        assert isinstance(tsm.chosen(), expected)
        if "no-provider" in faults:
            with pytest.raises(EvidenceUnavailableError, match="mkdir"):
                tsm.quote(DATA)
        else:
            assert parse_quote(tsm.quote(DATA)).report_data == DATA
            assert parse_event_log(tsm.event_log())
        if (tmp_path / "m/report").exists():
            assert os.listdir(tmp_path / "m/report") == []


# --- configfs alone ------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "m"


def slow_platform(directory: Path, delay_s: float) -> None:
    SimPlatform.create(directory)
    path = directory / "platform.toml"
    path.write_text(path.read_text().replace("delay_s = 0.0", f"delay_s = {delay_s}"))


@pytest.mark.root
def test_no_entry_is_left_behind(tmp_path: Path, mount: Path) -> None:
    for fault in ("none", "empty", "timeout"):
        directory = tmp_path / fault
        make_platform(directory, f'quote = "{fault}"', events=True)
        with running_sim(directory, "--mount", mount, "--device-only"):
            tsm = ConfigfsTsm(f"{mount}/report", f"{mount}/CCEL", pause_s=0.01)
            with contextlib.suppress(EvidenceUnavailableError):
                tsm.quote(DATA)
            assert os.listdir(mount / "report") == []


@pytest.mark.root
def test_three_at_once_all_get_their_own(tmp_path: Path, mount: Path) -> None:
    slow_platform(tmp_path / "p", 0.05)
    answers: dict[int, bytes] = {}
    with running_sim(tmp_path / "p", "--mount", mount, "--device-only"):
        # Many short attempts: the kernel answers EBUSY while another quote is in flight.
        tsm = ConfigfsTsm(f"{mount}/report", "", attempts=200, pause_s=0.02)

        def ask(number: int) -> None:
            answers[number] = tsm.quote(bytes([number]) * 64)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert {n: parse_quote(q).report_data[0] for n, q in answers.items()} == {
        0: 0,
        1: 1,
        2: 2,
    }


@pytest.mark.root
def test_busy_for_ever_is_unavailable(tmp_path: Path, mount: Path) -> None:
    slow_platform(tmp_path / "p", 1.5)
    with running_sim(tmp_path / "p", "--mount", mount, "--device-only"):
        report = f"{mount}/report"
        thread = threading.Thread(target=ConfigfsTsm(report, "").quote, args=(DATA,))
        thread.start()
        wait_for(lambda: in_flight(mount))
        tsm = ConfigfsTsm(report, "", attempts=2, pause_s=0.01)
        with pytest.raises(EvidenceUnavailableError, match="busy") as caught:
            tsm.quote(DATA)
        assert "busy" in caught.value.hint
        thread.join(30)


def in_flight(mount: Path) -> bool:
    """Whether somebody has committed report data."""
    for entry in (mount / "report").iterdir():
        with contextlib.suppress(OSError):
            return (entry / "generation").read_text() == "1\n"
    return False


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)
