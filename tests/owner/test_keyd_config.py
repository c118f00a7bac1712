"""keyd.toml: strict, and no root but a simulated one beside Intel's."""

from __future__ import annotations

import pytest

from tdxd.errors import ConfigError
from tdxd.owner.server.config import read_config

GOOD = f"""
listen = "127.0.0.1:50051"
deployment = "{"0a" * 16}"
[collateral]
url = "http://127.0.0.1:8081"
[[root]]
file = "root.der"
simulated = true
collateral_url = "http://127.0.0.1:8081"
"""


def read(tmp_path, text):
    (tmp_path / "keyd.toml").write_text(text)
    return read_config(tmp_path)


def test_good_config(tmp_path):
    config = read(tmp_path, GOOD)
    assert config.token_lifetime_s == 60
    assert config.root[0].simulated


def test_intels_service_is_the_default(tmp_path):
    config = read(tmp_path, GOOD.split("[collateral]", maxsplit=1)[0])
    assert config.collateral.url == "https://api.trustedservices.intel.com"
    assert config.root == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("listen", "listens", "listens: unknown key"),
        ("simulated = true", "simulated = false", "simulated must be true"),
        ("simulated = true\n", "", "root[0].simulated: missing"),
        ("127.0.0.1:50051", "127.0.0.1", "is not HOST:PORT"),
        ("0a0a", "0A0A", "is not 16 bytes in hex"),
        ("http://", "file://", "is not an http or https address"),
        ("[collateral]", "token_lifetime_s = 121\n[collateral]", "is not 1 to 120"),
        ("[collateral]", "[collateral]\ntimeout_s = 0", "must be greater than 0"),
        ("[collateral]", "[collateral", "not valid TOML"),
    ],
)
def test_bad_config_names_the_key(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert str(tmp_path / "keyd.toml") in caught.value.message
    assert message in caught.value.message


def test_missing_config_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="is no key server store") as caught:
        read_config(tmp_path)
    assert "tdx-keyd init" in caught.value.hint


def test_config_that_is_not_text(tmp_path):
    (tmp_path / "keyd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "processes"),
    [("", 1), ("workers = 1", 1), ("workers = 7", 7)],
)
def test_workers(tmp_path, text, processes):
    config = read(tmp_path, GOOD + f"[serve]\n{text}\n")
    assert config.serve.processes() == processes


def test_one_worker_for_each_core(tmp_path):
    import os

    config = read(tmp_path, GOOD + '[serve]\nworkers = "auto"\n')
    assert config.serve.processes() == min(64, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    "table",
    [
        "[serve]\nworkers = -1",
        "[serve]\nworkers = 65",
        '[serve]\nworkers = "all"',
        "[serve]\nworkers = [1]",
        "[serve]\nworkers = true",
        "[limits]\nreleases_per_s = 0.0",
        "[limits]\npeer_calls = 0",
        "[limits]\nrate = 5",
        "[keys]\nrotate_token_s = 1.0",
    ],
)
def test_bad_tables_of_serving_are_refused(tmp_path, table):
    with pytest.raises(ConfigError, match=r"keyd\.toml: (serve|limits|keys)"):
        read(tmp_path, GOOD + table + "\n")
