"""The roots that a key server trusts, each with its collateral, as its configuration says."""

from __future__ import annotations

from pathlib import Path

from tdxd.errors import DataError
from tdxd.owner.appraisal.appraise import TrustedRoot, intel_root, load_root
from tdxd.owner.collateral.cache import CollateralCache, SetRules, Trust
from tdxd.owner.collateral.files import CollateralFiles
from tdxd.owner.collateral.floors import StoreFloors
from tdxd.owner.collateral.pcs import PcsSource, fetch_collateral
from tdxd.owner.files import read_bytes
from tdxd.owner.server.config import KeydConfig
from tdxd.owner.store.store import Store

__all__ = [
    "OFFLINE",
    "find_root",
    "make_cache",
    "open_caches",
    "trust_of",
    "trusted_roots",
]

OFFLINE = "imported bundles"


def trusted_roots(directory: Path, config: KeydConfig) -> dict[TrustedRoot, PcsSource]:
    """Return Intel's root and those that the config names, each with its source.

    Raises: ConfigError, HostError.
    """
    chosen = config.collateral
    tls_ca = None if chosen.tls_ca is None else directory / chosen.tls_ca
    sources = {
        intel_root(): PcsSource(
            url=chosen.url,
            root_crl_url=chosen.root_crl_url,
            timeout_s=chosen.timeout_s,
            tls_ca=tls_ca,
        )
    }
    for item in config.root:
        path = directory / item.file
        root = load_root(read_bytes(path), simulated=item.simulated, source=str(path))
        sources[root] = PcsSource(
            url=item.collateral_url, timeout_s=chosen.timeout_s, tls_ca=tls_ca
        )
    return sources


def open_caches(
    directory: Path, config: KeydConfig, store: Store
) -> dict[TrustedRoot, CollateralCache]:
    """Return the collateral of every trusted root.

    Raises: ConfigError, HostError.
    """
    return {
        root: make_cache(directory, config, store, root, source)
        for root, source in trusted_roots(directory, config).items()
    }


def make_cache(
    directory: Path,
    config: KeydConfig,
    store: Store,
    root: TrustedRoot,
    source: PcsSource,
) -> CollateralCache:
    """Return the collateral of one root.

    Raises: ConfigError for CAs that cannot be read.
    """
    chosen = config.collateral
    source.tls()  # a wrong file is found at the start, not with the first guest

    def fetch(fmspc: str, ca: str) -> str:
        return fetch_collateral(source, fmspc, ca)

    return CollateralCache(
        None if chosen.offline else fetch,
        trust=trust_of(root),
        floors=StoreFloors(store),
        files=CollateralFiles(directory, root.key_sha384),
        rules=SetRules(
            max_age_s=chosen.max_age_s, crl_rollback_s=chosen.crl_rollback_s
        ),
        refresh_s=chosen.refresh_s,
        source=OFFLINE if chosen.offline else source.base(),
        patience_s=2 * chosen.timeout_s,
    )


def trust_of(root: TrustedRoot) -> Trust:
    """Return a root as collateral is verified under it."""
    return Trust(name=root.name, key_sha384=root.key_sha384)


def find_root(
    roots: dict[TrustedRoot, PcsSource], key_sha384: str
) -> tuple[TrustedRoot, PcsSource]:
    """Return the trusted root with this key.

    Raises: DataError.
    """
    for root, source in roots.items():
        if root.key_sha384 == key_sha384:
            return root, source
    names = ", ".join(root.name for root in roots)
    raise DataError(
        f"root with key sha384:{key_sha384[:16]}… is not trusted here",
        hint=f"keyd.toml trusts: {names}",
    )
