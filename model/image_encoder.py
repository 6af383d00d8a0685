"""CLIP's image tower, on open_clip's modules: a picture to the image embedding that an adapter reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

Fit = Literal["crop", "squash", "pad"]
LONG = 256  # pictures whose sides are in this ratio or more are cut before they are resized
ROWS = 64  # rows that `padded_square` takes at a time
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalise(rgb: Tensor) -> Tensor:
    """RGB in [0, 1], `... 3 h w`, to CLIP's pixels: minus the mean of its training pictures, over their deviation."""
    return (rgb - rgb.new_tensor(MEAN)[:, None, None]) / rgb.new_tensor(STD)[:, None, None]


def centre_square(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resizes the short side to `size`, then cuts the centre square, with the margin rounded down.

    Of a picture longer than LONG times its short side only the middle is resized, so a strip of 60000 x 1 takes no memory.
    """
    short, long = min(image.size), max(image.size)
    if long > LONG * short:
        kept = LONG * short + (long - LONG * short) % 2  # an even number of pixels goes, so the centre stays
        image = _middle(image, min(image.width, kept), min(image.height, kept))
    image = image.resize((int(size * image.width / short), int(size * image.height / short)), resample)
    return _middle(image, size, size)


def padded_square(image: Image.Image, size: int) -> Image.Image:
    """Pads an RGB picture to a square with bars of CLIP's mean colour, then resizes it to `size`, bicubic.

    Equal to padding first, bit for bit, but takes size x side pixels in place of side x side: Pillow resizes rows, then
    columns, so the rows can be padded and resized a few at a time.
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
    """Sizes of the tower; the default is OpenCLIP ViT-H/14, which the released SD 1.5 adapters read."""

    kind: Literal["vit", "resnet"] = "vit"
    image_size: int = 224
    patch: int = 14
    width: int = 1280
    layers: tuple[int, ...] = (32,)  # a ResNet has four
    heads: int = 16
    mlp_ratio: float = 4.0
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    output_dim: int = 1024
    stem_pool: bool = True  # a ResNet's average pooling after the stem; without it the grid is twice as fine

    @property
    def fine_dim(self) -> int:
        return self.width * (32 if self.kind == "resnet" else 1)


VIT_H = ImageConfig()
VIT_BIGG = ImageConfig(width=1664, layers=(48,), mlp_ratio=8192 / 1664, output_dim=1280)
VIT_L = ImageConfig(width=1024, layers=(24,), activation="quick_gelu", output_dim=768)
MINI_IMAGE = ImageConfig(
    kind="resnet", image_size=64, width=20, layers=(1, 1, 1, 1), heads=10, output_dim=256, stem_pool=False
)


class ImageEncoder(nn.Module):
    """Pixels, `b 3 s s` as `preprocess` makes them, to CLIP image features."""

    def __init__(self, config: ImageConfig = VIT_H) -> None:
        # open_clip takes seconds to import, so only what builds a tower imports it
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
            seen = config.image_size * (1 if config.stem_pool else 2)  # the size at which a pooled stem has this grid
            self.clip = ModifiedResNet(list(config.layers), config.output_dim, config.heads, seen, config.width)
            if not config.stem_pool:
                self.clip.avgpool = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        """The global embedding `b e`: class token after the last norm and projection, or attention pooling. **Not** normalised."""
        return self.clip(pixels)

    def fine(self, pixels: Tensor) -> Tensor:
        """Fine-grained features `b n c`: all tokens of a ViT's penultimate layer, no norm after; or of a convolutional tower the
        cells of its last grid and their places, as its attention pooling adds them (a ViT's tokens hold theirs)."""
        if self.config.kind == "resnet":
            grid: Tensor = self.clip.forward_intermediates(pixels, indices=1, intermediates_only=True)[
                "image_intermediates"
            ][0]
            return grid.flatten(2).transpose(1, 2) + self.clip.attnpool.positional_embedding[1:]
        layer = self.config.layers[0] - 2
        if layer < 0:  # one layer: what enters it
            return self.clip._embeds(pixels)
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
        """A picture to pixels `3 s s`, by the arithmetic of CLIP's processor.

        `crop` (official): short side to s, bicubic, then the centre square, the margin rounded down. `squash` resizes to a
        square, `pad` first adds bars of the mean colour, so that nothing is lost.
        """
        image, size = image.convert("RGB"), self.config.image_size
        if fit == "squash":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            image = padded_square(image, size) if fit == "pad" else centre_square(image, size, Image.Resampling.BICUBIC)
        return normalise(torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1))
