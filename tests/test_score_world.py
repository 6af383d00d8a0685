"""`python -m eval world`: the choice of lambda, the comparisons without a model, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eval import world, world_rules
from eval.__main__ import main
from eval.bench import Bench, draw_prompts, embed
from eval.clip_score import Scorer
from eval.prompts import Prompts
from eval.scores import Scores
from eval.world_table import line, table
from sampling.loading import load

ROOT = Path(__file__).parent.parent


def row(lam: float, concept: float, background: float, error: float, right: float = 0.0) -> dict[str, Any]:
    scores = {"concept": concept, "background": background, "palette_error": error, "all": right}
    return {"lambda": lam, **{key: [value, value - 0.1, value + 0.1] for key, value in scores.items()}}


def test_the_lambda_is_the_best_of_those_that_follow_a_conflicting_text() -> None:
    rows = [row(0.2, 1, 1, 50), row(0.3, 0.9, 0.95, 40), row(0.4, 0.95, 0.89, 30), row(0.6, 0.85, 1, 20)]
    assert world_rules.best_conflict(rows)["lambda"] == 0.3
    assert world_rules.best_conflict(rows[2:])["lambda"] == 0.4, "if none follows often enough: the best lesser share"


def test_the_lambda_of_scenes_is_the_one_that_is_right_most_often() -> None:
    assert (
        world_rules.best_scene([row(0.4, 1, 1, 10, 0.5), row(0.8, 0, 0, 90, 0.7), row(1.0, 1, 1, 10, 0.6)])["lambda"] == 0.8
    )


def test_the_guidance_is_the_one_that_is_right_most_often_in_the_right_colours() -> None:
    rows = [row(0, 1, 1, 14, 0.8), row(1, 1, 1, 14.9, 0.85), row(2, 1, 1, 15.1, 0.9)]
    assert world_rules.best_apart(rows)["lambda"] == 1
    assert world_rules.best_apart([row(3, 1, 1, 17, 0.9), row(4, 1, 1, 16, 0.8)])["lambda"] == 4, "if none has the right colours"


def test_lambdas_are_chosen_on_other_prompts_and_by_their_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, tuple[str, ...], float]] = []

    def scores(_: object, task: world.Task, lam: float, name: str, text_guidance: float = 0.0) -> Scores:
        seen.append((name.split(",")[0], tuple(task.texts), lam))
        made = row(lam, 1.0, 1.0 if lam < 0.5 else 0.5, 2 * text_guidance if text_guidance else 50 - lam, lam + text_guidance)
        return {key: value for key, value in made.items() if key != "lambda"}

    monkeypatch.setattr(world.Measure, "draw", scores)
    nothing: Any = None
    chosen, sweep = world.choose_lambdas(world.Measure(nothing, nothing, 2, 4.0), 3)
    assert chosen == {"complementary": 1.0, "conflict": 0.4}
    assert [(name, lam) for name, _, lam in seen] == [(k, lam) for k, lams in world.LAMBDAS.items() for lam in lams]
    assert {key: [each["lambda"] for each in rows] for key, rows in sweep.items()} == {
        key: list(lams) for key, lams in world.LAMBDAS.items()
    }
    weight, rows = world.choose_text_guidance(world.Measure(nothing, nothing, 2, 4.0), 3)
    assert weight == 7.0 and [each["guidance"] for each in rows] == list(world.TEXT_GUIDANCE)
    test = world.tasks_of(3, seed=2)
    assert not {texts for _, texts, _ in seen} & {tuple(task.texts) for task in test.values()}


def test_tasks_with_pictures_are_those_with_a_lambda() -> None:
    tasks = world.tasks_of(4, seed=2)
    assert list(tasks) == ["text", "scene", "colour", "image", "complementary", "apart", "conflict"]
    assert [key for key, task in tasks.items() if task.images] == ["image", "complementary", "apart", "conflict"]
    assert tasks["scene"].target is tasks["complementary"].target and tasks["image"].target.references
    assert tasks["apart"] is tasks["complementary"]


def test_floors_equal_their_definitions() -> None:
    """The palettes of two prompts differ by (3, 4), so by 5, in both colours. The error of a grey of lightness 65 is its
    distance from all four colours."""
    palette = torch.tensor([[[60.0, 40, 0], [60, 0, 40]], [[60, 43, 4], [60, 3, 44]]])
    actual = world.floors(palette)
    assert actual["another"]["palette_error"] == pytest.approx([5, 5, 5])
    assert actual["grey"]["palette_error"][0] == pytest.approx((palette - torch.tensor([65.0, 0, 0])).norm(dim=-1).mean().item())


def test_the_table_shows_values_with_half_their_intervals() -> None:
    assert line({"concept": [0.938, 0.92, 0.95], "palette_error": [31.54, 30.6, 32.4]}) == {
        "concept": "93.8 ± 1.5 %",
        "palette error": "31.5 ± 0.9",
    }


@pytest.mark.parametrize("name", ["ip_adapter", "ip_adapter_plus"])
def test_pictures_encoded_together_are_those_encoded_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.bench.batch_size", lambda device: 2)
    pipeline = load(ROOT / "weights", ROOT / "weights" / f"{name}.safetensors")
    images = Prompts.of_the_world(3).images
    alone = torch.cat([pipeline.embed([image]) for image in images])
    together = embed(pipeline, images)
    assert together.shape == alone.shape
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


@pytest.mark.filterwarnings("ignore:these words are not in this model's vocabulary")
def test_the_world_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "VALIDATION", 2)
    monkeypatch.setattr(world, "LAMBDAS", {"complementary": (0.6,), "conflict": (0.3,)})
    monkeypatch.setattr(world, "TEXT_GUIDANCE", (8.0,))
    out = tmp_path / "world.json"
    command = ["eval", "--weights", str(ROOT / "weights"), "world", "--n", "4", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    main()
    results = json.loads(out.read_text())
    assert results["lambda"] == {"complementary": 0.6, "conflict": 0.3} and results["text_guidance"] == 8.0
    scores = results["scores"]
    assert all(low - 1e-9 <= value <= high + 1e-9 for each in scores.values() for value, low, high in each.values())
    assert (
        scores["true"]["background"][0] == 1 and scores["true"]["palette_error"][0] < scores["text"]["palette_error"][0]
    )
    assert {"size", "place", "all"} <= set(scores["complementary"]) & set(scores["scene"]) & set(scores["image"])
    assert "size" not in scores["conflict"] and "placement_error" in scores["image"]
    assert scores["apart"] != scores["complementary"]
    printed = capsys.readouterr().out
    assert table(results) in printed and len(table(results).splitlines()) == 2 + len(scores)


def test_seeds_image_prompts_and_hints_go_on_from_batch_to_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], Tensor, Tensor]] = []

    def sample(texts: list[str], seeds: list[int], embedding: Tensor, **given: Any) -> Tensor:
        seen.append((seeds, embedding, given["hints"][0].picture))
        return torch.zeros(len(texts), 3, 4, 4)

    fake: Any = SimpleNamespace(device=torch.device("cpu"), unet=nn.Linear(1, 1), native_size=(64, 64), controls=(0,), sample=sample)
    monkeypatch.setattr("eval.bench.batch_size", lambda *_: 2)
    given = torch.arange(3.0).view(3, 1, 1, 1)
    draw_prompts(fake, ["a", "b", "c"], given, 0.5, 3.0, 7, "a test", hints=given)
    seeds, embeddings, hints = zip(*seen, strict=True)
    assert [seed for batch in seeds for seed in batch] == [0, 1, 2]
    assert torch.equal(torch.cat(embeddings), given) and torch.equal(torch.cat(hints), given)


def test_a_drawing_of_the_picture_alone_is_scored_with_its_caption() -> None:
    prompts, asked = Prompts.of_the_world(2), list[list[str]]()

    def texts(captions: Any) -> Tensor:
        asked.append(list(captions))
        return torch.ones(len(captions), 2)

    bench: Any = Bench(None, prompts, Scorer("none", lambda pictures: torch.ones(len(pictures), 2), texts), None)  # type: ignore[arg-type]
    bench.read("picture", prompts.pixels)
    bench.read("conflict", prompts.pixels)
    assert asked == [prompts.texts("agreeing"), prompts.texts("conflict")]
