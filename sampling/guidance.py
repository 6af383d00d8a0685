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
    """eps^ = w eps(x_t, c_t, c_i, t) + (1 - w) eps(x_t, t)     (Eq. 7; Eq. 2 without a picture), computed as u + w (c - u).

    The unconditional pass has an empty text and the null image (section 3.2.3). All passes run as one batch, [uncond, cond]. At w = 1
    the unconditional pass has no weight and is not computed. `move` computes the Context of each timestep. `control` is called once
    for each pass, because some controls act only on the conditional one. A step never waits for the device.

    If `image_guidance` w_i differs from w, then w is the weight w_t of the text, and a third pass reads the picture without the text:

    eps^ = eps(0, 0) + w_i [eps(0, c_i) - eps(0, 0)] + w_t [eps(c_t, c_i) - eps(0, c_i)],  where 0 is the empty text or the null image,

    as in InstructPix2Pix (arXiv 2211.09800, Eq. 3). Adapters are trained with dropped texts and pictures, which covers all three passes.
    """
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
        eps = dict(zip(sides, unet(rows, step, move(context, t), residuals).to(x).chunk(len(sides)), strict=True))
        if "uncond" not in eps:
            return eps["cond"]
        if "image" not in eps:
            return eps["uncond"].lerp(eps["cond"], guidance)
        return eps["uncond"].lerp(eps["image"], w_i) + guidance * (eps["cond"] - eps["image"])

    return denoise
