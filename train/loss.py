"""The diffusion loss, shared by the base model and the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from model.attention import Fuse, decoupled
from model.context import Context
from model.unet import Residuals, UNetConfig
from sampling.micro import added_vector
from sampling.schedule import Schedule
from train.data import map_tensors
from train.pairs import Batch
from train.randomness import draw, draw_normal

TIMESTEPS = 1000  # T of Stable Diffusion's schedule
DROP = 0.05  # probability of each kind of dropping (section 4.1.2)


def min_snr(schedule: Schedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Return the loss weight (arXiv 2303.09556) with SNR_t = a_t / (1 - a_t), `b` -> `b`:

    min(SNR_t, gamma) / SNR_t for epsilon, and min(SNR_t, gamma) / (SNR_t + 1) for v.
    """
    a = schedule.at(t)
    snr = a / (1 - a)
    weight = snr.clamp(max=gamma) / snr
    return weight if schedule.prediction == "epsilon" else weight * snr / (snr + 1)


def diffusion_loss(
    unet: Callable[..., Tensor],
    schedule: Schedule,
    x0: Tensor,
    context: Context,
    t: Tensor,
    eps: Tensor,
    gamma: float | None = None,
    control: Callable[[Tensor, Tensor], Residuals] | None = None,
) -> Tensor:
    """|| eps - eps_theta(x_t, c, t) ||^2, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps  (Eq. 1; Eq. 6 when c holds a picture).

    `x0`, `eps`: `b c h w`; `t`: `b`. Returns the mean over all dimensions but the batch, in float32: `b`. With v-prediction
    the target is v. `gamma` applies the min-SNR weight; the paper uses none. `control(x_t, t)` gives the residuals of a structure
    control.
    """
    x_t = schedule.add_noise(x0, eps, t)
    error = unet(x_t, t, context, control(x_t, t) if control else None).float() - schedule.target(x0, eps, t)
    loss = error.square().mean(dim=tuple(range(1, error.ndim)))
    return loss if gamma is None else loss * min_snr(schedule, t, gamma)


def noise_for(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (t, eps): t uniform in [0, T), eps ~ N(0, I)."""
    t = draw(lambda n: torch.randint(TIMESTEPS, (n,), generator=generator, device=generator.device), len(x0), generator)
    return t, draw_normal(x0, generator)


def drops(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw masks (drop the text, drop the image) for n pictures: image only, text only or both, with probability 5 % each."""
    r = draw(lambda n: torch.rand(n, generator=generator, device=generator.device), n, generator)
    image = (r < DROP) | ((r >= 2 * DROP) & (r < 3 * DROP))
    text = (r >= DROP) & (r < 3 * DROP)
    return text, image


@dataclass(frozen=True)
class LossInputs:
    """The inputs of Eq. 6: latents x_0, timesteps, noise, text tokens c_t, the adapter's input, and for SDXL pooled texts and sizes."""

    x0: Tensor
    t: Tensor
    eps: Tensor
    text: Tensor
    image: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def context(self, unet: UNetConfig, fuse: Fuse = decoupled) -> Context:
        """Return what this UNet is conditioned on, without the picture."""
        added = None if self.pooled is None or self.sizes is None else added_vector(self.pooled, self.sizes, unet)
        return Context(self.text, fuse=fuse, added=added)

    def split(self, most: int) -> Iterator[LossInputs]:
        """Yield the inputs in order, in parts of at most `most` pictures."""
        for rows in torch.arange(len(self.x0), device=self.x0.device).split(most):
            yield map_tensors(partial(torch.index_select, dim=0, index=rows), self)


def sample_inputs(batch: Batch, g: torch.Generator, dropping: bool = False, offset: float = 0.0) -> LossInputs:
    """Draw latents, timesteps and noise for the pairs. With `dropping`, some lose their text, picture, or both.

    `offset` is the noise offset o: eps + o n, where n ~ N(0, I) is the same at all pixels of a channel. The paper uses none.
    """
    x0 = batch.latents(g)
    t, eps = noise_for(x0, g)
    none = torch.zeros(len(batch), dtype=torch.bool, device=g.device)
    drop_text, drop_image = drops(len(batch), g) if dropping else (none, none)
    if offset:
        eps = eps + offset * draw_normal(eps[:, :, :1, :1], g)
    text = torch.where(drop_text.view(-1, 1, 1), batch.empty, batch.text)
    inputs = LossInputs(x0, t, eps, text, batch.images(drop_image))
    if (added := batch.added) is None:
        return inputs
    return replace(inputs, pooled=torch.where(drop_text[:, None], added.empty, added.pooled), sizes=added.sizes)
