"""tdx-sim as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tdxd.core.appraisal import appraise_report
from tdxd.core.policy import parse_policy
from tdxd.core.qgs import QgsAddress
from tdxd.core.quote import parse_quote
from tdxd.errors import EX_CONFIG, EX_OK, EX_OSERR, EX_USAGE
from tdxd.host.qgs import request_quote
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA, NOW, verify
from tests.sim_process import running_sim, sim_command


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = sim_command(*arguments)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def platform(tmp_path: Path) -> Path:
    directory = tmp_path / "p"
    SimPlatform.create(directory)
    return directory


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


def test_init_then_quote_gives_a_quote_that_verifies(tmp_path: Path) -> None:
    directory, output = tmp_path / "p", tmp_path / "quote.bin"
    assert run("init", directory).returncode == EX_OK
    done = run("quote", directory, "--report-data", DATA.hex(), "-o", output)
    assert (done.returncode, done.stdout, done.stderr) == (EX_OK, "", "")
    loaded = SimPlatform.load(directory)
    quote = output.read_bytes()
    assert parse_quote(quote).report_data == DATA
    assert verify(quote, loaded.collateral_json(NOW), loaded.root_der) == "UpToDate"


def test_init_twice_is_refused(platform: Path) -> None:
    done = run("init", platform)
    assert done.returncode == EX_USAGE
    assert "tdx-sim: error:" in done.stderr
    assert "tdx-sim: hint:" in done.stderr


def test_root_prints_what_a_key_server_pins(platform: Path) -> None:
    done = run("root", platform)
    assert done.stdout == SimPlatform.load(platform).root_pem
    done = run("root", platform, "--der")
    assert Path(done.stdout.strip()).read_bytes() == SimPlatform.load(platform).root_der


def test_measurements_are_a_policy_that_this_td_fulfils(platform: Path) -> None:
    done = run("measurements", platform)
    rules = parse_policy(done.stdout).tdx
    quote = parse_quote(SimPlatform.load(platform).quote(DATA))
    assert all(check.ok for check in appraise_report(rules, quote))
    assert rules.simulated


def test_measurements_as_json(platform: Path) -> None:
    values = json.loads(run("measurements", platform, "--json").stdout)
    quote = parse_quote(SimPlatform.load(platform).quote(DATA))
    assert values["mrtd"] == quote.mr_td.hex()
    assert [values[f"rtmr{n}"] for n in range(4)] == [one.hex() for one in quote.rtmrs]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["quote", "P", "--report-data", "zz", "-o", "/dev/null"], EX_USAGE, "not hex"),
        (["quote", "P", "--report-data", "00", "-o", "/dev/null"], EX_USAGE, "1 bytes"),
        (["run", "P"], EX_USAGE, "--mount"),
        (["run", "P", "--mount", "/nowhere"], EX_USAGE, "--pccs"),
        (["run", "P", "--pccs-only"], EX_USAGE, "--pccs"),
        (["run", "P", "--pccs-only", "--pccs", "127.0.0.1"], EX_USAGE, "IP:PORT"),
        (["run", "P", "--pccs-only", "--pccs", "0.0.0.0:0"], EX_USAGE, "loopback"),
        (["run", "P", "--qgs-only"], EX_USAGE, "--qgs ADDRESS"),
        (
            ["run", "P", "--qgs-only", "--qgs", "tcp:1"],
            EX_USAGE,
            "is not vsock:CID",
        ),
        (
            ["run", "P", "--qgs-only", "--qgs", "unix:/nowhere/q"],
            EX_OSERR,
            "unix:/nowhere/q",
        ),
        (["measurements", "/nowhere"], EX_OSERR, "/nowhere/platform.toml"),
    ],
)
def test_mistakes_are_named(platform: Path, arguments, code: int, text: str) -> None:
    done = run(*(str(platform) if one == "P" else one for one in arguments))
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_description_is_named(platform: Path) -> None:
    (platform / "platform.toml").write_text("[td]\nmrtd = 1\n")
    done = run("measurements", platform)
    assert done.returncode == EX_CONFIG
    assert "td.mrtd" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_pccs_alone_runs_until_a_signal(platform: Path, number: int) -> None:
    with running_sim(platform, "--pccs-only", "--pccs", "127.0.0.1:0") as sim:
        assert set(sim.ready) == {"pccs"}
        url = sim.ready["pccs"] + "/sgx/certification/v4/rootcacrl"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert bytes.fromhex(answer.read().decode())
        assert sim.stop(number) == (EX_OK, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_quoting_service_alone_runs_until_a_signal(
    platform: Path, tmp_path: Path, number: int
) -> None:
    where = tmp_path / "qgs"
    report = SimPlatform.load(platform).td_report(DATA)
    with running_sim(platform, "--qgs-only", "--qgs", f"unix:{where}") as sim:
        assert sim.ready == {"qgs": f"unix:{where}"}
        quote = request_quote(QgsAddress(path=str(where)), report, timeout_s=10)
        assert parse_quote(quote).report_data == DATA
        assert sim.stop(number) == (EX_OK, "")
    assert not where.exists()


def test_all_of_it_runs_at_once_without_a_mount(platform: Path, tmp_path: Path) -> None:
    arguments = ("--pccs-only", "--pccs", "127.0.0.1:0", "--qgs", f"unix:{tmp_path}/q")
    with running_sim(platform, *arguments) as sim:
        assert set(sim.ready) == {"pccs", "qgs"}
        assert sim.stop() == (EX_OK, "")


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_leaves_nothing_mounted(platform: Path, tmp_path: Path, number) -> None:
    mount = tmp_path / "m"
    with running_sim(platform, "--mount", mount, "--pccs", "127.0.0.1:0") as sim:
        assert set(sim.ready) == {"pccs", "tsm", "tdx_guest", "rtmr", "ccel"}
        assert str(mount) in mounts()
        log = Path(sim.ready["ccel"]).read_bytes()
        assert log == SimPlatform.load(platform).event_log
        held = os.open(sim.ready["tsm"], os.O_RDONLY)
        try:
            assert sim.stop(number) == (EX_OK, "")
            assert str(mount) not in mounts()
        finally:
            os.close(held)
    assert os.listdir(mount) == []


@pytest.mark.root
def test_a_killed_one_is_cleaned_up_at_the_next_start(
    platform: Path, tmp_path: Path
) -> None:
    mount = tmp_path / "m"
    with running_sim(platform, "--mount", mount, "--device-only") as sim:
        sim.stop(signal.SIGKILL)
        assert str(mount) in mounts()
    with running_sim(platform, "--mount", mount, "--device-only"):
        names = ["CCEL", "measurements", "report", "tdx_guest"]
        assert sorted(os.listdir(mount)) == names
    assert str(mount) not in mounts()


@pytest.mark.root
def test_a_mount_in_use_is_left_alone(platform: Path, tmp_path: Path) -> None:
    mount = tmp_path / "m"
    with running_sim(platform, "--mount", mount, "--device-only"):
        done = run("run", platform, "--mount", mount, "--device-only")
        assert done.returncode == EX_USAGE
        assert "mounted there already" in done.stderr
        assert (mount / "report").is_dir()


@pytest.mark.root
def test_the_mount_behaves_as_files(platform: Path, tmp_path: Path) -> None:
    """What a shell script would do, through the real kernel."""
    mount = tmp_path / "m"
    with running_sim(platform, "--mount", mount, "--device-only"):
        entry = mount / "report" / "x"
        entry.mkdir()
        assert sorted(os.listdir(entry)) == [
            "generation",
            "inblob",
            "outblob",
            "provider",
        ]
        (entry / "inblob").write_bytes(DATA)  # O_TRUNC: the kernel sends a truncate
        assert parse_quote((entry / "outblob").read_bytes()).report_data == DATA
        assert (entry / "generation").read_text() == "1\n"
        refused = [
            (entry / "inblob").read_bytes,
            lambda: (entry / "outblob").write_bytes(DATA),
            lambda: (entry / "new").write_bytes(DATA),
            (entry / "generation").unlink,
            (mount / "elsewhere").mkdir,
        ]
        for attempt in refused:
            with pytest.raises(PermissionError):
                attempt()
        (mount / "measurements" / "rtmr3:sha384").write_bytes(b"d" * 48)
        entry.rmdir()
        assert not entry.exists()
        assert (mount / "measurements" / "rtmr3:sha384").read_bytes() != bytes(48)
