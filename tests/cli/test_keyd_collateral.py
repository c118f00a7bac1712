"""`tdx-keyd collateral` as a person types it, against a PCCS on loopback."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdxd.cli.tdx_keyd import main
from tdxd.owner.collateral.bundle import encode_bundle, parse_bundle
from tdxd.sim.pccs import PccsServer
from tdxd.sim.platform import SimPlatform
from tests.collateral import DAY, a_set

REPOSITORY = Path(__file__).parents[2]


class Platform(SimPlatform):
    state: dict[str, object]

    def collateral(self, now_s, **overrides):
        return super().collateral(now_s, **{**self.state, **overrides})


@pytest.fixture
def keyd(capfd, monkeypatch):
    def run(*argv, code=0):
        """Return standard output, or standard error where `code` is not 0."""
        monkeypatch.setattr(sys, "argv", ["tdx-keyd", *map(str, argv)])
        capfd.readouterr()
        returned = main()
        out, err = capfd.readouterr()
        assert returned == code, err
        return err if code else out

    return run


@pytest.fixture
def platform():
    one = Platform.create()
    assert isinstance(one, Platform)
    one.state = {}
    return one


@pytest.fixture
def pccs(platform):
    with contextlib.closing(PccsServer(platform, "127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def make_store(keyd, platform, pccs, tmp_path):
    """Make a store that trusts the platform's root."""
    root = tmp_path / "root.pem"
    root.write_text(platform.root_pem)

    def make(name="store", url=pccs.url, offline=False):
        directory = tmp_path / name
        keyd(
            *("init", directory, "--name", "127.0.0.1", "--listen", "127.0.0.1:0"),
            *("--collateral-url", url, "--simulated-root", root),
        )
        if offline:
            config = directory / "keyd.toml"
            text = config.read_text()
            config.write_text(
                text.replace("[collateral]\n", "[collateral]\noffline = true\n")
            )
        return directory

    return make


def fetched(keyd, store, platform, **changes):
    args = ("--fmspc", platform.fmspc.lower(), "--root", "simulated-root.der")
    return keyd("collateral", "fetch", store, *args, **changes)


def test_an_empty_store(keyd, make_store):
    store = make_store()
    assert "no collateral yet" in keyd("collateral", "status", store)
    assert json.loads(keyd("collateral", "status", store, "--json")) == []


def test_fetch_then_status(keyd, make_store, platform, pccs):
    store = make_store()
    out = fetched(keyd, store, platform)
    assert out == keyd("collateral", "status", store)
    header, row = out.splitlines()
    assert header.split()[:3] == ["FMSPC", "CA", "STATE"]
    assert row.split()[:3] == [platform.fmspc, "platform", "valid"]
    assert "tcb 20, qe 20" in row
    assert row.endswith(f"{pccs.url} simulated")
    (one,) = json.loads(keyd("collateral", "status", store, "--json"))
    assert (one["state"], one["problem"], one["hint"]) == ("valid", "", "")
    assert one["pck_crl_number"] == 1
    assert one["issued"].endswith("Z")
    assert sorted(name.partition("/")[0] for name in one["floors"]) == [
        "pck-crl",
        "pck-crl-time",
        "qe-evaluation",
        "root-crl",
        "root-crl-time",
        "tcb-evaluation",
    ]


def test_key_encryption_key_elsewhere(keyd, make_store, platform, tmp_path):
    """Every verb takes it, and says so where it is missing."""
    store, other = make_store(), make_store("other")
    kept = (store / "kek.private").rename(tmp_path / "kek")
    there = (other / "kek.private").rename(tmp_path / "other.kek")
    fetch = ("fetch", store, "--fmspc", platform.fmspc, "--root", "simulated-root.der")
    for argv, kek in (
        (fetch, kept),
        (("status", store), kept),
        (("export", store, tmp_path / "sets"), kept),
        (("import", other, tmp_path / "sets"), there),
    ):
        assert "--kek FILE" in keyd("collateral", *argv, code=78)
        assert (
            platform.fmspc in keyd("collateral", *argv, "--kek", kek)
            or argv[0] == "export"
        )


def test_several_processes_at_once(keyd, make_store, platform):
    """They write one file and one set of floors; none fails, none tears the other's work."""
    store = make_store()
    argv = [
        sys.executable,
        "-m",
        "tdxd.cli.tdx_keyd",
        "collateral",
        "fetch",
        str(store),
    ]
    argv += ["--fmspc", platform.fmspc, "--root", "simulated-root.der", "--json"]
    running = [
        subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(3)
    ]
    for one in running:
        out, _ = one.communicate(timeout=120)
        assert one.returncode == 0
        assert json.loads(out)["state"] == "valid"
    (row,) = json.loads(keyd("collateral", "status", store, "--json"))
    assert (row["state"], len(row["floors"])) == ("valid", 6)
    assert len(list((store / "collateral").iterdir())) == 1


