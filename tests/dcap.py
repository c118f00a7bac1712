"""dcap-qvl as the tests call it."""

from __future__ import annotations

import json
from typing import Any

import dcap_qvl

NOW = 1_790_000_000
"""A moment of 2026, in seconds since 1970; tests never read the clock."""
DATA = bytes(range(64))


def verify(quote: bytes, collateral: str, root: bytes, now: int = NOW) -> str:
    """The status without a policy; ValueError if refused."""
    col = dcap_qvl.QuoteCollateralV3.from_json(collateral)
    status: str = dcap_qvl.verify_with_root_ca(quote, col, root, now).status
    return status


def claims(quote: bytes, collateral: str, root: bytes, now: int = NOW) -> Any:
    """The claims under the strict policy that the key server starts from."""
    policy = (
        dcap_qvl.QuotePolicy.strict(now)
        .allow_dynamic_platform(True)
        .allow_smt(True)
        .allow_cached_keys(True)
    )
    col = dcap_qvl.QuoteCollateralV3.from_json(collateral)
    verifier = dcap_qvl.QuoteVerifier(root)
    return json.loads(verifier.verify_with_policy(quote, col, now, policy).to_json())
