"""What the three packages are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["PACKAGES", "Package"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One binary package.

    Its modules are those of `programs` (name in /usr/bin → module with `main`) and `parts` (whole
    subpackages of tdxd), and all that these import. `depends` leaves out Python and libc6, which
    follow from what is built.
    """

    name: str
    summary: str
    description: str
    programs: Mapping[str, str]
    parts: tuple[str, ...]
    man_pages: tuple[str, ...]
    depends: tuple[str, ...]
    recommends: tuple[str, ...] = ()
    suggests: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    """Empty directories, for the administrator to fill."""
    examples: tuple[str, ...] = ()
    """Files beside this one that go to the examples of the documentation."""
    monitoring: tuple[str, ...] = ()
    """Files of contrib/monitoring that go to the documentation, with docs/monitoring.md."""
    left_out_distributions: tuple[str, ...] = ()
    """What a dependency requires, but does not need for what is done here."""
    left_out_files: tuple[str, ...] = ()
    """Patterns below the private module directory."""

    @property
    def library(self) -> str:
        """The private module directory, below /."""
        return f"usr/lib/{self.name}/python"


_GUEST = Package(
    name="tdxd",
    summary="attested model volumes and model serving in a TDX guest",
    description="""\
tdxd proves by an Intel TDX quote what it runs in, receives the keys of sealed
model images from their owner's key server, opens and mounts the images, and
serves the models behind TLS. tdxctl shows and steers it.

The Python libraries that it needs are in a private directory.""",
    programs={"tdxd": "tdxd.cli.tdxd", "tdxctl": "tdxd.cli.tdxctl"},
    parts=("tdxd.guest", "tdxd.host"),
    man_pages=("tdxd.8", "tdxctl.1", "tdxd.toml.5"),
    depends=(
        "dmsetup",  # its udev rules make the names of mappings
        "haproxy (>= 2.6)",  # the front
        "kmod",  # the unit's modprobe@tdx_guest
        "libgcc-s1",
        "libssl3 | libssl3t64",  # libcrypto, by ctypes
        "libstdc++6",  # gRPC
        "systemd (>= 252)",  # sysusers and tmpfiles; the daemon is a service of it
        "util-linux (>= 2.33)",  # nsenter, and setpriv that knows --pdeathsig
    ),
    recommends=("tdxd-model-server | tensorflow-model-server", "udev"),
    directories=("etc/tdxd",),
    examples=("tdxd/tdxd.toml",),
    monitoring=("tdxd.rules.yml", "tdxd.dashboard.json"),
)

_OWNER = Package(
    name="tdxd-owner",
    summary="conversion and sealing of models, and the key server for tdxd",
    description="""\
tdx-convert makes SavedModels of frozen graphs.
tdx-seal makes encrypted, integrity-protected images of model directories.
tdx-keyd releases their keys to guests that prove themselves by an Intel TDX
quote. All run on a machine that the owner of the models trusts.

The Python libraries that they need are in a private directory.""",
    programs={
        "tdx-convert": "tdxd.cli.tdx_convert",
        "tdx-seal": "tdxd.cli.tdx_seal",
        "tdx-keyd": "tdxd.cli.tdx_keyd",
    },
    parts=("tdxd.owner",),
    man_pages=("tdx-convert.1", "tdx-seal.1", "tdx-keyd.8"),
    depends=(
        "erofs-utils (>= 1.5)",  # mkfs.erofs -x, -T, --all-root
        "ca-certificates",  # Intel's PCS is reached over https alone
        "systemd (>= 252) | systemd-standalone-sysusers",
        "libgcc-s1",
        "libssl3 | libssl3t64",
        "libstdc++6",
        "util-linux (>= 2.33)",  # setpriv that knows --pdeathsig
    ),
    suggests=(
        "cryptsetup-bin",
        "tdxd-model-server",  # its TensorFlow checks what tdx-convert made
    ),
    monitoring=("tdx-keyd.rules.yml", "tdx-keyd.dashboard.json"),
)

_MODEL_SERVER = Package(
    name="tdxd-model-server",
    summary="drop-in for TensorFlow Serving, for guests of tdxd",
    description="""\
tdx-model-server executes SavedModels with TensorFlow and answers as
tensorflow_model_server does, for guests where that cannot be installed.

TensorFlow, without what serving does not use, is in a private directory.""",
    programs={"tdx-model-server": "tdxd.cli.tdx_model_server"},
    parts=("tdxd.model_server",),
    man_pages=("tdx-model-server.1",),
    depends=("libgcc-s1", "libstdc++6"),
    suggests=("tdxd",),
    left_out_distributions=(
        "google-pasta",  # rewrites TensorFlow 1 sources
        "h5py",  # Keras' old file format
        "keras",  # trains; TensorFlow imports it where it is there, for 1.5 s
        "libclang",  # builds operations
        "setuptools",
        "wheel",
    ),
    left_out_files=(
        "tensorflow/compiler/mlir/stablehlo/stablehlo_extension.so",
        "tensorflow/compiler/tf2xla/ops/_xla_ops.so",
        "tensorflow/include/*",
        "tensorflow/xla_aot_runtime_src/*",
    ),
)

PACKAGES = {one.name: one for one in (_GUEST, _OWNER, _MODEL_SERVER)}
