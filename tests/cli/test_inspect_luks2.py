"""tdx-seal inspect of LUKS2 images that others made: it says what a guest's strict reader says."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import pytest

from tdxd.cli.tdx_seal import main
from tests.attacks.luks2_images import IMAGES
from tests.luks2_genuine import ARGON2ID, PASSPHRASE, cryptsetup, make_image
from tests.owner.sealing import make, model_directory

HOSTILE = ("02", "05", "13", "16", "30")
"""A null cipher, dm-linear, two copies that differ, a key twice, LUKS1."""


@pytest.fixture
def inspect(capfd, monkeypatch):
    def run(path, code=0):
        monkeypatch.setattr(sys, "argv", ["tdx-seal", "inspect", str(path), "--json"])
        capfd.readouterr()
        assert main() == code
        out, err = capfd.readouterr()
        return err if code else json.loads(out)

    return run


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return make_image(tmp_path_factory.mktemp("inspect") / "vol.img")


def test_what_a_guest_would_take(inspect, image):
    told = inspect(image)
    data = image.read_bytes()
    uuid = subprocess.run(
        ["cryptsetup", "luksUUID", image], capture_output=True, text=True, check=True
    )
    assert told == {
        "kind": "LUKS2 image",
        "uuid": uuid.stdout.strip(),
        "cipher": "aes-xts-plain64",
        "sector_bytes": 4096,
        "payload_offset_bytes": 2**20,
        "payload_bytes": len(data) - 2**20,
        "size_bytes": len(data),
        "keyslots": ["pbkdf2 1000 iterations"],
        "header_sha256": hashlib.sha256(data[: 2**20]).hexdigest(),
    }


def test_argon2id_and_several_keyslots(inspect, tmp_path):
    path = make_image(tmp_path / "a.img", kdf=ARGON2ID, payload=bytes(4096))
    (tmp_path / "more").write_bytes(b"another passphrase")
    cryptsetup(
        *("luksAddKey", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
        *(path, tmp_path / "more"),
        passphrase=PASSPHRASE,
    )
    assert inspect(path)["keyslots"] == [
        "argon2id 4 passes, 64 KiB, 1 lanes",
        "pbkdf2 1000 iterations",
    ]


@pytest.mark.parametrize("number", HOSTILE)
def test_what_a_guest_would_refuse(inspect, image, tmp_path, number):
    name = next(name for name in IMAGES if name.startswith(number))
    copy = shutil.copy(image, tmp_path / "vol.img")
    path = IMAGES[name](tmp_path / "vol.img", PASSPHRASE)
    assert copy != path
    err = inspect(path, code=65)
    assert f"tdx-seal: error: {path}: " in err
    if number == "30":
        assert "cryptsetup convert --type luks2 IMAGE" in err


def test_a_sealed_image_whose_record_is_elsewhere(inspect, tmp_path):
    made = make(model_directory(tmp_path / "model"), tmp_path / "out")
    record = tmp_path / "out/m.img.json"
    assert inspect(tmp_path / "out/m.img")["kind"] == "sealed image"
    record.unlink()
    told = inspect(tmp_path / "out/m.img")
    assert (told["kind"], told["recovery_keyslot"]) == ("LUKS2 image", False)
    assert told["size_bytes"] == made.bundle.manifest.image_bytes
