"""Image to image (SDEdit, arXiv 2108.01073) and inpainting.

The samplers do not know about editing. They run from step `start`, and call `begin_step` for the latents at the start of each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.vae import VAE
from sampling.fields import check_size
from sampling.request import STRENGTH
from sampling.sampler import Denoiser, randn
from sampling.schedule import diffuse


@dataclass(frozen=True)
class Edit:
    """A picture to change, `b 3 H W` in [-1, 1], or `1 3 H W` for the whole batch.

    `strength`, in (0, 1]: run only this fraction of the steps, the last ones. `mask`, `b 1 H W` or `1 1 H W` in [0, 1]: 1 where
    to repaint; latents are repainted where it is at least 0.5. `paste`: put the old pixels back where the mask is 0, and blend
    where it is between 0 and 1. Raises ValueError if the strength is out of range, the mask and picture
    differ in size, or the mask repaints nothing.
    """

    picture: Tensor
    strength: float = STRENGTH
    mask: Tensor | None = None
    paste: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        if self.mask is not None and self.mask.shape[-2:] != self.picture.shape[-2:]:
            (h, w), (height, width) = self.mask.shape[-2:], self.size
            raise ValueError(f"the mask is {w} x {h} and the picture {width} x {height}: make them the same size")
        if self.mask is not None and not (self.mask >= 0.5).any():
            raise ValueError("the mask repaints nothing, because it is below 128 everywhere: it needs white (255) where to repaint")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.picture.shape[-2:]
        return height, width

    def crop(self, size: tuple[int, int]) -> Edit:
        """Crop the picture and its mask to their centre, `size` (height, width). Raises ValueError if they are smaller than that."""
        (height, width), (old_height, old_width) = size, self.size
        if height > old_height or width > old_width or min(size) < 1:
            raise ValueError(f"a picture of {old_width} x {old_height} can't be cropped to {width} x {height}: choose a smaller size")
        top, left = (old_height - height) // 2, (old_width - width) // 2

        def middle(pixels: Tensor) -> Tensor:
            return pixels[..., top : top + height, left : left + width]

        return replace(self, picture=middle(self.picture), mask=None if self.mask is None else middle(self.mask))

    def start(self, steps: int) -> int:
        """Return the number of steps to skip, rounded up as in diffusers. Raises ValueError if no step would run."""
        run = int(steps * self.strength)
        if run < 1:
            raise ValueError(f"strength {self.strength} of {steps} steps is less than one step: increase --strength or --steps")
        return steps - run

    def finish(self, picture: Tensor) -> Tensor:
        """Paste the drawn picture, `b 3 H W`, into the old one with the mask. Pixels with mask 0 keep their exact old values."""
        if self.mask is None or not self.paste:
            return picture
        old, mask = self.picture.to(picture.device), self.mask.to(picture.device)
        return old.lerp(picture.float().clamp(-1, 1), mask)


@dataclass(frozen=True)
class Canvas:
    """The input of a sampler: N(0, 1) noise `b c h w` and, for an edit, the picture's latents and mask.

    `start`: index of the first step that runs. `pure`: start from the noise alone, rather than from the noised `latents`.
    `mask`, `b 1 h w` or `1 1 h w`: 1 where to repaint, for an ordinary UNet. `extra`, `b c+1 h w`: the additional input of an
    inpainting UNet, which is the mask and the latents of the masked picture.
    """

    noise: Tensor
    start: int = 0
    pure: bool = False
    latents: Tensor | None = None
    mask: Tensor | None = None
    extra: Tensor | None = None

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        """Wrap the denoiser for the sampler: concatenate `extra` to the latents if the UNet is for inpainting."""
        extra = self.extra
        return denoise if extra is None else lambda x, t: denoise(torch.cat([x, extra], dim=1), t)

    def begin_step(self, index: int, a: float, x: Tensor) -> Tensor:
        """Return the latents at the start of a step, from the sampler's latents x and the mask m.

        The first step starts at x_t = sqrt(a) z_0 + sqrt(1 - a) eps (at x if `pure`), later steps at m x + (1 - m) x_t.
        """
        if self.latents is None:
            return x
        noisy = diffuse(self.latents, self.noise, self.latents.new_tensor(a))
        if index == self.start:
            return x if self.pure else noisy
        return x if self.mask is None else noisy.lerp(x, self.mask)

    def final(self, x: Tensor) -> Tensor:
        """Return the final latents, m x + (1 - m) z_0."""
        return x if self.latents is None or self.mask is None else self.latents.lerp(x, self.mask)


def begin(
    edit: Edit | None,
    channels: int,
    vae: VAE,
    steps: int,
    generators: Sequence[torch.Generator],
    size: tuple[int, int],
) -> Canvas:
    """Build the canvas for pictures of `size` (height, width) and a UNet with `channels` input channels: 4, or 9 for inpainting.

    Each picture's generator draws, in diffusers' order: a sample of the VAE's posterior, the noise and, with a mask, a sample of
    the masked picture's posterior. As in `StableDiffusionInpaintPipeline`, strength 1 with a mask starts from noise alone.
    Raises ValueError if sizes do not match, or if the UNet is for inpainting and there is no picture or no mask.
    """
    like, inpaints = next(vae.parameters()), channels > vae.config.latent_channels
    shape = vae.config.latent_channels, *(side // vae.config.factor for side in size)
    _check(edit, inpaints, vae.config.factor, len(generators), size)

    def sample(pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(like), randn(shape, generators, like)).float()  # the solver stays in float32

    def noise() -> Tensor:
        return randn(shape, generators).to(like.device)

    if edit is None:
        return Canvas(noise())
    start, pure = edit.start(steps), edit.mask is not None and edit.strength == 1
    latents = None if inpaints and pure else sample(edit.picture)
    canvas = Canvas(noise(), start, pure, latents)
    if edit.mask is None:
        return canvas
    mask = (edit.mask >= 0.5).float()
    small = F.interpolate(mask, shape[1:]).to(like.device)
    if not inpaints:
        noise()  # advance the generators: diffusers encodes the masked picture for every UNet
        return replace(canvas, mask=small)
    background = sample(edit.picture * (1 - mask))
    return replace(canvas, extra=torch.cat([small.expand(len(background), -1, -1, -1), background], dim=1))


def _check(edit: Edit | None, inpaints: bool, factor: int, batch: int, size: tuple[int, int]) -> None:
    height, width = size
    check_size(width, height)
    if height % factor or width % factor or min(size) <= 0:
        crop = f"{width - width % factor} x {height - height % factor}"
        offer = f": add --crop to crop the picture to its centre, {crop}" if edit and edit.size == size and min(size) >= factor else ""
        raise ValueError(f"width and height must be positive multiples of {factor}, not {width} x {height}{offer}")
    if inpaints and (edit is None or edit.mask is None):
        raise ValueError("this base model is for inpainting: it needs both a picture and a mask (--init-image, --mask)")
    if edit is None:
        return
    if edit.size != size:
        expected, actual = f"{width} x {height}", f"{edit.size[1]} x {edit.size[0]}"
        raise ValueError(f"the size is {expected}, but the picture to change is {actual}: resize the picture, or add --crop")
    for tensor in (edit.picture, edit.mask):
        if tensor is not None and len(tensor) not in (1, batch):
            raise ValueError(f"{len(tensor)} pictures or masks to change do not match {batch} prompts: give 1 or {batch}")
