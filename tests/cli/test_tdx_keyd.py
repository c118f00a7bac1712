"""tdx-keyd as a person types it: output, exit codes, and a server that ends in order."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tdxd.cli.tdx_keyd import main
from tdxd.core.bundle import KeyBundle
from tdxd.core.config import KeyReleaseConfig, parse_signing_key
from tests.keyserver import make_bundle, opened_owner, policy_text

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
COMMAND = (sys.executable, "-m", "tdxd.cli.tdx_keyd")


@pytest.fixture
def keyd(capfd, monkeypatch):
    """Run one verb to its end, in this process: a process each would cost half a second.

    `serve` hardens its process and keeps its loggers, so that one has a process of its own.
    """

    def run(*argv, code=0):
        """Return standard output, or standard error where `code` is not 0."""
        if argv[:1] == ("serve",):
            return served(argv, code)
        monkeypatch.setattr(sys, "argv", ["tdx-keyd", *map(str, argv)])
        capfd.readouterr()
        returned = main()
        out, err = capfd.readouterr()
        assert returned == code, err
        assert (out if code else err) == ""
        return err if code else out

    return run


def served(argv, code):
    """Run `serve` that ends by itself; return its standard error."""
    done = subprocess.run(
        [*COMMAND, *map(str, argv)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    return done.stderr


@pytest.fixture
def store(tmp_path, keyd):
    keyd("init", tmp_path / "store", "--name", "127.0.0.1", "--listen", "127.0.0.1:0")
    return tmp_path / "store"


@pytest.fixture
def policy(tmp_path):
    from tdxd.sim.platform import SimPlatform

    path = tmp_path / "policy.toml"
    path.write_text(policy_text(SimPlatform.create()))
    return path


def bundle_file(tmp_path, volume_id="v", generation=1):
    path = tmp_path / f"{volume_id}-{generation}.bundle"
    path.write_bytes(make_bundle(volume_id, generation).encode())
    return path


def test_init_prints_what_a_guest_config_needs(keyd, tmp_path):
    import tomllib

    directory = tmp_path / "s"
    out = keyd("init", directory, "--name", "keys.example.com", "::1")
    section = tomllib.loads(out)["key_release"]
    KeyReleaseConfig(
        servers=tuple(section["servers"]),
        ca=section["ca"],
        signing_key=section["signing_key"],
    )
    assert section["servers"] == ["keys.example.com:50051", "[::1]:50051"]
    assert Path(section["ca"]).read_text().startswith("-----BEGIN CERTIFICATE")
    private = [
        name for name in os.listdir(directory) if name.endswith((".key", "private"))
    ]
    assert sorted(private) == [
        "ca.key",
        "kek.private",
        "server.key",
        "signing.key",
    ]
    for name in private:
        assert (directory / name).stat().st_mode & 0o777 == 0o600


def test_init_as_json(keyd, tmp_path):
    made = json.loads(keyd("init", tmp_path / "s", "--name", "a.example", "--json"))
    assert len(parse_signing_key(made["signing_key"])) == 32


def test_init_never_overwrites(keyd, store):
    err = keyd("init", store, "--name", "x", code=78)
    assert err == (
        f"tdx-keyd: error: {store} is not empty: it holds ca.key\n"
        "tdx-keyd: hint: a store's keys are never overwritten; name a new directory\n"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["init"],
        ["init", "DIR"],
        ["fly"],
        [],
        ["init", "DIR", "--name", "x", "--listen", "nowhere"],
        ["init", "DIR", "--name", "b\u00e4d name"],
    ],
)
def test_usage_errors(keyd, tmp_path, argv):
    err = keyd(*[str(tmp_path / "s") if one == "DIR" else one for one in argv], code=64)
    assert err.startswith("tdx-keyd: error: ")
    assert not (tmp_path / "s").exists()


def test_add_list_show_remove(keyd, store, tmp_path, policy):
    assert keyd("list", store) == "ID  KIND  GENERATIONS  POLICY VERSION\n"
    assert keyd("add", store, bundle_file(tmp_path)) == "added v generation 1\n"
    made = keyd("add", store, bundle_file(tmp_path, "v", 2), "--policy", policy)
    assert made == "added v generation 2\n"
    assert keyd("list", store) == (
        "ID  KIND    GENERATIONS  POLICY VERSION\nv   sealed  1 2          1\n"
    )
    shown = json.loads(keyd("show", store, "v", "--json"))
    assert [one["generation"] for one in shown["generations"]] == [1, 2]
    assert "v: sealed, policy version 1\n" in keyd("show", store, "v")
    assert (
        keyd("remove", store, "v", "--generation", "2")
        == "removed v: 1 generation(s)\n"
    )
    assert "no generation 2" in keyd("remove", store, "v", "--generation", "2", code=65)
    assert keyd("remove", store, "v") == "removed v: 1 generation(s)\n"
    err = keyd("remove", store, "v", code=65)
    assert err == (
        "tdx-keyd: error: no volume or secret 'v' in the store\n"
        "tdx-keyd: hint: there are: none\n"
    )


def test_adding_the_same_generation_twice(keyd, store, tmp_path):
    keyd("add", store, bundle_file(tmp_path))
    err = keyd("add", store, bundle_file(tmp_path), code=65)
    assert "volume 'v' generation 1 is in the store" in err
    assert "higher --generation" in err


def test_bundle_with_a_bad_policy_adds_nothing(keyd, store, tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("[tdx]\nmrtdd = []\n")
    err = keyd("add", store, bundle_file(tmp_path), "--policy", bad, code=78)
    assert err == (
        f"tdx-keyd: error: {bad}: tdx.mrtdd: unknown key\n"
        "tdx-keyd: hint: did you mean 'mrtd'\n"
    )
    assert json.loads(keyd("list", store, "--json")) == []


def test_file_that_is_no_bundle(keyd, store, tmp_path):
    junk = tmp_path / "junk"
    junk.write_bytes(b"secret stuff")
    err = keyd("add", store, junk, code=65)
    assert "is this a bundle file of tdx-seal?" in err
    assert "secret stuff" not in err


def test_missing_bundle(keyd, store, tmp_path):
    assert "No such file" in keyd("add", store, tmp_path / "none", code=71)


def test_policy_verbs(keyd, store, tmp_path, policy):
    keyd("add", store, bundle_file(tmp_path))
    assert "has no policy" in keyd("policy", "show", store, "v", code=65)
    assert keyd("policy", "set", store, "v", policy) == "policy of v is now version 1\n"
    assert keyd("policy", "show", store, "v") == policy.read_text()
    assert keyd("policy", "check", policy).startswith(f"{policy}: valid, ")
    assert "no volume or secret 'w'" in keyd(
        "policy", "set", store, "w", policy, code=65
    )


def test_verbs_on_a_directory_that_is_no_store(keyd, tmp_path):
    for argv in (["list"], ["serve"], ["show", "v"]):
        err = keyd(argv[0], tmp_path, *argv[1:], code=78)
        assert "is no key server store" in err


def started(store, *extra, user=None):
    child = subprocess.Popen(
        [*COMMAND, "serve", str(store), *extra],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        user=user,
    )
    line = child.stdout.readline() if child.stdout else ""
    assert line.startswith("ready 127.0.0.1:"), child.stderr and child.stderr.read()
    return child, int(line.rpartition(":")[2])


def ended(child):
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    assert out == ""
    return err


async def test_served_release_denial_and_explanation(keyd, tmp_path, policy):
    with opened_owner(
        tmp_path
    ) as owner:  # its platform and PCCS; the server is a process
        bundle = owner.add("v")
        owner.add("w", platforms=f'["{"ab" * 16}"]')
        child, port = started(owner.directory)
        try:
            from tdxd.core.config import Address

            config = owner.config(Address("127.0.0.1", port))
            got = await owner.fetch("v", "w", config=config)
        finally:
            err = ended(child)
        assert isinstance(got["v"], KeyBundle)
        assert got["v"].secret.matches(bundle.secret)
        assert "keyd.simulated_root_trusted" in err
        assert "key.released" in err
        assert "key.denied" in err
        denials = json.loads(
            keyd("audit", "show", owner.directory, "--denied", "--json")
        )
        assert [one["volume"] for one in denials] == ["w"]
        denial = denials[0]["denial_id"]
        assert denial in str(got["w"])
        table = keyd("explain", owner.directory, denial)
        assert "reason platform\n" in table
        ppid = owner.platform.pki.identity.ppid.hex()
        assert table.startswith("DENIED: the machine is not on the policy's list\n")
        lines = [line.split() for line in table.splitlines()]
        assert ["platform", "FAIL", "ab" * 16, ppid] in lines
        assert table.count("FAIL") == 1
        for name in ("token", "report_data", "quote", "mr_td", "rtmr3", "tcb_status"):
            assert [name, "ok"] in [line[:2] for line in lines]
        audit = keyd("audit", "show", owner.directory)
        assert [line.split()[2] for line in audit.splitlines()[1:]] == [
            "released",
            "denied",
        ]
        as_json = json.loads(keyd("explain", owner.directory, denial, "--json"))
        assert as_json["checks"][0]["name"] == "token"
    err = keyd("explain", owner.directory, "nope", code=65)
    assert "no denial 'nope'" in err


def test_port_in_use(keyd, store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = store / "keyd.toml"
        config.write_text(config.read_text().replace(":0", f":{port}"))
        err = keyd("serve", store, code=71)
    assert f"listen on 127.0.0.1:{port}" in err
    assert "is the port in use?" in err


def test_second_server_on_the_same_port_is_refused(keyd, store):
    child, port = started(store)
    try:
        config = store / "keyd.toml"
        config.write_text(config.read_text().replace(":0", f":{port}"))
        assert "is the port in use?" in keyd("serve", store, code=71)
    finally:
        ended(child)


def test_token_key_is_rotated(keyd, store):
    (before,) = json.loads(keyd("keys", "list", store, "--json"))["token_keys"]
    out = keyd("keys", "rotate-token", store)
    listed = json.loads(keyd("keys", "list", store, "--json"))["token_keys"]
    made = {one["key_id"] for one in listed} - {before["key_id"]}
    assert len(listed) == 2
    assert made.pop() in out


def test_signing_key_is_rotated_in_three_steps(keyd, store):
    err = keyd("keys", "rotate-signing", store, "--use", code=65)
    assert "no next signing key" in err
    old = json.loads(keyd("keys", "list", store, "--json"))["signing_keys"][0]
    out = keyd("keys", "rotate-signing", store, "--publish")
    line = out.splitlines()[-1]
    parse_signing_key(line)
    assert "pin this" in out
    assert old["signing_key"] in keyd("keys", "list", store)
    out = keyd("keys", "rotate-signing", store, "--use")
    assert out.splitlines()[-1] == line
    assert "reload" in out
    roles = {
        one["role"]: one["signing_key"]
        for one in json.loads(keyd("keys", "list", store, "--json"))["signing_keys"]
    }
    assert roles == {"current": line, "previous": old["signing_key"]}
    assert "destroyed" in keyd("keys", "rotate-signing", store, "--retire")
    shown = keyd("keys", "list", store)
    assert line in shown
    assert old["signing_key"] not in shown


def test_rotation_as_json(keyd, store):
    made = json.loads(keyd("keys", "rotate-signing", store, "--publish", "--json"))
    assert made["step"] == "publish"
    parse_signing_key(made["signing_key"])
    assert (
        len(json.loads(keyd("keys", "rotate-token", store, "--json"))["key_id"]) == 16
    )
    keyd("keys", "rotate-signing", store, "--use")
    done = json.loads(keyd("keys", "rotate-signing", store, "--retire", "--json"))
    assert done == {"step": "retire"}


@pytest.mark.parametrize("argv", [[], ["--use", "--retire"]])
def test_signing_rotation_takes_one_step(keyd, store, argv):
    keyd("keys", "rotate-signing", store, *argv, code=64)


@pytest.mark.parametrize("pid", ["0", "1", "-5", "x", "99999999999"])
def test_reload_of_what_is_no_process(keyd, pid):
    assert f"PID {pid}" in keyd("reload", "--", pid, code=64).replace("'", "")


def test_reload_of_a_process_that_is_gone(keyd):
    child = subprocess.Popen(["true"])
    child.wait()
    assert str(child.pid) in keyd("reload", str(child.pid), code=71)


@pytest.mark.root
def test_running_server_cannot_be_dumped(store):
    """The kernel gives a process's files in /proc to root when it is not dumpable (proc(5))."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(store, f"{directory}/store")
        for path in (directory, copy, *(f"{copy}/{one}" for one in os.listdir(copy))):
            os.chown(path, NOBODY, NOBODY)
        child, _ = started(copy, user=NOBODY)
        try:
            assert f"Uid:\t{NOBODY}" in Path(f"/proc/{child.pid}/status").read_text()
            assert Path(f"/proc/{child.pid}/environ").stat().st_uid == 0
        finally:
            ended(child)


def test_help_starts_fast_without_heavy_imports():
    script = (
        "import sys, tdxd.cli.tdx_keyd as m\n"
        "try: m.run_command(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'sqlalchemy', 'dcap_qvl', 'cryptography', 'trio'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0
    assert b"usage: tdx-keyd" in done.stdout


def test_key_encryption_key_is_rotated(keyd, store, tmp_path):
    before = (store / "kek.private").read_bytes()
    out = keyd("rotate-kek", store)
    assert "systemctl reload tdx-keyd" in out
    assert (store / "kek.private").read_bytes() != before
    kept = (store / "kek.private").rename(tmp_path / "kek")
    done = json.loads(keyd("rotate-kek", store, "--kek", kept, "--json"))
    public = (store / "kek.public").read_bytes()
    assert done == {
        "kek_sha256": hashlib.sha256(public).hexdigest(),
        "finished": False,
        "scrubbed": True,
    }
    keyd("audit", "verify", store, "--kek", kept)
    rows = json.loads(keyd("audit", "show", store, "--json"))
    assert [row["decision"] for row in rows] == ["kek-rotated"] * 2
    assert "kek.private is missing" in keyd("rotate-kek", store, code=78)
