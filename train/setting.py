"""What an adapter is trained on: the frozen base, the encoded pictures, and fingerprints that identify them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints.adapters import PROJECTIONS, adapter_file, adapter_kind
from checkpoints.files import sha256
from model.adapter import IPAdapter
from model.features import FINE, GLOBAL, Embedder
from model.image_projection import HEAD, ImageProjection, Projection, Resampler
from model.words import Prediction
from sampling.loading import load
from sampling.pipeline import Pipeline
from sampling.request import WEIGHTS
from train import processes
from train.album import Album
from train.buckets import BucketPictures
from train.captioned import captioned_files, split, summary
from train.encode import WorldPictures
from train.file_pairs import FilePictures
from train.fingerprint import configuration, digest, fingerprint
from train.loss import TIMESTEPS
from train.pairs import EncodedPairs
from train.sharding import check_team
from train.unet import HELD_OUT, PICTURES
from train.world import Says

SAYS = Says(0.5, 0.7, 0.7, 0.7)  # captions of the mini world: the text names the scene, and often leaves the subject to the picture
TOKENS, FINE_TOKENS, DEPTH = 4, 16, 4  # DEPTH: layers of Plus; diffusers supports only 4
XL_WIDTH = 1280  # of Plus for Stable Diffusion XL, with 20 heads; other official ones are as wide as the text tokens
MINI_DEPTH, GAMMA = 2, 1.0  # layers of Plus, and gamma of the min-SNR weights, in the mini world
PictureSets = tuple[WorldPictures | FilePictures | BucketPictures, WorldPictures | FilePictures]
FileSplit = tuple[Album, Album]


@dataclass(frozen=True)
class TrainingSource:
    """The files to train on, and the size and precision of the base.

    `data`: a user's pictures, or None for the mini world. `skip_broken`: leave out those that cannot be read. `reads`: how the adapter
    reads them; fine features are for Plus (Figure 11). `prediction`: what the UNet predicts, whatever its files say.
    `start`: a trained adapter to start from. `gamma`, `noise_offset`: see `Setting`. `preview_every`, `tensorboard`: see `Display`.
    `checkpointing`: levels of the UNet, from the largest feature maps, whose activations are recomputed in the backward pass.
    `shard`: keep a part of the base in each process. `buckets`: train on pictures in several shapes (train/buckets.py).
    """

    base: Path = WEIGHTS
    image_encoder: Path | None = None
    prediction: Prediction | None = None
    reads: Embedder = GLOBAL
    pictures: int = PICTURES  # number of mini world pictures
    data: Path | None = None
    side: int | None = None
    base_dtype: torch.dtype = torch.float32
    checkpointing: int = 0
    start: Path | None = None
    skip_broken: bool = False
    gamma: float | None = None
    noise_offset: float = 0.0
    preview_every: int = 0
    tensorboard: bool = False
    shard: bool = False
    buckets: bool = False

    def pipeline(self, device: str) -> Pipeline:
        """Load the frozen base and its image encoder. Raises ValueError if an adapter cannot be trained on them."""
        if self.shard:
            check_team(self.preview_every)
        pipeline = load(self.base, (), self.image_encoder, device=device, prediction=self.prediction)
        if pipeline.schedule.timesteps != TIMESTEPS:
            raise ValueError(f"{self.base} has {pipeline.schedule.timesteps} timesteps; adapters are trained on models with {TIMESTEPS}")
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"{self.base} is an inpainting model: train on the text-to-image model instead; its adapters also work for inpainting"
            )
        if pipeline.unet.config.added_dim and self.data is None:
            raise ValueError(f"{self.base} is Stable Diffusion XL: name pictures to train on with --data")
        if pipeline.image is None:
            raise ValueError(f"{self.base} has no image encoder: give one with --image-encoder")
        if self.side and self.side % pipeline.vae.config.factor:
            raise ValueError(f"--side {self.side} must be a multiple of {pipeline.vae.config.factor}, the VAE's factor")
        pipeline.unet.checkpointing = self.checkpointing
        return pipeline

    @property
    def kind(self) -> str:
        """Return the kind of adapter, as `adapter_kind` names it. Raises ValueError if `start` reads the other kind of features."""
        kind = adapter_kind(adapter_file(self.start)) if self.start else "IP-Adapter Plus" if self.reads == FINE else "IP-Adapter"
        if PROJECTIONS[kind].reads.face:
            raise ValueError(f"{self.start} is {kind}, which reads faces and cannot be trained here: name another file with --from")
        if PROJECTIONS[kind].reads != self.reads:
            stage = "adapter" if self.reads == FINE else "plus"
            raise ValueError(f"{self.start} is {kind}: continue it with `python -m train {stage}`")
        return kind

    def files(self, folder: Path) -> FileSplit | None:
        """Check a user's pictures and split them into (training, held out). Returns None for the mini world.

        The indices of shards are kept in the state `folder`.
        """
        if self.data is None:
            return None
        train, held_out = split(captioned_files(self.data, folder / "cache", self.skip_broken))
        print(summary(self.data, train, held_out))
        return train, held_out

    def picture_sets(self, files: FileSplit | None, native: int, says: Says, multiple: int = 1) -> PictureSets:
        """Return (training, held-out) pictures. A user's `files` are resized to `side`, or to the base's `native` size.

        With `buckets`, those to train on keep about their shape, with sides that are multiples of `multiple`.
        """
        if files is None:
            return WorldPictures("train", self.pictures, says), WorldPictures("val", min(HELD_OUT, self.pictures), says)
        side = self.side or native
        held_out = FilePictures(files[1], side, side)
        return BucketPictures(files[0], side, multiple) if self.buckets else FilePictures(files[0], side, side), held_out


@dataclass(frozen=True)
class Setting:
    """What all adapters of an experiment share: the frozen base, the training pairs, and the held-out pairs, if any."""

    pipeline: Pipeline
    pairs: EncodedPairs
    held_out: EncodedPairs | None
    gamma: float | None = None  # of the min-SNR weights; the paper uses none
    noise_offset: float = 0.0  # see `loss.sample_inputs`; the paper uses none
    reads: Embedder = GLOBAL
    depth: int = DEPTH  # layers of Plus
    made_from: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False  # each process has a part of the base, so all must run it together

    def adapter(self, own_projections: bool = True, tokens: int | None = None) -> IPAdapter:
        """Build an untrained adapter for this base and encoder, on the base's device. For fine features, build Plus with 16 tokens.

        The weights come from torch's global generator, so call this inside `seeded`.
        """
        unet, feature_width = self.pipeline.unet, self.pairs.width
        width = unet.config.context_dim
        if self.reads == FINE:
            inner = XL_WIDTH if unet.config.added_dim else width
            projection: Projection = Resampler(feature_width, width, tokens or FINE_TOKENS, inner, self.depth, max(1, inner // HEAD))
        else:
            projection = ImageProjection(feature_width, width, tokens or TOKENS)
        return IPAdapter(unet, projection, own_projections).to(next(unet.parameters()).device)


def data_identity(sets: PictureSets) -> dict[str, Any]:
    """Return hashes that identify the pictures and captions."""
    return {**sets[0].made_from(), "held-out pictures": digest(sets[1].made_from())}


def made_from(pipeline: Pipeline, source: TrainingSource, sets: PictureSets) -> dict[str, Any]:
    """Return short values that identify all inputs of an adapter's training, apart from its plan."""
    networks = {"base": pipeline.unet, "vae": pipeline.vae, "text encoder": pipeline.text, "image encoder": pipeline.image}
    identity: dict[str, Any] = {name: fingerprint(part) for name, part in networks.items() if part is not None}
    schedule, parts = pipeline.schedule, [part for part in networks.values() if part is not None]
    identity["configs"] = digest([configuration(*parts), schedule.prediction, schedule.beta_start, schedule.beta_end])
    identity |= {"precision of the base": str(source.base_dtype), "form": source.kind}
    identity |= {name: value for name, value in {"min-snr": source.gamma, "noise offset": source.noise_offset}.items() if value}
    return {**data_identity(sets), **identity, "--from": sha256(source.start) if source.start else "nothing"}


