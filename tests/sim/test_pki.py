"""Keys are made per installation, kept private, and read back as they were."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tdxd.errors import DataError, HostError, UsageError
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA, NOW, verify


def test_a_saved_platform_loads_as_it_was(tmp_path: Path) -> None:
    made = SimPlatform.create(tmp_path / "p")
    loaded = SimPlatform.load(tmp_path / "p")
    assert loaded.root_der == made.root_der
    assert loaded.quote(DATA) == made.quote(DATA)
    assert loaded.event_log == made.event_log
    collateral = loaded.collateral_json(NOW)
    assert verify(made.quote(DATA), collateral, loaded.root_der) == "UpToDate"


def test_keys_are_private(tmp_path: Path) -> None:
    SimPlatform.create(tmp_path / "p")
    pki = tmp_path / "p" / "pki"
    keys = sorted(pki.glob("*.key"))
    assert len(keys) == 5
    assert stat.S_IMODE(pki.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_two_installations_share_no_key(tmp_path: Path) -> None:
    one, two = SimPlatform.create(), SimPlatform.create()
    assert one.root_der != two.root_der
    assert one.pki.identity.ppid != two.pki.identity.ppid


def test_a_platform_is_never_overwritten(tmp_path: Path) -> None:
    made = SimPlatform.create(tmp_path)
    with pytest.raises(UsageError, match="holds a platform already") as caught:
        SimPlatform.create(tmp_path)
    assert caught.value.hint
    assert SimPlatform.load(tmp_path).root_der == made.root_der


def test_root_files_hold_the_same_certificate(tmp_path: Path) -> None:
    made = SimPlatform.create(tmp_path)
    pem = x509.load_pem_x509_certificate((tmp_path / "pki/root.pem").read_bytes())
    assert (tmp_path / "pki/root.der").read_bytes() == made.root_der
    assert pem.public_bytes(Encoding.DER) == made.root_der


def test_the_root_signs_itself() -> None:
    """dcap-qvl aborts the process on a root whose issuer is another."""
    root = SimPlatform.create().pki.root.certificate
    assert root.issuer == root.subject
    root.verify_directly_issued_by(root)


def test_a_missing_platform_is_named_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"platform\.toml") as caught:
        SimPlatform.load(tmp_path / "none")
    assert "tdx-sim init" in caught.value.hint


@pytest.mark.parametrize("name", ["root.key", "pck.pem", "identity.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    SimPlatform.create(tmp_path)
    (tmp_path / "pki" / name).write_text("broken")
    with pytest.raises(DataError, match=name):
        SimPlatform.load(tmp_path)


def test_a_missing_key_is_named_with_a_hint(tmp_path: Path) -> None:
    SimPlatform.create(tmp_path)
    (tmp_path / "pki" / "pck.key").unlink()
    with pytest.raises(HostError, match=r"pck\.key") as caught:
        SimPlatform.load(tmp_path)
    assert "tdx-sim init" in caught.value.hint
