"""`tdx-model-server`: a drop-in for `tensorflow_model_server`."""

from __future__ import annotations

import sys
from typing import NoReturn

from tdxd.cli.boundary import run

__all__ = ["main"]


def main() -> NoReturn:
    """Run the program."""
    from tdxd.model_server.server import main as serve

    sys.exit(run("tdx-model-server", serve))


if __name__ == "__main__":
    main()