def encode(pipeline: Pipeline, sets: PictureSets, folder: Path, reads: Embedder) -> tuple[EncodedPairs, EncodedPairs | None]:
    """Encode the training pairs and the held-out ones, if any, or read them from the cache in `folder`."""
    parts, (train, held_out) = (pipeline.vae, pipeline.text, pipeline.image, folder / "cache", reads), sets
    return train.pairs(*parts), held_out.pairs(*parts) if len(held_out) else None


def prepare(
    source: TrainingSource,
    folder: Path,
    device: str = "cpu",
    says: Says = SAYS,
    check: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Setting:
    """Check the pictures, load the base, and encode the pictures, using the cache in `folder`.

    `check` is called with the fingerprints of all inputs before anything is encoded; it may raise an error to stop. Raises ValueError
    if several processes read different inputs.
    """
    files = source.files(folder)
    pipeline = source.pipeline(device)
    multiple = pipeline.vae.config.factor * 2 ** (len(pipeline.unet.config.channels) - 1)
    sets = source.picture_sets(files, pipeline.native_size[0], says, multiple)
    identity = made_from(pipeline, source, sets)
    processes.check_same(identity)
    check(identity)
    gamma = GAMMA if source.data is None and source.gamma is None else source.gamma
    mini: dict[str, Any] = {"depth": MINI_DEPTH} if source.data is None else {}
    pairs, held_out = encode(pipeline, sets, folder, source.reads)
    return Setting(pipeline, pairs, held_out, made_from=identity, reads=source.reads, gamma=gamma, noise_offset=source.noise_offset, **mini)
