"""Puts the key server of a store directory together."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import structlog

from tdxd.owner.appraisal.appraise import TrustedRoot
from tdxd.owner.appraisal.judge import REASONS, Judge
from tdxd.owner.audit.guard import opened_audit
from tdxd.owner.audit.record import AuditRecord
from tdxd.owner.collateral.roots import open_caches
from tdxd.owner.server.at_hand import AtHand
from tdxd.owner.server.config import KeydConfig, read_config
from tdxd.owner.server.init import read_tls
from tdxd.owner.server.keyd import Keyd, Signer
from tdxd.owner.server.metrics import CollateralSeen, Tally
from tdxd.owner.server.rpc_server import RpcServer
from tdxd.owner.server.signing_keys import read_signing_keys
from tdxd.owner.server.token_keys import TokenKeys
from tdxd.owner.store.store import Store
from tdxd.owner.store.volumes import Volumes

__all__ = ["make_keyd", "opened_server"]


_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@contextlib.contextmanager
def opened_server(
    directory: Path, workers: int, kek_file: Path | None = None, *, tally: Tally
) -> Iterator[RpcServer]:
    """Open the store and make the server of one of several workers, which counts in `tally`.

    Raises: ConfigError, HostError.
    """
    config = read_config(directory)
    with (
        Store.open(directory, kek_file) as store,
        opened_audit(directory, config, store) as hooks,
    ):

        def told(records: Sequence[AuditRecord]) -> None:
            tally.decided(records)
            hooks.tell(records)

        yield RpcServer(
            make_keyd(directory, config, store, on_records=told, tally=tally),
            read_tls(directory),
            config.limits.share(workers),
            share_port=True,
            on_end=tally.ended,
        )


def make_keyd(
    directory: Path,
    config: KeydConfig,
    store: Store,
    *,
    clock: Callable[[], float] = time.time,
    on_records: Callable[[Sequence[AuditRecord]], None] = lambda _records: None,
    tally: Tally | None = None,
) -> Keyd:
    """Build the key server of a store directory; `on_records` hears of what was decided.

    `tally` is told what collateral is used.

    Raises: ConfigError, HostError.
    """
    kek = store.kek()
    if kek.unfinished:
        _log.warning(
            "kek.rotation_unfinished",
            hint="the old key is still there: run tdx-keyd rotate-kek once more",
        )
    token_keys = TokenKeys(
        store,
        kek,
        rotate_s=config.keys.rotate_token_s,
        clock=clock,
        random_bytes=os.urandom,
    )
    roots = {
        root: AtHand(cache.get)
        for root, cache in open_caches(directory, config, store).items()
    }
    if tally is not None:
        tally.expect(REASONS)
        tally.collateral = partial(_collateral_seen, roots, clock)
    return Keyd(
        store=store,
        volumes=Volumes(store, kek),
        signers=_signers(directory, config, token_keys, roots),
        token_keys=token_keys,
        deployment=bytes.fromhex(config.deployment),
        token_lifetime_s=config.token_lifetime_s,
        clock=clock,
        random_bytes=os.urandom,
        on_records=on_records,
    )


def _signers(
    directory: Path,
    config: KeydConfig,
    token_keys: TokenKeys,
    roots: Mapping[TrustedRoot, AtHand],
) -> list[Signer]:
    """Return the keys that may sign, each with the judge of evidence that names it."""
    return [
        Signer(
            key=key,
            judge=Judge(
                token_keys=token_keys.opening,
                deployment=bytes.fromhex(config.deployment),
                signing_key_sha256=key.key_id,
                roots=cast("Any", roots),
            ),
        )
        for key in read_signing_keys(directory)
    ]


def _collateral_seen(
    roots: Mapping[TrustedRoot, AtHand], clock: Callable[[], float]
) -> list[CollateralSeen]:
    return [
        CollateralSeen(
            root=root.name,
            fmspc=fmspc,
            ca=ca,
            issued_s=one.issued_s,
            expires_s=one.expires_s,
        )
        for root, at_hand in roots.items()
        for fmspc, ca, one in at_hand.used(clock())
    ]
