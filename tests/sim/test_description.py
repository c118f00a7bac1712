"""platform.toml is read strictly, and each edit shows in the quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdxd.core.quote import parse_quote, td_attribute_names
from tdxd.errors import ConfigError
from tdxd.sim.description import DEFAULT_DESCRIPTION, parse_description
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA, NOW, verify


def edited(directory: Path, old: str, new: str) -> SimPlatform:
    SimPlatform.create(directory)
    path = directory / "platform.toml"
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))
    return SimPlatform.load(directory)


def test_the_attributes_are_those_written(tmp_path: Path) -> None:
    platform = edited(tmp_path, '["SEPT_VE_DISABLE"]', '["DEBUG", "SEPT_VE_DISABLE"]')
    quote = parse_quote(platform.quote(DATA))
    assert td_attribute_names(quote.td_attributes) == ("DEBUG", "SEPT_VE_DISABLE")


def test_another_kernel_changes_rtmr1_alone(tmp_path: Path) -> None:
    platform = edited(tmp_path, "unified kernel image 1", "unified kernel image 2")
    before = SimPlatform.create().rtmrs
    after = platform.rtmrs
    assert [one == two for one, two in zip(before, after, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


def test_the_tcb_status_is_the_one_written(tmp_path: Path) -> None:
    platform = edited(tmp_path, 'status = "UpToDate"', 'status = "OutOfDate"')
    collateral = platform.collateral_json(NOW)
    assert verify(platform.quote(DATA), collateral, platform.root_der) == "OutOfDate"


def test_version_5_quotes_can_be_had(tmp_path: Path) -> None:
    platform = edited(tmp_path, "quote_version = 4", "quote_version = 5")
    assert parse_quote(platform.quote(DATA)).version == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "t: x: unknown key"),
        ("[td]\nmrtd = 'zz'", "mrtd is not hex"),
        ("[td]\nmrtd = 'aa'", "mrtd is 1 bytes long, not 48"),
        ("[td]\ntd_attributes = ['NONE']", "unknown TD attribute 'NONE'"),
        ("[td]\nrtmrs = ['aa']", "rtmrs has 1 entries, not 4"),
        ("[td]\nquote_version = 3", "expected one of 4, 5"),
        ("[[event]]\nrtmr = 4\ntype = 'EV_IPL'\ndata = ''", "rtmr is 4, not 0 to 3"),
        ("[[event]]\nrtmr = 0\ntype = 'EV_X'\ndata = ''", "unknown event type 'EV_X'"),
        ("[faults]\ndelay_s = 61", "delay_s is 61.0, not 0 to 60"),
        ("[faults]\ncount = -1", "count is -1, less than 0"),
        ("[faults]\nquote = 'late'", "expected one of 'none'"),
        ("[td", "t: "),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_description(text, source="t")
    assert message in caught.value.message


def test_registers_and_events_exclude_each_other() -> None:
    text = DEFAULT_DESCRIPTION.replace("[td]", "[td]\nrtmrs = " + str(["aa" * 48] * 4))
    with pytest.raises(ConfigError, match="not both"):
        parse_description(text, source="t")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    SimPlatform.create(tmp_path)
    (tmp_path / "platform.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        SimPlatform.load(tmp_path)
