"""Encode pictures and captions for the UNet and the adapter. Slow results are cached, one file per batch.

The cache folder is named after the encoder's weights and the picture size, and each file after the content of its pictures. So a
change of pictures, encoder or size never reads a stale file, and an interrupted run loses only the current batch.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import replacing
from model.features import GLOBAL, Embedder, Features
from model.image_encoder import ImageEncoder, centre_square, normalise
from model.text_encoder import Text
from model.vae import VAE
from train import processes
from train.captioned import Captioned
from train.data import Data, Files, OnTheFly, stream
from train.fingerprint import digest, fingerprint
from train.pairs import Pairs
from train.pool import in_parts, pixels_of, scenes_of, to_unit
from train.world import SAYS, Says, Scene, Split, Style, World, pictures, render

Encode = Callable[[Tensor], dict[str, Tensor]]
ENCODED = 500  # pictures of the mini world that are encoded at a time


def _read(file: Path) -> dict[str, Tensor] | None:
    """Read a cache file. Return None if it is missing, or damaged; report damage on stderr."""
    try:
        return load_file(file) if file.exists() else None
    except (SafetensorError, OSError) as error:
        print(f"{file} is damaged ({error}); computing it again", file=sys.stderr)
        return None


@torch.no_grad()
def encoded(data: Data[Tensor], keys: Sequence[str], encode: Encode, folder: Path, workers: int = 2) -> dict[str, Tensor]:
    """Concatenate encode(data.batch(i)) over all keys, in half precision. Batch i is cached as `folder`/`keys[i]`.safetensors.

    Each batch is encoded separately, so the result does not depend on what was cached. Processes share the batches that are missing.
    Raises OSError if the folder cannot be written.
    """
    files = [folder / f"{key}.safetensors" for key in keys]
    parts = {i: tensors for i, file in enumerate(files) if (tensors := _read(file))}
    missing, team = [i for i in range(len(files)) if i not in parts], processes.team()
    processes.wait()  # so that all processes find the same files missing
    own = missing[team.rank :: team.size]
    batches: Iterator[Tensor] = stream(data, own, workers)
    for i in tqdm(own, desc=folder.name, disable=not own or team.rank > 0):
        parts[i] = {name: tensor.half().cpu().contiguous() for name, tensor in encode(next(batches)).items()}
        with replacing(files[i]) as part:
            save_file(parts[i], part)
    processes.wait()
    for i in (i for i in missing if i not in parts):
        if (found := _read(files[i])) is None:
            raise FileNotFoundError(f"{files[i]}, of another process, is not here: keep --state on a disk that all processes share")
        parts[i] = found
    return {name: torch.cat([parts[i][name] for i in range(len(files))]) for name in parts[0]}


def latents(vae: VAE, data: Data[Tensor], keys: Sequence[str], folder: Path, size: str) -> tuple[Tensor, Tensor]:
    """Return the scaled mean and standard deviation of q(z|x), `n c h w` each, for batches `b 3 h w` in [-1, 1]."""
    weight = next(vae.parameters())

    def encode(x: Tensor) -> dict[str, Tensor]:
        mean, logvar = vae.moments(x.to(weight))
        return {"mean": mean * vae.config.scale, "std": (0.5 * logvar).exp() * vae.config.scale}

    moments = encoded(data, keys, encode, folder / f"latents-{size}-{fingerprint(vae)}-{vae.config.scale:g}")
    return moments["mean"], moments["std"]


def features(
    image: ImageEncoder, data: Data[Tensor], keys: Sequence[str], folder: Path, reads: Embedder
) -> Features:
    """Return the features of one picture per prompt, for batches of pixels `b 3 s s`."""
    weight, size = next(image.parameters()), image.config.image_size
    cache = folder / f"{reads.name.replace(' ', '-')}-{size}-{fingerprint(image)}"
    pictures = encoded(data, keys, lambda x: {"features": reads(image, x.to(weight))}, cache)["features"]
    with torch.no_grad():
        return Features(pictures[:, None], reads.null(image, pictures.shape[-1]).cpu())


@torch.no_grad()
def encode_texts(text: Text, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return the text tokens of the different captions, `m 77 c`, the empty one first, and the row of each caption, `n`."""
    different = ["", *sorted(set(captions) - {""})]
    row = {caption: i for i, caption in enumerate(different)}
    tokens = torch.cat(in_parts(lambda part: text.tokenize([different[i] for i in part]), len(different), 0, "captions"))
    device = next(text.parameters()).device
    hidden = torch.cat([text(part.to(device)).half().cpu() for part in tokens.split(256)])
    return hidden, torch.tensor([row[caption] for caption in captions])


@functools.cache
def renderer(style: Style = render) -> str:
    """Hash some rendered pictures, to detect changes of the drawings or the renderer."""
    return hashlib.sha256(pictures([World("train")[i] for i in range(16)], style).tobytes()).hexdigest()[:8]


@dataclass(frozen=True)
class WorldPictures:
    """The first `count` pictures of a split in a style, with captions that name as much as `says`."""

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
        scenes, pixels = self.scenes, pixels_of(self.split, self.count, 0, self.style).split(ENCODED)
        keys = [digest([renderer(self.style), self.split, ENCODED * i, len(part)]) for i, part in enumerate(pixels)]
        mean, std = latents(vae, OnTheFly(lambda i: to_unit(pixels[i])), keys, folder, "world")
        read = None
        if image is not None:
            read = features(image, OnTheFly(lambda i: normalise(pixels[i].float() / 255)), keys, folder, reads)
        texts, caption = encode_texts(text, [scene.caption for scene in scenes])
        return Pairs(mean, std, caption, texts, read).to(str(next(vae.parameters()).device))

    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures and captions."""
        captions = digest([scene.caption for scene in self.scenes])
        return {"pictures": f"{self.count} of {self.split}, {renderer(self.style)}", "captions": captions}


@dataclass(frozen=True)
class FilePictures:
    """A user's pictures: resize the short side to `side`, then crop the centre, as in the paper."""

    files: list[Captioned]
    side: int

    def __len__(self) -> int:
        return len(self.files)

    def pairs(self, vae: VAE, text: Text, image: ImageEncoder | None, folder: Path, reads: Embedder = GLOBAL) -> Pairs:
        """Encode the pictures, one at a time. Without an `image` encoder, there are no features."""
        keys = [file.digest for file in self.files]

        def square(picture: Image.Image) -> Tensor:
            resized = centre_square(picture, self.side, Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1

        paths = [file.path for file in self.files]
        mean, std = latents(vae, Files(paths, square), keys, folder, str(self.side))
        read = None
        if image is not None:
            read = features(image, Files(paths, image.preprocess), keys, folder, reads)
        texts, caption = encode_texts(text, [file.text for file in self.files])
        return Pairs(mean, std, caption, texts, read)

    def made_from(self) -> dict[str, str]:
        """Return hashes that identify the pictures and captions."""
        pictures = digest([file.digest for file in self.files])
        captions = digest([file.text for file in self.files])
        return {"pictures": pictures, "captions": captions, "side": str(self.side)}
