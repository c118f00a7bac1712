"""What a running front counts, and when its certificates end, by its runtime API.

Source: HAProxy 2.6 management guide §9.1 (fields of the statistics), §9.3 "show stat", "show ssl
cert".
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

from tdxd.host.haproxy import RuntimeApi

__all__ = ["Row", "certificate_ends", "statistics"]

_NOT_AFTER = "notAfter:"
_DATE = "%b %d %H:%M:%S %Y GMT"

Row = Mapping[str, str]
"""One proxy or server: values by the name of the field, "" where it has none."""


async def statistics(api: RuntimeApi) -> list[Row]:
    """Return a row for each proxy and each server behind it.

    Raises: NotReadyError.
    """
    head, *lines = (await api.command("show stat -1 7 -1")).splitlines() or [""]
    names = head.removeprefix("# ").split(",")
    rows = (dict(zip(names, one.split(","), strict=False)) for one in lines)
    return [row for row in rows if "svname" in row]


async def certificate_ends(api: RuntimeApi) -> list[float]:
    """Return the notAfter of each certificate that the front shows, unix time.

    Raises: NotReadyError.
    """
    names = (await api.command("show ssl cert")).splitlines()
    ends = []
    for name in names:
        if (
            name and name[0] not in "#*"
        ):  # * stands before a change that is not committed
            ends += _ends(await api.command(f"show ssl cert {name}"))
    return ends


def _ends(shown: str) -> list[float]:
    found = []
    for line in shown.splitlines():
        if line.startswith(_NOT_AFTER):
            text = line.removeprefix(_NOT_AFTER).strip()
            moment = dt.datetime.strptime(text, _DATE).replace(tzinfo=dt.UTC)
            found.append(moment.timestamp())
    return found
