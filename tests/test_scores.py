"""Scores of drawings, their intervals, and complementary prompts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.scenes import ScenePrompts, other_class
from eval.scores import ANYWHERE, Target, all_drawings, mean, nearest, places_of, score_reading, share, sizes_of
from train.judge import Reading, ground_truth
from train.world import (
    BACKGROUND_NAMES,
    CONCEPT_NAMES,
    CONCEPTS,
    PLACES,
    SIZES,
    Scene,
    World,
    move_randomly,
    place_class,
    size_class,
)

TEXT = re.compile(r"(?:a (\w+) (.+)|(\w+)) on an? (\w+) background(?:, ([a-z ]+))?")


def scenes_of(n: int) -> list[Scene]:
    return [World("test")[i] for i in range(n)]


def perfect(scenes: list[Scene]) -> Reading:
    """Return the reading of a judge without errors. Its concept has a 65th class, "none of these"."""
    true = ground_truth(scenes)
    concept, background = torch.eye(65)[true["concept"]], torch.eye(10)[true["background"]]
    return Reading(concept, background, true["palette"], true["placement"].double())


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilson_s_interval(hits: int, n: int, low: float, high: float) -> None:
    """The values are those of Newcombe (1998), table I, method 3."""
    interval = share(torch.arange(n) < hits)
    assert interval == pytest.approx([hits / n, low, high], abs=5e-5)
    mirrored = share(torch.arange(n) >= hits)
    assert mirrored == pytest.approx([1 - interval[0], 1 - interval[2], 1 - interval[1]], abs=1e-12)


def test_means_have_the_normal_interval() -> None:
    half = 1.96 * (5 / 3) ** 0.5 / 2
    assert mean(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx([2.5, 2.5 - half, 2.5 + half], abs=1e-3)


def test_a_perfect_reading_is_right_in_everything() -> None:
    scenes = scenes_of(40)
    scores = {key: value for key, (value, _, _) in score_reading(perfect(scenes), Target.of_scenes(scenes)).items()}
    errors = {"palette_error": 0.0, "placement_error": 0.0}
    assert scores == {"concept": 1, "background": 1, "size": 1, "place": 1, "all": 1, **errors}


def test_the_first_of_a_target() -> None:
    target = Target.of_scenes(scenes_of(4)).first(2)
    assert target.references is not None and len(target.references) == len(target.concept) == 2


def test_each_mistake_affects_only_its_own_score() -> None:
    """Of ten small or medium drawings, one has no concept, one has another background, and one is moved by ten pixels."""
    scenes = [replace(scene, size=44, x=0, y=0) for scene in scenes_of(10)]
    reading, target = perfect(scenes), Target.of_scenes(scenes)
    reading.concept[0] = torch.eye(65)[64]
    reading.background[1] = reading.background[1].roll(1)
    reading.placement[2, 0] += 10
    scores = {key: value for key, (value, _, _) in score_reading(reading, target).items()}
    assert scores["placement_error"] == pytest.approx(1) and scores["palette_error"] == 0
    assert [scores[key] for key in ("concept", "background", "size", "place", "all")] == [0.9, 0.9, 1.0, 0.9, 0.7]


def test_a_large_drawing_may_be_anywhere() -> None:
    scenes = [replace(scene, size=58, x=0, y=0) for scene in scenes_of(4)]
    reading, target = perfect(scenes), Target.of_scenes(scenes)
    reading.placement[:, 0] += 6
    assert target.place is not None and (target.place == ANYWHERE).all()
    assert score_reading(reading, target)["place"][0] == 1


def test_sizes_and_places_are_those_of_the_scenes() -> None:
    """This holds for all whole-pixel placements, also if the judge is slightly off. Sides larger than the picture are allowed."""
    scenes = [replace(scene, x=i % (65 - scene.size), y=i % 3) for i, scene in enumerate(scenes_of(100))]
    placement = ground_truth(scenes)["placement"].double()
    expected = [place_class(scene.x, scene.y, scene.size) for scene in scenes]
    for off in (-0.2, 0.0, 0.2):
        assert places_of(placement + torch.tensor([off, off, 0.0])).tolist() == expected
    assert sizes_of(placement).tolist() == [size_class(scene.size) for scene in scenes]
    odd = torch.tensor([[32.0, 32.0, 90.0], [-5.0, 70.0, 40.0]])
    assert [PLACES[i] for i in places_of(odd)] == ["centre", "bottom left"] and sizes_of(odd).tolist() == [2, 0]


def test_texts_name_another_scene_and_nothing_else() -> None:
    """Parse the texts: background, size and place are those of the target, and differ from those of the picture."""
    prompts = ScenePrompts.of_the_world(640, seed=0)
    target = prompts.target
    assert target.size is not None and target.place is not None
    assert set(Counter(scene.concept for scene in prompts.scenes).values()) == {10}
    with_subject = prompts.texts(subject=True)
    for i, (scene, text) in enumerate(zip(prompts.scenes, prompts.texts(), strict=True)):
        for words in (text, with_subject[i]):
            match = TEXT.fullmatch(words)
            assert match, words
            size, concept, background, place = match[1] or match[3], *match.group(2, 4, 5)
            assert (size == "large") == (place is None)
            assert BACKGROUND_NAMES.index(background) == target.background[i] != scene.background
            assert SIZES.index(size) == target.size[i] != size_class(scene.size)
            if place is not None:
                assert PLACES.index(place) == target.place[i] != place_class(scene.x, scene.y, scene.size)
            assert concept == (CONCEPT_NAMES[scene.concept] if words is not text else None)
    assert torch.equal(target.concept, torch.tensor([scene.concept for scene in prompts.scenes]))
    palettes = np.stack([scene.palette for scene in prompts.scenes])
    np.testing.assert_allclose(target.palette, palettes, rtol=1e-6)


def test_what_texts_name_is_drawn_evenly() -> None:
    index = torch.arange(9).repeat(1000)
    classes = other_class(np.random.default_rng(0), index, 9)
    counts = torch.bincount(9 * index + classes, minlength=81).view(9, 9)
    assert counts.diagonal().sum() == 0 and counts[~torch.eye(9, dtype=torch.bool)].sub(125).abs().max() < 50


def test_prompts_depend_on_their_seed_alone() -> None:
    first, again, other = (ScenePrompts.of_the_world(20, seed=seed).texts(subject=True) for seed in (1, 1, 2))
    assert first == again != other


def test_nearest_finds_the_drawing() -> None:
    many = [i for i in range(200) if len(CONCEPTS[CONCEPT_NAMES[World("val")[i].concept]]) > 1][:6]
    scenes = [World("val")[i] for i in many]
    other = [replace(s, drawing=(s.drawing + 1) % len(all_drawings(s))) for s in scenes]
    for shown in (scenes, other, [move_randomly(s) for s in scenes], [move_randomly(s) for s in other]):
        placement = ground_truth(shown)["placement"] + torch.tensor([2.0, -2.0, 1.0])  # the judge is not exact
        assert nearest(scenes, torch.stack([all_drawings(s)[s.drawing] for s in shown]), placement) == [s.drawing for s in shown]
