"""What status says of protection: fresh verdicts, on a look that may be half a minute old."""

from __future__ import annotations

import dataclasses

from tdxd.core.config_trust import ConfigTrust
from tdxd.core.protection import Observed
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.protection import Lookout, shown
from tests.core.test_protection import CONFIG, MEASURED


class Machine:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.seen = MEASURED
        self.looks = 0

    def look(self) -> Observed:
        self.looks += 1
        return self.seen


def lacking(loaded: LoadedConfig, lookout: Lookout) -> list[str]:
    matters = shown(loaded, lookout)
    assert all(set(one) == {"name", "protected", "text", "hint"} for one in matters)
    return [one["name"] for one in matters if not one["protected"]]


def test_a_look_counts_for_half_a_minute() -> None:
    machine = Machine()
    lookout = Lookout(machine.look, lambda: machine.now_s)
    loaded = LoadedConfig(config=CONFIG, trust=ConfigTrust.ROOT_FILE_SYSTEM)
    assert lacking(loaded, lookout) == []
    machine.seen = dataclasses.replace(MEASURED, swap=("/dev/vdc",))
    machine.now_s += 29
    assert lacking(loaded, lookout) == []
    assert machine.looks == 1
    machine.now_s += 1
    assert lacking(loaded, lookout) == ["swap"]
    assert machine.looks == 2


def test_the_configuration_is_judged_as_it_is_now() -> None:
    machine = Machine()
    lookout = Lookout(machine.look, lambda: machine.now_s)
    loaded = LoadedConfig(config=CONFIG, trust=ConfigTrust.ROOT_FILE_SYSTEM)
    assert lacking(loaded, lookout) == []
    loaded = dataclasses.replace(loaded, trust=ConfigTrust.UNMEASURED)
    assert lacking(loaded, lookout) == ["trust"]


def test_this_machine_has_all_matters() -> None:
    matters = shown(LoadedConfig(config=CONFIG))
    assert len(matters) == 9
