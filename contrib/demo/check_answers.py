"""Compare a model's answers from elsewhere with the local model's, and with the truth.

    check_answers.py HELDOUT.npz ANSWERS.npy [GREATEST]

ANSWERS.npy holds what tdx-infer wrote for all held-out images in one request. Prints one line;
exits with 1 unless every answer equals the local model's, bit for bit, or differs by no more than
GREATEST: another processor sums in another order.
"""

from __future__ import annotations

import sys

import numpy as np


def main() -> int:
    """Run the program."""
    if len(sys.argv) not in (3, 4):
        usage = "HELDOUT.npz ANSWERS.npy [GREATEST]"
        print(f"usage: {sys.argv[0]} {usage}", file=sys.stderr)
        return 64
    with np.load(sys.argv[1]) as heldout:
        labels, local = heldout["labels"], heldout["answers_all"]
    answers = np.load(sys.argv[2])
    if answers.shape != local.shape:
        print(f"{answers.shape} answers, expected {local.shape}", file=sys.stderr)
        return 1
    accuracy = float((answers.argmax(axis=1) == labels).mean())
    same = int((answers == local).all(axis=1).sum())
    worst = float(np.abs(answers - local).max())
    print(
        f"{len(labels)} digits, accuracy {accuracy:.3f}, equal to the local model "
        f"{same}/{len(labels)}, greatest difference {worst:g}"
    )
    greatest = float(sys.argv[3]) if len(sys.argv) == 4 else 0.0
    return 0 if worst <= greatest else 1


if __name__ == "__main__":
    sys.exit(main())
