"""Encode pictures and captions for the UNet and the adapter, and the pictures of the mini world. Encoded pictures are stored on disk."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.features import GLOBAL, Embedder, Features
from model.image_encoder import ImageEncoder, normalise
from model.text_encoder import Text, TextEncoderPair
from model.vae import VAE
from train.data import Data, OnTheFly
from train.fingerprint import configuration, content_key, digest, fingerprint
from train.pairs import Pairs
from train.pool import in_parts, scenes_of, to_unit
from train.store import Rows, encode_rows
from train.world import SAYS, Says, Scene, Split, Style, World, elsewhere, pictures, render

ENCODED = 500  # pictures of the mini world that are encoded at a time


def latents(vae: VAE, data: Data[Tensor], keys: Tensor, folder: Path, size: str, each: int = 1) -> tuple[Rows, Rows]:
    """Return the scaled mean and standard deviation of q(z|x), `n c h w` each, for batches `b 3 h w` in [-1, 1].

    `keys`: those of the n pictures. `each`: pictures in a batch.
    """
    weight = next(vae.parameters())

    def encode(x: Tensor) -> dict[str, Tensor]:
        mean, logvar = vae.moments(x.to(weight))
        return {"mean": mean * vae.config.scale, "std": (0.5 * logvar).exp() * vae.config.scale}

    moments = encode_rows(data, keys, encode, folder / f"latents-{size}-{fingerprint(vae)}-{vae.config.scale:g}", each)
    return moments["mean"], moments["std"]


def features(
    image: ImageEncoder, data: Data[Tensor], keys: Tensor, folder: Path, reads: Embedder, each: int = 1
) -> tuple[Rows, Tensor]:
    """Return the features of each picture, `n m e`, and of the null image, `1 1 m e`, for batches of pixels `b 3 s s`."""
    weight, size = next(image.parameters()), image.config.image_size
    cache = folder / f"{reads.name.replace(' ', '-')}-{size}-{fingerprint(image)}-{configuration(image)[:8]}"
    pictures = encode_rows(data, keys, lambda x: {"features": reads(image, x.to(weight))}, cache, each)["features"]
    with torch.no_grad():
        return pictures, reads.null(image, pictures.shape[-1]).cpu()


class Texts(NamedTuple):
    """Different captions, the empty one first: text tokens, `m 77 c`, and for SDXL pooled texts, `m p`. `rows`: of all captions, `n`."""

    tokens: Tensor
    pooled: Tensor | None
    rows: Tensor


@torch.no_grad()
def encode_texts(text: Text, captions: list[str]) -> Texts:
    """Encode captions, each different one once, without autocast. Store them in half precision."""
    different = ["", *sorted(set(captions) - {""})]
    row = {caption: i for i, caption in enumerate(different)}
    tokens = torch.cat(in_parts(lambda part: text.tokenize([different[i] for i in part]), len(different), 0, "captions"))
    device = next(text.parameters()).device
    parts = [part.to(device) for part in tokens.split(256)]
    with torch.autocast(device.type, enabled=False):
        hidden = torch.cat([text(part).half().cpu() for part in parts])
        pooled = torch.cat([text.pooled(part).half().cpu() for part in parts]) if isinstance(text, TextEncoderPair) else None
    return Texts(hidden, pooled, torch.tensor([row[caption] for caption in captions]))


@functools.cache
def renderer(style: Style = render) -> str:
    """Hash some rendered pictures, to detect changes of the drawings or the renderer."""
    return hashlib.sha256(pictures([World("train")[i] for i in range(16)], style).tobytes()).hexdigest()[:8]


@dataclass(frozen=True)
class WorldPictures:
    """The first `count` pictures of a split in a style, with captions that name as much as `says`.

    The image prompt of a picture is another picture: it shows the scene with the drawing at another size and place (`move_randomly`).
    """

    split: Split
    count: int
    says: Says = SAYS
    style: Style = render

    @property
    def scenes(self) -> list[Scene]:
        return scenes_of(self.split, self.count, 0, self.says)

    def __len__(self) -> int:
        return self.count

    def pairs(self, vae: VAE, text: Text, image: ImageEncoder | None, folder: Path, reads: Embedder = GLOBAL) -> Pairs:
        """Encode the pictures, `ENCODED` at a time. The pairs are on the device of `vae`. Without `image`, there are no features."""
        scenes = self.scenes

        def batch_of(style: Style, i: int) -> Tensor:
            part = pictures(scenes[ENCODED * i : ENCODED * (i + 1)], style)
            return torch.from_numpy(part).permute(0, 3, 1, 2)

        targets = OnTheFly(lambda i: to_unit(batch_of(self.style, i)))
        mean, std = latents(vae, targets, self.keys(self.style), folder, "world", ENCODED)
        inputs = None
        if image is not None:
            prompts = OnTheFly(lambda i: normalise(batch_of(elsewhere, i).float() / 255))
            rows, null = features(image, prompts, self.keys(elsewhere), folder, reads, ENCODED)
            inputs = Features(rows.all()[:, None], null)
        texts = encode_texts(text, [scene.caption for scene in scenes])
        return Pairs(mean.all(), std.all(), texts.rows, texts.tokens, inputs).to(str(next(vae.parameters()).device))

    def keys(self, style: Style) -> Tensor:
        """Return the keys of the pictures in a style, `n`. They name the pictures that are encoded together."""
        counts = [min(ENCODED, self.count - first) for first in range(0, self.count, ENCODED)]
        names = [f"{renderer(style)} {self.split} {ENCODED * part} {count}" for part, count in enumerate(counts)]
        return torch.tensor([content_key(f"{name} {i}".encode()) for name, count in zip(names, counts, strict=True) for i in range(count)])

    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures, the image prompts and the captions."""
        captions = digest([scene.caption for scene in self.scenes])
        parts = {"pictures": f"{self.count} of {self.split}, {renderer(self.style)}", "image prompts": renderer(elsewhere)}
        return {**parts, "captions": captions}
