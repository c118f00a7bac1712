"""The doctor gathers facts side by side, and what hangs becomes a finding."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core.config import PlatformConfig, ServingConfig, VolumeConfig
from tdxd.errors import ConfigError
from tdxd.guest import doctor
from tdxd.guest.config_files import LoadedConfig
from tests.certificates import self_signed
from tests.guest_unit.test_doctor import CONFIG


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(self_signed("keys.example")[1])
    release = dataclasses.replace(
        CONFIG.key_release, ca=str(ca), servers=("127.0.0.1:1",)
    )
    platform = PlatformConfig(
        tsm=str(tmp_path / "report"), tdx_guest=str(tmp_path / "tdx_guest")
    )
    config = dataclasses.replace(CONFIG, key_release=release, platform=platform)
    return LoadedConfig(config=config)


def test_facts_are_gathered_of_a_configuration(
    loaded: LoadedConfig, tmp_path: Path
) -> None:
    (tmp_path / "a.img").write_bytes(bytes(1000))
    (tmp_path / "b.img").write_bytes(bytes(3000))
    volume = VolumeConfig(id="m", image=f"{tmp_path}/*.img")
    serving = ServingConfig(command="/bin/true", haproxy="/bin/true")
    config = dataclasses.replace(loaded.config, volume=(volume,), serving=serving)
    facts = doctor.gather(LoadedConfig(config=config))
    assert facts.images[0].sizes_bytes == (1000, 3000)
    assert (facts.haproxy, facts.model_server) == ("/bin/true", "/bin/true")
    assert facts.evidence.quote is not None
    assert [one.step for one in facts.servers] == ["connection"]
    assert facts.ca is None
    assert all(one.text for one in doctor.diagnose(facts))


def test_a_missing_model_server_and_front_are_seen(loaded: LoadedConfig) -> None:
    serving = ServingConfig(command="/no/server", haproxy="/no/haproxy")
    config = dataclasses.replace(loaded.config, serving=serving)
    facts = doctor.gather(LoadedConfig(config=config))
    assert facts.haproxy is None
    assert facts.model_server_problem is not None
    assert "/no/server" in facts.model_server_problem.message
    levels = {one.name: one.level for one in doctor.diagnose(facts)}
    assert (levels["front"], levels["model-server"]) == ("fail", "fail")


def test_a_measured_ca_is_used_as_it_was_measured(loaded: LoadedConfig) -> None:
    pem = Path(loaded.config.key_release.ca).read_bytes()
    Path(loaded.config.key_release.ca).unlink()
    assert doctor.gather(loaded).ca is not None
    measured = dataclasses.replace(loaded, ca_pem=pem)
    assert doctor.gather(measured).ca is None


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Calls to the host and the network do not return before this is set."""
    event = threading.Event()

    def hang(*_args: object) -> None:
        event.wait(30)

    monkeypatch.setattr(doctor, "gather_evidence", hang)
    monkeypatch.setattr(doctor, "ask_key_server", hang)
    monkeypatch.setattr(doctor, "LIMIT_S", 0.3)
    yield event
    event.set()


def test_what_hangs_becomes_a_finding(
    loaded: LoadedConfig, held: threading.Event
) -> None:
    assert not held.is_set()
    began_s = time.monotonic()
    findings = {one.name: one for one in doctor.examine(loaded)}
    assert time.monotonic() - began_s < 10
    assert findings["quote"].level == "fail"
    assert "did not end within 0.3 s" in findings["quote"].text
    server = findings["key-server 127.0.0.1:1"]
    assert server.level == "fail"
    assert "did not end within 0.3 s" in server.text


def test_without_a_configuration_the_machine_is_judged_all_the_same() -> None:
    findings = doctor.unconfigured(ConfigError("x.toml: key_release is missing"))
    names = [one.name for one in findings]
    assert names[0] == "config"
    assert findings[0].level == "fail"
    assert {"tdx", "quote", "swap", "mapper"} <= set(names)
    assert not any(name.startswith("key-server") for name in names)
    assert doctor.report(findings)["exit"] == 69
