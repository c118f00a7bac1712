"""ConfigfsTsm where there is no TDX: every failure is named, with a hint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tdxd.core.eventlog import MAX_LOG_BYTES
from tdxd.errors import EvidenceUnavailableError, Retry
from tdxd.host.tsm import ConfigfsTsm


def test_a_kernel_without_configfs_tsm_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "tsm" / "report")
    with pytest.raises(EvidenceUnavailableError) as caught:
        ConfigfsTsm(path, "").quote(bytes(64))
    assert caught.value.message.startswith(f"mkdir {path}/tdxd-")
    assert "No such file" in caught.value.message
    assert "Linux 6.7" in caught.value.hint
    assert caught.value.retry is Retry.BACKOFF


def test_a_directory_that_is_not_configfs_is_named_and_left_clean(
    tmp_path: Path,
) -> None:
    with pytest.raises(EvidenceUnavailableError, match="provider"):
        ConfigfsTsm(str(tmp_path), "").quote(bytes(64))
    assert os.listdir(tmp_path) == []


def test_no_report_data_but_64_bytes_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="65 bytes"):
        ConfigfsTsm(str(tmp_path), "").quote(bytes(65))
    assert os.listdir(tmp_path) == []


def test_an_absent_event_log_is_empty(tmp_path: Path) -> None:
    assert ConfigfsTsm("", str(tmp_path / "CCEL")).event_log() == b""


def test_the_event_log_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "CCEL"
    path.write_bytes(b"x" * MAX_LOG_BYTES)
    assert ConfigfsTsm("", str(path)).event_log() == b"x" * MAX_LOG_BYTES


def test_an_event_log_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "CCEL"
    path.write_bytes(b"x" * (MAX_LOG_BYTES + 1))
    with pytest.raises(EvidenceUnavailableError, match="longer than 1048576"):
        ConfigfsTsm("", str(path)).event_log()


def test_an_event_log_without_end_is_refused() -> None:
    with pytest.raises(EvidenceUnavailableError, match="longer than 1048576"):
        ConfigfsTsm("", "/dev/zero").event_log()


def test_an_event_log_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvidenceUnavailableError, match="Is a directory"):
        ConfigfsTsm("", str(tmp_path)).event_log()
