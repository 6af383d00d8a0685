"""What an adapter is trained on: the frozen base, the pictures, and what identifies them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints.adapters import adapter_file, adapter_kind
from checkpoints.files import sha256
from model.adapter import IPAdapter
from model.image_projection import HEAD, ImageProjection, Projection, Resampler
from sampling.pipeline import Pipeline, load
from sampling.request import WEIGHTS
from train.captioned import Captioned, captioned_files, split, summary
from train.data import Pairs
from train.encode import FilePictures, WorldPictures
from train.fingerprint import digest, fingerprint
from train.unet import HELD_OUT, PICTURES

SAYS = 0.5, 0.5  # the shares of captions that name the concept, and the background, in the mini world
TOKENS, FINE_TOKENS, DEPTH = 4, 16, 4  # DEPTH is of Plus; diffusers reads no other
MINI_DEPTH, GAMMA = 2, 1.0  # of Plus, and of min-SNR weights, in the mini world
Listed = tuple[WorldPictures | FilePictures, WorldPictures | FilePictures]
Split = tuple[list[Captioned], list[Captioned]]


@dataclass(frozen=True)
class Source:
    """What to train on: the mini world, or with `data` a user's pictures; at which size and precision the base runs.

    With `fine` the adapter reads the encoder's fine features: Plus (Figure 11). `start` is an adapter to continue from.
    """

    base: Path = WEIGHTS
    image_encoder: Path | None = None
    fine: bool = False
    pictures: int = PICTURES  # of the mini world
    data: Path | None = None
    side: int | None = None
    base_dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    start: Path | None = None

    def pipeline(self, device: str) -> Pipeline:
        """The frozen base with its image encoder. Raises ValueError when an adapter cannot be trained on them."""
        pipeline = load(self.base, (), self.image_encoder, device=device)
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"{self.base} is a model for inpainting: train on the ordinary one, whose adapters it can use"
            )
        if pipeline.image is None:
            raise ValueError(f"{self.base} has no image encoder: name one with --image-encoder")
        if self.side and self.side % pipeline.vae.config.factor:
            raise ValueError(f"--side {self.side} must be a multiple of {pipeline.vae.config.factor}, the VAE's factor")
        pipeline.unet.checkpointing = self.checkpointing
        return pipeline

    @property
    def kind(self) -> str:
        """The form of the adapter, in the words of `adapter_kind`. Raises ValueError when `start` has other features."""
        kind = adapter_kind(adapter_file(self.start)) if self.start else "IP-Adapter Plus" if self.fine else "IP-Adapter"
        if self.fine != (kind != "IP-Adapter"):
            stage = "adapter" if self.fine else "plus"
            raise ValueError(f"{self.start} is {kind}: continue it with `python -m train {stage}`")
        return kind

    def files(self) -> Split | None:
        """A user's pictures, all checked: (to train on, held out). None for the mini world."""
        if self.data is None:
            return None
        train, held_out = split(captioned_files(self.data))
        print(summary(self.data, train, held_out))
        return train, held_out

    def listed(self, files: Split | None, native: int, says: tuple[float, float]) -> Listed:
        """(pictures to train on, held-out ones); of a user's `files` at `side`, or the base's `native` size."""
        if files is None:
            held_out = min(HELD_OUT, self.pictures)
            return WorldPictures("train", self.pictures, says), WorldPictures("val", held_out, says)
        side = self.side or native
        return FilePictures(files[0], side), FilePictures(files[1], side)


@dataclass(frozen=True)
class Setting:
    """What adapters of one experiment share: the frozen base, its pictures, and the held-out ones, if any."""

    pipeline: Pipeline
    pairs: Pairs
    held_out: Pairs | None
    gamma: float | None = None  # of min-SNR weights; the paper has none
    depth: int = DEPTH  # of Plus
    made_from: dict[str, Any] = field(default_factory=dict)

    def adapter(self, own_projections: bool = True, tokens: int | None = None) -> IPAdapter:
        """An untrained adapter for this base and encoder, on the base's device. For fine features it is Plus, with 16 tokens.

        Its weights are drawn from torch's global generator: call it inside `seeded`.
        """
        assert self.pairs.images is not None
        unet, seen = self.pipeline.unet, self.pairs.images.shape[-1]
        width = unet.config.context_dim
        if self.pairs.images.ndim == 3:
            heads = max(1, width // HEAD)
            projection: Projection = Resampler(seen, width, tokens or FINE_TOKENS, width, self.depth, heads)
        else:
            projection = ImageProjection(seen, width, tokens or TOKENS)
        return IPAdapter(unet, projection, own_projections).to(next(unet.parameters()).device)


def seen(listed: Listed) -> dict[str, Any]:
    """What identifies the pictures and captions."""
    return {**listed[0].made_from(), "held-out pictures": digest(listed[1].made_from())}


def made_from(pipeline: Pipeline, source: Source, listed: Listed) -> dict[str, Any]:
    """Everything that an adapter is made from, beside its plan, as short values that can be compared."""
    parts = {"base": pipeline.unet, "vae": pipeline.vae, "text encoder": pipeline.text, "image encoder": pipeline.image}
    found: dict[str, Any] = {name: fingerprint(part) for name, part in parts.items() if part is not None}
    found |= {"precision of the base": str(source.base_dtype), "form": source.kind}
    return {**seen(listed), **found, "--from": sha256(source.start) if source.start else "nothing"}


def encode(pipeline: Pipeline, listed: Listed, folder: Path, fine: bool) -> tuple[Pairs, Pairs | None]:
    """The pairs to train on, and the held-out ones if any; computed, or found in `folder`."""
    parts, (train, held) = (pipeline.vae, pipeline.text, pipeline.image, folder / "cache", fine), listed
    return train.pairs(*parts), held.pairs(*parts) if len(held) else None


def prepare(
    source: Source,
    folder: Path,
    device: str = "cpu",
    says: tuple[float, float] = SAYS,
    check: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Setting:
    """Checks the pictures, loads the base, and computes, or finds in `folder`, what the adapter reads.

    `check` sees what the adapter will be made from before anything is computed, and may refuse it.
    """
    files = source.files()
    pipeline = source.pipeline(device)
    listed = source.listed(files, pipeline.native_size[0], says)
    made = made_from(pipeline, source, listed)
    check(made)
    mini: dict[str, Any] = {"gamma": GAMMA, "depth": MINI_DEPTH} if source.data is None else {}
    pairs, held_out = encode(pipeline, listed, folder, source.fine)
    return Setting(pipeline, pairs, held_out, made_from=made, **mini)
