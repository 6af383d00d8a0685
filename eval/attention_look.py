"""Draw once, keep every attention map, and look at those of one step, layer and head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from eval.attention_maps import LayerMaps, name_maps, record
from model.attention import Fuse
from model.text_encoder import Text
from sampling.images import to_images
from sampling.pipeline import Pipeline
from sampling.request import Request
from sampling.sampler import State
from sampling.sheets.strip import Watch, sample

SIDE = 256
Cells = list[tuple[Image.Image, str]]


@dataclass(frozen=True, eq=False)
class Look:
    """A drawing, and the maps of its conditional pass in half precision: a list of layers for each step."""

    drawing: Image.Image
    prompt: str
    maps: list[list[LayerMaps]]

    def of(self, step: int, layer: int, head: int) -> tuple[Tensor, Tensor | None, bool]:
        """Return the maps `m y x` of a step, a layer and a head (all counted from 1; head 0 is their mean), the share of the picture
        in a joint softmax `y x`, or None, and whether there is an image prompt. Raises ValueError for a number that is not there.
        """
        for name, number, most in (("step", step, len(self.maps)), ("layer", layer, len(self.maps[0]))):
            if not 1 <= number <= most:
                raise ValueError(f"there are {most} {name}s, so there is no {name} {number}")
        one = self.maps[step - 1][layer - 1]
        if not 0 <= head <= one.text.shape[1]:
            raise ValueError(f"this layer has {one.text.shape[1]} heads, so there is no head {head}")
        heads = slice(None) if head == 0 else slice(head - 1, head)
        maps = one.picture(torch.cat([one.text, *one.image], dim=-1).float())[0, heads].mean(dim=0)
        mass = None
        if one.image_mass is not None:
            mass = one.image_mass[0, heads].float().mean(dim=0).reshape(one.grid)
        return maps, mass, bool(one.image)


def look(pipeline: Pipeline, request: Request, fuse: Fuse, watch: Watch | None = None) -> Look:
    """Draw the request once, with this `fuse`, and keep its maps."""
    steps: list[list[LayerMaps]] = []
    scale = request.image_prompts[0].scale if request.image_prompts else 1.0
    with record(pipeline.unet) as maps:

        def keep(state: State) -> None:
            steps.append([_conditional(one) for one in maps])
            maps.clear()
            if watch:
                watch(state)

        drawing = to_images(sample(pipeline, request, fuse, keep, scale, 1))[0]
    return Look(drawing.resize((SIDE, SIDE), Image.Resampling.LANCZOS), request.prompt, steps)


def cells(encoder: Text, look: Look, step: int, layer: int, head: int) -> tuple[Cells, str]:
    """Lay each map over the drawing. Returns the pictures with their names, and the image mass in a sentence."""
    from eval.attention_sheet import overlay, overlays  # imports matplotlib, which takes seconds

    maps, mass, has_prompt = look.of(step, layer, head)
    words, tokens = name_maps(encoder, look.prompt, maps)
    overlaid = overlays(look.drawing, [*words, *tokens])
    pictures = [(look.drawing, "the drawing"), *((heat, name.removesuffix(" of the attention")) for heat, name in overlaid)]
    if not has_prompt:
        return pictures, "There is no image prompt, so the text keeps all of the attention."
    if mass is None:
        return pictures, (
            "Text and picture each have a softmax of their own. The text keeps all of its attention, and what is read from the "
            "picture is multiplied by λ and added to it."
        )
    pictures.append((overlay(look.drawing, mass), f"all image tokens\n{mass.mean():.1%}"))
    return pictures, f"The picture takes {mass.mean():.1%} of the one softmax (the image mass). The text keeps the rest."


def _conditional(maps: LayerMaps) -> LayerMaps:
    """Keep the last row alone, in half precision."""
    mass = None if maps.image_mass is None else maps.image_mass[-1:].half()
    image = tuple(one[-1:].half() for one in maps.image)
    return replace(maps, text=maps.text[-1:].half(), image=image, weights=(), image_mass=mass)
