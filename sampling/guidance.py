"""Classifier-free guidance (Eq. 2 and 7): one denoiser from the UNet and two or three Contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from model.context import Context, stack
from model.fast import FastUNet
from model.unet import Residuals, UNet, join
from sampling.lambdas import Move, as_tensors, keep_context
from sampling.sampler import Denoiser

Side = Literal["uncond", "image", "cond"]  # a pass of the UNet: neither prompt, the picture alone, both
Control = Callable[[Tensor, float, Side], Residuals]  # (x, t, side) -> the residuals of one pass of the UNet


def guided(
    unet: UNet,
    uncond: Context,
    cond: Context,
    guidance: float,
    image_guidance: float | None = None,
    move: Move = keep_context,
    control: Control | None = None,
) -> Denoiser:
    """eps^ = w eps(x_t, c_t, c_i, t) + (1 - w) eps(x_t, t)     (Eq. 7; Eq. 2 without a picture)

    The unconditional pass has an empty text and the null image (section 3.2.3). The passes run as one batch, [uncond, cond]; at w = 1,
    only cond runs. `move` computes the Context of each timestep, and `control` the residuals of each pass. A step never waits for the
    device.

    If `image_guidance` w_i differs from w, then w is the weight w_t of the text, and a third pass reads the picture without the text:

    eps^ = eps(0, 0) + w_i [eps(0, c_i) - eps(0, 0)] + w_t [eps(c_t, c_i) - eps(0, c_i)]

    as in InstructPix2Pix (arXiv 2211.09800, Eq. 3). 0 is the empty text or the null image; adapters are trained with all of these."""
    sides: dict[Side, Context] = {"uncond": uncond, "image": replace(uncond, image=cond.image), "cond": cond}
    w_i = guidance if image_guidance is None else image_guidance
    if w_i == guidance or not cond.image:
        del sides["image"]
        if guidance == 1:
            del sides["uncond"]
    context = reduce(stack, sides.values())
    context = as_tensors(context) if hasattr(unet, "_orig_mod") else context  # compiled

    def denoise(x: Tensor, t: float) -> Tensor:
        rows, step = x.to(context.text), torch.full((), t, device=x.device)
        residuals = join([control(rows, t, side) for side in sides]) if control else None
        rows = rows if isinstance(unet, FastUNet) else torch.cat([rows] * len(sides))
        eps, *more = unet(rows, step, move(context, t), residuals).to(x).chunk(len(sides))
        if "image" in sides:
            eps_image, eps_cond = more
            return eps.lerp(eps_image, w_i) + guidance * (eps_cond - eps_image)
        return eps.lerp(more[0], guidance) if more else eps

    return denoise
