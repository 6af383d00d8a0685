"""CLIP's image encoder, built from open_clip's modules. It maps images to the features that adapters read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model.words import Fit

if TYPE_CHECKING:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

LONG = 256  # images with a larger aspect ratio are cropped before they are resized
ROWS = 64  # number of rows that `padded_square` resizes at once
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalise(rgb: Tensor) -> Tensor:
    """Normalise RGB in [0, 1], `... 3 h w`, with the mean and standard deviation of CLIP's training images."""
    return (rgb - rgb.new_tensor(MEAN)[:, None, None]) / rgb.new_tensor(STD)[:, None, None]


def centre_square(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize the short side to `size`, then crop the centre square, with left and top margins rounded down.

    If the aspect ratio is above LONG, only the middle of the image is resized. Otherwise an image of 60000 x 1 would need
    gigabytes of memory.
    """
    short, long = min(image.size), max(image.size)
    if long > LONG * short:
        length = LONG * short + (long - LONG * short) % 2  # crop an even number of pixels, to keep the centre
        image = _middle(image, min(image.width, length), min(image.height, length))
    image = image.resize((int(size * image.width / short), int(size * image.height / short)), resample)
    return _middle(image, size, size)


def padded_square(image: Image.Image, size: int) -> Image.Image:
    """Pad an RGB image to a square with CLIP's mean colour, then resize it to `size` with bicubic interpolation.

    The result equals that of padding the whole image first, bit for bit, but needs memory for size x side pixels instead of
    side x side. Pillow resizes rows before columns, so a few rows at a time can be padded and resized.
    """
    side, colour = max(image.size), tuple(round(255 * m) for m in MEAN)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), colour)
    for first in range(0, image.height, ROWS):
        last = min(first + ROWS, image.height)
        rows = Image.new("RGB", (side, last - first), colour)
        rows.paste(image.crop((0, first, image.width, last)), (left, 0))
        narrow.paste(rows.resize((size, last - first), Image.Resampling.BICUBIC), (0, top + first))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class ImageConfig:
    """Sizes of the image encoder. The default is OpenCLIP ViT-H/14, which the released SD 1.5 adapters use."""

    kind: Literal["vit", "resnet"] = "vit"
    image_size: int = 224
    patch: int = 14
    width: int = 1280
    layers: tuple[int, ...] = (32,)  # a ResNet has four numbers: blocks per level
    heads: int = 16
    mlp_ratio: float = 4.0
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    output_dim: int = 1024
    stem_pool: bool = True  # whether a ResNet's stem ends with average pooling; without it, the grid has twice the resolution

    @property
    def fine_dim(self) -> int:
        """Width of the fine-grained features."""
        return self.width * (32 if self.kind == "resnet" else 1)


VIT_H = ImageConfig()
VIT_BIGG = ImageConfig(width=1664, layers=(48,), mlp_ratio=8192 / 1664, output_dim=1280)
VIT_L = ImageConfig(width=1024, layers=(24,), activation="quick_gelu", output_dim=768)
MINI_IMAGE = ImageConfig(kind="resnet", image_size=64, width=20, layers=(1, 1, 1, 1), heads=10, output_dim=256, stem_pool=False)


class ImageEncoder(nn.Module):
    """Maps pixels `b 3 s s`, as returned by `preprocess`, to CLIP image features."""

    def __init__(self, config: ImageConfig = VIT_H) -> None:
        # imported here, because open_clip takes seconds to import
        from open_clip.modified_resnet import ModifiedResNet
        from open_clip.transformer import QuickGELU, VisionTransformer

        super().__init__()
        self.config = config
        self.clip: VisionTransformer | ModifiedResNet
        if config.kind == "vit":
            act = QuickGELU if config.activation == "quick_gelu" else nn.GELU
            self.clip = VisionTransformer(
                config.image_size,
                config.patch,
                config.width,
                config.layers[0],
                config.heads,
                config.mlp_ratio,
                output_dim=config.output_dim,
                act_layer=act,
            )
        else:
            size = config.image_size * (1 if config.stem_pool else 2)  # the size that gives the same grid with pooling
            self.clip = ModifiedResNet(list(config.layers), config.output_dim, config.heads, size, config.width)
            if not config.stem_pool:
                self.clip.avgpool = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the global image embedding, `b e`, **not** normalised.

        ViT: the class token after the final norm and projection. ResNet: the output of the attention pooling.
        """
        return cast(Tensor, self.clip(pixels))

    def fine(self, pixels: Tensor) -> Tensor:
        """Compute the fine-grained features, `b m e`.

        ViT: all tokens of the penultimate layer, class token first, without the final norm. ResNet: the cells of the last
        feature map, plus the position embeddings of the attention pooling.
        """
        if self.config.kind == "resnet":
            grid: Tensor = self.clip.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][0]
            positions: Tensor = self.clip.attnpool.positional_embedding
            return grid.flatten(2).transpose(1, 2) + positions[1:]
        layer = self.config.layers[0] - 2
        if layer < 0:  # a ViT of one layer: return the input of that layer
            return cast(Tensor, self.clip._embeds(pixels))
        parts = self.clip.forward_intermediates(
            pixels,
            indices=[layer],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([parts["image_intermediates_prefix"][0], parts["image_intermediates"][0]], dim=1)

    def preprocess(self, image: Image.Image, fit: Fit = "crop") -> Tensor:
        """Convert an image to pixels `3 s s`, exactly as CLIP's image processor does.

        `crop` (official): resize the short side to s with bicubic interpolation, then crop the centre square. `squash`:
        resize to a square. `pad`: pad to a square with the mean colour, then resize.
        """
        image, size = image.convert("RGB"), self.config.image_size
        if fit == "squash":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            image = padded_square(image, size) if fit == "pad" else centre_square(image, size, Image.Resampling.BICUBIC)
        return normalise(torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1))
