"""What the UNet and the adapter learn from, computed once: latents, captions, and image embeddings of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from model.image_encoder import ImageEncoder, normalise
from model.text_encoder import TextEncoder
from model.vae import VAE
from train.loop import stream
from train.world import Scene, Split, World, pictures


@dataclass(frozen=True)
class Pairs:
    """Picture-text pairs. `mean`, `std`: `n c h w` of q(z|x), scaled; `caption`: row of `texts` for each picture;
    `texts`: `m 77 c`, the different captions' text tokens, the empty one first; `images`: `n e` embeddings, or None."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    texts: Tensor
    images: Tensor | None

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A sample of q(z|x) for these rows."""
        mean = self.mean[rows].float()
        return mean + self.std[rows].float() * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def encode(
    vae: VAE, image: ImageEncoder | None, batches: Callable[[int], Tensor], count: int, name: str
) -> dict[str, Tensor]:
    """Latents (and image embeddings) of `count` batches of pictures `b 3 h w` in [0, 1], in half precision."""
    means, stds, images = [], [], []
    for x in tqdm(stream(batches, 0, count, workers=2), total=count, desc=name):
        mean, logvar = vae.moments(2 * x - 1)
        means.append((mean * vae.config.scale).half())
        stds.append(((0.5 * logvar).exp() * vae.config.scale).half())
        if image is not None:
            images.append(image(normalise(x).contiguous(memory_format=torch.channels_last)).half())
    found = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
    return found | ({"images": torch.cat(images)} if images else {})


@torch.no_grad()
def encode_texts(text: TextEncoder, captions: list[str]) -> tuple[Tensor, Tensor]:
    """The text tokens of all different captions, the empty one first, and each caption's row."""
    different = ["", *sorted(set(captions) - {""})]
    row = {caption: i for i, caption in enumerate(different)}
    tokens = text.tokenize(different)
    hidden = torch.cat([text(part).half() for part in tokens.split(256)])
    return hidden, torch.tensor([row[caption] for caption in captions])


def world_pairs(
    vae: VAE, text: TextEncoder, image: ImageEncoder | None, split: Split, count: int, cache: Path
) -> Pairs:
    """The first `count` pictures of a split; what is slow to compute is kept in the file `cache`."""
    world, batch = World(split), 100
    scenes: list[Scene] = [world[i] for i in range(count)]

    def batches(step: int) -> Tensor:
        return torch.from_numpy(pictures(scenes[step * batch : (step + 1) * batch])).permute(0, 3, 1, 2).float() / 255

    if not cache.exists():
        save_file(
            encode(vae, image, batches, -(-count // batch), f"{cache.stem}: {count} pictures"),
            cache.with_suffix(".part"),
        )
        cache.with_suffix(".part").rename(cache)
    found = load_file(cache)
    texts, caption = encode_texts(text, [scene.caption for scene in scenes])
    return Pairs(found["mean"], found["std"], caption, texts, found.get("images"))
