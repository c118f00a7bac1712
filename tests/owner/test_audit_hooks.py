"""Hooks: each denial is told, and nothing that a hook does reaches an answer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tdxd.errors import UnavailableError
from tdxd.owner.audit import hooks as audit_hooks
from tdxd.owner.audit.config import AuditConfig
from tdxd.owner.audit.deliver import post, run_command
from tdxd.owner.audit.hooks import DenialHooks
from tests.owner.test_checkpoint import Receiver, wait_for
from tests.owner.test_store import record


def denial(name="d"):
    return record(decision="denied", denial_id=name, reason="tcb-status")


def shell(script):
    return ("/bin/sh", "-c", script)


def test_command_gets_a_line_of_json_for_each_denial_and_for_nothing_else(tmp_path):
    path = tmp_path / "told"
    config = AuditConfig(on_denial_command=shell(f"cat >> {path}"))
    with DenialHooks(config) as hooks:
        hooks.tell([record(), denial("one"), denial("two")])
    told = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["denial_id"] for one in told] == ["one", "two"]
    assert told[0] == {
        "event": "key.denied",
        "at_s": 5,
        "volume": "v",
        "reason": "tcb-status",
        "denial_id": "one",
        "request_id": "r",
        "peer": "ipv4:127.0.0.1:1",
        "simulated": True,
        "policy_version": 2,
        "failed": [
            {"name": "b", "expected": "x", "actual": "y"},
            {"name": "c", "expected": "same", "actual": "same"},
        ],
    }


def test_address_gets_it_too_even_if_the_command_fails(capfd):
    with Receiver() as receiver:
        config = AuditConfig(
            on_denial_command=shell("echo no such host >&2; exit 3"),
            on_denial_url=receiver.url,
        )
        with DenialHooks(config) as hooks:
            hooks.tell([denial()])
    ((kind, data),) = receiver.got
    assert kind == "application/json"
    assert json.loads(data)["denial_id"] == "d"
    said = "".join(capfd.readouterr())
    assert "hook.failed" in said
    assert "exited with 3" in said
    assert "no such host" in said


def test_slow_hook_delays_nobody_and_a_full_queue_is_counted(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(audit_hooks, "_QUEUE_MAX", 2)
    gate = tmp_path / "gate"
    config = AuditConfig(
        on_denial_command=shell(f"while ! test -e {gate}; do sleep 0.05; done")
    )
    with DenialHooks(config) as hooks:
        began_s = time.monotonic()
        for count in range(50):
            hooks.tell([denial(str(count))])
        assert time.monotonic() - began_s < 1
        gate.touch()
    said = "".join(capfd.readouterr())
    assert "hook.dropped" in said
    assert "count=4" in said  # 47 or 48 of 50


def test_no_hook_no_thread():
    before = threading.active_count()
    with DenialHooks(AuditConfig()) as hooks:
        hooks.tell([denial()])
        assert threading.active_count() == before


# --- delivery -----------------------------------------------------------------


def test_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    path = tmp_path / "pid"
    began_s = time.monotonic()
    with pytest.raises(UnavailableError, match=r"/bin/sh takes longer than 0.5 s"):
        run_command(shell(f"sleep 60 & echo $! > {path}; wait"), b"", 0.5)
    assert time.monotonic() - began_s < 10
    child = Path("/proc") / path.read_text().strip()

    def gone():
        with contextlib.suppress(FileNotFoundError):
            return "State:\tZ" in (child / "status").read_text()
        return True

    wait_for(gone)


def test_command_that_is_not_there():
    with pytest.raises(UnavailableError, match="No such file"):
        run_command(("/nonexistent/program",), b"", 5)


def test_command_that_does_not_read_its_input():
    run_command(("/bin/true",), bytes(1_000_000), 5)


def test_command_sees_nothing_of_our_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_SERVER", "x")
    path = tmp_path / "environment"
    run_command(shell(f"env > {path}"), b"", 5)
    assert "SECRET_OF_THE_SERVER" not in path.read_text()


def test_command_inherits_no_descriptor(tmp_path):
    path = tmp_path / "descriptors"
    opened = os.open("/dev/null", os.O_RDONLY)
    held = os.dup2(opened, 200, inheritable=True)
    try:
        run_command(shell(f"ls /proc/self/fd > {path}"), b"", 10)
    finally:
        os.close(held)
        os.close(opened)
    assert path.read_text().split() == ["0", "1", "2", "3"]  # 3 is the listing itself


@pytest.mark.parametrize("status", [301, 404, 500])
def test_address_that_refuses(status):
    with (
        Receiver(status) as receiver,
        pytest.raises(UnavailableError, match=f"HTTP status {status}"),
    ):
        post(receiver.url, b"x", "text/plain", 5)


def test_address_where_nobody_listens():
    with pytest.raises(UnavailableError, match="refused"):
        post("http://127.0.0.1:9/", b"x", "text/plain", 5)


def test_address_that_answers_byte_by_byte():
    """A socket's timeout is for each read; the whole is bounded nevertheless."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip():
            peer, _ = server.accept()
            with peer, contextlib.suppress(OSError):
                for _ in range(400):
                    if stop.wait(0.05):
                        return
                    peer.send(b"H")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        began_s = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(UnavailableError):
            post(url, b"x", "text/plain", 0.5)
        assert time.monotonic() - began_s < 5
        stop.set()
        thread.join()
