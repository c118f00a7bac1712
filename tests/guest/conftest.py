"""One guest at a time in each process, its world, and what it said when a test fails.

Two processes run at once (`make test-guest`): an emulated guest rarely keeps more than one
processor busy. All tests that share a guest run in one of them (`groups.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from contrib.guest.build_image import GuestImage, build_image, built_packages
from contrib.guest.disk import Disk
from contrib.guest.disks import make_ext4
from contrib.guest.machine import Machine
from tdxd.user.endpoint import open_channel
from tests.guest.groups import SERVED
from tests.guest.hostile import Hostile
from tests.guest.measured import MeasuredGuest, measured_machine
from tests.guest.observed import Observed
from tests.guest.world import GuestWorld, made_world
from tests.system.world import ROOT

LOGS = ROOT / "build" / "guest-logs"
NEWER = "0.1.1"
"""Version of the package that the guest is upgraded to."""
BOOT_CHECK = "systemd.wants=boot-complete.target"
"""As on a system that blesses its boots: the target is part of every boot."""


class Slot:
    """The place for the one guest that may run."""

    def __init__(self, directory: Path, image: GuestImage) -> None:
        self.directory, self.image = directory, image
        self.machine: Machine | None = None
        self._shared_as: str | None = None
        self._count = 0

    def fresh(self, *disks: Disk, **options: Any) -> Machine:
        """Take away the machine before, and set up another, switched off."""
        self.clear()
        tools = Disk(name="tools", path=self.image.tools, read_only=True)
        self._count += 1
        place = self.directory / f"machine-{self._count}"
        self.machine = Machine(place, self.image, disks=(tools, *disks), **options)
        return self.machine

    def hold(self, machine: Machine) -> Machine:
        """Take away the machine before; this one is in its place."""
        self.clear()
        self.machine = machine
        return machine

    def shared(self, name: str, make: Callable[[], Machine]) -> Machine:
        """Take the running machine of this name, or make it."""
        if self._shared_as != name or self.machine is None or not self.machine.running:
            machine = make()
            machine.boot()
            self._shared_as = name
            return machine
        return self.machine

    def clear(self) -> None:
        if self.machine is not None:
            self.machine.close()
        self.machine = self._shared_as = None


@pytest.fixture(scope="session")
def guest_directory() -> Iterator[Path]:
    """A short path: those of sockets have 108 bytes at most."""
    place = Path("/var/tmp")
    for left in place.glob("tdxd-guest-*"):  # by a run that was killed
        if not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left)
    directory = place / f"tdxd-guest-{os.getpid()}"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The guest with the packages that `make deb` made."""
    return build_image(built_packages())


@pytest.fixture(scope="session")
def world(guest_directory: Path) -> Iterator[GuestWorld]:
    with made_world(guest_directory / "world") as made:
        yield made


@pytest.fixture(scope="session")
def slot(guest_directory: Path, guest_image: GuestImage) -> Iterator[Slot]:
    made = Slot(guest_directory, guest_image)
    try:
        yield made
    finally:
        made.clear()


@pytest.fixture
def bare(slot: Slot) -> Machine:
    """A running guest without platform and configuration, shared by the tests that ask for it."""

    def make() -> Machine:
        tree = slot.directory / "bare.d"
        tree.mkdir()
        (tree / "victim").write_bytes(b"abcdefg\n" * 12500)
        disk = Disk(name="delivery", path=slot.directory / "bare.raw")
        make_ext4(tree, disk.path, label="delivery", spare_bytes=256 * 2**20)
        shutil.rmtree(tree)
        return slot.fresh(
            disk, append="systemd.mask=tdxd.socket systemd.mask=tdxd.service"
        )

    return slot.shared("bare", make)


@pytest.fixture(scope="session")
def keys(world: GuestWorld) -> Iterator[None]:
    """The key server; whether a guest reaches it is the machine's `route_keys_to`."""
    with world.key_server():
        yield


@pytest.fixture(scope="session")
def packages(guest_directory: Path) -> Path:
    """A directory with a newer package of the daemon and the owner's, delivered with the image."""
    directory = guest_directory / "packages"
    build = ["contrib/deb/build", "--version", NEWER, "--output", str(directory)]
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([*build, "tdxd", "tdxd-owner"], check=True, cwd=ROOT, env=env)
    return directory


