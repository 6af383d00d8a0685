"""What the UNet and the adapter learn from, computed once: latents, captions, and image embeddings of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from model.image_encoder import ImageEncoder, centre_square, normalise
from model.text_encoder import TextEncoder
from model.vae import VAE
from sampling.images import open_image
from train.loop import stream
from train.world import Scene, Split, World, pictures


@dataclass(frozen=True)
class Pairs:
    """Picture-text pairs. `mean`, `std`: `n c h w` of q(z|x), scaled; `caption`: row of `texts` for each picture;
    `texts`: `m 77 c`, the different captions' text tokens, the empty one first; `images`: `n e` embeddings."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    texts: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A sample of q(z|x) for these rows."""
        mean = self.mean[rows].float()
        return mean + self.std[rows].float() * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def encode(
    vae: VAE, image: ImageEncoder, batches: Callable[[int], tuple[Tensor, Tensor]], count: int, name: str
) -> dict[str, Tensor]:
    """Latents and image embeddings of `count` batches, in half precision.

    A batch holds pictures `b 3 h w` in [-1, 1] for the VAE and pixels `b 3 s s` for the image encoder.
    """
    found: dict[str, list[Tensor]] = {"mean": [], "std": [], "images": []}
    v, e = next(vae.parameters()), next(image.parameters())
    for x, pixels in tqdm(stream(batches, 0, count, workers=2), total=count, desc=name):
        mean, logvar = vae.moments(x.to(v))
        found["mean"].append((mean * vae.config.scale).half().cpu())
        found["std"].append(((0.5 * logvar).exp() * vae.config.scale).half().cpu())
        found["images"].append(image(pixels.to(e).contiguous(memory_format=torch.channels_last)).half().cpu())
    return {key: torch.cat(parts).contiguous() for key, parts in found.items()}


@torch.no_grad()
def encode_texts(text: TextEncoder, captions: list[str]) -> tuple[Tensor, Tensor]:
    """The text tokens of all different captions, the empty one first, and each caption's row."""
    different = ["", *sorted(set(captions) - {""})]
    row = {caption: i for i, caption in enumerate(different)}
    tokens = text.tokenize(different)
    device = next(text.parameters()).device
    hidden = torch.cat([text(part.to(device)).half().cpu() for part in tokens.split(256)])
    return hidden, torch.tensor([row[caption] for caption in captions])


def _cached(cache: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    if not cache.exists():
        part = cache.with_suffix(".part")
        save_file(compute(), part)
        part.rename(cache)
    return load_file(cache)


def world_pairs(vae: VAE, text: TextEncoder, image: ImageEncoder, split: Split, count: int, cache: Path) -> Pairs:
    """The first `count` pictures of a split; what is slow to compute is kept in the file `cache`."""
    world, size = World(split), 100
    scenes: list[Scene] = [world[i] for i in range(count)]

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rgb = torch.from_numpy(pictures(scenes[step * size : (step + 1) * size])).permute(0, 3, 1, 2).float() / 255
        return 2 * rgb - 1, normalise(rgb)

    found = _cached(cache, lambda: encode(vae, image, batches, -(-count // size), f"{count} pictures"))
    texts, caption = encode_texts(text, [scene.caption for scene in scenes])
    return Pairs(found["mean"], found["std"], caption, texts, found["images"])


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
    vae: VAE, text: TextEncoder, image: ImageEncoder, files: list[tuple[Path, str]], side: int, cache: Path
) -> Pairs:
    """A user's pictures, short side to `side` and centre crop as the paper does; what is slow is kept in `cache`."""

    def batches(step: int) -> tuple[Tensor, Tensor]:
        rgb = open_image(files[step][0])
        square = np.array(centre_square(rgb, side, Image.Resampling.BILINEAR), dtype=np.float32)
        return torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1, image.preprocess(rgb)[None]

    found = _cached(cache, lambda: encode(vae, image, batches, len(files), f"{len(files)} pictures"))
    texts, caption = encode_texts(text, [words for _, words in files])
    return Pairs(found["mean"], found["std"], caption, texts, found["images"])
