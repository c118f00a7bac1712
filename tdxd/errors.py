"""The error taxonomy: what went wrong, whether to try again, what to do about it.

Every error that a user can cause or meet is a `TdxdError`. Its text is lower case, has no
full stop, and names the object and the value; `hint` says what to do. Anything that is not a
`TdxdError` is a bug. Imports nothing of the project.

Exit codes are those of sysexits.h (BSD, `man 3head sysexits`).
"""

from __future__ import annotations

import enum
import os

TYPE_CHECKING = False  # typing itself would cost tdxctl a fifth of its start
if TYPE_CHECKING:
    from typing import ClassVar

__all__ = [
    "EX_CONFIG",
    "EX_DATAERR",
    "EX_NOPERM",
    "EX_OK",
    "EX_OSERR",
    "EX_PROTOCOL",
    "EX_SOFTWARE",
    "EX_TEMPFAIL",
    "EX_UNAVAILABLE",
    "EX_USAGE",
    "BadBundleError",
    "BadHeaderError",
    "BusyError",
    "ConfigError",
    "CrowdedError",
    "DataError",
    "DeniedError",
    "EvidenceError",
    "EvidenceMalformedError",
    "EvidenceUnavailableError",
    "HostError",
    "IntegrityError",
    "KeyReleaseError",
    "LocalProtocolError",
    "MissingError",
    "NoRoomError",
    "NotAllowedError",
    "NotAttestedError",
    "NotReadyError",
    "PassphraseNeededError",
    "ProtocolError",
    "RecordError",
    "ReexecError",
    "RemoteProtocolError",
    "Retry",
    "ServeError",
    "ServerExitedError",
    "StaleSecretError",
    "StalledError",
    "TdxdError",
    "UnavailableError",
    "UnreachableError",
    "UsageError",
    "VolumeError",
    "WrongKindError",
    "WrongPassphraseError",
]

EX_OK = 0
EX_USAGE = 64
EX_DATAERR = 65
EX_UNAVAILABLE = 69
EX_SOFTWARE = 70
EX_OSERR = 71
EX_TEMPFAIL = 75
EX_PROTOCOL = 76
EX_NOPERM = 77
EX_CONFIG = 78


class Retry(enum.Enum):
    """What may follow an error, as the daemon's `plan` reads it."""

    NEVER = "never"
    """Trying again cannot help; the caller must change something."""
    BACKOFF = "backoff"
    """Likely to pass: try again after a jittered, growing delay."""
    SLOW = "slow"
    """Refused by policy, which the owner may mend: try again every few minutes."""
    OPERATOR = "operator"
    """Only an operator or a new file can help (integrity)."""


class TdxdError(Exception):
    """Base of all expected errors.

    `message` names the object and the value; `hint` says what to do, or is empty.
    """

    code: ClassVar[str] = "error"
    retry: ClassVar[Retry] = Retry.NEVER
    exit_code: ClassVar[int] = EX_SOFTWARE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TdxdError):
    """The command line is wrong."""

    code = "usage"
    exit_code = EX_USAGE


class ConfigError(TdxdError):
    """A configuration or policy file is wrong; the message names the key path."""

    code = "config"
    exit_code = EX_CONFIG


class DataError(TdxdError):
    """A file that the user named does not hold what it should."""

    code = "data"
    exit_code = EX_DATAERR


class UnavailableError(TdxdError):
    """A program of ours that should answer does not."""

    code = "unavailable"
    exit_code = EX_UNAVAILABLE


class NotAllowedError(TdxdError):
    """The caller has no right to do this."""

    code = "not-allowed"
    exit_code = EX_NOPERM


class ReexecError(TdxdError):
    """The daemon does not give way to its new program now, or is just about to.

    A command that it interrupts may be given again.
    """

    code = "reexec"
    retry = Retry.BACKOFF
    exit_code = EX_TEMPFAIL


# --- the wire -----------------------------------------------------------------


class ProtocolError(TdxdError):
    """A message breaks its protocol."""

    code = "protocol"
    exit_code = EX_PROTOCOL