def test_fetch_of_what_is_not_there(keyd, make_store):
    store = make_store()
    args = ("--fmspc", "00806F050000", "--root", "simulated-root.der")
    err = keyd("collateral", "fetch", store, *args, code=69)
    assert "HTTP status 404" in err
    assert "hint: it has none for this family" in err
    err = keyd("collateral", "fetch", store, "--fmspc", "zz", code=65)
    assert "12 upper-case hex digits" in err


def test_fetch_from_a_liar(keyd, make_store, platform):
    store = make_store()
    platform.state = {"signer": "pck"}
    err = fetched(keyd, store, platform, code=69)
    assert "tcb_info_signer is tdx-sim PCK Certificate" in err
    assert "do not trust it" in err
    assert "no collateral yet" in keyd("collateral", "status", store)


def test_fetch_below_a_floor(keyd, make_store, platform):
    store = make_store()
    platform.state = {"eval_data_number": 21}
    fetched(keyd, store, platform)
    platform.state = {}
    err = fetched(keyd, store, platform, code=69)
    assert "collateral_floor is tcb-evaluation 20, qe-evaluation 20" in err
    assert "expected tcb-evaluation >= 21" in err
    assert "refresh the PCCS" in err


def test_from_an_online_store_to_an_offline_one(keyd, make_store, platform, tmp_path):
    online, offline = make_store("online"), make_store("offline", offline=True)
    err = fetched(keyd, offline, platform, code=78)
    assert "offline = true" in err
    fetched(keyd, online, platform)
    bundle = tmp_path / "sets.bundle"
    out = keyd("collateral", "export", online, bundle)
    assert out == f"exported 1 set(s) to {bundle}\n"
    out = keyd("collateral", "import", offline, bundle)
    assert out.startswith(f"imported {platform.fmspc} platform, expires 20")
    status = keyd("collateral", "status", offline)
    assert "valid" in status
    assert "(imported) simulated" in status
    err = keyd("collateral", "export", online, bundle, code=71)
    assert "File exists" in err


def test_export_of_nothing(keyd, make_store, tmp_path):
    err = keyd("collateral", "export", make_store(), tmp_path / "b", code=65)
    assert "has no valid collateral" in err
    assert "hint: tdx-keyd collateral fetch" in err
    assert not (tmp_path / "b").exists()


def bundle_of(tmp_path, *sets):
    path = tmp_path / "sets.bundle"
    path.write_bytes(encode_bundle(sets))
    return path


def test_import_of_an_expired_set(keyd, make_store, platform, tmp_path):
    """One of two has expired: it is named, and neither is imported."""
    now_s = int(time.time())
    good, old = a_set(platform, now_s), a_set(platform, now_s - 40 * DAY)
    store = make_store()
    err = keyd("collateral", "import", store, bundle_of(tmp_path, good, old), code=65)
    assert "is not imported" in err
    assert "collateral_dates is tcb_info expired" in err
    assert "hint: is the clock of this machine right?" in err
    assert "no collateral yet" in keyd("collateral", "status", store)


def test_import_of_another_root(keyd, make_store, tmp_path):
    stranger = SimPlatform.create()
    path = bundle_of(tmp_path, a_set(stranger, int(time.time())))
    err = keyd("collateral", "import", make_store(), path, code=65)
    assert "is not trusted here" in err
    assert "Intel SGX Root CA" in err


def test_import_of_a_damaged_file(keyd, make_store, platform, tmp_path):
    path = bundle_of(tmp_path, a_set(platform, int(time.time())))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    err = keyd("collateral", "import", make_store(), path, code=65)
    assert str(path) in err
    err = keyd("collateral", "import", make_store("b"), tmp_path / "none", code=71)
    assert "No such file" in err


def test_import_of_an_older_set_keeps_the_newer(keyd, make_store, platform, tmp_path):
    now_s = int(time.time())
    store = make_store()
    fetched(keyd, store, platform)
    path = bundle_of(tmp_path, a_set(platform, now_s - 3600))
    out = keyd("collateral", "import", store, path)
    assert out.startswith("a later set is there:")
    (one,) = json.loads(keyd("collateral", "import", store, path, "--json"))
    assert one["taken"] is False


def test_status_of_a_damaged_and_of_an_expired_set(
    keyd, make_store, platform, tmp_path
):
    store = make_store()
    fetched(keyd, store, platform)
    (file,) = (store / "collateral").iterdir()
    (one,) = parse_bundle(file.read_bytes(), source="file")
    file.write_bytes(b"junk")
    out = keyd("collateral", "status", store)
    assert "unreadable" in out
    assert "is no collateral bundle" in out
    old = a_set(platform, int(time.time()) - 40 * DAY)
    file.write_bytes(encode_bundle([old]))
    out = keyd("collateral", "status", store)
    assert "refused" in out
    assert "collateral_dates is tcb_info expired" in out
    assert "hint: " in out
    file.write_bytes(encode_bundle([one]))
    assert "valid" in keyd("collateral", "status", store)
