"""Reference-only attention, the rival that trains nothing: self-attention also reads the feature maps of the image prompt.

Source: "reference" of sd-webui-controlnet. In each step the image prompt is noised to the same timestep and runs through the same
UNet, and the inputs of all self-attentions are kept. Then the drawing runs, and its self-attentions read keys and values of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from eval.ablation.rival import Rival, latents_of
from eval.hooks import hooked
from model.attention import SelfAttention, attention
from model.context import Context
from model.unet import Residuals, UNet
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule

REFERENCE, FIDELITY = "reference", 0.5  # the default of sd-webui-controlnet


def read_both(layer: SelfAttention, x: Tensor, bank: Tensor) -> Tensor:
    """Attention from the tokens `x`, `b n c`, to themselves and to those of `bank`, `b m c`."""
    both = torch.cat([x, bank], dim=1)
    return layer.merge(attention(layer.split(layer.to_q(x)), layer.split(layer.to_k(both)), layer.split(layer.to_v(both))))


class ReferenceUNet(UNet):
    """A UNet whose self-attentions also read an image prompt, in guidance batches [uncond, cond].

    `added` of its Context holds the latents of the image prompts, `b c h w`. `fidelity` f: the unconditional rows get
    f y_c + (1 - f) y_uc, where y_uc reads the image prompt and y_c does not; the conditional rows get y_uc.
    """

    def __init__(self, unet: UNet, schedule: Schedule, fidelity: float = FIDELITY) -> None:
        super().__init__(unet.config)
        self.load_state_dict(unet.state_dict())
        self.to(next(unet.parameters())).requires_grad_(False)
        self.schedule, self.fidelity = schedule, fidelity

    def forward(self, x: Tensor, t: Tensor | int, context: Context, residuals: Residuals | None = None) -> Tensor:
        """Predict the noise, as the UNet does. The noise of the image prompts is the same in all steps.

        Raises ValueError if the batch does not have both sides: at guidance 1.
        """
        assert context.added is not None
        if len(x) % 2 or not torch.equal(*context.added.chunk(2)):
            raise ValueError("reference-only attention needs a guidance other than 1: its batch has an unconditional side")
        bank: dict[nn.Module, Tensor] = {}

        def keep(layer: SelfAttention, args: tuple[Tensor], _: Tensor) -> None:
            bank[layer] = args[0]

        def read(layer: SelfAttention, args: tuple[Tensor], alone: Tensor) -> Tensor:
            uncond, cond = read_both(layer, args[0], bank[layer]).chunk(2)
            return torch.cat([uncond.lerp(alone[: len(uncond)].to(uncond), self.fidelity), cond])

        latents, times = context.added, torch.as_tensor(t, device=x.device).expand(len(x))
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents).expand_as(latents)
        layers = [module for module in self.modules() if isinstance(module, SelfAttention)]
        with hooked(layers, keep):
            super().forward(self.schedule.add_noise(latents, noise, times).to(x), t, context)
        with hooked(layers, read):
            return super().forward(x, t, context, residuals)


class ReferenceOnly(Rival):
    """The rival that reads latents, and trains nothing."""

    def __init__(self, unet: UNet, schedule: Schedule) -> None:
        super().__init__(ReferenceUNet(unet, schedule))

    def look(self, pipeline: Pipeline, images: Sequence[Image.Image]) -> Tensor:
        return latents_of(pipeline, images)

    def drop_picture(self, image: Tensor) -> Tensor:
        """Return the picture itself: on the unconditional side, too, self-attention reads it, by 1 - f."""
        return image

    def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
        return Context(text, added=image)
