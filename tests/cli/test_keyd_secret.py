"""tdx-keyd secret, as a person types it: contents from files and from standard input."""

from __future__ import annotations

import ctypes
import io
import json
import sys

import pytest

from tdxd.core.named_secret import NamedSecret
from tdxd.owner.store.kek import unwrap
from tdxd.owner.store.store import Store
from tests.certificates import self_signed
from tests.cli.test_tdx_keyd import bundle_file, keyd, policy, store

__all__ = ["keyd", "policy", "store"]

PR_SET_DUMPABLE = 4


@pytest.fixture
def secret(keyd, store, capfd, monkeypatch):
    """Run a verb of `secret`; return its exit code, standard output and standard error."""
    from tdxd.cli.tdx_keyd import main

    def run(verb, *argv, stdin=b""):
        words = ["secret", verb, str(store), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", ["tdx-keyd", *words])
        reader = io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", reader)
        capfd.readouterr()
        code = main()
        return code, *capfd.readouterr()

    yield run
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


@pytest.fixture
def pem(tmp_path):
    """A private file with a key and its certificate."""
    path = tmp_path / "server.pem"
    path.touch(0o600)
    path.write_bytes(self_signed("model.example.com")[0])
    return path


def held(store, name, generation):
    """What a key server would release."""
    with Store.open(store) as opened:
        rows = {row.generation: row for row in opened.generations(name)}
        wrapped = rows[generation].wrapped
        bundle = unwrap(opened.kek(), wrapped, name, generation)
    assert isinstance(bundle, NamedSecret)
    return bundle


def test_a_certificate_and_its_next_generation(secret, store, pem, policy):
    said = "certificate of CN=model.example.com, valid to 9999-12-31\n"
    argv = ("web", "--tls-pem", pem, "--policy", policy)
    assert secret("put", *argv) == (0, f"put web generation 1: {said}", "")
    before = pem.read_bytes()
    pem.write_bytes(self_signed("model.example.com")[0])
    again = secret("put", "web", "--tls-pem", pem)
    assert again == (0, f"put web generation 2: {said}", "")
    assert held(store, "web", 1).secret.reveal() == before
    assert held(store, "web", 2).secret.reveal() == pem.read_bytes()
    assert held(store, "web", 2).manifest.content == "tls-pem"
    code, out, err = secret("list")
    assert (code, err) == (0, "")
    titles, line = out.splitlines()
    assert titles.split() == [
        "ID",
        "CONTENT",
        "GENERATIONS",
        "POLICY",
        "VERSION",
        "ADDED",
    ]
    assert line.split()[:5] == ["web", "tls-pem", "1", "2", "1"]
    assert secret("remove", "web", "--generation", "1") == (
        0,
        "removed web: 1 generation(s)\n",
        "",
    )
    (shown,) = json.loads(secret("list", "--json")[1])
    assert (shown["id"], shown["generations"]) == ("web", [2])
    code, out, _ = secret("remove", "web", "--json")
    assert json.loads(out) == {"id": "web", "generations_removed": 1}
    assert json.loads(secret("list", "--json")[1]) == []


def test_standard_input_and_the_policy_of_a_volume(
    secret, store, keyd, tmp_path, policy
):
    keyd("add", store, bundle_file(tmp_path), "--policy", policy)
    code, out, err = secret(
        "put", "words", "--file", "-", "--like", "v", "--json", stdin=b"open\0sesame"
    )
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "id": "words",
        "generation": 1,
        "content": "file",
        "policy_version": 1,
    }
    assert held(store, "words", 1).secret.reveal() == b"open\0sesame"
    assert keyd("policy", "show", store, "words") == policy.read_text()
    listed = [line.split()[:2] for line in keyd("list", store).splitlines()[1:]]
    assert listed == [["v", "sealed"], ["words", "secret"]]
    assert keyd("show", store, "words").startswith("words: secret, policy version 1\n")
    assert [one["id"] for one in json.loads(secret("list", "--json")[1])] == ["words"]
    # The verbs of policies and removal are those of volumes.
    keyd("policy", "set", store, "words", policy)
    assert "the file means the same" in keyd("policy", "diff", store, "words", policy)
    assert keyd("remove", store, "words") == "removed words: 1 generation(s)\n"


