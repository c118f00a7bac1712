"""The table of the 36 images in docs/threats.md is that of the images which the tests open."""

from __future__ import annotations

import re
from pathlib import Path

from tests.attacks.luks2_images import IMAGES

TEXT = (Path(__file__).parents[2] / "docs/threats.md").read_text(encoding="utf-8")


def test_each_image_has_its_line_and_its_verdict():
    section = TEXT.partition("\n## Attacks on foreign volumes\n")[2].partition("\n## ")[
        0
    ]
    told = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(\d\d-[\w-]+)`", cells[0]):
            assert name not in told, name
            told[name] = re.split(r"\W", cells[2])[0]
    assert told == {name: image.verdict for name, image in IMAGES.items()}
