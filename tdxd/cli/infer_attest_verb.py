"""`tdx-infer attest`: what an endpoint proves of itself, without sending it data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdxd.cli.infer_attest import judge, summary
from tdxd.cli.infer_options import add_connection, endpoint_of
from tdxd.errors import EX_NOPERM, EX_OK, UsageError

if TYPE_CHECKING:
    from tdxd.cli.endpoint_appraise import Verdict
    from tdxd.user.attested import Proof

__all__ = ["add_attest"]


def add_attest(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options, and the verb itself."""
    add_connection(parser)
    text = "write the attested certificate there, for clients to pin: PEM, a new file"
    parser.add_argument("--cert-out", metavar="FILE", type=Path, help=text)
    parser.set_defaults(verb=_attest)


def _attest(arguments: argparse.Namespace) -> int:
    from tdxd.cli import keyd_explain
    from tdxd.owner.files import write_public

    if arguments.attest is None:
        raise UsageError("--attest POLICY is missing: what to demand of the guest")
    endpoint = endpoint_of(arguments, prove=False)
    proof, verdict = judge(endpoint, arguments)
    why = keyd_explain.conclusion(verdict.checks)
    if verdict.accepted and arguments.cert_out is not None:
        write_public(arguments.cert_out, proof.certificate_pem)
    if arguments.json:
        _print_json(proof, verdict)
        return EX_OK if verdict.accepted else EX_NOPERM
    if why is None:
        print(f"ATTESTED: {endpoint.address} meets {arguments.attest}")
        print(f"certificate key sha256:{proof.key_sha256.hex()}")
        for line in summary(verdict):
            print(line)
    else:
        for line in why.lines("REFUSED"):
            print(line)
    print()
    for line in keyd_explain.table(verdict.checks):
        print(line)
    return EX_OK if verdict.accepted else EX_NOPERM


def _print_json(proof: Proof, verdict: Verdict) -> None:
    import json

    from tdxd.cli import keyd_explain
    from tdxd.core.decode import plain

    why = keyd_explain.conclusion(verdict.checks)
    words = {"conclusion": why.what, "to_do": why.todo} if why else {}
    shown: dict[str, Any] = {
        "attested": verdict.accepted,
        **words,
        "certificate_key_sha256": proof.key_sha256.hex(),
        "took_s": round(proof.took_s, 4),
        "volumes": [
            {
                "id": one.volume_id,
                "generation": one.generation,
                "manifest_sha256": one.manifest_sha256.hex(),
            }
            for one in verdict.volumes
        ],
        "checks": plain(verdict.checks),
    }
    print(json.dumps(shown))
