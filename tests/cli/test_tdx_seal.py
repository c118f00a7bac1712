"""tdx-seal as a person runs it: output, errors, exit codes, and what an interrupted run leaves."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VECTOR = ROOT / "tests/vectors/sealed/small.bundle"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    version = tmp_path / "model/models/m/1"
    version.mkdir(parents=True)
    (version / "saved_model.pb").write_bytes(os.urandom(100_000))
    return tmp_path / "model"


@pytest.fixture
def seal(tmp_path: Path):
    """Run the program in the test's directory."""

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tdxd.cli.tdx_seal", *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


CREATE = ("create", "model", "--id", "m", "--generation", "3")
FILES = ("-o", "m.img", "--bundle", "m.bundle")


def said(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Return exit code and error line; there must be nothing on standard output."""
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()[0]


def test_create_inspect_and_verify(seal, model, tmp_path):
    made = seal(*CREATE, *FILES)
    assert (made.returncode, made.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m.bundle",
        "m.img",
        "m.img.json",
        "model",
    ]
    for name, kind in (
        ("m.img", "sealed image"),
        ("m.bundle", "key bundle"),
        ("m.img.json", "public record"),
    ):
        shown = json.loads(seal("inspect", name, "--json").stdout)
        assert (shown["kind"], shown["id"], shown["generation"]) == (kind, "m", 3)
    record = json.loads((tmp_path / "m.img.json").read_text())
    assert record["size_bytes"] == (tmp_path / "m.img").stat().st_size
    digest = subprocess.run(
        ["sha256sum", tmp_path / "m.img"], capture_output=True, text=True, check=True
    )
    assert digest.stdout.split()[0] == record["sha256"]
    assert seal("verify", "m.img").returncode == 0
    assert seal("verify", "m.img", "--bundle", "m.bundle").returncode == 0


def test_open_lists_and_extracts(seal, model, tmp_path):
    (model / "models/m/1/esc\x1b[2J").write_bytes(b"12345")
    seal(*CREATE, *FILES)
    shown = seal("open", "m.img", "--bundle", "m.bundle")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = [line.split(maxsplit=2) for line in shown.stdout.splitlines()]
    assert ["-r--r--r--", "100000", "models/m/1/saved_model.pb"] in lines
    assert ["-r--r--r--", "5", "models/m/1/esc?[2J"] in lines
    assert [name for _, _, name in lines] == sorted(name for _, _, name in lines)
    done = seal("open", "m.img", "--bundle", "m.bundle", "--json")
    listed = json.loads(done.stdout)
    assert {
        "path": "models/m/1/saved_model.pb",
        "kind": "file",
        "mode": "0444",
        "size_bytes": 100000,
    } in listed
    done = seal("open", "m.img", "--bundle", "m.bundle", "--extract", "back")
    assert done.stdout == "back: 2 files, 100005 bytes, every one verified\n"
    one, two = (
        tmp_path / name / "models/m/1/saved_model.pb" for name in ("model", "back")
    )
    assert one.read_bytes() == two.read_bytes()
    assert said(seal("open", "m.img", "--bundle", "m.bundle", "--extract", "back")) == (
        65,
        "tdx-seal: error: back exists already",
    )


def test_rekey_counts_up_and_says_what_to_do(seal, model, tmp_path):
    seal(*CREATE, *FILES)
    argv = ("rekey", "m.img", "--bundle", "m.bundle", "-o", "n.img")
    done = seal(*argv, "--new-bundle", "n.bundle")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tdx-keyd remove STORE m --generation 3" in done.stdout
    assert json.loads(seal("inspect", "n.bundle", "--json").stdout)["generation"] == 4
    assert seal("verify", "n.img").returncode == 0
    assert seal("verify", "n.img", "--bundle", "n.bundle").returncode == 0
    old, new = (
        (tmp_path / name).read_bytes()[-64:] for name in ("m.bundle", "n.bundle")
    )
    assert old != new
    code, line = said(seal(*argv, "--new-bundle", "o.bundle", "--generation", "3"))
    assert (code, line) == (64, "tdx-seal: error: generation 3 is not above 3")


def test_rekey_never_replaces_what_it_reads(seal, model, tmp_path):
    seal(*CREATE, *FILES)
    before = [(tmp_path / name).read_bytes() for name in ("m.img", "m.bundle")]
    argv = ("rekey", "m.img", "--bundle", "m.bundle", "--force")
    for more in (
        ("-o", "./m.img", "--new-bundle", "n.bundle"),
        ("-o", "n.img", "--new-bundle", "./m.bundle"),
    ):
        code, line = said(seal(*argv, *more))
        assert (code, line.endswith("would replace the old one")) == (64, True)
    assert [(tmp_path / name).read_bytes() for name in ("m.img", "m.bundle")] == before


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """Attach a loop device of 32 MiB that holds something old."""
    backing = tmp_path.with_suffix(".backing")
    backing.write_bytes(os.urandom(2**20) * 32)
    argv = ["losetup", "--find", "--show", str(backing)]
    made = subprocess.run(argv, capture_output=True, text=True, check=True)
    path = Path(made.stdout.strip())
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)
        backing.unlink()


@pytest.mark.root
def test_a_block_device_is_an_image_as_well(seal, model, tmp_path, device):
    seal(*CREATE, *FILES)
    name = str(device)
    argv = [*CREATE, "-o", name, "--bundle", "d.bundle", "--secret-from", "m.bundle"]
    code, line = said(seal(*argv, "--force"))
    assert (code, line) == (64, f"tdx-seal: error: {name} is a block device")
    argv += ["--record", "d.json"]
    assert said(seal(*argv)) == (65, f"tdx-seal: error: {name} exists already")
    assert not (tmp_path / "d.bundle").exists()
    done = seal(*argv, "--force")
    assert (done.returncode, done.stderr) == (0, "")
    image = (tmp_path / "m.img").read_bytes()
    assert device.read_bytes()[: len(image)] == image
    digests = [
        json.loads((tmp_path / one).read_text())["sha256"]
        for one in ("d.json", "m.img.json")
    ]
    assert digests[0] == digests[1]
    assert seal("verify", name, "--record", "d.json").returncode == 0
    assert seal("verify", name, "--bundle", "d.bundle").returncode == 0
    assert json.loads(seal("inspect", name, "--json").stdout)["size_bytes"] == 2**25


@pytest.mark.root
def test_a_block_device_is_opened_and_rekeyed_both_ways(seal, model, tmp_path, device):
    seal(*CREATE, *FILES)
    name = str(device)
    outputs = ("--bundle", "d.bundle", "--record", "d.json", "--force")
    assert seal(*CREATE, "-o", name, *outputs).returncode == 0
    (tmp_path / "link").symlink_to(name)
    opened = seal("open", "link", "--bundle", "d.bundle", "--extract", "back")
    assert opened.returncode == 0
    assert (tmp_path / "back/models/m/1/saved_model.pb").is_file()
    away = ("rekey", name, "--bundle", "d.bundle", "-o", "n.img")
    assert seal(*away, "--new-bundle", "n.bundle").returncode == 0
    assert seal("verify", "n.img", "--bundle", "n.bundle").returncode == 0
    onto = ("rekey", "m.img", "--bundle", "m.bundle", "-o", name, "--force")
    more = ("--new-bundle", "o.bundle", "--record", "o.json")
    assert seal(*onto, *more).returncode == 0
    assert seal("verify", name, "--bundle", "o.bundle").returncode == 0
    assert said(seal("verify", name, "--bundle", "d.bundle"))[0] == 65


@pytest.mark.root
def test_a_block_device_too_small_or_in_use_is_refused(seal, model, tmp_path, device):
    name, more = str(device), ("--bundle", "d.bundle", "--record", "d", "--force")
    with (model / "models/m/1/weights").open("wb") as file:
        file.truncate(2**25)
    code, line = said(seal(*CREATE, "-o", name, *more))
    assert (code, f"{name} has {2**25} bytes, the image needs" in line) == (65, True)
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount holds it
    try:
        code, line = said(seal(*CREATE, "-o", name, *more))
    finally:
        os.close(fd)
    assert (code, line) == (
        71,
        f"tdx-seal: error: open {name}: Device or resource busy",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_inspecting_a_bundle_shows_no_secret(seal, model, tmp_path):
    seal(*CREATE, *FILES)
    bundle = (tmp_path / "m.bundle").read_bytes()
    secret = bundle[-64:]
    shown = seal("inspect", "m.bundle").stdout
    assert secret.hex() not in shown
    assert "secret_bytes" in shown


def test_the_same_secret_makes_the_same_image(seal, model, tmp_path):
    seal(*CREATE, *FILES)
    again = ("-o", "n.img", "--bundle", "n.bundle", "--secret-from", "m.bundle")
    assert seal(*CREATE, *again).returncode == 0
    assert (tmp_path / "m.img").read_bytes() == (tmp_path / "n.img").read_bytes()
    assert (tmp_path / "m.bundle").read_bytes() == (tmp_path / "n.bundle").read_bytes()


def test_a_changed_byte_is_refused_both_ways(seal, model, tmp_path):
    seal(*CREATE, *FILES)
    with (tmp_path / "m.img").open("r+b") as file:
        file.seek(16 * 2**20 + 5000)
        file.write(b"\0\1\2\3")
    code, line = said(seal("verify", "m.img"))
    assert code == 65
    assert line.startswith("tdx-seal: error: m.img: SHA-256 ")
    done = seal("verify", "m.img", "--bundle", "m.bundle")
    assert said(done) == (65, "tdx-seal: error: m.img: block 1 is not what was sealed")
    assert done.stderr.splitlines()[1].startswith("tdx-seal: hint: ")


def test_the_bundle_of_another_image_is_refused(seal, model):
    seal(*CREATE, *FILES)
    seal(*CREATE, "-o", "n.img", "--bundle", "n.bundle")
    code, line = said(seal("verify", "m.img", "--bundle", "n.bundle"))
    assert code == 65
    assert line.endswith("m.img: does not open with the key of m generation 3")


def test_a_truncated_image_is_refused(seal, model, tmp_path):
    seal(*CREATE, *FILES)
    size = (tmp_path / "m.img").stat().st_size
    os.truncate(tmp_path / "m.img", size - 1)
    code, line = said(seal("verify", "m.img", "--bundle", "m.bundle"))
    assert code == 65
    assert line.endswith(f"m.img: {size - 1} bytes, m generation 3 needs {size}")
    assert said(seal("verify", "m.img"))[0] == 65


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (("create", "model"), 64, "required: --id"),
        ((*CREATE[:3], "A/B", "--generation", "3", *FILES), 64, "volume id 'A/B'"),
        ((*CREATE[:5], "0", *FILES), 64, "generation 0 is not 1 or more"),
        (("create", "none", *CREATE[2:], *FILES), 65, "none is not a directory"),
        ((*CREATE, *FILES, "--secret-from", "none"), 71, "read none: No such file"),
        (("verify", "none.img"), 71, "read none.img.json: No such file"),
        (("inspect", "none"), 71, "read none: No such file"),
        (("verify", "none", "--bundle", str(VECTOR)), 75, "none: no such file"),
        (("open", "none", "--bundle", str(VECTOR)), 75, "none: no such file"),
        (("open", "model", "--bundle", str(VECTOR)), 65, "model: is a directory"),
        (("open", "none", "--bundle", "none"), 71, "read none: No such file"),
        (("open", "model"), 64, "required: --bundle"),
        (("rekey", "model", "--bundle", "model"), 64, "required: -o/--output"),
        (("rekey", "x", "--bundle", "n", "-o", "y"), 64, "required: --new-bundle"),
        (("inspect", "model/models/m/1/saved_model.pb"), 65, "at most 8192 allowed"),
        (("cert", "a b"), 64, "'a b' is neither a host name nor an IP address"),
    ],
)
def test_bad_input_is_named(seal, model, argv, code, text):
    got, line = said(seal(*argv))
    assert got == code
    assert text in line
    assert line.startswith("tdx-seal: error: ")


def test_a_missing_mkfs_is_named(model, tmp_path):
    (tmp_path / "bin").mkdir()
    argv = [sys.executable, "-m", "tdxd.cli.tdx_seal", *CREATE, *FILES]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(tmp_path / "bin")}
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    for program in ("setpriv", "mkfs.erofs"):
        if program == "mkfs.erofs":
            (tmp_path / "bin/setpriv").symlink_to(setpriv)
        done = subprocess.run(
            argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 71
        assert f"run {program}: No such file" in done.stderr
        assert "hint: install " in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "model"]


def test_a_model_directory_without_models_is_refused(seal, tmp_path):
    (tmp_path / "model").mkdir()
    done = seal(*CREATE, *FILES)
    assert said(done) == (65, "tdx-seal: error: model holds no models")
    assert "models/NAME/VERSION/saved_model.pb" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_cert_makes_a_private_key_and_a_public_certificate(seal, tmp_path):
    made = seal("cert", "model.example.com", "::1", "--cert-out", "server.crt")
    assert (made.returncode, made.stderr) == (0, "")
    assert (tmp_path / "server.pem").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE KEY" in (tmp_path / "server.pem").read_text()
    assert "PRIVATE" not in (tmp_path / "server.crt").read_text()
    argv = ["openssl", "x509", "-in", tmp_path / "server.crt", "-noout", "-text"]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "DNS:model.example.com, IP Address:0:0:0:0:0:0:0:1" in shown
    assert "Dec 31 23:59:59 9999" in shown
    assert said(seal("cert", "x"))[1].endswith("server.pem exists already")


OPEN = ("open", "old.img", "--bundle", "old.bundle", "--extract", "back")
REKEY = ("rekey", "old.img", "--bundle", "old.bundle", "-o", "m.img")


@pytest.fixture
def big(model: Path, seal) -> list[str]:
    """Make a model, and its image `old.img`, that take some time; return what there is then."""
    (model / "models/m/1/big").write_bytes(os.urandom(2**20) * 100)
    argv = (*CREATE, "-o", "old.img", "--bundle", "old.bundle")
    assert seal(*argv).returncode == 0
    return sorted(path.name for path in model.parent.iterdir())


@contextlib.contextmanager
def running(argv: Sequence[str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    # A shell's background job, as a test run may be, has SIGINT ignored, and children inherit that.
    program = ["env", "--default-signal=INT", sys.executable, "-m"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*program, "tdxd.cli.tdx_seal", *argv]
    with subprocess.Popen(command, cwd=cwd, env=env) as process:
        yield process


CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGKILL: -signal.SIGKILL,
}


@pytest.mark.parametrize("how", CODES)
@pytest.mark.parametrize(
    "argv",
    [(*CREATE, *FILES), (*REKEY, "--new-bundle", "m.bundle")],
    ids=["create", "rekey"],
)
def test_an_interrupted_run_leaves_no_file_and_no_process(big, tmp_path, how, argv):
    with running(argv, tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers: list[str] = []
        while len(workers) < len(os.sched_getaffinity(0)):
            assert process.poll() is None
            workers = children.read_text().split()
            time.sleep(0.005)
        process.send_signal(how)
        code = process.wait()
    assert code == CODES[how]
    assert sorted(path.name for path in tmp_path.iterdir()) == big
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))


@pytest.mark.parametrize("how", CODES)
def test_mkfs_does_not_outlive_an_interrupted_run(model, tmp_path, how):
    with (model / "models/m/1/big").open("wb") as file:
        file.truncate(2**31)  # seconds for mkfs.erofs
    with running((*CREATE, *FILES), tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        found: list[str] = []
        while not found:
            assert process.poll() is None
            found = [pid for pid in children.read_text().split() if is_mkfs(pid)]
            time.sleep(0.005)
        process.send_signal(how)
        assert process.wait() == CODES[how]
    time.sleep(0.3)
    assert not alive(found[0])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def is_mkfs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "mkfs.erofs\n"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("how", CODES)
def test_an_interrupted_extraction_gives_no_directory(big, tmp_path, how):
    with running(OPEN, tmp_path) as process:
        while not list(tmp_path.glob(".back.*.new/models/m/1/big")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(how)
        code = process.wait()
    assert code == CODES[how]
    left = sorted(path.name for path in tmp_path.iterdir())
    if how == signal.SIGKILL:  # nobody could clear away, but it has no final name
        left.remove(f".back.{process.pid}.new")
    assert left == big


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_progress_is_shown_on_a_terminal(model, tmp_path):
    terminal, side = pty.openpty()
    argv = [sys.executable, "-m", "tdxd.cli.tdx_seal", *CREATE, *FILES]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    with subprocess.Popen(
        argv, cwd=tmp_path, env=env, stderr=side, stdout=subprocess.PIPE
    ) as process:
        os.close(side)
        shown = b""
        while True:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # the terminal's other side is closed
                break
        process.communicate()
    os.close(terminal)
    assert process.returncode == 0
    assert b"encrypt" in shown
