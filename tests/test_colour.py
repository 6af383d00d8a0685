"""CIELAB, and the names of colours."""

from __future__ import annotations

import numpy as np
import pytest

from train.colour import HUES, NAMES, coarse_name, fine_name, hue_of, lab_to_srgb, lch, srgb_to_lab


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 0), (97.14, -21.55, 94.48)),
        ((0, 255, 255), (91.11, -48.09, -14.13)),
        ((255, 0, 255), (60.32, 98.23, -60.82)),
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((119, 119, 119), (50.03, 0.0, 0.0)),
        ((5, 5, 5), (1.37, 0.0, 0.0)),  # on the straight part of both curves
    ],
)
def test_lab_of_known_colours(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    np.testing.assert_allclose(srgb_to_lab(np.array(rgb) / 255), lab, atol=0.02)


def test_lab_round_trip() -> None:
    rgb = np.random.default_rng(0).uniform(0, 1, (7, 500, 3))
    rgb[0] *= 0.05  # dark ones
    np.testing.assert_allclose(lab_to_srgb(srgb_to_lab(rgb)), rgb, atol=1e-6)


def test_lch_keeps_hue_and_stays_in_the_gamut() -> None:
    for hue in range(0, 360, 7):
        colour = lch(60, 200, hue)
        rgb, chroma = lab_to_srgb(colour), float(np.hypot(colour[1], colour[2]))
        assert colour[0] == 60 and hue_of(colour) == pytest.approx(hue, abs=1e-6)
        assert rgb.min() >= 0 and rgb.max() <= 1 and 20 < chroma < 200
        more = lab_to_srgb(lch(60, chroma, hue) * [1, (chroma + 1) / chroma, (chroma + 1) / chroma])
        assert more.min() < 0 or more.max() > 1  # one more is outside


KNOWN = {
    "red": [(255, 0, 0), (220, 20, 60), (205, 92, 92)],
    "orange": [(255, 165, 0), (255, 140, 0), (210, 105, 30)],
    "yellow": [(255, 255, 0), (255, 215, 0), (189, 183, 107)],
    "green": [(0, 128, 0), (50, 205, 50), (60, 179, 113)],
    "teal": [(0, 128, 128), (32, 178, 170), (64, 224, 208)],
    "blue": [(30, 144, 255), (100, 149, 237), (70, 130, 180)],
    "purple": [(147, 112, 219), (128, 0, 128), (186, 85, 211)],
    "pink": [(255, 105, 180), (255, 20, 147), (219, 112, 147)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_coarse_names_of_known_colours(name: str) -> None:
    assert [coarse_name(srgb_to_lab(np.array(rgb) / 255)) for rgb in KNOWN[name]] == [name] * 3


def test_coarse_names_begin_at_their_hues() -> None:
    for i, (name, start) in enumerate(HUES.items()):
        at, before = (
            np.array([60, 50 * np.cos(np.radians(h)), 50 * np.sin(np.radians(h))]) for h in (start + 0.01, start - 0.01)
        )
        assert coarse_name(at) == name and coarse_name(before) == NAMES[i - 1]
    assert coarse_name(np.array([60, 50.0, 0.0])) == "pink"


def test_fine_names_refine_coarse_ones() -> None:
    colours = [
        np.array([light, chroma * np.cos(np.radians(h)), chroma * np.sin(np.radians(h))])
        for light in (53, 59, 65, 71, 77)
        for chroma in (40, 50, 65)
        for h in np.arange(0, 360, 0.5)
    ]
    assert all(fine_name(colour).split()[-1] == coarse_name(colour) for colour in colours)
    assert len({fine_name(colour) for colour in colours}) == 5 * 3 * 32
    greens = [fine_name(np.array([65, 50 * np.cos(np.radians(h)), 50 * np.sin(np.radians(h))])) for h in (115, 130, 145, 160)]
    assert greens == ["yellow green", "yellowish green", "tealish green", "teal green"]
