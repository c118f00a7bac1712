"""What is missing on this machine, in words, and what to do about it: facts in, findings out.

It asks for one quote and one challenge of each key server, and changes nothing; nothing that it
reads is secret. All of it together takes less than `LIMIT_S`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from tdxd.core.config import Address, Config, KeyReleaseConfig, parse_address
from tdxd.errors import EX_OK, EX_UNAVAILABLE, ConfigError, TdxdError
from tdxd.guest import (
    doctor_evidence,
    doctor_machine,
    doctor_network,
    doctor_protection,
)
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.finding import Facts, Finding, ImageFact, fail
from tdxd.guest.server_program import server_command
from tdxd.host import images
from tdxd.host.evidence_facts import EvidenceFacts, gather_evidence
from tdxd.host.exposure import observe
from tdxd.host.facts import MachineFacts, Problem, gather_machine
from tdxd.host.in_time import in_time
from tdxd.host.key_server_facts import KeyServerFacts, ask_key_server

__all__ = ["LIMIT_S", "diagnose", "examine", "gather", "report", "unconfigured"]

LIMIT_S = 70.0
"""Twice the 30 s that the kernel waits for a quote, and some."""


def examine(loaded: LoadedConfig) -> tuple[Finding, ...]:
    """Look at this machine and judge it; blocks for `LIMIT_S` at most."""
    return diagnose(gather(loaded))


def unconfigured(problem: ConfigError) -> tuple[Finding, ...]:
    """Judge a machine whose configuration cannot be used: what can be said without one."""
    servers = KeyReleaseConfig(
        servers=("unknown:1",), ca="/", signing_key="ed25519:" + "A" * 43 + "="
    )
    facts = gather(LoadedConfig(config=Config(key_release=servers)), network=False)
    wrong = fail("config", problem.message, problem.hint or "see man tdxd.toml")
    rest = [
        *(one for one in doctor_protection.judge(facts) if one.name != "trust"),
        *doctor_evidence.judge(facts),
        *doctor_machine.judge_machine(facts),
        *doctor_machine.judge_programs(facts),
    ]
    return (wrong, *rest)


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """Judge the facts; pure."""
    return (
        *doctor_machine.judge_config(facts),
        *doctor_protection.judge(facts),
        *doctor_evidence.judge(facts),
        *doctor_machine.judge_machine(facts),
        *doctor_machine.judge_programs(facts),
        *doctor_machine.judge_images(facts),
        *doctor_network.judge(facts),
    )


def report(findings: tuple[Finding, ...]) -> dict[str, Any]:
    """Return the findings as plain values, with the exit code: 69 if one fails, else 0."""
    failed = any(one.level == "fail" for one in findings)
    return {
        "findings": [dataclasses.asdict(one) for one in findings],
        "exit": EX_UNAVAILABLE if failed else EX_OK,
    }


def gather(loaded: LoadedConfig, *, network: bool = True) -> Facts:
    """Look at the machine, its evidence and its key servers, side by side."""
    config = loaded.config
    ca_pem, ca_problem = _ca(loaded) if network else (None, None)
    asked: list[Address] = []
    if ca_pem is not None:
        asked = [parse_address(one) for one in config.key_release.servers]
    calls: list[Callable[[], object]] = [
        partial(_machine, config),
        partial(gather_evidence, config.platform),
        *(partial(ask_key_server, one, ca_pem or b"") for one in asked),
    ]
    machine, evidence, *servers = in_time(calls, LIMIT_S)
    assert isinstance(machine, MachineFacts), "reads files alone, and ends at once"
    if not isinstance(evidence, EvidenceFacts):
        evidence = _silent_evidence()
    model_server, model_server_problem = _model_server(config)
    return Facts(
        config=config,
        trust=loaded.trust,
        machine=machine,
        observed=observe(),
        evidence=evidence,
        ca=ca_problem,
        servers=tuple(
            found if isinstance(found, KeyServerFacts) else _silent_server(address)
            for address, found in zip(asked, servers, strict=True)
        ),
        haproxy=shutil.which(config.serving.haproxy) if config.serving else None,
        model_server=model_server,
        model_server_problem=model_server_problem,
        images=tuple(
            ImageFact(one.id, one.image, tuple(f.size_bytes for f in files))
            for one in config.volume
            for files in [images.candidates(one.image)]
        ),
    )


def _machine(config: Config) -> MachineFacts:
    user = config.serving.user if config.serving else None
    return gather_machine(group=config.control.group, user=user)


def _silent_evidence() -> EvidenceFacts:
    text = f"asking for a quote did not end within {LIMIT_S:g} s"
    hint = "the host's quoting service does not answer; the host must run QGS"
    return EvidenceFacts(
        configfs=True,
        module=True,
        report_dir=True,
        provider=True,
        device=True,
        quote=Problem(text, hint),
    )


def _silent_server(address: Address) -> KeyServerFacts:
    text = f"looking up {address.host} did not end within {LIMIT_S:g} s"
    problem = Problem(text, "does /etc/resolv.conf name a server that answers?")
    return KeyServerFacts(server=str(address), step="name", problem=problem)


def _ca(loaded: LoadedConfig) -> tuple[bytes | None, Problem | None]:
    if loaded.ca_pem is not None:
        return loaded.ca_pem, None
    path = loaded.config.key_release.ca
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20), None
    except OSError as exc:
        hint = "copy the server-ca.pem that tdx-keyd init wrote to that place"
        return None, Problem(f"key_release.ca {path}: {exc.strerror}", hint)


def _model_server(config: Config) -> tuple[str | None, Problem | None]:
    if config.serving is None:
        return None, None
    try:
        program = server_command(config.serving)[0]
    except TdxdError as exc:
        return None, Problem.of(exc)
    if shutil.which(program) is None:
        hint = "serving.command names a program that can be run"
        return None, Problem(f"there is no model server {program}", hint)
    return program, None
