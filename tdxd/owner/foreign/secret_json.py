"""The secrets of another key service: the `secret.json` of Intel's secretmanager examples.

One flat JSON object, application id to password. Its server takes whatever else cJSON lets pass
(text after the object, the first of two equal names, a value up to a NUL); here each of these is an
error, since nobody can know which password was meant.

Source: intel/confidential-computing-zoo, cczoo/tdx-encrypted-vfs/get_secret (README.md: "<APP_ID>:
<PASSWORD> pair"; examples/cpp/secretmanger/server.cc) and mount_encrypted_vfs.sh.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from tdxd.core.foreign import PASSPHRASE_MAX_BYTES
from tdxd.core.secret import Secret
from tdxd.core.showing import shown
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError, UsageError

__all__ = ["ForeignSecret", "chosen", "parse_secret_json"]

_SHORTENED = re.compile(r": |\s\s|^\s|\s$|[\r\n\t]")
"""What mount_encrypted_vfs.sh does not pass on whole: it splits at ": " and echoes unquoted."""
_SHAPE = 'it should be {"APP_ID": "PASSWORD", ...}'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForeignSecret:
    """One passphrase; `shortened`: the reference's mount script uses a part of it only."""

    app_id: str
    passphrase: Secret
    shortened: bool


def parse_secret_json(data: bytes, *, source: str) -> tuple[ForeignSecret, ...]:
    """Read all secrets of a file, in its order.

    Raises: DataError; no message and no cause shows a value.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_pairs)
    except UnicodeDecodeError:
        problem = f"{source}: not UTF-8 text"
    except json.JSONDecodeError as exc:
        problem = f"{source}: not JSON: line {exc.lineno} column {exc.colno}"
    except (ValueError, RecursionError):
        problem = f"{source}: not a flat JSON object"
    else:
        if isinstance(value, _Object):
            return _secrets(value.pairs, source)
        problem = f"{source}: not a JSON object"
    # Raised here, outside: the causes hold the whole file.
    raise DataError(problem, hint=_SHAPE)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class _Object:
    pairs: list[tuple[str, object]]


def _pairs(pairs: list[tuple[str, object]]) -> _Object:
    return _Object(pairs)


def _secrets(
    pairs: Sequence[tuple[str, object]], source: str
) -> tuple[ForeignSecret, ...]:
    if not pairs:
        raise DataError(f"{source}: holds no secret", hint=_SHAPE)
    (name, count), *_ = Counter(name for name, _ in pairs).most_common(1)
    if count > 1:
        raise DataError(
            f"{source}: {_shown(name)} stands there {count} times",
            hint="the reference's server uses the first; delete the others",
        )
    return tuple(_secret(name, value, source) for name, value in pairs)


def _secret(name: str, value: object, source: str) -> ForeignSecret:
    what = f"{source}: the value of {_shown(name)}"
    if not isinstance(value, str):
        raise DataError(f"{what} is not a string", hint=_SHAPE)
    try:
        raw = value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as \ud800
        raw = b""
    if not 1 <= len(raw) <= PASSPHRASE_MAX_BYTES or b"\0" in raw:
        raise DataError(
            f"{what} is not 1 to {PASSPHRASE_MAX_BYTES} bytes of UTF-8 without NUL"
        )
    return ForeignSecret(
        app_id=name,
        passphrase=Secret(raw),
        shortened=_SHORTENED.search(value) is not None,
    )


def chosen(
    secrets: Sequence[ForeignSecret], names: Sequence[str], *, source: str
) -> Mapping[str, ForeignSecret]:
    """Return secrets by the volume id that each is for: all of them, or those that are named.

    A name is `APP_ID`, or `APP_ID=ID` where the volume has another id.

    Raises: UsageError for a name that the file does not have, an id that two would have, and an id
    that no volume can have.
    """
    held = {one.app_id: one for one in secrets}
    made: dict[str, ForeignSecret] = {}
    for name in names or list(held):
        app_id, volume_id = _split(name, held) if names else (name, name)
        if app_id not in held:
            known = ", ".join(map(_shown, held))
            raise UsageError(
                f"{source} has no {_shown(app_id)}", hint=f"it has {known}"
            )
        try:
            check_volume_id(volume_id)
        except ValueError as exc:
            hint = f"name the volume: --id '{_shown(app_id)}=ID'"
            raise UsageError(f"{source}: {exc}", hint=hint) from exc
        if volume_id in made:
            raise UsageError(f"two secrets for the volume {volume_id}")
        made[volume_id] = held[app_id]
    return made


def _split(name: str, held: Mapping[str, ForeignSecret]) -> tuple[str, str]:
    """Take a name apart at its last "=", unless the file has it as it is."""
    if name in held or "=" not in name:
        return name, name
    app_id, _, volume_id = name.rpartition("=")
    return app_id, volume_id


def _shown(name: str) -> str:
    return shown(name, 64)
