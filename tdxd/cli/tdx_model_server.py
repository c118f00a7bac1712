"""`tdx-model-server`: a drop-in for `tensorflow_model_server`."""

from __future__ import annotations

import sys

from tdxd.cli.boundary import run

__all__ = ["main"]


def main() -> int:
    """Run the program."""
    from tdxd.model_server.server import main as serve

    return run("tdx-model-server", serve)


if __name__ == "__main__":
    sys.exit(main())
