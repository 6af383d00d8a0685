"""Read the files of a Request: pictures, masks as tensors, and lambda as a Lambda."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sampling.control import Hint
from sampling.edit import Edit
from sampling.embeddings import PictureWeights
from sampling.fields import check_range
from sampling.images import open_image, read_mask, to_tensor
from sampling.lambdas import Lambda
from sampling.micro import Micro
from sampling.request import STRENGTH, HintFile, ImagePrompt, Request

DARK = 0.1  # an --image-mask without a larger value, such as one with 0 and 1 of 255, leaves nothing of the image prompt
Picture = Image.Image | Path  # an opened picture, or the path of a saved embedding, which is read later


@dataclass(frozen=True)
class PromptInputs:
    """An image prompt: its pictures and their weights, its negative pictures, and its lambda."""

    pictures: tuple[Picture, ...]
    weights: PictureWeights
    negatives: tuple[Picture, ...]
    scale: Lambda


@dataclass(frozen=True)
class Inputs:
    """A request and the contents of its files. `edit`: the picture to change, if there is one."""

    request: Request
    image_prompts: tuple[PromptInputs, ...]
    edit: Edit | None
    hints: tuple[Hint, ...] = ()

    @property
    def steps(self) -> int:
        """The number of steps that run: with a picture to change, the last ones."""
        return self.request.steps - (self.edit.start(self.request.steps) if self.edit else 0)

    @property
    def micro(self) -> Micro:
        """What SDXL reads beside the text. A request has (width, height), as pictures do, where a Micro has (height, width)."""
        request = self.request
        original, corner, target = (
            None if pair is None else (pair[1], pair[0])
            for pair in (request.original_size, request.crop_corner, request.target_size)
        )
        return Micro(original, corner or (0, 0), target, request.zero_negative)


def read_inputs(request: Request) -> Inputs:
    """Open all files of a request, before any weights are loaded.

    Raises ValueError if a file is missing or damaged, or if it does not fit the request.
    """
    prompts, hints = tuple(map(prompt_inputs, request.image_prompts)), tuple(map(_hint, request.hints))
    inputs = Inputs(request, prompts, _edit(request), hints)
    for prompt in prompts:
        check_range("--image", prompt.scale.start, prompt.scale.end, inputs.steps)
    for hint in hints:
        check_range("--control", hint.start, hint.end, inputs.steps)
    return inputs


def open_picture(path: Path) -> Picture:
    """Open a picture. Return the path of a saved embedding (.safetensors) as it is."""
    return path if path.suffix == ".safetensors" else open_image(path)


def prompt_inputs(prompt: ImagePrompt) -> PromptInputs:
    """Open the pictures and the mask of an image prompt. Raises ValueError if the mask is dark everywhere."""
    pictures, negatives = (tuple(map(open_picture, each)) for each in (prompt.images, prompt.negatives))
    mask = read_mask(prompt.mask)[0, 0] if prompt.mask else None
    if mask is not None and mask.max() < DARK:
        raise ValueError(f"{prompt.mask} is dark everywhere: it needs white (255) where the image prompt acts, and black (0) elsewhere")
    lam = Lambda(prompt.scale, prompt.layers, prompt.start, prompt.end, mask)
    return PromptInputs(pictures, PictureWeights(prompt.weights, prompt.rule), negatives, lam)


def _hint(hint: HintFile) -> Hint:
    """Open a hint. Transparent pixels become black, which means that nothing is drawn there."""
    return Hint(open_image(hint.picture, behind="black"), hint.scale, hint.start, hint.end, hint.guess)


def _edit(request: Request) -> Edit | None:
    if request.init_image is None:
        return None
    mask = read_mask(request.mask) if request.mask else None
    strength = request.strength if request.strength is not None else 1.0 if request.mask else STRENGTH
    return Edit(to_tensor(open_image(request.init_image)), strength, mask, request.paste)


def size_of(inputs: Inputs, native: tuple[int, int], factor: int) -> tuple[Edit | None, tuple[int, int]]:
    """Return the picture to change, cropped if the request asks for it, and the size (height, width) of the drawing.

    `native`: the size that the base model was trained at. `factor`: the VAE's downsampling factor; cropping rounds the size
    down to a multiple of it.
    """
    request, edit = inputs.request, inputs.edit
    height, width = edit.size if edit else native
    if edit and request.crop:
        height, width = height - height % factor, width - width % factor
    size = height if request.height is None else request.height, width if request.width is None else request.width
    return (edit.crop(size) if edit and request.crop else edit), size
