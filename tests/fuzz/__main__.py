"""Fuzzes one parser: python -m tests.fuzz NAME CORPUS [libFuzzer options].

What is found stands in CORPUS; an input that breaks a parser is written beside it, as crash-….
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["tdxd"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(
            f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} CORPUS [OPTION…]"
        )
    target = TARGETS[sys.argv[1]]
    corpus = Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