class LocalProtocolError(ProtocolError):
    """We were about to send what the protocol forbids."""

    code = "protocol-local"


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol forbids."""

    code = "protocol-remote"
    retry = Retry.BACKOFF


# --- evidence -----------------------------------------------------------------


class EvidenceError(TdxdError):
    """No usable quote."""

    code = "evidence"
    retry = Retry.BACKOFF
    exit_code = EX_TEMPFAIL


class EvidenceUnavailableError(EvidenceError):
    """The platform gives no quote now."""

    code = "evidence-unavailable"


class EvidenceMalformedError(EvidenceError):
    """Bytes that should be a quote or an event log are not."""

    code = "evidence-malformed"
    exit_code = EX_DATAERR


class RecordError(EvidenceError):
    """The record of what RTMR3 was extended with does not explain RTMR3, or can hold no more."""

    code = "runtime-record"
    retry = Retry.OPERATOR
    exit_code = EX_DATAERR


# --- key release --------------------------------------------------------------


class KeyReleaseError(TdxdError):
    """No key."""

    code = "key-release"
    retry = Retry.BACKOFF
    exit_code = EX_TEMPFAIL


class UnreachableError(KeyReleaseError):
    """No key server answered."""

    code = "key-server-unreachable"


class DeniedError(KeyReleaseError):
    """The key server's policy refuses."""

    code = "key-denied"
    retry = Retry.SLOW
    exit_code = EX_NOPERM


class BadBundleError(KeyReleaseError):
    """The key server's answer does not prove itself, or does not fit the volume."""

    code = "key-bad-bundle"
    exit_code = EX_DATAERR


class StaleSecretError(KeyReleaseError):
    """What the key server releases is older than what this guest had already."""

    code = "secret-stale"
    retry = Retry.SLOW


class WrongKindError(BadBundleError):
    """The id is that of something else than the configuration says."""

    code = "key-wrong-kind"
    retry = Retry.SLOW
    exit_code = EX_CONFIG


# --- volumes ------------------------------------------------------------------


class VolumeError(TdxdError):
    """A volume cannot be opened or closed."""

    code = "volume"
    retry = Retry.BACKOFF
    exit_code = EX_TEMPFAIL


class MissingError(VolumeError):
    """The image file is not there."""

    code = "volume-missing"


class BusyError(VolumeError):
    """Somebody still uses the volume."""

    code = "volume-busy"


class BadHeaderError(VolumeError):
    """The file is not an image of the expected kind."""

    code = "volume-bad-header"
    retry = Retry.OPERATOR
    exit_code = EX_DATAERR


class IntegrityError(VolumeError):
    """The image's content is not what the owner sealed."""

    code = "volume-integrity"
    retry = Retry.OPERATOR
    exit_code = EX_DATAERR


class WrongPassphraseError(VolumeError):
    """No keyslot of a foreign volume opens with the passphrase."""

    code = "volume-passphrase"
    retry = Retry.OPERATOR
    exit_code = EX_DATAERR


class PassphraseNeededError(VolumeError):
    """An operator must bring the passphrase of a foreign volume."""

    code = "passphrase-needed"
    retry = Retry.OPERATOR
    exit_code = EX_NOPERM


class StalledError(VolumeError):
    """A disk or the kernel does not let go of a step of a volume; it may still end."""

    code = "volume-stalled"


# --- serving ------------------------------------------------------------------


class ServeError(TdxdError):
    """The model cannot be served."""

    code = "serve"
    retry = Retry.BACKOFF
    exit_code = EX_TEMPFAIL


class RefusedGenerationError(ServeError):
    """A new generation of a volume cannot be served, and an older one still is."""

    code = "generation-refused"
    retry = Retry.OPERATOR


class ServerExitedError(ServeError):
    """A child ended by itself."""

    code = "serve-exited"


class NotReadyError(ServeError):
    """A child runs but its models are not available."""

    code = "serve-not-ready"


class NoRoomError(ServeError):
    """There is no memory for a second model server beside the one that runs."""

    code = "serve-no-room"


class CrowdedError(ServeError):
    """Too many ask for the same at once."""

    code = "serve-crowded"


class NotAttestedError(TdxdError):
    """What answers at an endpoint does not prove that it is what the client's policy wants."""

    code = "not-attested"
    exit_code = EX_NOPERM


class HostError(TdxdError):
    """The operating system refused an operation.

    `op` names the call, `path` its object, `errno` the kernel's number (0 if there is none).
    """

    code = "host"
    retry = Retry.BACKOFF
    exit_code = EX_OSERR

    def __init__(self, op: str, path: str, errno: int, *, hint: str = "") -> None:
        reason = os.strerror(errno) if errno else "failed"
        super().__init__(f"{op} {path}: {reason}", hint=hint)
        self.op = op
        self.path = path
        self.errno = errno

    @classmethod
    def of(cls, op: str, path: str, exc: OSError, *, hint: str = "") -> HostError:
        """Convert the `OSError` of one system call."""
        return cls(op, path, exc.errno or 0, hint=hint)
