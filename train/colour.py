"""Conversions between sRGB and CIELAB (D65, 2 degrees), and the colour names of the mini world."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_TO_RGB = np.linalg.inv(_TO_XYZ)
_WHITE = _TO_XYZ.sum(axis=1)
_EPS, _KAPPA = 216 / 24389, 24389 / 27

# CIELAB hue (degrees) at which each coarse name begins; pink wraps around zero
HUES = {"red": 15, "orange": 50, "yellow": 82, "green": 112, "teal": 165, "blue": 230, "purple": 290, "pink": 330}
NAMES = tuple(HUES)
_EDGES = np.array(list(HUES.values()))


def srgb_to_lab(rgb: Array) -> Array:
    """Convert sRGB in [0, 1], `... 3`, to CIELAB: L in [0, 100], a and b roughly in [-100, 100] (IEC 61966-2-1, CIE 15)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > _EPS, np.cbrt(xyz), (_KAPPA * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def lab_to_srgb(lab: Array) -> Array:
    """Convert CIELAB, `... 3`, to sRGB. Values outside [0, 1] are out of gamut; they are not clipped."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f**3 > _EPS, f**3, (116 * f - 16) / _KAPPA) * _WHITE
    linear = xyz @ _TO_RGB.T
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def lch(lightness: float, chroma: float, hue: float) -> Array:
    """Return a CIELAB colour; reduce its chroma until sRGB can show it. `hue` is in degrees."""
    direction = np.array([0.0, np.cos(np.radians(hue)), np.sin(np.radians(hue))])
    base = np.array([lightness, 0.0, 0.0])
    while chroma > 0:
        rgb = lab_to_srgb(base + chroma * direction)
        if rgb.min() >= 0 and rgb.max() <= 1:
            break
        chroma -= 1.0
    return base + max(chroma, 0.0) * direction


def hue_of(lab: Array) -> float:
    return float(np.degrees(np.arctan2(lab[2], lab[1])) % 360)


def coarse_name(lab: Array) -> str:
    """Name a colour by its hue alone, such as "teal"; there are eight names."""
    return NAMES[int(np.searchsorted(_EDGES, hue_of(lab), side="right")) - 1]


def fine_bin(lab: Array) -> tuple[int, int]:
    """Return (tone, sector). Tone: 0 dark, 1 medium, 2 light. Sector, 0 .. 15: the half of a coarse name's hue range."""
    i = int(np.searchsorted(_EDGES, hue_of(lab), side="right")) - 1
    start, end = _EDGES[i], _EDGES[i + 1] if 0 <= i < 7 else _EDGES[0] + 360
    late = (hue_of(lab) - start) % 360 > ((end - start) % 360) / 2
    return (0 if lab[0] < 60 else 2 if lab[0] > 70 else 1), 2 * (i % 8) + int(late)


def fine_name(lab: Array) -> str:
    """Name a colour by hue and lightness; there are 48 names, read only by CLIP. "dark green teal": a dark teal, slightly green."""
    tone, sector = fine_bin(lab)
    return f"{('dark ', '', 'light ')[tone]}{NAMES[(sector // 2 + (1 if sector % 2 else -1)) % 8]} {NAMES[sector // 2]}"