def test_without_a_policy_it_says_so(secret):
    code, out, err = secret("put", "words", "--file", "-", stdin=b"x")
    assert (code, out) == (0, "put words generation 1: 1 bytes\n")
    assert err == (
        "warning: words has no policy, so nobody gets it: tdx-keyd policy set\n"
    )


def test_a_policy_of_what_had_the_id_before_is_told(
    secret, store, keyd, tmp_path, policy
):
    """The policy of something that was removed stands: it may be looser than one thinks."""
    keyd("add", store, bundle_file(tmp_path), "--policy", policy)
    keyd("remove", store, "v")
    code, out, err = secret("put", "v", "--file", "-", stdin=b"x")
    assert (code, out) == (0, "put v generation 2: 1 bytes\n")
    assert "v was removed before, and its policy of then (version 1) stands" in err
    assert secret("put", "v", "--file", "-", stdin=b"y")[2] == ""
    keyd("remove", store, "v")
    argv = ("put", "v", "--file", "-", "--policy", policy)
    assert secret(*argv, stdin=b"z")[2] == ""


def test_a_policy_that_releases_another_generation_is_told(
    secret, store, keyd, tmp_path, policy
):
    listing = tmp_path / "listing.toml"
    listing.write_text(policy.read_text() + "\n[release]\ngenerations = [2]\n")
    keyd("add", store, bundle_file(tmp_path), "--policy", listing)
    argv = ("put", "words", "--file", "-")
    err = secret(*argv, "--like", "v", stdin=b"x")[2]
    assert "policy of words lists generations, and releases none" in err
    assert secret(*argv, stdin=b"y")[2] == ""
    assert "releases generation 2" in secret(*argv, stdin=b"z")[2]


def test_others_may_read_the_file(secret, pem, policy):
    pem.chmod(0o644)
    _, _, err = secret("put", "web", "--tls-pem", pem, "--policy", policy)
    assert err == f"warning: {pem} has mode 0644, so others may read it\n"
    public = pem.with_name("ca.pem")
    public.write_bytes(self_signed("x")[1])
    code, _, err = secret("put", "ca", "--client-ca", public, "--policy", policy)
    assert code == 65
    assert "readers" not in err
    assert "is not that of a CA" in err


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (("a", "--file", "-", "--tls-pem", "-"), 64, "not allowed with argument"),
        (("a",), 64, "one of the arguments --tls-pem --client-ca --file is required"),
        (("a", "--file", "-", "--like", "v", "--policy", "p"), 64, "not allowed with"),
        (("A", "--file", "-"), 64, "volume id 'A' is not"),
        (("a", "--file", "-", "--like", "v"), 65, "no volume or secret 'v'"),
        (("a", "--tls-pem", "-"), 65, "standard input: not PEM, or damaged"),
        (("a", "--tls-pem", "/nowhere"), 71, "read /nowhere"),
    ],
)
def test_what_is_refused_says_so_and_stores_nothing(secret, argv, code, text):
    got, out, err = secret("put", *argv, stdin=b"open sesame")
    assert (got, out) == (code, "")
    assert text in err
    assert "sesame" not in err
    assert json.loads(secret("list", "--json")[1]) == []


def test_too_much_is_refused(secret, tmp_path):
    large = tmp_path / "large"
    large.touch(0o600)
    large.write_bytes(bytes(65537))
    assert "65537 bytes, not 1 to 65536" in secret("put", "a", "--file", large)[2]
    endless = secret("put", "a", "--file", "-", stdin=bytes(10**6))
    assert endless[0] == 65
    assert "not 1 to 65536" in endless[2]


def test_a_volume_is_no_secret(secret, store, keyd, tmp_path):
    keyd("add", store, bundle_file(tmp_path))
    code, _, err = secret("remove", "v")
    assert code == 65
    assert "'v' is a volume, no secret" in err
    assert "tdx-keyd remove" in err
    assert secret("put", "v", "--file", "-", stdin=b"x")[0] == 65


def test_no_key_in_an_error(secret, pem):
    """What is wrong is said of the place, never by what stands there."""
    text = pem.read_text()
    first, _, rest = text.partition("-----END PRIVATE KEY-----")
    lines = first.splitlines()
    lines[2] = lines[2][::-1]
    pem.write_text("\n".join(lines) + "\n-----END PRIVATE KEY-----" + rest)
    code, _, err = secret("put", "web", "--tls-pem", pem)
    assert code == 65
    assert lines[1] not in err
    assert lines[2] not in err
