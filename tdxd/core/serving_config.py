"""The table `[serving]`: the model server, what it serves and how, and the front before it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tdxd.core.address import parse_address
from tdxd.core.decode import plain
from tdxd.core.positive import check_positive
from tdxd.core.server_flags import check_extra_flag
from tdxd.core.volume_id import check_volume_id

__all__ = ["BatchingConfig", "ServedModelConfig", "ServingConfig"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """How the model server merges concurrent requests; what is absent the server decides."""

    max_batch_size: int | None = None
    """Rows of one batch."""
    timeout_s: float | None = None
    """How long a request waits for others."""
    max_enqueued_batches: int | None = None
    threads: int | None = None
    allowed_batch_sizes: tuple[int, ...] = ()
    """Sizes that batches are padded to, ascending; the last is `max_batch_size`."""

    def __post_init__(self) -> None:
        check_positive(self, "max_batch_size", "max_enqueued_batches", "threads")
        if self.timeout_s is not None and self.timeout_s < 0:
            msg = f"timeout_s {self.timeout_s} is negative"
            raise ValueError(msg)
        sizes = list(self.allowed_batch_sizes)
        if sizes != sorted({size for size in sizes if size > 0}):
            msg = f"allowed_batch_sizes {sizes} are not ascending from 1"
            raise ValueError(msg)
        if sizes and sizes[-1] != self.max_batch_size:
            msg = f"allowed_batch_sizes end with {sizes[-1]}, not with max_batch_size"
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModelConfig:
    """Which versions of one model are served, and the labels of some of them."""

    name: str
    policy: Literal["latest", "all", "specific"] = "latest"
    latest: int = 1
    """How many of the newest versions, for the policy `latest`."""
    versions: tuple[int, ...] = ()
    """Which, for the policy `specific`."""
    labels: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(self, "latest")
        if (self.policy == "specific") != bool(self.versions):
            msg = f"model {self.name}: versions are for policy 'specific', which needs some"
            raise ValueError(msg)
        for label, version in self.labels.items():
            if self.policy == "specific" and version not in self.versions:
                msg = f"model {self.name}: label {label!r} is for version {version}, not served"
                raise ValueError(msg)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """The model server and its TLS front. Absent from the config: nothing is served."""

    command: str | None = None
    """The model server; absent: `tensorflow_model_server` if installed, else the drop-in."""
    extra_flags: tuple[str, ...] = ()
    """More flags for it, `--name=value`; unknown ones are refused before it starts."""
    read_paths: tuple[str, ...] = ()
    """What it may read and execute besides the system's own programs, for one outside /usr."""
    model: tuple[ServedModelConfig, ...] = ()
    batching: BatchingConfig | None = None
    monitoring: bool = False
    """Whether metrics of the model server are shown, on `rest_listen`."""
    warmup: bool = True
    intra_op_threads: int | None = None
    inter_op_threads: int | None = None
    grpc_threads: int | None = None
    rest_threads: int | None = None
    memory_limit_bytes: int | None = None
    cpu_limit: float | None = None
    """How many processors' time each model server may use."""

    listen: str = "[::]:8500"
    rest_listen: str | None = None
    """Address of REST over HTTPS; absent: none."""
    tls_volume: str | None = None
    """The volume whose `tls/server.pem` the front uses; may be left out if there is one."""
    tls_secret: str | None = None
    """The secret that is the front's certificate, instead of one in a volume."""
    client_ca: Literal["volume", "secret"] | None = None
    """Clients need a certificate: of `tls/client-ca.pem` beside the server's own, or a secret's."""
    client_ca_secret: str | None = None
    """The secret with the authorities of clients."""
    user: str = "tdxd-serve"
    """Unprivileged user of the model server (`nobody` for trying out)."""
    front_user: str | None = None
    """The front's; absent: `tdxd-front` if it exists, else `user`."""
    haproxy: str = "haproxy"
    max_request_bytes: int = 128 * 2**20
    max_connections: int = 4096
    client_requests_per_s: int | None = None
    """How many requests per second one client address may send; absent: any number."""
    request_timeout_s: float = 600.0
    """How long the model server may take for an answer."""
    client_timeout_s: float = 60.0
    """How long a client may be silent within a request, or not take its answer."""
    idle_timeout_s: float = 600.0
    """How long a connection without requests is kept."""
    access_log: bool = False
    attest: bool = False
    """Whether clients may ask the front for a quote of this guest, on `listen`."""

    strategy: Literal["side-by-side", "replace-in-place"] = "side-by-side"
    """How a model server is replaced: by one beside it, or, to save memory, after its end."""
    ready_timeout_s: float = 300.0
    drain_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        parse_address(self.listen)
        if self.rest_listen is not None:
            parse_address(self.rest_listen)
        check_positive(self, *_POSITIVE)
        self._check_certificates()
        for flag in self.extra_flags:
            check_extra_flag(flag)
        for path in self.read_paths:
            if not path.startswith("/") or path.strip("/") == "":
                msg = f"read_paths: {path!r} is not an absolute path below /"
                raise ValueError(msg)
        names = [one.name for one in self.model]
        for name in names:
            if names.count(name) > 1:
                msg = f"model {name!r} stands twice"
                raise ValueError(msg)
        if self.monitoring and self.rest_listen is None:
            msg = "monitoring needs rest_listen, where it is shown"
            raise ValueError(msg)

    def _check_certificates(self) -> None:
        for secret in (self.tls_secret, self.client_ca_secret):
            if secret is not None:
                check_volume_id(secret)
        if self.tls_secret is not None and self.tls_volume is not None:
            msg = (
                f"tls_volume {self.tls_volume!r} and tls_secret {self.tls_secret!r} are both "
                "given: the front has one certificate"
            )
            raise ValueError(msg)
        if self.client_ca == "volume" and self.tls_secret is not None:
            msg = (
                "client_ca 'volume' is for a certificate in a volume: with tls_secret, set "
                "client_ca to 'secret' and client_ca_secret"
            )
            raise ValueError(msg)
        if (self.client_ca == "secret") != (self.client_ca_secret is not None):
            msg = "client_ca 'secret' and client_ca_secret need each other"
            raise ValueError(msg)

    def of_front(self) -> dict[str, object]:
        """Return what a front must be another process for, if it changes.

        Not where its certificates are from: it takes other ones while it runs.
        """
        made = {name: plain(getattr(self, name)) for name in _OF_FRONT}
        return made | {"client_ca": self.client_ca is not None}

    def of_server(self) -> dict[str, object]:
        """Return what a model server must be another process for, if it changes."""
        made = {name: plain(getattr(self, name)) for name in _OF_SERVER}
        return made | {"rest": self.rest_listen is not None}

    def versions_of(self, model: str) -> ServedModelConfig:
        """Return what is configured for a model, or the usual: its newest version."""
        known = (one for one in self.model if one.name == model)
        return next(known, ServedModelConfig(name=model))


_POSITIVE = (
    "intra_op_threads",
    "inter_op_threads",
    "grpc_threads",
    "rest_threads",
    "memory_limit_bytes",
    "cpu_limit",
    "max_request_bytes",
    "max_connections",
    "client_requests_per_s",
    "request_timeout_s",
    "client_timeout_s",
    "idle_timeout_s",
    "ready_timeout_s",
    "drain_timeout_s",
)
_OF_FRONT = (
    "listen",
    "rest_listen",
    "user",
    "front_user",
    "haproxy",
    "max_request_bytes",
    "max_connections",
    "client_requests_per_s",
    "request_timeout_s",
    "client_timeout_s",
    "idle_timeout_s",
    "access_log",
    "attest",
    "monitoring",
)
_OF_SERVER = (
    "command",
    "extra_flags",
    "read_paths",
    "model",
    "batching",
    "monitoring",
    "warmup",
    "intra_op_threads",
    "inter_op_threads",
    "grpc_threads",
    "rest_threads",
    "memory_limit_bytes",
    "cpu_limit",
    "user",
    "max_request_bytes",
    "request_timeout_s",
)
