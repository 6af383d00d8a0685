"""Render the image prompts of the demo, and their outlines.  `python -m eval examples`"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from PIL import Image

from checkpoints.files import replacing
from train.outlines import outline
from train.world import CONCEPT_NAMES, Scene, World, pictures

COUNT = 12


def examples(folder: Path) -> None:
    """Write the first test pictures that show `COUNT` different concepts, and their outlines to `folder`/hints.

    Each file is named after its concept.
    """
    scenes: dict[str, Scene] = {}
    for i in range(1000):
        scene = World("test")[i]
        scenes.setdefault(CONCEPT_NAMES[scene.concept], scene)
        if len(scenes) == COUNT:
            break
    for name, scene in scenes.items():
        for place, pixels in ((folder, pictures([scene])[0]), (folder / "hints", outline(scene))):
            with replacing(place / f"{name.replace(' ', '_')}.png") as part:
                Image.fromarray(pixels).save(part, "PNG")


def run(args: Namespace) -> None:
    """`python -m eval examples`"""
    examples(args.out)
