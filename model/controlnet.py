"""ControlNet: a trainable copy of the UNet's encoder half that reads a hint, such as the edges of a picture.

y_c = F(x; Theta) + Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)     (arXiv 2302.05543, Eq. 2)

F is the encoder half, Theta_c its copy, c the hint, and Z a zero convolution: its weights and biases start at 0, so
y_c = y before training (Eq. 3). The first Z is the end of the hint network. There is one second Z for each skip and one
for the middle. tests/test_controlnet.py compares this file with diffusers' `ControlNetModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from model.context import Context
from model.layers import keep_channels_last
from model.unet import SD15, SD21, SDXL, Residuals, UNet, UNetConfig, UNetEncoder

HINT = (16, 32, 96, 256)


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """Sizes of a ControlNet: those of its UNet, and of its hint network. The default is that of SD 1.5.

    `hint`: widths of the hint network, which halves the size between each two of them. `pooled`: the residuals are averaged
    over all positions, as in the official Shuffle model, so they carry no structure.
    """

    hint: tuple[int, ...] = HINT
    hint_channels: int = 3
    pooled: bool = False

    @property
    def factor(self) -> int:
        """The downsampling factor: side of the hint / side of the latents."""
        return 1 << (len(self.hint) - 1)

    @classmethod
    def of(cls, unet: UNetConfig, hint: Sequence[int] = HINT, pooled: bool = False) -> ControlNetConfig:
        """Return the config of a ControlNet for this UNet. Both read SDXL's added vector."""
        return cls(**asdict(unet) | {"hint": tuple(hint), "pooled": pooled})


CONTROLNET_SD15, CONTROLNET_SD21, CONTROLNET_SDXL = (ControlNetConfig.of(unet) for unet in (SD15, SD21, SDXL))


def zero_module(conv: nn.Conv2d) -> nn.Conv2d:
    """Set the weights and biases of a convolution to 0."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def hint_network(config: ControlNetConfig) -> nn.Sequential:
    """Map a hint `b c fH fW` to `b w H W`: 3x3 convolutions with SiLU between them. Each change of width halves the size."""
    widths, out = config.hint, config.channels[0]
    layers: list[nn.Module] = [nn.Conv2d(config.hint_channels, widths[0], 3, padding=1), nn.SiLU()]
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, a, 3, padding=1), nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, zero_module(nn.Conv2d(widths[-1], out, 3, padding=1)))


class ControlNet(UNetEncoder):
    """Map latents, a timestep, a text Context and a hint to Residuals for the UNet's skips and middle."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig = CONTROLNET_SD15) -> None:
        super().__init__(config)
        self.hint = hint_network(config)
        self.zero = nn.ModuleList(zero_module(nn.Conv2d(c, c, 1)) for c in self.stage_channels)
        self.zero_mid = zero_module(nn.Conv2d(self.stage_channels[-1], self.stage_channels[-1], 1))
        keep_channels_last(self)

    @classmethod
    def of(cls, unet: UNet, hint: Sequence[int] = HINT, pooled: bool = False) -> ControlNet:
        """Build an untrained ControlNet: a copy of the UNet's encoder half, which leaves the UNet's output unchanged, bit for bit."""
        control = cls(ControlNetConfig.of(unet.config, hint, pooled)).to(next(unet.parameters()))
        control.load_state_dict(control.state_dict() | {k: v for k, v in unet.state_dict().items() if k in encoder_names(control)})
        return control

    def zero_convolutions(self) -> list[nn.Parameter]:
        """Return the weights and biases of the second Z, the only tensors with a gradient in the first step."""
        return [*self.zero.parameters(), *self.zero_mid.parameters()]

    def forward(self, x: Tensor, t: Tensor | int, context: Context, hint: Tensor) -> Residuals:
        """Compute the residuals for latents `b c h w` at timesteps `b`, or one number.

        `context`: the text, without image prompts. `hint`: `b c fh fw` or `1 c fh fw` in [0, 1], not normalised, f = `factor`.
        Raises ValueError when the size of the hint does not match the latents.
        """
        guide = self.hint(hint)
        if guide.shape[-2:] != x.shape[-2:]:
            height, width = (self.config.factor * side for side in x.shape[-2:])
            raise ValueError(f"the hint is {hint.shape[-1]} x {hint.shape[-2]}: resize it to {width} x {height}")
        emb = self.embed(torch.as_tensor(t, device=x.device).expand(x.shape[0]), context.added, x.dtype)
        mid, skips = self.encode(x, emb, context, {0: guide})
        residuals = [zero(skip) for zero, skip in zip([*self.zero, self.zero_mid], [*skips, mid], strict=True)]
        if self.config.pooled:
            residuals = [each.mean(dim=(2, 3), keepdim=True) for each in residuals]
        return Residuals(residuals[:-1], residuals[-1])


def encoder_names(control: ControlNet) -> set[str]:
    """Return the names of the tensors that a ControlNet shares with its UNet."""
    return {name for name in control.state_dict() if name.partition(".")[0] not in ("hint", "zero", "zero_mid")}
