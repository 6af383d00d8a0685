"""The mini world: determinism, what is held out, the palette's truth in the pixels, captions, and CIELAB."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import resvg_py
from PIL import Image

from train.colour import NAMES, Array, coarse_name, fine_name, hue_of, lab_to_srgb, lch, srgb_to_lab
from train.drawings import drawing, fill_colours, hex_to_rgb, recolour, rgb_to_hex
from train.spoiled import OTHERS
from train.world import (
    BACKGROUND_NAMES,
    BACKGROUNDS,
    CONCEPT_NAMES,
    CONCEPTS,
    HELD_OUT_HUES,
    PLACES,
    SIDES,
    SIZE,
    SIZES,
    Says,
    Scene,
    Split,
    World,
    article,
    caption,
    elsewhere,
    held_out_pair,
    move_randomly,
    pictures,
    place_class,
    render,
    size_class,
)

ROOT = Path(__file__).parent.parent
COUNT = 2000
DRAWINGS = [(name, i) for name, codes in CONCEPTS.items() for i in range(len(codes))]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    world = World("train")
    return [world[i] for i in range(COUNT)]


def plain(scene: Scene) -> list[object]:
    """The scene as JSON can hold it, every float to its last digit."""
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in astuple(scene)]


def scene_of(name: str, drawing: int = 0, palette: Array | None = None) -> Scene:
    """A drawing as large as it gets, not mirrored, on a colour that is no drawing's."""
    return replace(
        World()[0],
        concept=CONCEPT_NAMES.index(name),
        drawing=drawing,
        background=0,
        background_rgb=np.array([0.9, 0.2, 0.9]),
        palette=np.stack([lch(62, 55, 30), lch(68, 45, 260)]) if palette is None else palette,
        size=62,
        x=1,
        y=1,
        mirror=False,
    )


def bytes_of(lab: Array) -> tuple[int, ...]:
    return tuple(int(v) for v in np.rint(lab_to_srgb(lab).clip(0, 1) * 255))


def paint(code: str, palette: Array) -> str:
    """The recoloured SVG."""
    svg, fills = drawing(code)
    return recolour(svg, dict(zip(fills, map(rgb_to_hex, fill_colours(code, palette)), strict=True)))


def painted(code: str, palette: Array, side: int) -> Array:
    """The recoloured SVG as resvg draws it, RGBA in [0, 1]."""
    png = resvg_py.svg_to_bytes(svg_string=paint(code, palette), width=side, height=side)
    return np.array(Image.open(io.BytesIO(png)).convert("RGBA")) / 255


def colours_in(picture: Array) -> Counter[tuple[int, ...]]:
    """How many pixels of `... 3` bytes have each colour."""
    values, counts = np.unique(picture.reshape(-1, 3).astype(int) @ [65536, 256, 1], return_counts=True)
    return Counter({(v >> 16, v >> 8 & 255, v & 255): n for v, n in zip(values.tolist(), counts.tolist(), strict=True)})


# the list


def test_enough_of_everything() -> None:
    assert len(CONCEPTS) >= 64 and len(BACKGROUNDS) == 10
    assert sum(len(codes) >= 2 for codes in CONCEPTS.values()) >= 20
    codes = [code for codes in CONCEPTS.values() for code in codes]
    assert len(set(codes)) == len(codes)


def test_no_concept_is_named_by_a_colour() -> None:
    for concept in CONCEPT_NAMES:
        assert not [colour for colour in {*NAMES, *BACKGROUND_NAMES, "black", "brown"} if colour in concept], concept


def test_every_colour_word_is_a_background() -> None:
    assert set(NAMES) < set(BACKGROUND_NAMES)


# determinism and splits


def test_a_scene_is_the_same_in_any_order_and_object(scenes: list[Scene]) -> None:
    assert [plain(World("train")[i]) for i in (1999, 0, 17)] == [plain(scenes[i]) for i in (1999, 0, 17)]


