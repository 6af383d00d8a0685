"""Write an uploaded picture, or a painted mask, again in the size that a model draws."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image, ImageOps

from checkpoints.files import replacing
from sampling.images import open_image


def resize_file(path: Path | str, size: tuple[int, int], folder: Path, mask: bool = False) -> Path | None:
    """Crop and scale a picture file to `size` (height, width), and write it into `folder` under a name made of its pixels.

    With `mask`, the file has strokes on a transparent background. Make the strokes white; return None if there are none.
    """
    image = ImageOps.fit(open_image(path, "black" if mask else "white"), size[::-1])
    if mask:
        paint = image.convert("L")
        if not paint.getbbox():
            return None
        image = Image.new("RGB", image.size, "white")
        image.putalpha(paint)
    out = folder / f"{'mask' if mask else 'picture'}-{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
    with replacing(out) as part:
        image.save(part, "PNG")
    return out
