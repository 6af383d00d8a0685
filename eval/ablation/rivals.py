"""Other ways to show a picture to the same base model, small copies of the paper's rivals (Table 1). Tier C of the ablation.

Those here read the global image embedding. `shuffle.py` and `reference.py` have those that read the picture itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from eval.ablation.rival import Rival, parameters_of
from eval.ablation.shuffle import ControlNetShuffle
from model.adapter import IPAdapter
from model.attention import concatenated
from model.context import Context
from model.features import GLOBAL
from model.image_projection import ImageProjection, Projection
from model.layers import FeedForward, timestep_embedding
from model.unet import UNet
from train.randomness import draw, draw_normal

TOKENS = 4


class Adapter(Rival):
    """An IP-Adapter, with any projection: own keys and values in a softmax of their own, or tokens that are appended to the text."""

    def __init__(self, unet: UNet, projection: Projection, decoupled: bool) -> None:
        super().__init__(unet)
        self.decoupled, self.adapter = decoupled, IPAdapter(unet, projection, own_projections=decoupled)

    def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
        return self.adapter(Context(text) if self.decoupled else Context(text, fuse=concatenated), image)


class GlobalAdapter(Projection):
    """Uni-ControlNet's global adapter (arXiv 2305.16322): 4 tokens = FF_2(LN(FF_1(LN(e)))), two GEGLU layers, without their dropout.

    FF_1 maps e to 2 e with a hidden width of 4 e, and FF_2 maps to four tokens with a hidden width of 8 e.
    """

    reads = GLOBAL

    def __init__(self, image_dim: int, context_dim: int) -> None:
        super().__init__(image_dim, context_dim)
        self.norms = nn.ModuleList([nn.LayerNorm(image_dim), nn.LayerNorm(2 * image_dim)])
        self.layers = nn.ModuleList([FeedForward(image_dim), FeedForward(2 * image_dim)])
        self.layers[0].proj_out = nn.Linear(4 * image_dim, 2 * image_dim)
        self.layers[1].proj_out = nn.Linear(8 * image_dim, TOKENS * context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`b 1 e` -> `b 4 c`. Raises ValueError when `check` does."""
        self.check(features)
        x = features[:, 0]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(norm(x))
        return rearrange(x, "b (n c) -> b n c", n=TOKENS)


class MLP(Projection):
    """c_i = LayerNorm(W_2 GELU(W_1 e + b_1) + b_2), split into 4 tokens, with `parameters` parameters or a few less."""

    reads = GLOBAL

    def __init__(self, image_dim: int, context_dim: int, parameters: int) -> None:
        super().__init__(image_dim, context_dim)
        out = TOKENS * context_dim
        hidden = (parameters - out - 2 * context_dim) // (image_dim + 1 + out)
        self.proj = nn.Sequential(nn.Linear(image_dim, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`b 1 e` -> `b 4 c`. Raises ValueError when `check` does."""
        self.check(features)
        return self.norm(rearrange(self.proj(features[:, 0]), "b (n c) -> b n c", n=TOKENS))


class WholeUNet(Rival):
    """A rival that trains a copy of the whole UNet."""

    def __init__(self, unet: UNet) -> None:
        super().__init__(unet)
        self.network = copy.deepcopy(unet).requires_grad_(True)

    @property
    def unet(self) -> UNet:
        return self.network


class ImageVariations(WholeUNet):
    """Stable Diffusion Image Variations: the image embedding takes the place of the text. It is cut into tokens as wide as the text's,
    the last one filled up with zeros."""

    drop = 0.0, 0.1, 0.0

    def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
        c = text.shape[-1]
        tokens = rearrange(F.pad(image, (0, -image.shape[1] % c)), "b (n c) -> b n c", c=c)
        places = timestep_embedding(torch.arange(tokens.shape[1], device=image.device), c).to(tokens)
        return Context((tokens + places) * image.any(dim=1)[:, None, None])  # a dropped picture is zeros


class UnCLIP(WholeUNet):
    """Stable Diffusion unCLIP: the embedding, with noise of some level l, is added to the timestep embedding. The text stays.

    e~ = mean + sqrt(a_l) (e - mean) + sqrt(1 - a_l) std n, and MLP([e~, PE(l)]) is added. a_l is the cosine schedule. In training, l is
    drawn from 0 .. 999; in drawing, l = 0 and n = 0. The last layer of the MLP starts at zero, so that the training starts from the base.
    """

    drop = 0.075, 0.225, 0.025  # 10 % of the texts and 25 % of the pictures, independently
    LEVELS = 1000
    mean: Tensor
    std: Tensor

    def __init__(self, unet: UNet, image_dim: int) -> None:
        super().__init__(unet)
        self.network = UNet(replace(unet.config, added_dim=2 * image_dim)).to(next(unet.parameters()).device)
        missing, unexpected = self.network.load_state_dict(unet.state_dict(), strict=False)
        assert not unexpected and all(name.startswith("added_embed.") for name in missing)
        assert self.network.added_embed is not None
        for weight in self.network.added_embed[-1].parameters():
            nn.init.zeros_(weight)
        self.register_buffer("mean", torch.zeros(image_dim))
        self.register_buffer("std", torch.ones(image_dim))

    def learn_scale(self, embeddings: Tensor) -> None:
        """Set the mean and the standard deviation of each entry."""
        self.mean.copy_(embeddings.float().mean(dim=0))
        self.std.copy_(embeddings.float().std(dim=0))

    def noised(self, image: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Return e~ for embeddings and noise, `b e`, and levels, `b`."""
        root = torch.cos(((level + 1) / self.LEVELS + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
        a = root[:, None].square()
        return self.mean + a.sqrt() * (image - self.mean) + (1 - a).sqrt() * self.std * noise

    def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
        level, noise = image.new_zeros(len(image)), torch.zeros_like(image)
        if g is not None:
            level = draw(lambda n: torch.randint(self.LEVELS, (n,), generator=g, device=g.device), len(image), g).to(image)
            noise = draw_normal(image, g)
        vector = torch.cat([self.noised(image, level, noise), timestep_embedding(level, image.shape[1]).to(image)], dim=1)
        return Context(text, added=vector * image.any(dim=1, keepdim=True))  # a dropped picture is a zero vector


def ip_adapter(unet: UNet, image_dim: int) -> Adapter:
    return Adapter(unet, ImageProjection(image_dim, unet.config.context_dim, TOKENS), decoupled=True)


def simple_mlp(unet: UNet, image_dim: int) -> Rival:
    """The simple adapter, with an MLP of as many parameters as IP-Adapter has."""
    return Adapter(unet, MLP(image_dim, unet.config.context_dim, parameters_of(ip_adapter(unet, image_dim))), decoupled=False)


def uni_controlnet(unet: UNet, image_dim: int) -> Rival:
    """Uni-ControlNet's global adapter. Its source drops half of the texts and half of the pictures, independently."""
    rival = Adapter(unet, GlobalAdapter(image_dim, unet.config.context_dim), decoupled=False)
    rival.drop = 0.25, 0.25, 0.25
    return rival


TRAINED: dict[str, Callable[[UNet, int], Rival]] = {
    "ip_adapter": ip_adapter,
    "simple_mlp": simple_mlp,
    "uni_controlnet": uni_controlnet,
    "shuffle": lambda unet, _: ControlNetShuffle(unet),
    "unclip": UnCLIP,
    "variations": lambda unet, _: ImageVariations(unet),
}
WHOLE = "unclip", "variations"  # those that train the whole UNet
LARGE = "shuffle", *WHOLE  # those that start as copies of the base, and are not shipped
