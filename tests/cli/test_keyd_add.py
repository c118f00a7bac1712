"""tdx-keyd add of foreign volumes, as a person types it: every source, every word."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdxd.core.foreign import PassphraseBundle
from tdxd.owner.foreign.image import read_foreign
from tdxd.owner.store.kek import unwrap
from tdxd.owner.store.store import Store
from tests.cli.test_tdx_keyd import bundle_file, keyd, policy, store
from tests.luks2_genuine import PASSPHRASE, make_image

__all__ = ["keyd", "policy", "store"]

PR_SET_DUMPABLE = 4
ROOT = Path(__file__).parents[2]
NOT_PINNED = (
    "warning: {0}: the header is not pinned: any LUKS2 header that this passphrase opens will do; "
    "--image IMAGE pins it\n"
)
SHORT = (
    "warning: {0}: the passphrase has fewer than 20 bytes: the host has the image, and may guess "
    "at it for ever\n"
)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("foreign") / "vol.img")


@pytest.fixture
def add(keyd, store, capfd, monkeypatch):
    """Run `add`; return its exit code, standard output and standard error."""
    from tdxd.cli.tdx_keyd import main

    def run(*argv):
        monkeypatch.setattr(
            sys, "argv", ["tdx-keyd", "add", str(store), *map(str, argv)]
        )
        capfd.readouterr()
        code = main()
        return code, *capfd.readouterr()

    yield run
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


@pytest.fixture
def file(tmp_path):
    """A private file with the passphrase."""
    path = tmp_path / "passphrase"
    path.touch(0o600)
    path.write_bytes(PASSPHRASE)
    return path


@contextlib.contextmanager
def descriptor(data):
    reader, writer = os.pipe()
    try:
        os.write(writer, data)
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


def held(store, volume_id, generation=1):
    """What a key server would release."""
    with Store.open(store) as opened:
        (row,) = [
            one for one in opened.generations(volume_id) if one.generation == generation
        ]
        bundle = unwrap(opened.kek(), row.wrapped, volume_id, generation)
    assert isinstance(bundle, PassphraseBundle)
    assert row.manifest == bundle.manifest.encode()
    return bundle


def test_passphrase_from_a_file_with_the_header_pinned(add, store, file, image, keyd):
    argv = ("--luks2", "vol", "--passphrase-file", file, "--image", image)
    assert add(*argv) == (0, "added vol generation 1\n", "")
    bundle = held(store, "vol")
    pin = read_foreign(image).header_sha256
    assert bundle.secret.reveal() == PASSPHRASE
    assert bundle.manifest.header_sha256 == pin
    assert keyd("list", store) == (
        "ID   KIND   GENERATIONS  POLICY VERSION\nvol  luks2  1            -\n"
    )
    shown = keyd("show", store, "vol")
    assert shown.startswith("vol: luks2, policy version none\n")
    assert shown.splitlines()[-1].endswith(f"  {pin.hex()}")
    as_json = json.loads(keyd("show", store, "vol", "--json"))
    assert as_json["kind"] == "luks2"
    assert as_json["generations"][0]["header"] == pin.hex()


def test_passphrase_from_a_descriptor(add, store, keyd):
    with descriptor(PASSPHRASE) as fd:
        made = add("--luks2", "vol", "--generation", "7", "--passphrase-fd", fd)
    assert made == (0, "added vol generation 7\n", NOT_PINNED.format("vol"))
    bundle = held(store, "vol", 7)
    assert bundle.secret.reveal() == PASSPHRASE
    assert bundle.manifest.header_sha256 == b""
    assert keyd("show", store, "vol").splitlines()[-1].endswith("  any")


def test_policy_and_json(add, store, file, policy, keyd):
    argv = ("--luks2", "vol", "--passphrase-file", file, "--policy", policy, "--json")
    code, out, _ = add(*argv)
    made = json.loads(out)
    assert code == 0
    assert (made["id"], made["generation"], made["kind"]) == ("vol", 1, "luks2")
    assert made["header"] == "any"
    assert made["manifest_sha256"] == held(store, "vol").manifest.digest().hex()
    assert keyd("policy", "show", store, "vol") == policy.read_text()


def test_a_newline_counts_and_is_told(add, store, file):
    file.write_bytes(PASSPHRASE + b"\n")
    code, _, err = add("--luks2", "vol", "--passphrase-file", file)
    assert code == 0
    assert "the passphrase ends in a newline, which counts" in err
    assert held(store, "vol").secret.reveal() == PASSPHRASE + b"\n"


def test_wrong_passphrase_adds_nothing(add, store, file, image, keyd):
    file.write_bytes(PASSPHRASE + b"\n")
    argv = ("--luks2", "vol", "--passphrase-file", file, "--image", image)
    code, out, err = add(*argv)
    assert (code, out) == (65, "")
    assert f"{image}: the passphrase opens none of 1 keyslot\n" in err
    assert "without a newline at its end?" in err
    assert json.loads(keyd("list", store, "--json")) == []


def test_image_that_a_guest_would_refuse_adds_nothing(add, store, file, tmp_path, keyd):
    other = tmp_path / "other.img"
    other.write_bytes(bytes(100_000))
    code, _, err = add("--luks2", "vol", "--passphrase-file", file, "--image", other)
    assert code == 65
    assert f"{other}: not a LUKS2 image" in err
    assert json.loads(keyd("list", store, "--json")) == []


@pytest.mark.parametrize("data", [b"", b"x" * 513])
def test_what_is_no_passphrase(add, store, file, data):
    file.write_bytes(data)
    code, out, err = add("--luks2", "vol", "--passphrase-file", file)
    assert (code, out) == (64, "")
    assert "the passphrase is " in err
    assert "xxx" not in err


def test_others_may_read_the_file(add, file):
    file.chmod(0o644)
    _, _, err = add("--luks2", "vol", "--passphrase-file", file)
    assert f"warning: {file} has mode 0644, so others may read it\n" in err


# --- the terminal ---------------------------------------------------------------


@contextlib.contextmanager
def on_terminal(*argv):
    """Start tdx-keyd on a terminal of its own; yields the process and the terminal's other end."""
    main, side = pty.openpty()
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", TERMINAL, *map(str, argv)],
            stdin=side,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            start_new_session=True,
        )
        os.close(side)
        try:
            yield child, main
        finally:
            child.kill()
            child.communicate()
    finally:
        os.close(main)


TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tdxd.cli.tdx_keyd import main
sys.exit(main())
"""


def answer(fd, prompt, typed):
    """Wait for a prompt, type a line; return all that the terminal showed."""
    seen, end = b"", time.monotonic() + 30
    while prompt not in seen:
        assert time.monotonic() < end, seen
        if select.select([fd], [], [], 1)[0]:
            seen += os.read(fd, 4096)
    os.write(fd, typed + b"\n")
    return seen


def test_asked_on_the_terminal_once_where_the_image_proves_it(store, image):
    argv = ("add", store, "--luks2", "vol", "--image", image)
    with on_terminal(*argv) as (child, fd):
        seen = answer(fd, b"Passphrase of vol: ", PASSPHRASE)
        out, err = child.communicate(timeout=60)
        seen += os.read(fd, 4096)
    assert (child.returncode, out, err) == (0, "added vol generation 1\n", "")
    assert PASSPHRASE not in seen
    assert held(store, "vol").secret.reveal() == PASSPHRASE


@pytest.mark.parametrize("again", [PASSPHRASE, b"another"])
def test_asked_twice_where_nothing_proves_it(store, again):
    with on_terminal("add", store, "--luks2", "vol") as (child, fd):
        answer(fd, b"Passphrase of vol: ", PASSPHRASE)
        answer(fd, b"Passphrase of vol, again: ", again)
        _, err = child.communicate(timeout=60)
    if again == PASSPHRASE:
        assert (child.returncode, err) == (0, NOT_PINNED.format("vol"))
        assert held(store, "vol").secret.reveal() == PASSPHRASE
    else:
        assert child.returncode == 65
        assert "the two passphrases differ" in err


def test_no_terminal(store):
    """A daemon has none: nothing is read from standard input instead."""
    done = subprocess.run(
        [sys.executable, "-m", "tdxd.cli.tdx_keyd", "add", store, "--luks2", "vol"],
        cwd=ROOT,
        input="typed\n",
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == (
        "tdx-keyd: error: no terminal to ask for a passphrase on\n"
        "tdx-keyd: hint: use --passphrase-fd or --passphrase-file\n"
    )


# --- the reference's key service --------------------------------------------------


@pytest.fixture
def secrets(tmp_path):
    path = tmp_path / "secret.json"
    path.touch(0o600)
    path.write_text(json.dumps({"app1": "2333", "luksKey": PASSPHRASE.decode()}))
    return path


def test_secret_json_as_a_whole(add, store, secrets, policy, keyd):
    secrets.write_text(json.dumps({"a": PASSPHRASE.decode(), "b": "2333"}))
    code, out, err = add("--from-secret-json", secrets, "--policy", policy)
    assert code == 0
    assert out == "added a generation 1\nadded b generation 1\n"
    assert err == "".join(
        (NOT_PINNED.format("a"), NOT_PINNED.format("b"), SHORT.format("b"))
    )
    assert held(store, "a").secret.reveal() == PASSPHRASE
    assert held(store, "b").secret.reveal() == b"2333"
    assert [
        one["policy_version"] for one in json.loads(keyd("list", store, "--json"))
    ] == [
        1,
        1,
    ]


def test_one_of_secret_json_with_its_image(add, store, secrets, image):
    argv = ("--from-secret-json", secrets, "--id", "luksKey=vol", "--image", image)
    code, out, err = add(*argv, "--json")
    (made,) = json.loads(out)
    assert (code, err, made["id"], made["kind"]) == (0, "", "vol", "luks2")
    assert made["header"] == read_foreign(image).header_sha256.hex()
    assert held(store, "vol").secret.reveal() == PASSPHRASE


def test_names_that_no_volume_can_have(add, store, secrets, keyd):
    code, out, err = add("--from-secret-json", secrets)
    assert (code, out) == (64, "")
    assert "volume id 'luksKey' is not 1 to 64 of a-z 0-9 . _ -" in err
    assert "hint: name the volume: --id 'luksKey=ID'" in err
    assert json.loads(keyd("list", store, "--json")) == []


def test_value_that_the_reference_shortens(add, secrets):
    secrets.write_text(json.dumps({"a": "what: is the rest of it for"}))
    _, _, err = add("--from-secret-json", secrets)
    assert "warning: a: the reference's mount script shortens such a value" in err
    assert "rest" not in err


def test_file_that_is_no_secret_json(add, secrets):
    secrets.write_text('{"a": "wilbur-and-orville",}')
    code, out, err = add("--from-secret-json", secrets)
    assert (code, out) == (65, "")
    assert f"{secrets}: not JSON: line 1 column " in err
    assert "wilbur" not in err


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ((), "name one of BUNDLE"),
        (("BUNDLE", "--luks2", "v"), "name one of BUNDLE"),
        (("--luks2", "v", "--from-secret-json", "FILE"), "name one of BUNDLE"),
        (("BUNDLE", "--passphrase-fd", "0"), "a passphrase is for --luks2"),
        (
            ("--from-secret-json", "FILE", "--passphrase-file", "FILE"),
            "a passphrase is for --luks2",
        ),
        (("BUNDLE", "--id", "x"), "--id is for --from-secret-json"),
        (("--luks2", "v", "--id", "x"), "--id is for --from-secret-json"),
        (("BUNDLE", "--generation", "2"), "a bundle has its generation"),
        (("BUNDLE", "--image", "FILE"), "a bundle has its generation"),
        (("--luks2", "V"), "volume id 'V'"),
        (
            ("--luks2", "v", "--passphrase-fd", "0", "--passphrase-file", "FILE"),
            "not allowed with",
        ),
        (
            ("--luks2", "v", "--passphrase-file", "FILE", "--generation", "0"),
            "v: generation 0 is not between 1 and",
        ),
        (("--luks2", "v", "--passphrase-fd", "-1"), "descriptor -1: "),
        (("--luks2", "v", "--passphrase-fd", "999"), "descriptor 999: "),
        (
            (
                *("--from-secret-json", "FILE", "--image", "FILE"),
                *("--id", "app1", "--id", "luksKey=v"),
            ),
            "--image is for one passphrase, ",
        ),
    ],
    ids=range(15),
)
def test_usage_errors(add, store, secrets, tmp_path, keyd, argv, problem):
    names = {"BUNDLE": bundle_file(tmp_path), "FILE": secrets}
    code, out, err = add(*[names.get(one, one) for one in argv])
    assert (code, out) == (64, "")
    assert problem in err
    assert json.loads(keyd("list", store, "--json")) == []


def test_a_sealed_image_is_added_as_ever(add, tmp_path):
    made = add(bundle_file(tmp_path), "--json")
    assert made[0] == 0
    assert made[2] == ""
    assert json.loads(made[1])["kind"] == "sealed"
    assert json.loads(made[1])["header"] == ""
