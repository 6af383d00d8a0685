"""What the UNet and the adapter learn from, computed once: latents, captions, and image embeddings of pictures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from model.image_encoder import ImageEncoder, centre_square, normalise
from model.text_encoder import TextEncoder
from model.vae import VAE
from sampling.images import open_image
from train.loop import stream
from train.world import SAYS, Scene, Split, World, pictures


@dataclass(frozen=True)
class Pairs:
    """Picture-text pairs. `mean`, `std`: `n c h w` of q(z|x), scaled; `caption`: row of `texts` for each picture;
    `texts`: `m 77 c`, the different captions' text tokens, the empty one first. If asked for, `images` are what an adapter reads,
    embeddings `n e` or fine features `n m e`, and `null` is what it reads of no picture: zeros `e`, or those of zero pixels, `m e`."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    texts: Tensor
    images: Tensor | None
    null: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A sample of q(z|x) for these rows."""
        mean = self.mean[rows].float()
        return mean + self.std[rows].float() * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def _computed(
    cache: Path, batches: Callable[[int], Tensor], count: int, encode: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """encode(batches(0)), ..., joined, in half precision; kept in the file `cache` and read from it the next time."""
    if not cache.exists():
        found: dict[str, list[Tensor]] = {}
        for batch in tqdm(stream(batches, 0, count, workers=2), total=count, desc=cache.stem):
            for key, value in encode(batch).items():
                found.setdefault(key, []).append(value.half().cpu())
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")  # another process may compute the same
        save_file({key: torch.cat(parts).contiguous() for key, parts in found.items()}, part)
        part.rename(cache)
    return load_file(cache)


def fingerprint(module: nn.Module) -> str:
    """A few digits that change when a module's weights do."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def latents(vae: VAE, batches: Callable[[int], Tensor], count: int, folder: Path, data: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of q(z|x), scaled, for `count` batches of pictures `b 3 h w` in [-1, 1]."""
    weight = next(vae.parameters())

    def encode(x: Tensor) -> dict[str, Tensor]:
        mean, logvar = vae.moments(x.to(weight))
        return {"mean": mean * vae.config.scale, "std": (0.5 * logvar).exp() * vae.config.scale}

    found = _computed(folder / f"{data}-latents-{fingerprint(vae)}.safetensors", batches, count, encode)
    return found["mean"], found["std"]


def features(
    image: ImageEncoder, batches: Callable[[int], Tensor], count: int, folder: Path, data: str, fine: bool
) -> tuple[Tensor, Tensor]:
    """(images, null) of `Pairs` for `count` batches of pixels `b 3 s s`: image embeddings, or fine features."""
    weight, size = next(image.parameters()), image.config.image_size
    read: Callable[[Tensor], Tensor] = image.fine if fine else image
    cache = folder / f"{data}-{'tokens' if fine else 'images'}-{fingerprint(image)}.safetensors"
    images = _computed(cache, batches, count, lambda x: {"images": read(x.to(weight))})["images"]
    with torch.no_grad():
        null = read(torch.zeros(1, 3, size, size).to(weight))[0].cpu() if fine else torch.zeros(images.shape[1])
    return images, null


@torch.no_grad()
def encode_texts(text: TextEncoder, captions: list[str]) -> tuple[Tensor, Tensor]:
    """The text tokens of all different captions, the empty one first, and each caption's row."""
    different = ["", *sorted(set(captions) - {""})]
    row = {caption: i for i, caption in enumerate(different)}
    tokens = text.tokenize(different)
    device = next(text.parameters()).device
    hidden = torch.cat([text(part.to(device)).half().cpu() for part in tokens.split(256)])
    return hidden, torch.tensor([row[caption] for caption in captions])


def world_pairs(
    vae: VAE,
    text: TextEncoder,
    image: ImageEncoder | None,
    split: Split,
    count: int,
    folder: Path,
    says: tuple[float, float] = SAYS,
    fine: bool = False,
) -> Pairs:
    """The first `count` pictures of a split; what is slow to compute is kept in `folder`. `images` only with `image`.

    `says`: the shares of captions that name the concept, and the background.
    """
    world, size = World(split, says), 100
    scenes: list[Scene] = [world[i] for i in range(count)]
    steps = -(-count // size)

    def rgb(step: int) -> Tensor:
        return torch.from_numpy(pictures(scenes[step * size : (step + 1) * size])).permute(0, 3, 1, 2).float() / 255

    data = f"{split}-{count}"
    mean, std = latents(vae, lambda step: 2 * rgb(step) - 1, steps, folder, data)
    images, null = None, None
    if image is not None:
        images, null = features(image, lambda step: normalise(rgb(step)), steps, folder, data, fine)
    texts, caption = encode_texts(text, [scene.caption for scene in scenes])
    return Pairs(mean, std, caption, texts, images, null)


def captioned_files(data: Path) -> list[tuple[Path, str]]:
    """The pictures and captions of a user's data: the official trainer's JSON list
    `[{"image_file": ..., "text": ...}]` (paths relative to the file), or a folder of pictures with a `.txt` beside each.

    Raises ValueError that names the first entries at fault.
    """
    if data.is_dir():
        files = sorted(f for f in data.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
        missing = [f.name for f in files if not f.with_suffix(".txt").exists()]
        if missing or not files:
            what = f"no caption (.txt) beside {', '.join(missing[:5])}" if missing else "no pictures in it"
            raise ValueError(f"{data}: {what}")
        return [(f, f.with_suffix(".txt").read_text().strip()) for f in files]
    try:
        entries = json.loads(data.read_text())
        pairs = [(data.parent / entry["image_file"], str(entry["text"])) for entry in entries]
    except (OSError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{data}: not a JSON list of image_file and text, nor a folder ({error!r})") from None
    absent = [str(f) for f, _ in pairs if not f.exists()]
    if absent or not pairs:
        what = f"these pictures are missing: {', '.join(absent[:5])}" if absent else "the list is empty"
        raise ValueError(f"{data}: {what}")
    return pairs


def file_pairs(
    vae: VAE,
    text: TextEncoder,
    image: ImageEncoder,
    files: list[tuple[Path, str]],
    side: int,
    folder: Path,
    fine: bool = False,
) -> Pairs:
    """A user's pictures, short side to `side` and centre crop as the paper does; what is slow is kept in `folder`."""

    def square(step: int) -> Tensor:
        picture = centre_square(open_image(files[step][0]), side, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1

    def pixels(step: int) -> Tensor:
        return image.preprocess(open_image(files[step][0]))[None]

    listed = hashlib.sha256(repr([str(file) for file, _ in files]).encode()).hexdigest()[:16]
    mean, std = latents(vae, square, len(files), folder, f"{listed}-{side}")
    images, null = features(image, pixels, len(files), folder, listed, fine)
    texts, caption = encode_texts(text, [words for _, words in files])
    return Pairs(mean, std, caption, texts, images, null)
