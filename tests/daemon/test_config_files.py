"""A configuration is accepted if the quote covers it: measured root, or MRCONFIGID."""

from __future__ import annotations

import base64
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdxd.core.config_trust import ConfigTrust, config_digest
from tdxd.core.td_report import encode_td_report
from tdxd.errors import ConfigError, EvidenceUnavailableError
from tdxd.guest import config_files
from tdxd.guest.config_files import digest_of, load_config, require_trust
from tdxd.host import machine, tdx_guest
from tdxd.host.attempts import TransientError
from tdxd.host.measured_root import lie_on_measured_root
from tests.boot_log import report_of

ROOT = Path(__file__).parents[2]
KEY = "ed25519:" + "A" * 43 + "="
CA = b"-----BEGIN CERTIFICATE-----\n"


class Files:
    """A configuration of two files, its CA, and a TD whose MRCONFIGID may be set."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "etc" / "tdxd.toml"
        self.more = directory / "etc" / "tdxd.d" / "site.toml"
        self.ca = directory / "ca.pem"
        self.measurements = directory / "measurements"
        self.measurements.mkdir()
        self.more.parent.mkdir(parents=True)
        self.ca.write_bytes(CA)
        self.write()
        self.more.write_text('[health]\nlisten = "127.0.0.1:9640"\n')

    def write(self, more: str = "") -> None:
        self.path.write_text(
            f'[key_release]\nservers = ["localhost:1"]\nca = "{self.ca}"\n'
            f'signing_key = "{KEY}"\n[platform]\nrtmr = "{self.measurements}"\n'
            f'tdx_guest = "{self.measurements}/none"\n{more}'
        )

    def measure(self) -> None:
        """Start the TD with the digest of what the files are now."""
        digest = digest_of(str(self.path))
        (self.measurements / "mrconfigid").write_bytes(digest)

    def trust(self) -> ConfigTrust:
        return load_config(str(self.path)).trust


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_configuration_whose_digest_is_mrconfigid_is_measured(files: Files) -> None:
    files.measure()
    loaded = require_trust(load_config(str(files.path)))
    assert loaded.trust is ConfigTrust.CONFIG_ID
    assert loaded.trust.value == "measured (MRCONFIGID)"
    assert loaded.ca_pem == CA  # what was hashed is what is used


def test_without_it_nothing_starts_unless_the_configuration_says_so(
    files: Files,
) -> None:
    loaded = load_config(str(files.path))
    assert loaded.trust is ConfigTrust.UNMEASURED
    with pytest.raises(ConfigError, match="is unmeasured") as caught:
        require_trust(loaded)
    assert "tdxd config-digest" in caught.value.hint
    assert "security.accept_unmeasured = true" in caught.value.hint
    files.write("[security]\naccept_unmeasured = true\n")
    assert require_trust(load_config(str(files.path))).ca_pem is None


@pytest.mark.parametrize("what", ["path", "more", "ca", "added", "removed", "renamed"])
def test_whatever_the_host_changes_makes_it_unmeasured(files: Files, what: str) -> None:
    files.measure()
    assert files.trust() is ConfigTrust.CONFIG_ID
    match what:
        case "added":
            files.more.with_name("z.toml").write_text("")
        case "removed":
            files.more.unlink()
        case "renamed":
            files.more.rename(files.more.with_name("other.toml"))
        case _:
            changed: Path = getattr(files, what)
            changed.write_bytes(changed.read_bytes() + b"\n")
    assert files.trust() is ConfigTrust.CONTRADICTED


def test_another_configuration_than_mrconfigids_cannot_accept_itself(
    files: Files,
) -> None:
    """The quote shows the MRCONFIGID that the policy pins, whatever the host puts on the disk."""
    files.measure()
    files.write("[security]\naccept_unmeasured = true\n")
    with pytest.raises(ConfigError, match="MRCONFIGID is that of another") as caught:
        require_trust(load_config(str(files.path)))
    assert "accept_unmeasured does not help" in caught.value.hint


def test_what_must_be_measured_cannot_accept_itself_either(files: Files) -> None:
    """An image whose configuration lies on the host's disk: there MRCONFIGID may be zero."""
    files.write("[security]\naccept_unmeasured = true\n")
    with pytest.raises(ConfigError, match="--require-measured accepts no such one"):
        require_trust(load_config(str(files.path)), always=True)
    files.measure()
    assert require_trust(load_config(str(files.path)), always=True).ca_pem == CA


