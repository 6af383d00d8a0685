"""The comic style of the mini world: the same scenes, but each drawing casts a hard black shadow on its background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from train.colour import to_bytes
from train.drawings import fill_colours, layers
from train.world import CONCEPT_NAMES, CONCEPTS, SIZE, Scene, paste

SHADOW = 4  # offset of the shadow in pixels, to the right and down


def comic(scene: Scene) -> NDArray[np.uint8]:
    """Render a scene in the comic style, `64 64 3`.

    A pixel of the background is lit where the drawing, moved by `SHADOW`, is transparent.
    """
    code = CONCEPTS[CONCEPT_NAMES[scene.concept]][scene.drawing]
    fills, outlines, transparency = layers(code, scene.size)
    colours = fill_colours(code, scene.palette)[:, None, None] / 255
    layer = paste(scene, (fills * colours).sum(axis=0) + outlines, np.zeros((SIZE, SIZE, 3)))
    clear = paste(scene, transparency, np.ones((SIZE, SIZE, 1)))
    lit = np.ones_like(clear)
    lit[SHADOW:, SHADOW:] = clear[:-SHADOW, :-SHADOW]
    return to_bytes(layer + clear * lit * scene.background_rgb)