def test_a_scene_is_the_same_in_another_process(scenes: list[Scene]) -> None:
    code = """
import json
from dataclasses import astuple
from train.world import World, render
plain = lambda scene: [v.tolist() if hasattr(v, "tolist") else v for v in astuple(scene)]
scenes = [World("train")[i] for i in (3, 40)]
print(json.dumps([[plain(scene), int(render(scene).astype(int).sum())] for scene in scenes]))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(process.stdout) == [[plain(scenes[i]), int(render(scenes[i]).astype(int).sum())] for i in (3, 40)]


def test_splits_share_no_scene(scenes: list[Scene]) -> None:
    seen = {tuple(scene.palette.flatten()) for scene in scenes}
    assert len(seen) == COUNT
    for split in ("val", "test"):
        others = [World(split)[i] for i in range(300)]
        assert not seen & {tuple(scene.palette.flatten()) for scene in others}
        assert plain(others[0]) != plain(scenes[0])
    assert plain(World("val")[0]) != plain(World("test")[0])


def test_train_has_no_held_out_pair_or_hue(scenes: list[Scene]) -> None:
    assert not [scene for scene in scenes if held_out_pair(scene.concept, scene.background)]
    low, high = HELD_OUT_HUES
    assert not [colour for scene in scenes for colour in scene.palette if low + 1e-9 < hue_of(colour) < high - 1e-9]


def test_train_has_everything_else(scenes: list[Scene]) -> None:
    pairs = {(scene.concept, scene.background) for scene in scenes}
    assert len(pairs) > 0.9 * 9 * len(CONCEPTS)
    assert {(CONCEPT_NAMES[scene.concept], scene.drawing) for scene in scenes} == set(DRAWINGS)
    assert {coarse_name(scene.palette[0]) for scene in scenes} == set(NAMES)
    hues = np.histogram([hue_of(colour) for scene in scenes for colour in scene.palette], bins=36, range=(0, 360))[0]
    assert hues[20] + hues[21] == 0 and min([*hues[:19], *hues[22:]]) > 40  # ten degrees each; 196 to 220 is held out


@pytest.mark.parametrize(("split", "there"), [("val", False), ("test", True)])
def test_only_the_test_split_has_held_out_pairs(split: Split, there: bool) -> None:
    assert (
        any(held_out_pair(scene.concept, scene.background) for scene in (World(split)[i] for i in range(200))) == there
    )


def test_one_background_is_held_out_for_each_concept() -> None:
    counts = [sum(held_out_pair(concept, background) for background in range(10)) for concept in range(len(CONCEPTS))]
    assert set(counts) == {1}


def test_palettes_are_colours_that_sRGB_shows_and_far_apart(scenes: list[Scene]) -> None:
    palettes = np.stack([scene.palette for scene in scenes])
    rgb = lab_to_srgb(palettes)
    assert rgb.min() >= -1e-9 and rgb.max() <= 1 + 1e-9
    assert np.linalg.norm(palettes[:, 0] - palettes[:, 1], axis=-1).min() > 20
    assert palettes[..., 0].min() >= 50 and palettes[..., 0].max() <= 80


def test_placement_is_inside_the_picture(scenes: list[Scene]) -> None:
    assert all(0 <= scene.x <= SIZE - scene.size and 0 <= scene.y <= SIZE - scene.size for scene in scenes)
    assert 0.45 < np.mean([scene.mirror for scene in scenes]) < 0.55


# the palette's truth


@pytest.mark.parametrize(("name", "i"), DRAWINGS)
def test_both_palette_colours_are_in_the_pixels(name: str, i: int) -> None:
    scene = scene_of(name, i)
    counts = colours_in(render(scene))
    first, second = (counts[bytes_of(colour)] for colour in scene.palette)
    assert first > 60 and second > 15, f"{first} and {second} pixels"


@pytest.mark.parametrize(("name", "i"), DRAWINGS)
def test_the_first_colour_has_the_largest_area(name: str, i: int) -> None:
    """Or one as large: measured at 240 pixels, where few are a mixture of two colours."""
    palette = scene_of(name).palette
    rgba = np.rint(255 * painted(CONCEPTS[name][i], palette, 240))
    fills = Counter(
        {colour: n for colour, n in colours_in(rgba[rgba[..., 3] == 255][:, :3]).items() if sum(colour) > 60}
    )
    assert fills[bytes_of(palette[0])] >= 0.95 * max(fills.values()), fills.most_common(3)


@pytest.mark.parametrize(("name", "i"), DRAWINGS)
def test_black_stays_and_other_colours_go(name: str, i: int) -> None:
    """Against the drawing as OpenMoji made it: equal black pixels, and no pixel left of its own fills."""
    scene = scene_of(name, i)
    svg, fills = drawing(CONCEPTS[name][i])
    png = resvg_py.svg_to_bytes(svg_string=svg, width=scene.size, height=scene.size)
    own = np.array(Image.open(io.BytesIO(png)).convert("RGBA"))
    before = np.full((SIZE, SIZE, 3), 255)
    before[1:63, 1:63][own[..., 3] == 255] = own[own[..., 3] == 255][:, :3]
    after = render(scene)
    black = (before == 0).all(axis=-1)
    assert black.sum() > 60 and np.array_equal(black, (after == 0).all(axis=-1))
    left = colours_in(after)
    assert not [text for text in fills if left[hex_to_rgb(text)]]


@pytest.mark.parametrize(("name", "i"), DRAWINGS)
@pytest.mark.parametrize("side", [40, 53])
def test_a_picture_is_the_recoloured_svg(name: str, i: int, side: int) -> None:
    """Within 4 of 255, because layers are rounded to bytes one by one; the mean error is far below 1."""
    scene = replace(scene_of(name, i), size=side, x=3, y=7)
    rgba, background = painted(CONCEPTS[name][i], scene.palette, side), scene.background_rgb
    expected = rgba[..., :3] * rgba[..., 3:] + background * (1 - rgba[..., 3:])
    error = np.abs(render(scene)[7 : 7 + side, 3 : 3 + side] - 255 * expected)
    assert error.max() < 4.5 and error.mean() < 0.6


def test_other_drawings_can_be_rendered_and_show_no_concept() -> None:
    known = {code for codes in CONCEPTS.values() for code in codes}
    assert not known & set(OTHERS) and len(set(OTHERS)) == len(OTHERS)
    scene = scene_of("fox")
    for code in OTHERS:
        assert (render(scene, code) != render(scene)).any() and (render(scene, code) != render(scene)[0, 0]).any()


def test_shades_keep_their_order_of_lightness() -> None:
    palette = scene_of("fox").palette
    for name, i in DRAWINGS:
        code = CONCEPTS[name][i]
        _, fills = drawing(code)
        if len(fills) < 3:
            continue
        before = [float(srgb_to_lab(np.array(hex_to_rgb(text)) / 255)[0]) for text in fills[1:]]
        svg = paint(code, palette)
        after = [palette[1][0] + np.clip((x - before[0]) / 3, -18, 18) for x in before]
        for lightness in after:
            rgb = bytes_of(np.array([lightness, *palette[1][1:]]))
            assert "#%02x%02x%02x" % rgb in svg, f"{name}, drawing {i}"  # noqa: UP031
        assert all(
            (a <= b) == (x <= y) or x == y
            for a, x in zip(before, after, strict=True)
            for b, y in zip(before, after, strict=True)
        )


def test_swapped_palettes_swap_the_colours() -> None:
    scene = scene_of("owl")
    swapped = replace(scene, palette=scene.palette[::-1])
    first, second = (bytes_of(colour) for colour in scene.palette)
    counts, other = colours_in(render(scene)), colours_in(render(swapped))
    assert counts[first] == other[second] and counts[second] == other[first]


def test_rendering_is_deterministic_and_mirrors() -> None:
    scene = replace(scene_of("fish"), x=0, y=2)
    picture = render(scene)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, render(scene))
    mirrored = render(replace(scene, mirror=True))
    assert not np.array_equal(picture, mirrored)
    assert np.array_equal(picture[2:, :62], mirrored[2:, :62][:, ::-1])
    assert np.array_equal(pictures([scene, scene])[1], picture)


def test_background_is_the_scene_s(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        picture, expected = render(scene), np.rint(scene.background_rgb * 255)
        corners = [picture[y, x] for y in (0, -1) for x in (0, -1)]
        assert sum(np.array_equal(corner, expected) for corner in corners) >= 3
        named = np.array(BACKGROUNDS[BACKGROUND_NAMES[scene.background]]) / 255
        assert np.abs(srgb_to_lab(scene.background_rgb) - srgb_to_lab(named)).max() < 12


# captions


def test_how_often_captions_say_what(scenes: list[Scene]) -> None:
    concept = np.mean([CONCEPT_NAMES[s.concept] in s.caption for s in scenes])
    colour = np.mean([s.says_colour for s in scenes])
    background = np.mean([f"{BACKGROUND_NAMES[s.background]} background" in s.caption for s in scenes])
    assert concept == pytest.approx(0.9, abs=0.02) and background == pytest.approx(0.9, abs=0.02)
    assert colour == pytest.approx(0.5, abs=0.03)
    size = np.mean([s.says_size for s in scenes])
    place = np.mean([s.says_place for s in scenes if SIZES[s.size_class] != "large"])
    assert size == pytest.approx(0.5, abs=0.03) and place == pytest.approx(0.5, abs=0.04)
    assert not [s for s in scenes if s.says_place and SIZES[s.size_class] == "large"]


def test_captions_say_what_the_scene_says(scenes: list[Scene]) -> None:
    for scene in scenes[:500]:
        words = scene.caption.split(",")[0].split(" on ")[0] if scene.says_concept else ""
        colour = coarse_name(scene.palette[0])
        assert (colour in words.split()) == (scene.says_concept and scene.says_colour), scene.caption
        assert coarse_name(scene.palette[1]) not in words.split() or coarse_name(scene.palette[1]) == colour
        assert (CONCEPT_NAMES[scene.concept] in words) == scene.says_concept
        assert ("background" in scene.caption) == scene.says_background
        said = set(scene.caption.replace(",", "").split()) & set(SIZES)
        assert said == ({SIZES[scene.size_class]} if scene.says_size else set())
        assert (scene.caption.split(", ")[-1] in PLACES) == scene.says_place


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("fox",), "a fox"),
        (("owl",), "an owl"),
        (("fox", "orange"), "an orange fox"),
        (("owl", "purple"), "a purple owl"),
        (("fox", "purple", "pink"), "a purple fox on a pink background"),
        (("fox", None, "orange"), "a fox on an orange background"),
        (("ice cream", None, "grey"), "an ice cream on a grey background"),
        ((None, "purple", "pink"), "on a pink background"),
        ((None, None, "orange"), "on an orange background"),
        ((None,), ""),
        ((None, "purple"), ""),
        (("fox", None, "pink", "small", "top left"), "a small fox on a pink background, top left"),
        (("owl", "teal", None, "large"), "a large teal owl"),
        ((None, None, "pink", "small", "left"), "small on a pink background, left"),
        ((None, None, None, "medium"), "medium"),
        ((None, None, None, None, "top"), "top"),
    ],
)
def test_caption(parts: tuple[str | None, ...], expected: str) -> None:
    assert caption(*parts) == expected


def test_articles(scenes: list[Scene]) -> None:
    for words in ("an apple", "an umbrella", "a teal owl", "an octopus", "an orange background"):
        assert article(words.split(" ", 1)[1]) == words
    for scene in scenes[:500]:
        words = scene.caption.split()
        assert all((word == "an") == (after[0] in "aeiou") for word, after in pairwise(words) if word in ("a", "an"))


def test_rich_captions_tell_size_place_and_both_colours(scenes: list[Scene]) -> None:
    for scene in scenes[:300]:
        rich, third = scene.rich_caption, (SIZE - scene.size) / 3
        assert all(fine_name(colour) in rich for colour in scene.palette) and CONCEPT_NAMES[scene.concept] in rich
        assert rich.split()[1] == ("small" if scene.size < 48 else "large" if scene.size > 55 else "medium")
        place = rich.split(", ")[1]
        assert ("left" in place) <= (scene.x <= third + 1) and ("right" in place) <= (scene.x >= 2 * third - 1)
        assert ("top" in place) <= (scene.y <= third + 1) and ("bottom" in place) <= (scene.y >= 2 * third - 1)


def test_an_image_prompt_shows_the_scene_at_another_size_and_place(scenes: list[Scene]) -> None:
    """The same drawing in the same colours on the same background. Nothing about the new size and place follows from the old ones."""
    others = [move_randomly(scene) for scene in scenes]
    assert [plain(scene) for scene in others] == [plain(move_randomly(scene)) for scene in scenes]
    for old, new in zip(scenes, others, strict=True):
        assert plain(replace(new, size=old.size, x=old.x, y=old.y)) == plain(old)
        assert min(new.x, new.y) >= 0 and max(new.x, new.y) + new.size <= SIZE
    assert {new.size for new in others} == set(range(SIDES[0], SIDES[1] + 1))
    for at in (lambda s: s.size, lambda s: s.x / (SIZE + 1 - s.size), lambda s: s.y / (SIZE + 1 - s.size)):
        assert abs(np.corrcoef([at(scene) for scene in scenes], [at(scene) for scene in others])[0, 1]) < 4 / COUNT**0.5
    assert np.array_equal(elsewhere(scenes[0]), render(others[0]))


def test_sizes_and_places_are_equally_frequent() -> None:
    """Every size class has a third of all sides, and every cell of the grid a ninth of all positions, within one pixel."""
    sides = range(SIDES[0], SIDES[1] + 1)
    assert max(Counter(map(size_class, sides)).values()) - min(Counter(map(size_class, sides)).values()) <= 1
    for side in (40, 46, 50):
        room = range(SIZE - side + 1)
        counts = Counter(place_class(x, y, side) for x in room for y in room)
        assert counts.keys() == set(range(9)) and max(counts.values()) <= 2 * min(counts.values())
    assert PLACES[place_class(0, 24, 40)] == "bottom left" and PLACES[place_class(12, 0, 40)] == "top"
    assert [size_class(side) for side in (10.0, 43.2, 50.9, 99.0)] == [0, 0, 1, 2]


@pytest.mark.parametrize("says", [Says(0.0, 1.0, 0.3, 0.0), Says(0.5, 0.9, 1.0, 1.0), Says(1.0, 0.5, 0.0, 0.5)])
def test_captions_that_say_less_are_of_the_same_pictures(says: Says) -> None:
    plain_world, other = World("train"), World("train", says)
    pairs = [(plain_world[i], other[i]) for i in range(400)]
    names = ("says_concept", "says_background", "says_size", "says_place")
    assert all(plain(replace(a, **{name: getattr(b, name) for name in names})) == plain(b) for a, b in pairs)
    for name, share in zip(names[:3], astuple(says)[:3], strict=True):
        said = [getattr(b, name) for _, b in pairs]
        assert abs(np.mean(said) - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 1e-9
