"""Draw IP-Adapter beside its rivals, as in Figures 3, 6 and 9 of the paper: one drawing of each prompt, at lambda 1.

Figures 3 and 9 have the first test prompts, and Figure 6 image prompts with outlines of other pictures. Nothing is selected.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from checkpoints.controls import load_control
from eval.ablation.reference import REFERENCE
from eval.ablation.rival import Rival, RivalPipeline
from eval.ablation.rival_draws import trained
from eval.ablation.rivals import WHOLE
from eval.ablation.study import SPLITS, Workspace
from eval.bench import Bench, draw_prompts
from eval.hinted import HintedPrompts
from sampling.images import save_image, to_images
from sampling.sheets.layout import sheet

SHOWN = 6  # prompts on a sheet
SHORT = {
    "ip_adapter": "IP-Adapter",
    "simple_mlp": "simple, MLP",
    "uni_controlnet": "Uni-ControlNet",
    "shuffle": "Shuffle",
    "unclip": "unCLIP",
    "variations": "Variations",
    REFERENCE: "reference-only",
}


Columns = dict[str, list[Image.Image]]


@dataclass(frozen=True)
class Painter:
    """Draws with all rivals: one drawing of each prompt, at lambda 1."""

    bench: Bench
    rivals: dict[str, Rival]

    def columns(self, task: str, images: list[Image.Image], texts: list[str], hints: Tensor | None = None) -> Columns:
        """Draw image prompts with texts and, with `hints`, the controls of the bench's pipeline. `task` names the progress bar."""
        return {SHORT[name]: self.draw(name, task, images, texts, hints) for name in self.rivals}

    def draw(self, name: str, task: str, images: list[Image.Image], texts: list[str], hints: Tensor | None) -> list[Image.Image]:
        rival, bench = self.rivals[name], self.bench
        pipeline, look = RivalPipeline.of(bench.pipeline, rival), rival.look(bench.pipeline, images)
        return to_images(draw_prompts(pipeline, texts, look, 1.0, bench.guidance, bench.steps, f"{name}, {task}", hints=hints))

    def steered(self, control: Path) -> Painter:
        """Return a painter with a ControlNet, without the rivals that trained the UNet."""
        pipeline = self.bench.pipeline
        model = load_control(control, pipeline.unet.config, factor=pipeline.vae.config.factor).to(pipeline.device)
        rivals = {name: rival for name, rival in self.rivals.items() if name not in WHOLE}
        return Painter(replace(self.bench, pipeline=replace(pipeline, controls=(model,))), rivals)


def write(workspace: Workspace, folder: Path) -> None:
    """Write figure_3.png (the image alone), figure_9.png (with a text) and, if the base has a ControlNet, figure_6.png (with outlines).

    If a rival was trained elsewhere, say so and write none.
    """
    bench = workspace.bench().first(SHOWN)
    try:
        painter = Painter(bench, {name: trained(workspace, name) for name in workspace.study.forms})
    except FileNotFoundError as error:
        print(f"The sheets are not drawn: {error}")
        return
    images, texts = bench.prompts.images, bench.prompts.texts("complementary")

    def save(number: int, title: str, left: Columns, right: Columns, notes: list[str]) -> None:
        rows = list(zip(*left.values(), *right.values(), strict=True))
        page = sheet([[*left], [*right]], rows, notes, note_at=len(left), title=f"Figure {number}: {title}")
        save_image(page, folder / f"figure_{number}.png", {"command": workspace.command})

    none = [""] * len(images)
    save(3, "the image prompt alone", {"image prompt": images}, painter.columns("picture", images, none), none)
    scenes = painter.columns("complementary", images, texts)
    save(9, "image prompt and text, which Variations does not read", {"image prompt": images}, scenes, texts)
    control = workspace.source.base / "controlnet.safetensors"
    if control.exists():
        prompts = HintedPrompts.of_the_world(len(images), SPLITS["test"])
        hints, images = prompts.hints.expand(-1, 3, -1, -1), prompts.images
        left = {"image prompt": images, "outlines": to_images(hints * 2 - 1)}
        save(6, "image prompt and outlines", left, painter.steered(control).columns("outlines", images, none, hints), none)
