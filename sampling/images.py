"""Read and write picture files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from checkpoints.files import check_output, replacing

KEY = "ip-adapter"  # the PNG text chunk that holds a picture's settings
LONGEST = 1 << 16  # largest accepted side of a picture in pixels, the limit of JPEG
METADATA = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # the chunks of a PNG that may hold an orientation


def open_image(path: Path | str, behind: Literal["white", "black"] = "white") -> Image.Image:
    """Open a picture file as upright 8-bit RGB.

    Apply the EXIF rotation, composite transparent pixels over the colour `behind`, and convert CMYK, grey and more than 8 bits.
    Raises ValueError if the file is missing, not a picture, damaged, or too large.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a picture file")
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'there is no such file'}")
    return decode_image(path, str(path), behind)


def decode_image(source: Path | BinaryIO, name: str, behind: Literal["white", "black"] = "white") -> Image.Image:
    """Decode a picture as `open_image` does, from a path or an open file. `name` is what error messages call it."""
    try:
        with Image.open(source) as file:
            if max(file.size) > LONGEST:
                raise Image.DecompressionBombError
            file.load()
            return to_rgb(ImageOps.exif_transpose(file), behind)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: Pillow cannot read this file as a picture: use a PNG, JPEG or WebP file") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: more pixels than can be read safely: make the picture smaller") from None
    except Exception as error:  # the decoders of damaged pictures raise errors of any kind
        raise ValueError(f"{name}: the picture is damaged or truncated ({str(error) or type(error).__name__})") from None


def picture_size(source: Path | BinaryIO) -> tuple[int, int]:
    """Read the (height, width) of a picture, upright, without decoding it."""
    with Image.open(source) as file:
        # Pillow turns TIFF files itself
        on_its_side = file.format != "TIFF" and _exif(file).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (file.width, file.height) if on_its_side else (file.height, file.width)


def _exif(file: ImageFile.ImageFile) -> Image.Exif:
    """Read the EXIF data of an open file. Of a PNG, Pillow's own method decodes the pixels to see what follows them."""
    if file.format != "PNG" or file.fp is None:
        return file.getexif()
    if _metadata_after_pixels(file.fp):
        file.load()
    return Image.Image.getexif(file)


def _metadata_after_pixels(file: IO[bytes]) -> bool:
    """Return whether metadata follow the pixels of a PNG. This reads only the length and the name of each chunk."""
    place, names = file.tell(), list[bytes]()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        names.append(head[4:])
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)
    return b"IDAT" in names and not METADATA.isdisjoint(names[names.index(b"IDAT") :])


def to_rgb(image: Image.Image, behind: Literal["white", "black"] = "white") -> Image.Image:
    """Convert a picture of any Pillow mode to 8-bit RGB. Composite transparent pixels over the colour `behind`."""
    if image.mode == "F" or image.mode.startswith("I"):
        clear = image.info.get("transparency")  # the grey level that is transparent in a 16-bit PNG
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

    Files with 32-bit or float levels do not record the level of white. We choose the first of 1 (only for floats), 255, 65535 and
    2^31 - 1 that is not below the largest value. In a float picture, highlights up to 16 still count as white = 1.
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
    """Convert a Pillow picture to `1 c h w` in [-1, 1]: c = 3 for RGB, 1 for grey. `to_images` is the inverse for RGB."""
    levels = np.atleast_3d(np.asarray(image, dtype=np.float32))
    return torch.from_numpy(levels / 127.5 - 1).permute(2, 0, 1)[None]


def read_mask(path: Path | str) -> Tensor:
    """Read a mask file as `1 1 h w` in [0, 1]. White is 1; black and transparent pixels are 0."""
    return to_tensor(open_image(path, behind="black").convert("L")) / 2 + 0.5


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Convert `b 3 h w` in [-1, 1] to Pillow pictures: clip, and round to the nearest of 256 levels."""
    levels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(level.permute(1, 2, 0).cpu().numpy()) for level in levels]


def check_png(path: Path) -> None:
    """Raise ValueError or OSError if `save_image` cannot write to `path`."""
    check_output(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG, which stores their settings: use the name {path.stem}.png")


def save_image(image: Image.Image, path: Path | str, settings: dict[str, Any]) -> None:
    """Write a PNG atomically, with `settings` as JSON in a text chunk."""
    check_png(Path(path))
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(settings))
    with replacing(Path(path)) as part:
        image.save(part, "PNG", pnginfo=info)


def read_settings(path: Path | str) -> dict[str, Any]:
    """Read the settings that `save_image` wrote into a PNG. Raises ValueError if there are none.

    Do not trust the settings: the file may come from anyone.
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
            f"{path}: this picture stores no settings: it was not drawn by this program, or another program saved it again"
        ) from None
    return settings