def test_in_a_td_a_configuration_cannot_say_where_mrconfigid_is(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file of the host's, with the digest of the host's configuration, would prove it."""
    files.measure()
    monkeypatch.setattr(machine, "is_tdx_guest", lambda: True)
    assert files.trust() is ConfigTrust.UNMEASURED


@pytest.mark.parametrize(("busy", "wanted"), [(1, "CONFIG_ID"), (9, "UNMEASURED")])
def test_a_module_that_is_busy_is_asked_again(
    files: Files, monkeypatch: pytest.MonkeyPatch, busy: int, wanted: str
) -> None:
    """An exit for an unmeasured configuration is for good: no moment may decide it."""
    report = report_of()
    digest = digest_of(str(files.path))
    left = [EvidenceUnavailableError("TD report: busy")] * busy

    def read(_device: str, report_data: bytes) -> bytes:
        assert report_data == bytes(64)
        if left:
            raise TransientError(left.pop())
        mine = dataclasses.replace(report, mr_config_id=digest, report_data=report_data)
        return encode_td_report(mine, mac=bytes(32))

    monkeypatch.setattr(tdx_guest, "read_td_report", read)
    monkeypatch.setattr(tdx_guest, "PAUSE_S", 0.0)
    assert files.trust() is ConfigTrust[wanted]


def test_a_td_without_a_config_id(files: Files) -> None:
    (files.measurements / "mrconfigid").write_bytes(bytes(48))
    assert files.trust() is ConfigTrust.UNMEASURED


def test_a_ca_that_is_missing_is_said_at_once_if_it_should_be_measured(
    files: Files,
) -> None:
    files.ca.unlink()
    assert files.trust() is ConfigTrust.UNMEASURED
    (files.measurements / "mrconfigid").write_bytes(b"\1" * 48)
    with pytest.raises(ConfigError, match=r"ca\.pem: cannot be read") as caught:
        load_config(str(files.path))
    assert "MRCONFIGID" in caught.value.hint
    with pytest.raises(ConfigError, match=r"ca\.pem: cannot be read") as caught:
        digest_of(str(files.path))
    assert "--ca" in caught.value.hint


def test_the_digest_does_not_depend_on_where_the_files_lie(
    files: Files, tmp_path: Path
) -> None:
    expected = config_digest(
        [
            ("tdxd.toml", files.path.read_bytes()),
            ("tdxd.d/site.toml", files.more.read_bytes()),
            ("key_release.ca", CA),
        ]
    )
    assert digest_of(str(files.path)) == expected
    elsewhere = tmp_path / "owner"
    (tmp_path / "etc").rename(elsewhere)
    files.ca.rename(elsewhere / "keyd-ca.pem")
    path, ca = str(elsewhere / "tdxd.toml"), str(elsewhere / "keyd-ca.pem")
    assert digest_of(path, ca=ca) == expected


def test_config_digest_prints_it(files: Files) -> None:
    def printed(*more: str) -> str:
        argv = [sys.executable, "-m", "tdxd.cli.tdxd", "config-digest", *more]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            argv, capture_output=True, text=True, check=True, env=env, timeout=60
        )
        return done.stdout

    digest = digest_of(str(files.path))
    assert printed("--config", str(files.path)) == digest.hex() + "\n"
    in_base64 = printed("--config", str(files.path), "--base64")
    assert base64.b64decode(in_base64) == digest


# --- a measured root file system ----------------------------------------------


def test_files_on_a_root_that_nothing_verifies(files: Files) -> None:
    assert not lie_on_measured_root([str(files.path)])


def test_a_file_of_another_file_system_is_not_on_the_root(tmp_path: Path) -> None:
    command_line = tmp_path / "cmdline"
    command_line.write_text("roothash=" + "ab" * 32)
    assert not lie_on_measured_root(["/proc/cmdline"], command_line=str(command_line))


def test_a_command_line_alone_proves_nothing(tmp_path: Path) -> None:
    """The root hash stands there, but the root is no dm-verity device, or of another hash."""
    command_line = tmp_path / "cmdline"
    command_line.write_text("roothash=" + "ab" * 32)
    number = os.stat("/").st_dev
    device = tmp_path / "devices" / f"{os.major(number)}:{os.minor(number)}" / "dm"
    for uuid in (None, "CRYPT-VERITY-00-root"):
        if uuid is not None:
            device.mkdir(parents=True)
            (device / "uuid").write_text(uuid + "\n")
        assert not lie_on_measured_root(
            ["/"], command_line=str(command_line), devices=str(tmp_path / "devices")
        )


def test_reading_does_not_judge(files: Files) -> None:
    """`--check-config` works anywhere, without a TD."""
    assert config_files.read_config(str(files.path)).health.listen == "127.0.0.1:9640"
