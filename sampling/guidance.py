"""Classifier-free guidance: a closure around the UNet, and a lerp."""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import Context, stack
from model.unet import UNet
from sampling.ddim import Denoiser


def guided(unet: UNet, uncond: Context, cond: Context, guidance: float) -> Denoiser:
    """eps^ = w eps(x_t, c_t, c_i, t) + (1 - w) eps(x_t, t)     (Eq. 7; Eq. 2 without a picture)

    Both halves run as one batch, [uncond, cond]. At w = 1 the unconditional half has no weight and is not computed.
    The unconditional pass has no text and the null image (section 3.2.3).
    """
    if guidance == 1:
        return lambda x, t: unet(x.to(cond.text), torch.tensor(t), cond).to(x)
    both = stack(uncond, cond)

    def denoise(x: Tensor, t: int) -> Tensor:
        eps_uncond, eps_cond = unet(torch.cat([x, x]).to(both.text), torch.tensor(t), both).to(x).chunk(2)
        return eps_uncond.lerp(eps_cond, guidance)

    return denoise
