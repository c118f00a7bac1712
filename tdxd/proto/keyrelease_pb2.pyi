from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_RELEASED: _ClassVar[Status]
    STATUS_DENIED: _ClassVar[Status]
STATUS_UNSPECIFIED: Status
STATUS_RELEASED: Status
STATUS_DENIED: Status

class ChallengeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChallengeResponse(_message.Message):
    __slots__ = ("token", "signing_key_sha256")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    signing_key_sha256: bytes
    def __init__(self, token: _Optional[bytes] = ..., signing_key_sha256: _Optional[bytes] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("token", "public_key", "volume_ids", "quote", "event_log", "runtime_log")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    VOLUME_IDS_FIELD_NUMBER: _ClassVar[int]
    QUOTE_FIELD_NUMBER: _ClassVar[int]
    EVENT_LOG_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_LOG_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    public_key: bytes
    volume_ids: _containers.RepeatedScalarFieldContainer[str]
    quote: bytes
    event_log: bytes
    runtime_log: bytes
    def __init__(self, token: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., volume_ids: _Optional[_Iterable[str]] = ..., quote: _Optional[bytes] = ..., event_log: _Optional[bytes] = ..., runtime_log: _Optional[bytes] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("volume_id", "generation", "status", "sealed_bundle", "denial_id", "reason", "hint")
    VOLUME_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SEALED_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    DENIAL_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    volume_id: str
    generation: int
    status: Status
    sealed_bundle: bytes
    denial_id: str
    reason: str
    hint: str
    def __init__(self, volume_id: _Optional[str] = ..., generation: _Optional[int] = ..., status: _Optional[_Union[Status, str]] = ..., sealed_bundle: _Optional[bytes] = ..., denial_id: _Optional[str] = ..., reason: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("verdicts", "signature")
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    signature: bytes
    def __init__(self, verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., signature: _Optional[bytes] = ...) -> None: ...
