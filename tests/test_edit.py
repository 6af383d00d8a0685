"""Image to image and inpainting against diffusers' pipelines: the same files, the same generators, the same picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from input_pictures import mask, picture
from PIL import Image
from small_models import BASES, Model, build
from tiny import difference

from sampling.dpm import DPM
from sampling.edit import Edit
from sampling.images import to_images, to_tensor
from sampling.loading import load
from sampling.pipeline import SAMPLERS, Pipeline

FOX, OWL = "A photo of a fox, 4k", "blurry; an owl"
LEVEL = 1  # of 255


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Pipeline, Model]]:
    """Build our and diffusers' pipeline of a small base model. "nine" is "sd15" with the UNet of an inpainting model."""
    made: dict[str, tuple[Pipeline, Model]] = {}

    def get(name: str) -> tuple[Pipeline, Model]:
        if name not in made:
            nine = replace(BASES["sd15"], unet=replace(BASES["sd15"].unet, in_channels=9))
            with pytest.MonkeyPatch.context() as m:
                m.setitem(BASES, "nine", nine)
                files = build(tmp_path_factory.mktemp(name), name)
            made[name] = load(files.base, files.adapters[0], files.encoder), files
        return made[name]

    return get


@dataclass(frozen=True)
class Ask:
    """What to draw: `num` pictures, from one picture for all of them or (`each`) one for each."""

    base: str = "sd15"
    sampler: str = "ddim"
    strength: float = 0.8
    steps: int = 6
    eta: float = 0.0
    num: int = 1
    size: tuple[int, int] = (16, 24)
    guidance: float = 3.0
    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    each: bool = False
    prompted: bool = False  # by a picture too
    seed: int = 11

    @property
    def pictures(self) -> list[Image.Image]:
        return [picture(self.size, i if self.each else 0) for i in range(self.num)]

    @property
    def masks(self) -> list[Image.Image]:
        return [mask(self.size, 9 + i if self.each else 9) for i in range(self.num)]


PROMPT = picture((30, 44), 5)


def ours(pipeline: Pipeline, ask: Ask, masked: bool, paste: bool = False) -> np.ndarray:
    given = ask.pictures if ask.each else ask.pictures[:1]
    masks = ask.masks if ask.each else ask.masks[:1]
    m = torch.cat([to_tensor(one) for one in masks]) / 2 + 0.5 if masked else None
    edit = Edit(torch.cat([to_tensor(one) for one in given]), ask.strength, m, paste)
    drawn = replace(pipeline, schedule=replace(pipeline.schedule, spacing=ask.spacing)).sample(
        [FOX] * ask.num,
        [ask.seed + i for i in range(ask.num)],
        pipeline.embed([PROMPT]) if ask.prompted else None,
        [OWL] * ask.num,
        scale=0.6,
        guidance=ask.guidance,
        steps=ask.steps,
        eta=ask.eta,
        sampler=SAMPLERS[ask.sampler],
        edit=edit,
    )
    return np.stack([np.asarray(one).astype(int) for one in to_images(drawn)])


def theirs(files: Model, ask: Ask, masked: bool) -> np.ndarray:
    peer = files.peers[ask.prompted]
    pipe: Any = (StableDiffusionInpaintPipeline if masked else StableDiffusionImg2ImgPipeline)(
        **peer.components, requires_safety_checker=False
    )
    kind = type(peer.scheduler) if ask.sampler == "ddim" else DPMSolverMultistepScheduler
    pipe.scheduler = kind.from_config(peer.scheduler.config, timestep_spacing=ask.spacing)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_: None  # it wants multiples of 8, whatever the VAE's factor
    extra: dict[str, Any] = {}
    if masked:
        extra = {"mask_image": ask.masks, "height": ask.size[0], "width": ask.size[1]}
    if ask.prompted:
        pipe.set_ip_adapter_scale(0.6)
        extra["ip_adapter_image"] = [[PROMPT]]
    drawn = pipe(
        [FOX] * ask.num,
        negative_prompt=[OWL] * ask.num,
        image=ask.pictures,
        strength=ask.strength,
        num_inference_steps=ask.steps,
        guidance_scale=ask.guidance,
        eta=ask.eta,
        generator=[torch.Generator().manual_seed(ask.seed + i) for i in range(ask.num)],
        **extra,
    ).images
    return np.stack([np.asarray(image).astype(int) for image in drawn])


Get = Callable[[str], tuple[Pipeline, Model]]
CHANGED = [Ask(strength=strength) for strength in (0.3, 0.5, 0.8, 1.0)]
CHANGED += [replace(ask, sampler="dpm++") for ask in CHANGED] + [replace(ask, eta=1.0) for ask in CHANGED]
CHANGED += [
    Ask(num=3, eta=1.0, strength=0.5),
    Ask(num=3, each=True, sampler="dpm++", strength=0.7),
    Ask(num=2, each=True, eta=0.5, size=(14, 22), strength=1.0),
    Ask(guidance=1.0, strength=0.5, prompted=True),
]
ELSEWHERE = [
    Ask("wide", size=(20, 36), steps=7, strength=0.5),
    Ask("wide", "dpm++", size=(28, 12), num=2, steps=20, strength=0.3),
    Ask("sd21", strength=0.6, eta=1.0),
    Ask("sd21", "dpm++", strength=0.6, steps=13),
    Ask(spacing="trailing", strength=0.55),
    Ask(spacing="linspace", strength=0.55, eta=1.0),
    Ask(sampler="dpm++", spacing="trailing", strength=0.55),
    Ask(sampler="dpm++", spacing="linspace", strength=0.55),
]