@pytest.fixture
def shared(slot: Slot, world: GuestWorld, keys: None, packages: Path) -> Observed:
    """The guest with a model, in whatever state the test before left it."""

    def make() -> Machine:
        machine = slot.fresh(world.delivery(more=packages), append=BOOT_CHECK)
        machine.route_keys_to(world.port)
        return machine

    return Observed(slot.shared("served", make), world)


@pytest.fixture
def served(shared: Observed) -> Observed:
    """The guest that serves, shared by the tests that leave it so or on the way there."""
    shared.until_serving()
    return shared


@pytest.fixture
def hostile(served: Observed) -> Iterator[Hostile]:
    """A model in the volume that does what a request says."""
    with open_channel(served.world.endpoint(served.machine)) as channel:
        yield Hostile(channel)


@pytest.fixture
def opened(shared: Observed) -> Observed:
    """The same guest for tests that need no model server: its start takes half a minute here."""
    shared.until_volume("mounted")
    return shared


@pytest.fixture
def measured(
    slot: Slot, world: GuestWorld, keys: None, guest_image: GuestImage
) -> MeasuredGuest:
    """The guest of the measured test image, shared by the tests that ask for it."""

    def make() -> Machine:
        directory = slot.directory / "measured"
        slot.clear()
        return slot.hold(measured_machine(world, guest_image, directory))

    return MeasuredGuest(slot.shared("measured", make), world)


class Boots:
    """Makes guests for tests that take the power away; each is switched off at first."""

    def __init__(self, slot: Slot, world: GuestWorld) -> None:
        self._slot, self._world = slot, world

    def guest(
        self,
        *,
        clock: str = "utc",
        backoff_max_s: float = 2.0,
        volumes: list[dict[str, Any]] | None = None,
        **delivered: Any,
    ) -> Observed:
        """Set up a guest that only opens its volume.

        `clock` is what the machine's own clock says at power on.
        """
        tables = self._world.config()
        tables["key_release"]["backoff_max_s"] = backoff_max_s
        tables["serving"] = None
        tables["volume"] = volumes or tables["volume"]
        machine = self._slot.fresh(
            self._world.delivery(**delivered, **tables),
            options=("-rtc", f"base={clock}"),
        )
        return Observed(machine, self._world)


@pytest.fixture
def boots(slot: Slot, world: GuestWorld, keys: None) -> Boots:
    return Boots(slot, world)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests that share a guest together, and in each group those that end it last."""
    groups = ("bare", "shared", "boots")

    def place(item: pytest.Item) -> tuple[int, bool, int]:
        names = getattr(item, "fixturenames", ())
        group = next((n for n, one in enumerate(groups) if one in names), len(groups))
        ends = item.get_closest_marker("ends_the_guest") is not None
        file = item.path.stem.removeprefix("test_")
        return group, ends, SERVED.index(file) if file in SERVED else len(SERVED)

    items.sort(key=place)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Have a figure of this test printed at the end of the run."""
    told = request.node.user_properties
    return lambda text: told.append(("told", text))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    passed = terminalreporter.stats.get("passed", [])
    told = [
        f"{report.nodeid.rpartition('::')[2].partition('@')[0]}: {text}"
        for report in passed
        for name, text in getattr(report, "user_properties", ())
        if name == "told" and report.when == "call"
    ]
    if told:
        terminalreporter.section("measured in the guests")
        for line in told:
            terminalreporter.line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Keep the serial log and the journal of a guest in which a test failed."""
    report: Any = yield
    slot = getattr(item, "funcargs", {}).get("slot")
    if report.failed and slot is not None and slot.machine is not None:
        name = "".join(one if one.isalnum() else "-" for one in item.name)
        LOGS.mkdir(parents=True, exist_ok=True)
        report.sections += [
            ("guest console", slot.machine.serial_tail()),
            ("guest journal", _journal(slot.machine, LOGS / f"{name}.journal")),
        ]
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(slot.machine.serial_log, LOGS / f"{name}.serial")
    return report


def _journal(machine: Machine, kept: Path) -> str:
    """Return the end of the journal, if the guest still tells it; all of it goes to a file."""
    if not machine.running:
        return "the guest is off"
    try:
        text = machine.output("journalctl -q --no-pager -o short-monotonic -b")
    except Exception as exc:  # noqa: BLE001  # a report of a failure must not fail
        return f"{exc!r}"
    kept.write_text(text)
    return "\n".join(text.splitlines()[-80:])
