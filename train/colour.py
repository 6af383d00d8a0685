"""Conversions between sRGB and CIELAB (D65, 2 degrees), and the colour names of the mini world."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

_TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
_TO_RGB = np.linalg.inv(_TO_XYZ)
_WHITE = _TO_XYZ.sum(axis=1)
_EPS, _KAPPA = 216 / 24389, 24389 / 27

# CIELAB hue (degrees) at which each coarse name begins; pink wraps around zero
HUES = {"red": 15, "orange": 50, "yellow": 82, "green": 112, "teal": 165, "blue": 230, "purple": 290, "pink": 330}
NAMES = tuple(HUES)
ISH = ("reddish", "orangish", "yellowish", "greenish", "tealish", "bluish", "purplish", "pinkish")
# each coarse name is split into four quarters: the first two lean towards the previous name, the last two towards the next
SECTORS = tuple(f"{word} {NAMES[i]}" for i in range(8) for word in (NAMES[i - 1], ISH[i - 1], ISH[(i + 1) % 8], NAMES[(i + 1) % 8]))
TONES, _TONE_EDGES, _TONE_MIDDLES = ("very dark", "dark", "", "light", "very light"), (56, 62, 68, 74), (53, 59, 65, 71, 77)
CHROMAS, _CHROMA_EDGES, _CHROMA_MIDDLES = ("dull", "", "vivid"), (45, 57), (42, 51, 63)
FINE_NAMES = tuple(" ".join(word for word in words if word) for words in itertools.product(TONES, CHROMAS, SECTORS))
_EDGES = np.array(list(HUES.values()))
_WIDTHS = np.diff(_EDGES, append=_EDGES[0] + 360)


def srgb_to_lab(rgb: Array) -> Array:
    """Convert sRGB in [0, 1], `... 3`, to CIELAB: L in [0, 100], a and b roughly in [-100, 100] (IEC 61966-2-1, CIE 15)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > _EPS, np.cbrt(xyz), (_KAPPA * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def tensor_to_lab(rgb: Tensor) -> Tensor:
    """Compute `srgb_to_lab` of a tensor `... 3`, on its device."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04) + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear.unbind(dim=-1)
    xyz = [a * red + b * green + c * blue for a, b, c in (_TO_XYZ / _WHITE[:, None]).tolist()]
    f = [torch.where(v > _EPS, v.clamp(min=_EPS) ** (1 / 3), (_KAPPA * v + 16) / 116) for v in xyz]
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])], dim=-1)


def lab_to_srgb(lab: Array) -> Array:
    """Convert CIELAB, `... 3`, to sRGB. Values outside [0, 1] are out of gamut; they are not clipped."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f**3 > _EPS, f**3, (116 * f - 16) / _KAPPA) * _WHITE
    linear = xyz @ _TO_RGB.T
    clipped: Array = np.maximum(linear, 0.0031308)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * clipped ** (1 / 2.4) - 0.055)


def to_bytes(rgb: Array) -> NDArray[np.uint8]:
    """Round values in [0, 1] to bytes; values outside are clipped."""
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def lch(lightness: float, chroma: float, hue: float) -> Array:
    """Return a CIELAB colour; reduce its chroma, in steps of 1, until sRGB can show it. `hue` is in degrees."""
    direction = np.array([0.0, np.cos(np.radians(hue)), np.sin(np.radians(hue))])
    chromas = np.append(np.arange(chroma, 0, -1), 0.0)
    candidates = np.array([lightness, 0.0, 0.0]) + chromas[:, None] * direction
    rgb = lab_to_srgb(candidates)
    displayable = np.all((rgb >= 0) & (rgb <= 1), axis=1) | (chromas == 0)
    return np.asarray(candidates[displayable.argmax()])


def hue_of(lab: Array) -> float:
    return float(np.degrees(np.arctan2(lab[2], lab[1])) % 360)


def coarse_name(lab: Array) -> str:
    """Name a colour by its hue alone, such as "teal"; there are eight names."""
    return NAMES[int(np.searchsorted(_EDGES, hue_of(lab), side="right")) - 1]


def fine_bin(lab: Array) -> int:
    """Return the index of a colour in `FINE_NAMES`, by its lightness, its chroma and its quarter of a coarse name."""
    i = int(np.searchsorted(_EDGES, hue_of(lab), side="right")) - 1
    quarter = int(4 * ((hue_of(lab) - _EDGES[i]) % 360) / _WIDTHS[i])
    tone, chroma = np.searchsorted(_TONE_EDGES, lab[0]), np.searchsorted(_CHROMA_EDGES, np.hypot(lab[1], lab[2]))
    return int((tone * len(CHROMAS) + chroma) * len(SECTORS) + 4 * (i % 8) + min(quarter, 3))


def fine_name(lab: Array) -> str:
    """Name a colour by lightness, chroma and hue, such as "very dark dull greenish teal". Only CLIP's captions use these names."""
    return FINE_NAMES[fine_bin(lab)]


def fine_colours() -> Array:
    """Return the CIELAB colour at the centre of each bin of `FINE_NAMES`, `480 3`."""
    hues = np.radians((_EDGES[:, None] + _WIDTHS[:, None] * (np.arange(4) + 0.5) / 4).flatten())
    lightness, chroma, hue = np.meshgrid(_TONE_MIDDLES, _CHROMA_MIDDLES, hues, indexing="ij")
    return np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1).reshape(-1, 3)
