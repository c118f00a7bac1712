"""The mappers of this machine: the configured one, and a sweep of what any of them left."""

from __future__ import annotations

from tdxd.core.config import MapperConfig
from tdxd.host import dm
from tdxd.host.dm_map import DmMapper
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.ports import Mapper

__all__ = ["chosen", "sweep"]


def chosen(config: MapperConfig) -> Mapper:
    """Return the configured mapper; `auto` is `dm` where the kernel's device mapper answers."""
    if config.mapper == "dm" or (config.mapper == "auto" and dm.available()):
        return DmMapper()
    return MemoryMapper(limit_bytes=config.memory_limit_bytes)


def sweep() -> tuple[str, ...]:
    """Close what a killed daemon left open, under whatever configuration; return the names.

    Raises: BusyError, HostError.
    """
    swept = DmMapper().sweep() if dm.available() else ()
    return (*swept, *MemoryMapper(limit_bytes=0).sweep())
