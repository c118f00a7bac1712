"""Strict decoding: a mapping becomes a dataclass, or an error names the key path.

One mechanism for everything that comes from outside as a mapping: TOML files and msgpack
messages. Unknown and missing keys, wrong types and values that the dataclass's own
`__post_init__` refuses (by `ValueError`) are all reported with the path of the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from typing import Any, TypeVar

import msgpack

from tdxd.errors import ConfigError, DataError, TdxdError

__all__ = ["decode", "decode_canonical", "encode_canonical", "plain", "strict_map"]

T = TypeVar("T")


def decode(
    cls: type[T],
    mapping: object,
    *,
    source: str,
    error: type[TdxdError] = ConfigError,
) -> T:
    """Build the dataclass `cls` from a mapping of plain values.

    A field's key is its name, or `metadata["key"]`. Supported field types: str, int, float,
    bool, bytes, `tuple[X, ...]`, `X | None`, `Literal`, `NewType`, enums by value,
    `dict[str, X]`, dataclasses, and unions of dataclasses, told apart by their keys. `source`
    (a file name) starts every message.

    Raises: `error`, naming the key path, the value and a hint.
    """
    decoder = _Decoder(source, error)
    return typing.cast("T", decoder.value(cls, mapping, ""))


@dataclasses.dataclass(frozen=True, slots=True)
class _Decoder:
    source: str
    error: type[TdxdError]

    def fail(self, path: str, text: str, hint: str = "") -> TdxdError:
        where = f"{self.source}: {path}: " if path else f"{self.source}: "
        return self.error(where + text, hint=hint)

    def value(self, want: Any, got: object, path: str) -> object:
        want = getattr(want, "__supertype__", want)
        if dataclasses.is_dataclass(want):
            return self.record(typing.cast("type[Any]", want), got, path)
        origin = typing.get_origin(want)
        if origin in (typing.Union, types.UnionType):
            arms = typing.get_args(want)
            if got is None and type(None) in arms:
                return None
            inner = [arm for arm in arms if arm is not type(None)]
            return self.value(_arm(inner, got), got, path)
        if origin is tuple:
            return self.items(typing.get_args(want)[0], got, path)
        if origin is dict:
            return self.table(typing.get_args(want)[1], got, path)
        if origin is typing.Literal:
            return self.choice(typing.get_args(want), got, path)
        return self.scalar(want, got, path)

    def scalar(self, want: type, got: object, path: str) -> object:
        if want is float and type(got) is int:
            return float(got)
        if type(got) is not want:
            text = f"expected {_name(want)}, got {_show(got)}"
            raise self.fail(path, text)
        return got

    def items(self, item: Any, got: object, path: str) -> tuple[object, ...]:
        if not isinstance(got, list | tuple):
            raise self.fail(path, f"expected a list, got {_show(got)}")
        return tuple(
            self.value(item, one, f"{path}[{index}]") for index, one in enumerate(got)
        )

    def table(self, item: Any, got: object, path: str) -> dict[str, object]:
        if not isinstance(got, dict):
            raise self.fail(path, f"expected a table, got {_show(got)}")
        return {
            key: self.value(item, one, _join(path, key)) for key, one in got.items()
        }

    def choice(self, arms: tuple[Any, ...], got: object, path: str) -> object:
        if not any(type(got) is type(arm) and got == arm for arm in arms):
            known = ", ".join(repr(arm) for arm in arms)
            raise self.fail(path, f"expected one of {known}, got {_show(got)}")
        return got

    def record(self, cls: type[Any], got: object, path: str) -> object:
        if not isinstance(got, dict):
            raise self.fail(path, f"expected a table, got {_show(got)}")
        fields = {
            field.metadata.get("key", field.name): field
            for field in dataclasses.fields(cls)
        }
        for key in got:
            if key not in fields:
                near = difflib.get_close_matches(str(key), list(fields), n=1)
                hint = f"did you mean {near[0]!r}" if near else _known(fields)
                raise self.fail(_join(path, key), "unknown key", hint)
        hints = _hints(cls)  # type: ignore[arg-type]  # every class has a hash
        made: dict[str, object] = {}
        for key, field in fields.items():
            if key in got:
                want = hints[field.name]
                made[field.name] = self.value(want, got[key], _join(path, key))
            elif _required(field):
                raise self.fail(_join(path, key), "missing")
        try:
            return cls(**made)
        except ValueError as exc:
            raise self.fail(path, str(exc)) from exc


def _arm(arms: list[Any], got: object) -> Any:
    """Return the first record that knows every key of `got`, or the first of all."""
    if len(arms) > 1 and isinstance(got, dict):
        return next((arm for arm in arms if got.keys() <= _keys(arm)), arms[0])
    return arms[0]


def _keys(cls: type[Any]) -> set[str]:
    return {field.metadata.get("key", field.name) for field in dataclasses.fields(cls)}


@functools.cache  # evaluating annotations is most of the work
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _join(path: str, key: object) -> str:
    text = str(key) if str(key).isprintable() else repr(key)  # it may be a stranger's
    return f"{path}.{text}" if path else text


def _known(fields: dict[str, Any]) -> str:
    return "known keys: " + ", ".join(sorted(fields))


def _name(want: type) -> str:
    return {str: "a string", int: "a whole number", bool: "true or false"}.get(
        want, want.__name__
    )


def _show(got: object) -> str:
    """Show a value shortly; bytes only by their length, for they may be secret."""
    if isinstance(got, bytes | bytearray):
        return f"{len(got)} bytes"
    if isinstance(got, dict):
        return "a table"
    if isinstance(got, list | tuple):
        return "a list"
    try:
        text = repr(got)
    except ValueError:  # TOML's hex may have more digits than Python writes in decimal
        return "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def plain(value: object) -> object:
    """Return plain values from which `decode` builds the same dataclass again."""
    if dataclasses.is_dataclass(value):
        return {
            field.metadata.get("key", field.name): plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


# --- canonical msgpack --------------------------------------------------------


def encode_canonical(value: object) -> bytes:
    """Encode plain values, keys of maps sorted bytewise, as msgpack of minimal length.

    Raises: TypeError for what msgpack has no type for.
    Source: the msgpack specification, "Serialization: smallest representation".
    """
    packed = msgpack.packb(_sorted(value), use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def decode_canonical(data: bytes, *, source: str, max_bytes: int) -> object:
    """Decode msgpack that must re-encode to the very same bytes.

    Raises: DataError for anything longer than `max_bytes`, malformed, with a duplicate or
    unsorted key, or not of minimal length.
    """
    value = strict_map(data, source=source, max_bytes=max_bytes)
    try:
        canonical = encode_canonical(value) == data
    except (RecursionError, ValueError):  # nested more deeply than anything of ours
        canonical = False
    if not canonical:
        msg = f"{source}: msgpack is not in canonical form"
        raise DataError(msg)
    return value


def strict_map(
    data: bytes, *, source: str, max_bytes: int, error: type[TdxdError] = DataError
) -> object:
    """Decode msgpack with string keys, no extension types and no duplicate key.

    Raises: `error`.
    """
    if len(data) > max_bytes:
        msg = f"{source}: {len(data)} bytes, at most {max_bytes} allowed"
        raise error(msg)
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_no_duplicates,
            ext_hook=_no_extension,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
        msg = f"{source}: not valid msgpack"
        raise error(msg) from exc


def _no_duplicates(pairs: list[tuple[object, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    for key, value in pairs:
        if not isinstance(key, str) or key in made:
            msg = "duplicate or non-string key"
            raise ValueError(msg)
        made[key] = value
    return made


def _no_extension(_code: int, _data: bytes) -> typing.NoReturn:
    msg = "extension type"
    raise ValueError(msg)


def _sorted(value: object) -> object:
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode())
        return {key: _sorted(value[key]) for key in keys}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value
