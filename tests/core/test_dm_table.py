"""The tables are what the kernel's documentation asks for, from the manifest alone."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import dm_table
from tdxd.core.bundle import Manifest

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