def same(get: Get, ask: Ask, masked: bool) -> None:
    pipeline, files = get(ask.base)
    want, got = theirs(files, ask, masked), ours(pipeline, ask, masked)
    assert want.shape == (ask.num, *ask.size, 3)
    assert difference(got, want) <= LEVEL
    assert want.std() > 20 and ((want == 0) | (want == 255)).mean() < 0.5  # neither grey nor cut off


@pytest.mark.parity("diffusers StableDiffusionImg2ImgPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("ask", [*CHANGED, *ELSEWHERE], ids=str)
def test_image_to_image_is_diffusers(model: Get, ask: Ask) -> None:
    same(model, ask, masked=False)


@pytest.mark.parity("diffusers StableDiffusionInpaintPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("ask", [*CHANGED, *ELSEWHERE], ids=str)
def test_inpainting_is_diffusers(model: Get, ask: Ask) -> None:
    same(model, ask, masked=True)


@pytest.mark.parity("diffusers StableDiffusionInpaintPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("ask", CHANGED, ids=str)
def test_a_network_that_inpaints_is_diffusers(model: Get, ask: Ask) -> None:
    same(model, replace(ask, base="nine"), masked=True)


@pytest.mark.parametrize("base", ["sd15", "nine"])
def test_pasting_keeps_pixels_outside_the_mask(model: Get, base: str) -> None:
    """Where the mask is black, pixels are unchanged; where it is white, they are those drawn; grey interpolates linearly."""
    pipeline, _ = model(base)
    ask = Ask(base, num=2, each=True)
    raw, pasted = ours(pipeline, ask, True), ours(pipeline, ask, True, paste=True)
    old = np.stack([np.asarray(one).astype(int) for one in ask.pictures])
    share = np.stack([np.asarray(one) for one in ask.masks])[..., None] / 255
    black, white = (np.broadcast_to(share == level, raw.shape) for level in (0, 1))
    assert (pasted[black] == old[black]).all() and (pasted[white] == raw[white]).all()
    assert np.abs(pasted - ((1 - share) * old + share * raw)).max() <= 1
    assert np.abs(raw - old)[black].max() > 10  # the autoencoder alone changes that much


def test_pictures_do_not_depend_on_their_batch(model: Get) -> None:
    pipeline, _ = model("nine")
    together = ours(pipeline, Ask(num=3, eta=1.0, seed=4), True)
    assert difference(together[2:], ours(pipeline, Ask(eta=1.0, seed=6), True)) <= 1


def test_a_white_mask_at_strength_one_ignores_the_picture(model: Get) -> None:
    """Everything is repainted from noise alone, so the drawing does not depend on the old picture."""
    pipeline, _ = model("sd15")
    white = torch.ones(1, 1, 16, 24)
    pixels = [to_tensor(picture((16, 24), seed)) for seed in (0, 1)]
    drawn = [pipeline.sample([FOX], [3], steps=3, edit=Edit(one, 1.0, white)) for one in pixels]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_strength_out_of_its_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1"):
        Edit(torch.zeros(1, 3, 8, 8), strength)


def edit(height: int, width: int, b: int = 1, masks: int = 0) -> Edit:
    return Edit(torch.zeros(b, 3, height, width), 0.5, torch.ones(masks, 1, height, width) if masks else None)


@pytest.mark.parametrize(
    ("base", "given", "options", "message"),
    [
        ("sd15", edit(15, 24), {}, "multiples of 2, not 24 x 15"),
        ("sd15", edit(16, 24), {"size": (24, 16)}, "the size is 16 x 24, but the picture to change is 24 x 16"),
        ("sd15", edit(16, 24), {"steps": 1}, "strength 0.5 of 1 steps is less than one step"),
        ("sd15", edit(16, 24, b=3), {}, "3 pictures or masks to change do not match 2 prompts"),
        ("sd15", edit(16, 24, masks=3), {}, "3 pictures or masks to change do not match 2 prompts"),
        ("nine", None, {}, "for inpainting: it needs both a picture and a mask"),
        ("nine", edit(16, 24), {}, "for inpainting: it needs both a picture and a mask"),
        ("sd15", edit(16, 24), {"sampler": DPM, "eta": 1.0}, "eta works only with DDIM"),
    ],
)
def test_inputs_that_do_not_match_are_rejected(
    model: Get, base: str, given: Edit | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(base)[0].sample([FOX] * 2, [0, 1], edit=given, **{"steps": 4} | options)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask is 24 x 16 and the picture 16 x 24: make them the same size"):
        Edit(torch.zeros(1, 3, 24, 16), mask=torch.ones(1, 1, 16, 24))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_levels_round_trip(mode: Literal["RGB", "L"]) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    image = Image.fromarray(levels).convert(mode)
    tensor = to_tensor(image)
    assert tensor.shape == (1, len(mode), 8, 32) and float(tensor.min()) == -1 and float(tensor.max()) == 1
    assert (np.asarray(to_images(tensor.expand(-1, 3, -1, -1))[0]) == levels[..., None]).all()
