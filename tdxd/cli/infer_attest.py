"""`--attest` of tdx-infer: have the endpoint prove itself before data is sent to it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tdxd.errors import NotAttestedError, UsageError

if TYPE_CHECKING:
    from tdxd.cli.endpoint_appraise import GetCollateral, Verdict
    from tdxd.core.policy import Policy
    from tdxd.owner.appraisal.appraise import TrustedRoot
    from tdxd.user.attested import Proof
    from tdxd.user.endpoint import Endpoint

__all__ = ["add_attest_options", "attested", "judge", "refuse_alone", "summary"]

_PCS_TIMEOUT_S = 10.0
_OPTIONS = ("expect_volume", "collateral", "pccs", "attest_root")


def add_attest_options(parser: argparse.ArgumentParser) -> None:
    """Add what every verb takes that sends data."""
    add = parser.add_argument
    text = "ask the guest for a fresh quote, and send data only if it meets this policy"
    add("--attest", metavar="POLICY", type=Path, help=text)
    text = "a volume that the quote must name (several times: each)"
    add(
        "--expect-volume",
        metavar="ID[:SHA256]",
        action="append",
        default=[],
        help=text,
    )
    text = "collateral: one set, or what tdx-keyd collateral export wrote"
    add("--collateral", metavar="FILE", type=Path, help=text)
    add("--pccs", metavar="URL", help="get collateral there (default: from Intel)")
    text = "root CA of a simulated platform (default: Intel's)"
    add("--attest-root", metavar="FILE", type=Path, help=text)


def attested(endpoint: Endpoint, arguments: argparse.Namespace) -> Endpoint:
    """Return an endpoint whose only root is the certificate that was attested now.

    Raises: NotAttestedError; what reading the files and asking may raise.
    """
    from tdxd.cli import keyd_explain

    proof, verdict = judge(endpoint, arguments)
    why = keyd_explain.conclusion(verdict.checks)
    if why is not None or not verdict.accepted:
        what = why.what if why else "nothing was checked"
        text = f"{endpoint.address} is not attested: {what}"
        hint = why.todo if why else "report it"
        raise NotAttestedError(text, hint=f"{hint}; tdx-infer attest shows every check")
    for line in summary(verdict):
        print(f"tdx-infer: attested: {line}", file=sys.stderr)
    return dataclasses.replace(endpoint, ca_pem=proof.certificate_pem, attested=True)


def refuse_alone(arguments: argparse.Namespace) -> None:
    """Refuse options that say nothing without `--attest`.

    Raises: UsageError.
    """
    for name in _OPTIONS:
        if getattr(arguments, name):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} without --attest POLICY")


def judge(endpoint: Endpoint, arguments: argparse.Namespace) -> tuple[Proof, Verdict]:
    """Read what to judge by before anything is asked, then ask and judge.

    Raises: UsageError, ConfigError, HostError, DataError; UnavailableError, ServeError and
    RemoteProtocolError where the endpoint or the source of collateral does not answer.
    """
    from tdxd.cli.endpoint_appraise import judge_endpoint
    from tdxd.user.attested import fetch_proof

    policy, root = _policy(arguments), _root(arguments.attest_root)
    collateral = _collateral(arguments, root)
    proof = fetch_proof(endpoint)
    verdict = judge_endpoint(proof, policy, root, collateral, int(time.time()))
    return proof, verdict


def _policy(arguments: argparse.Namespace) -> Policy:
    from tdxd.core.policy import parse_policy
    from tdxd.core.runtime_rules import ExpectedVolume
    from tdxd.owner.files import read_text

    policy = parse_policy(read_text(arguments.attest), source=str(arguments.attest))
    for text in arguments.expect_volume:
        try:
            ExpectedVolume.parse(text)
        except ValueError as exc:
            raise UsageError(f"--expect-volume {exc}", hint="ID or ID:SHA256") from exc
    expect = (*policy.runtime.expect, *arguments.expect_volume)
    runtime = dataclasses.replace(policy.runtime, expect=expect)
    return dataclasses.replace(policy, runtime=runtime)


def _root(path: Path | None) -> TrustedRoot:
    from tdxd.owner.appraisal.appraise import intel_root, load_root
    from tdxd.owner.files import read_bytes

    if path is None:
        return intel_root()
    return load_root(read_bytes(path), simulated=True, source=str(path))


def _collateral(arguments: argparse.Namespace, root: TrustedRoot) -> GetCollateral:
    from tdxd.cli.endpoint_appraise import from_file, from_pccs
    from tdxd.owner.collateral.config import check_url
    from tdxd.owner.collateral.pcs import INTEL_PCS_URL, PcsSource

    if arguments.collateral is not None:
        if arguments.pccs is not None:
            raise UsageError("--collateral and --pccs exclude each other")
        return from_file(arguments.collateral, root)
    if root.simulated and arguments.pccs is None:
        hint = "the address that tdx-sim run --pccs printed"
        raise UsageError("--attest-root without --pccs or --collateral", hint=hint)
    url = arguments.pccs or INTEL_PCS_URL
    try:
        check_url("--pccs", url)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    return from_pccs(PcsSource(url=url, timeout_s=_PCS_TIMEOUT_S))


def summary(verdict: Verdict) -> list[str]:
    """Say in a few lines what was proved."""
    lines = [
        f"volume {one.volume_id} generation {one.generation}, "
        f"manifest sha256:{one.manifest_sha256.hex()}"
        for one in verdict.volumes
    ]
    if not lines:
        lines = ["no volume is named by the quote: RTMR3 is not extended there"]
    if any(one.name == "simulated" and one.actual != "no" for one in verdict.checks):
        lines.append("warning: the platform is simulated and proves nothing")
    return lines
