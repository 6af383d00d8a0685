"""The drawings behind a point of the curves in RESULTS.md: one form at one lambda."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from PIL import Image

from checkpoints.adapters import load_adapter
from checkpoints.files import read_json
from eval.ablation.forms import FORMS
from eval.ablation.names import grid_name
from eval.ablation.study import Study, Workspace
from eval.bench import Bench
from sampling.images import to_images
from sampling.request import WEIGHTS
from train.card import ROOT
from train.setting import TrainingSource

SHOWN = 8  # prompts on a sheet
RESULTS, ADAPTERS = ROOT / "results" / "ablation.json", ROOT / "results" / "ablation"


def drawn_at(bench: Bench, file: Path, form: str, lam: float) -> list[Image.Image]:
    """Draw the prompts of the first task at lambda, with an adapter of a form."""
    adapter = load_adapter(file, bench.pipeline.unet).to(bench.pipeline.device) if lam else None
    return to_images(bench.draw(bench.prompts.tasks[0], adapter, FORMS[form].fuse, lam))


def grids() -> dict[str, list[float]]:
    """Return the lambdas of each form of the shipped study."""
    results = read_json(RESULTS)
    return {form: results["units"][grid_name(form)]["value"]["lambdas"] for form in results["study"]["forms"]}


@functools.cache
def shipped_bench() -> Bench:
    """Build the bench of the shipped study, with its first test prompts."""
    study = replace(Study.of(read_json(RESULTS)["study"]), device="cpu")
    return Workspace(study, TrainingSource(), ADAPTERS, Path(), str(WEIGHTS)).bench().first(SHOWN)


def point(form: str, lam: float) -> list[tuple[Image.Image, str]]:
    """Draw a point of the shipped study with seed 0: the pictures with their texts."""
    bench = shipped_bench()
    drawings = drawn_at(bench, ADAPTERS / f"{form}-0.safetensors", form, lam)
    return list(zip(drawings, bench.prompts.texts(bench.prompts.tasks[0]), strict=True))
