"""Pictures from and to files, as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from checkpoints.files import replacing

KEY = "ip-adapter"  # the PNG text chunk that holds a picture's settings


def open_image(path: Path) -> Image.Image:
    """A picture file as upright RGB: EXIF rotation applied, transparency on white, 16 bits scaled to 8, CMYK and grey converted.

    Raises ValueError with one sentence for a file that is missing, not a picture, truncated, or too large to be one.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that Pillow can read (PNG, JPEG, WebP, ... are fine)") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: more pixels than any picture needs; make it smaller first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: the picture is damaged or cut short ({error})") from None
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's to RGB, 8 bits."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        return Image.fromarray(
            (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image)
        return Image.fromarray(
            (values * (255 if values.max() <= 1 else 1)).round().clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow picture to `1 c h w` in [-1, 1], c = 3 of RGB and 1 of grey; `to_images` gives it back."""
    levels = np.atleast_3d(np.asarray(image, dtype=np.float32))
    return torch.from_numpy(levels / 127.5 - 1).permute(2, 0, 1)[None]


def to_images(pictures: Tensor) -> list[Image.Image]:
    """`b 3 h w` in [-1, 1] to Pillow pictures: clipped, rounded to the nearest of 256 levels."""
    levels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(level.permute(1, 2, 0).cpu().numpy()) for level in levels]


def save_image(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Writes a PNG whose text chunk holds `settings` as JSON. Raises OSError when the file can't be written."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(settings))
    with replacing(path) as part:
        image.save(part, "PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a PNG that `save_image` wrote. Raises ValueError when there are none."""
    try:
        with Image.open(path) as image:
            settings = json.loads(image.info[KEY])
        if not isinstance(settings, dict):
            raise TypeError
    except (OSError, UnidentifiedImageError):
        raise ValueError(f"{path}: not a picture that this program drew") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"{path}: this picture holds no settings (it was not drawn by this program, or another one saved it again)"
        ) from None
    return settings
