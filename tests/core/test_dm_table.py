"""The tables are what the kernel's documentation asks for, from the manifest alone."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import dm_table
from tdxd.core.bundle import Manifest
from tdxd.core.foreign import ForeignManifest

MANIFEST = Manifest(
    volume_id="resnet",
    generation=3,
    payload_offset_bytes=16 * 2**20,
    data_blocks=300,
    hash_blocks=4,
    root_hash=bytes(range(32)),
    salt=bytes(range(32, 64)),
)


def test_crypt_maps_the_payload_behind_the_header_of_a_block_device():
    table = dm_table.crypt_table(MANIFEST, device="254:16", offset_bytes=16 * 2**20)
    assert (table.target, table.sectors) == ("crypt", 304 * 8)
    assert table.parameters == (
        "aes-xts-plain64 :64:logon:tdxd:resnet:3 0 254:16 32768 1 sector_size:4096"
    )


def test_crypt_maps_a_loop_device_from_its_start():
    table = dm_table.crypt_table(MANIFEST, device="7:0", offset_bytes=0)
    assert " 7:0 0 1 sector_size:4096" in table.parameters


def test_verity_covers_the_data_and_finds_the_tree_behind_it():
    table = dm_table.verity_table(MANIFEST, device="253:0")
    assert (table.target, table.sectors) == ("verity", 300 * 8)
    root, salt = bytes(range(32)).hex(), bytes(range(32, 64)).hex()
    assert table.parameters == (f"1 253:0 253:0 4096 4096 300 300 sha256 {root} {salt}")


def test_verity_neither_ignores_corruption_nor_checks_only_once():
    parameters = dm_table.verity_table(MANIFEST, device="253:0").parameters
    assert len(parameters.split()) == 10  # no optional argument


def test_no_table_holds_the_key():
    table = dm_table.crypt_table(MANIFEST, device="7:0", offset_bytes=0)
    assert table.parameters.split()[1] == ":64:logon:tdxd:resnet:3"


def test_the_uuid_names_volume_manifest_and_layer():
    digest = hashlib.sha256(MANIFEST.encode()).hexdigest()[:32]
    assert dm_table.device_uuid(MANIFEST, "crypt") == f"TDXD-resnet-{digest}-crypt"
    other = dataclasses.replace(MANIFEST, salt=bytes(32))
    assert dm_table.device_uuid(other, "crypt") != f"TDXD-resnet-{digest}-crypt"


@given(st.from_regex(r"[a-z0-9._-]{1,64}", fullmatch=True), st.integers(1, 2**63 - 1))
def test_uuid_and_name_fit_the_kernel(volume_id, generation):
    try:
        made = dataclasses.replace(MANIFEST, volume_id=volume_id, generation=generation)
    except ValueError:
        return  # not every such text is an id
    for layer in ("crypt", "verity"):
        assert len(dm_table.device_uuid(made, layer)) < 129
        assert len(dm_table.device_name(made, layer)) < 128


@pytest.mark.parametrize(
    ("status", "intact"), [("V", True), ("C", False), ("V 0", True), ("C -", False)]
)
def test_verity_status(status, intact):
    assert dm_table.verity_is_intact(status) is intact


FOREIGN = ForeignManifest(volume_id="old", generation=2)


def foreign(**changes: int) -> dm_table.Table:
    numbers = {
        "offset_bytes": 2**24,
        "payload_bytes": 12288,
        "sector_bytes": 4096,
    }
    return dm_table.foreign_table(FOREIGN, device="7:3", **(numbers | changes))


def test_a_foreign_payload_has_a_table_of_its_own_numbers():
    table = foreign()
    assert (table.target, table.sectors) == ("crypt", 24)
    assert table.parameters == (
        "aes-xts-plain64 :64:logon:tdxd:old:2 0 7:3 32768 1 sector_size:4096"
    )


def test_sectors_of_512_bytes_go_without_saying():
    table = foreign(sector_bytes=512, payload_bytes=1536)
    assert table.sectors == 3
    assert table.parameters == "aes-xts-plain64 :64:logon:tdxd:old:2 0 7:3 32768"


@pytest.mark.parametrize(
    "changes",
    [
        {"sector_bytes": 1024},
        {"sector_bytes": 8192, "payload_bytes": 8192},
        {"offset_bytes": 512},
        {"payload_bytes": 4608},
        {"payload_bytes": 0},
        {"payload_bytes": -4096},
    ],
)
def test_numbers_that_are_no_table_are_refused(changes):
    with pytest.raises(ValueError, match="payload of"):
        foreign(**changes)


def test_a_foreign_device_is_named_after_its_manifest():
    digest = hashlib.sha256(FOREIGN.encode()).hexdigest()[:32]
    assert dm_table.device_uuid(FOREIGN, "crypt") == f"TDXD-old-{digest}-crypt"
    assert dm_table.device_name(FOREIGN, "crypt") == "tdxd-old-2-crypt"
