"""tdx-seal rekey: another secret and generation, the same file system."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tdxd.core import luks2
from tdxd.core.secret import Secret
from tdxd.errors import DataError, IntegrityError, UsageError
from tdxd.owner.sealing import check, extract
from tdxd.owner.sealing.image import Sealed
from tdxd.owner.sealing.rekey import RekeyRequest, rekey_image
from tests import reference_image
from tests.owner.sealing import file_system, make, model_directory, quiet, tree_of

NEW_SECRET = bytes(range(64, 128))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "model")


def rekey(tmp_path: Path, old: Sealed, **more: object) -> Sealed:
    out = tmp_path / "new"
    out.mkdir(exist_ok=True)
    fields: dict[str, object] = {
        "old_image": tmp_path / "out/m.img",
        "old_bundle": old.bundle,
        "volume_id": "m",
        "generation": 4,
        "image": out / "m.img",
        "bundle": out / "m.bundle",
        "secret": Secret(NEW_SECRET),
        **more,
    }
    return rekey_image(RekeyRequest(**fields), quiet)  # type: ignore[arg-type]


def test_the_file_system_stays_byte_for_byte(model, tmp_path):
    old = make(model, tmp_path / "out")
    before = (tmp_path / "out/m.img").read_bytes()
    new = rekey(tmp_path, old)
    image = tmp_path / "new/m.img"
    assert (tmp_path / "out/m.img").read_bytes() == before
    was = file_system(tmp_path / "out/m.img", old.bundle)
    assert file_system(image, new.bundle) == was
    check.check_payload(image, new.bundle, quiet)
    check.check_record(image, new.record, quiet)
    assert new.bundle.manifest.generation == 4
    extract.extract(image, new.bundle, tmp_path / "back", quiet)
    assert tree_of(tmp_path / "back") == tree_of(model)


def test_nothing_of_the_old_image_is_in_the_new(model, tmp_path):
    old = make(model, tmp_path / "out")
    new = rekey(tmp_path, old)
    start = luks2.PAYLOAD_OFFSET_BYTES
    before = (tmp_path / "out/m.img").read_bytes()[start:]
    after = (tmp_path / "new/m.img").read_bytes()[start:]
    for at in range(0, len(before), 4096):
        assert before[at : at + 4096] != after[at : at + 4096]
    one, two = old.bundle.manifest, new.bundle.manifest
    assert (one.salt, one.root_hash) != (two.salt, two.root_hash)
    assert one.salt != two.salt


def test_neither_bundle_opens_the_other_image(model, tmp_path):
    old = make(model, tmp_path / "out")
    new = rekey(tmp_path, old)
    for image, bundle in (("new", old.bundle), ("out", new.bundle)):
        with pytest.raises(IntegrityError, match="does not open with the key"):
            check.check_payload(tmp_path / image / "m.img", bundle, quiet)


def test_the_tree_is_what_veritysetup_makes_of_it(model, tmp_path):
    new = rekey(tmp_path, make(model, tmp_path / "out"))
    manifest = new.bundle.manifest
    data = file_system(tmp_path / "new/m.img", new.bundle)
    assert reference_image.hash_tree(data, manifest.salt)[1] == manifest.root_hash


@pytest.mark.parametrize("generation", [1, 3])
def test_the_generation_counts_up(model, tmp_path, generation):
    old = make(model, tmp_path / "out")
    with pytest.raises(UsageError, match=f"generation {generation} is not above 3"):
        rekey(tmp_path, old, generation=generation)


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a_damaged_image_gives_nothing(model, tmp_path, place):
    old = make(model, tmp_path / "out")
    image = tmp_path / "out/m.img"
    data = bytearray(image.read_bytes())
    data[place if place < 0 else luks2.PAYLOAD_OFFSET_BYTES + place] ^= 1
    image.write_bytes(data)
    with pytest.raises(IntegrityError):
        rekey(tmp_path, old)
    assert list((tmp_path / "new").iterdir()) == []


def test_existing_files_are_kept_without_force(model, tmp_path):
    old = make(model, tmp_path / "out")
    rekey(tmp_path, old)
    with pytest.raises(DataError, match="exists already"):
        rekey(tmp_path, old)
    rekey(tmp_path, old, force=True)


def test_a_recovery_keyslot_only_when_asked_for(model, tmp_path):
    old = make(model, tmp_path / "out", recovery=tmp_path / "old-words")
    rekey(tmp_path, old)
    argv = ["cryptsetup", "open", "--test-passphrase", str(tmp_path / "new/m.img")]
    words = (tmp_path / "old-words").read_bytes().rstrip()
    refused = subprocess.run(argv, input=words, capture_output=True, check=False)
    assert refused.returncode != 0
    rekey(tmp_path, old, force=True, recovery=tmp_path / "words")
    words = (tmp_path / "words").read_bytes().rstrip()
    assert len(words.replace(b"-", b"")) * 5 >= 128
    subprocess.run(argv, input=words, capture_output=True, check=True)
    assert os.stat(tmp_path / "words").st_mode & 0o777 == 0o600


def test_an_image_of_one_block(tmp_path):
    (tmp_path / "model/models").mkdir(parents=True)
    (tmp_path / "model/models/tiny").write_bytes(b"tiny")
    data = reference_image.file_system(tmp_path / "model", tmp_path / "fs")
    made = reference_image.seal(data, tmp_path / "m.img")
    old = Sealed(bundle=made.bundle, record=None)  # type: ignore[arg-type]
    new = rekey(tmp_path, old, old_image=made.path)
    assert new.bundle.manifest.hash_blocks == 0
    assert file_system(tmp_path / "new/m.img", new.bundle) == data
