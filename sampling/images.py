"""Read and write picture files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from checkpoints.files import check_output, replacing

KEY = "ip-adapter"  # the PNG text chunk that holds a picture's settings
LONGEST = 1 << 16  # pixels of a picture's longer side; JPEG's own limit


def open_image(path: Path | str, behind: Literal["white", "black"] = "white") -> Image.Image:
    """Open a picture file as upright RGB: apply the EXIF rotation, lay transparency over `behind`, convert CMYK, grey and deep levels.

    Raises ValueError with one sentence for a file that is missing, not a picture, damaged, or too large.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a picture in it")
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'there is no such file'}")
    try:
        with Image.open(path) as file:
            if max(file.size) > LONGEST:
                raise Image.DecompressionBombError
            file.load()
            return to_rgb(ImageOps.exif_transpose(file), behind)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that Pillow can read (PNG, JPEG, WebP, ... are fine)") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: more pixels than any picture needs; make it smaller first") from None
    except Exception as error:  # the decoders of damaged pictures raise errors of any kind
        raise ValueError(
            f"{path}: the picture is damaged or cut short ({str(error) or type(error).__name__})"
        ) from None


def to_rgb(image: Image.Image, behind: Literal["white", "black"] = "white") -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB, over a white or black background where the picture is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        clear = image.info.get("transparency")  # of a 16-bit PNG: one level
        grey = Image.fromarray(_grey(image))
        if clear is not None:
            grey.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
        image = grey
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, behind), rgba).convert("RGB")


def _grey(image: Image.Image) -> np.ndarray:
    """Convert 16-bit, 32-bit or float levels to 8-bit grey, `h w`; NaN becomes black.

    The file of 32-bit or float levels does not say which level is white: it is the first of 1 (floats), 255, 65535 and
    2^31 - 1 that the largest value does not exceed. A float picture may exceed 1 by a factor of 16, as highlights do.
    """
    values = np.asarray(image).astype(np.float32)
    largest = values.max(initial=0, where=np.isfinite(values))
    white = 65535.0
    if image.mode == "F" and largest <= 16:
        white = 1.0
    elif not image.mode.startswith("I;16"):
        white = next((level for level in (255.0, 65535.0, 2.0**31 - 1) if largest <= level), largest)
    return (np.nan_to_num(values).clip(0, white) * (255 / white)).round().astype(np.uint8)


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow picture to `1 c h w` in [-1, 1], c = 3 of RGB and 1 of grey; `to_images` gives it back."""
    levels = np.atleast_3d(np.asarray(image, dtype=np.float32))
    return torch.from_numpy(levels / 127.5 - 1).permute(2, 0, 1)[None]


def read_mask(path: Path | str) -> Tensor:
    """Read a mask file as `1 1 h w` in [0, 1]. White is 1; black and transparent are 0, since nothing was painted there."""
    return to_tensor(open_image(path, behind="black").convert("L")) / 2 + 0.5


def to_images(pictures: Tensor) -> list[Image.Image]:
    """`b 3 h w` in [-1, 1] to Pillow pictures: clipped, rounded to the nearest of 256 levels."""
    levels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(level.permute(1, 2, 0).cpu().numpy()) for level in levels]


def check_png(path: Path) -> None:
    """Raises ValueError or OSError if `save_image` cannot write to `path`."""
    check_output(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG, which keeps their settings: name it {path.stem}.png")


def save_image(image: Image.Image, path: Path | str, settings: dict[str, Any]) -> None:
    """Write a PNG atomically, with `settings` as JSON in a text chunk."""
    check_png(Path(path))
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(settings))
    with replacing(Path(path)) as part:
        image.save(part, "PNG", pnginfo=info)


def read_settings(path: Path | str) -> dict[str, Any]:
    """Read the settings that `save_image` wrote into a PNG. Raises ValueError when there are none.

    Do not trust them: anyone may have written them.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FileNotFoundError
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except Exception:  # the decoders of damaged pictures raise errors of any kind
        raise ValueError(f"{path}: not a picture that this program drew") from None
    try:
        settings = json.loads(text)  # type: ignore[arg-type]
        if not isinstance(settings, dict):
            raise TypeError
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"{path}: this picture holds no settings (it was not drawn by this program, or another one saved it again)"
        ) from None
    return settings
