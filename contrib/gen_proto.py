"""Generate the Python code of tdxd/proto/*.proto with grpcio-tools.

Run it from anywhere: `python contrib/gen_proto.py [OUTPUT_ROOT]`. The default root is the
repository; the tests generate into a temporary directory and compare.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROTOS = ("tdxd/proto/keyrelease.proto",)


def generate(root: Path) -> None:
    """Write `*_pb2.py` and `*_pb2.pyi` below `root`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    well_known = files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"-I{REPOSITORY}",
        f"-I{well_known}",
        f"--python_out={root}",
        f"--pyi_out={root}",
        *PROTOS,
    ]
    if protoc.main(arguments) != 0:
        sys.exit("gen_proto: error: protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY)
