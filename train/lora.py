"""Low-rank differences to the weights of a frozen UNet (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import copy
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.unet import UNet


class LoRA(nn.Module):
    """Compute W' = W + B A  (Eq. 3 of arXiv 2106.09685), for the weight of every linear and convolution layer of a UNet.

    W is `o i`; the input channels and the kernel of a convolution count as i. A is `r i`, initialised as torch initialises a linear
    layer. B is `o r` and starts at zero, so that W' = W before training.
    """

    def __init__(self, unet: UNet, rank: int) -> None:
        super().__init__()
        layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        self.layers = list(layers)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            o, i = layer.weight.flatten(1).shape
            r = min(rank, o, i)
            self.down.append(nn.init.kaiming_uniform_(torch.empty(r, i), math.sqrt(5)))
            self.up.append(torch.zeros(o, r))

    def weights(self, unet: UNet) -> dict[str, Tensor]:
        """Return the changed weights by their names in the UNet."""
        names = [f"{layer}.weight" for layer in self.layers]
        old = dict(unet.named_parameters())
        return {n: old[n] + (b @ a).view_as(old[n]) for n, a, b in zip(names, self.down, self.up, strict=True)}

    def forward(self, unet: UNet, *arguments: object) -> Tensor:
        """Run the UNet with the changed weights."""
        return cast(Tensor, functional_call(unet, self.weights(unet), arguments))

    @torch.no_grad()
    def merge(self, unet: UNet) -> UNet:
        """Return a copy of the UNet that has the changed weights."""
        result = copy.deepcopy(unet)
        result.load_state_dict(self.weights(unet), strict=False)
        return result
