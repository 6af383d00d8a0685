"""Classifier-free guidance: a closure around the UNet, and a lerp."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.attention import Context, stack
from model.unet import UNet
from sampling.ddim import Denoiser
from sampling.lambdas import Move, unmoved


def guided(
    unet: UNet,
    uncond: Context,
    cond: Context,
    guidance: float,
    image_guidance: float | None = None,
    move: Move = unmoved,
) -> Denoiser:
    """eps^ = w eps(x_t, c_t, c_i, t) + (1 - w) eps(x_t, t)     (Eq. 7; Eq. 2 without a picture)

    Both halves run as one batch, [uncond, cond]. At w = 1 the unconditional half has no weight and is not computed.
    The unconditional pass has no text and the null image (section 3.2.3). `move` makes the Context of each timestep.

    With another `image_guidance` w_i the text has w = w_t, and a third pass sees the picture without the text:

    eps^ = eps(0, 0) + w_i [eps(0, c_i) - eps(0, 0)] + w_t [eps(c_t, c_i) - eps(0, c_i)]

    as in InstructPix2Pix (arXiv 2211.09800, Eq. 3). The drops of the adapter's training cover all three. w_i = w_t is Eq. 7.
    """
    if image_guidance is not None and image_guidance != guidance and cond.image:
        return _apart(unet, uncond, cond, guidance, image_guidance, move)
    if guidance == 1:
        return lambda x, t: unet(x.to(cond.text), torch.tensor(t), move(cond, t)).to(x)
    both = stack(uncond, cond)

    def denoise(x: Tensor, t: int) -> Tensor:
        rows = torch.cat([x, x]).to(both.text)
        eps_uncond, eps_cond = unet(rows, torch.tensor(t), move(both, t)).to(x).chunk(2)
        return eps_uncond.lerp(eps_cond, guidance)

    return denoise


def _apart(unet: UNet, uncond: Context, cond: Context, w_t: float, w_i: float, move: Move) -> Denoiser:
    """Text and picture with a weight each: a batch of [uncond, the picture alone, cond]."""
    three = stack(uncond, stack(replace(uncond, image=cond.image), cond))

    def denoise(x: Tensor, t: int) -> Tensor:
        rows = torch.cat([x, x, x]).to(three.text)
        eps_uncond, eps_image, eps_cond = unet(rows, torch.tensor(t), move(three, t)).to(x).chunk(3)
        return eps_uncond.lerp(eps_image, w_i) + w_t * (eps_cond - eps_image)

    return denoise
