"""What tdx-keyd policy from-image refuses, and that what it leaves open is no policy."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.cli.test_keyd_from_image import FIRMWARE, disk, from_image, keyd
from tests.cli.test_tdx_keyd import bundle_file
from tests.measured_parts import ESP, make_gpt, make_pe

__all__ = ["disk", "from_image", "keyd"]


def test_a_fragment_is_no_policy_to_any_verb(keyd, from_image, disk, tmp_path):
    """Also where everything but RTMR0 and the platform was computed."""
    firmware = tmp_path / "OVMF.fd"
    firmware.write_bytes(FIRMWARE)
    store, made = tmp_path / "store", tmp_path / "fragment.toml"
    keyd("init", store, "--name", "localhost")
    bundle = bundle_file(tmp_path)
    for more in ((), ("--firmware", firmware), ("--machine", "alibaba")):
        made.write_text(from_image(disk, *more)[0])
        for verb in (
            ("policy", "check", made),
            ("add", store, bundle, "--policy", made),
        ):
            _, err = keyd(*verb, code=78)
            assert "missing" in err, err
        filled = made.read_text().replace('# rtmr0 = ""', 'rtmr0 = ""')
        made.write_text(filled.replace('# mrtd = [""]', 'mrtd = [""]'))
        keyd("add", store, bundle, "--policy", made, code=78)
    assert json.loads(keyd("list", store, "--json")[0]) == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--machine", "ibm"), "machine 'ibm' is not known"),
        (("--name", "a b"), "--name: name 'a b'"),
        (("--event-log", "x"), "belong to --enrolled"),
        (("--base", "x"), "belong to --enrolled"),
        (("--compare", "x", "--output", "y"), "--compare writes no policy"),
        (("--enrolled", "x", "--json"), "takes no --enrolled"),
    ],
)
def test_options_that_do_not_belong_together(from_image, disk, more, text):
    assert text in from_image(disk, *more, code=64)[1]


def test_images_that_are_none(from_image, tmp_path):
    path = tmp_path / "image"
    for data, text in (
        (b"", "is cut short"),
        (bytes(4096), "no GUID partition table"),
        (make_gpt([]), "no EFI system partition"),
        (make_gpt([(ESP, 2048, 4095)]), "no FAT file system"),
        (make_gpt([(ESP, 1 << 62, 1 << 63)]), "ends at sector"),
        (make_gpt([(ESP, 1 << 49, (1 << 50) - 1)]), "no FAT file system"),
        (make_pe({".text": b"x"}), "no unified kernel image"),
        (b"{", "not valid JSON"),
        (b"{}", "names no disk and no UKI"),
        (b'{"disk": {"file": "%s"}}' % (b"x" * 300), "names no disk and no UKI"),
        (b'{"disk": {"file": "a\\u0000b"}}', "names no disk and no UKI"),
        (b'{"disk": {"file": "../image"}}', "names no disk and no UKI"),
        (b'{"disk": {"file": "image"}}', "SHA-256"),
    ):
        path.write_bytes(data)
        assert text in from_image(path, code=65)[1]
    path.write_bytes(b'{"disk": {"file": "."}}')
    assert "read" in from_image(path, code=71)[1]
    assert "nowhere" in from_image(tmp_path / "nowhere", code=71)[1]


def test_facts_of_facts_and_of_another_build(from_image, tmp_path):
    inner, facts = tmp_path / "inner.json", tmp_path / "facts.json"
    inner.write_text("{}")
    told = {"disk": {"file": "inner.json", "sha256": hashlib.sha256(b"{}").hexdigest()}}
    facts.write_text(json.dumps(told))
    assert "neither a UKI nor a disk" in from_image(facts, code=65)[1]
    inner.write_text("{ }")
    assert "different builds" in from_image(facts, code=65)[1]
