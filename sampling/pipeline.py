"""From prompts to pictures: the parts of Figure 2, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import weights_convert
from model.adapter import IPAdapter
from model.attention import Context, Fuse, Scale, decoupled
from model.image_encoder import Fit, ImageEncoder
from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE
from sampling.ddim import Sampler, State, ddim
from sampling.edit import Edit, begin
from sampling.guidance import guided
from sampling.schedule import Schedule, schedule_of

WEIGHTS = Path(__file__).parent.parent / "weights"
Lambda = Scale | Sequence[Scale]  # of one adapter: for all its layers, or one for each


@dataclass(frozen=True)
class Pipeline:
    """A base model and, to read image prompts, an image encoder with its adapters. Immutable; its modules are never changed."""

    unet: UNet
    vae: VAE
    text: TextEncoder
    schedule: Schedule
    image: ImageEncoder | None = None
    adapters: tuple[IPAdapter, ...] = ()

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image], fit: Fit = "crop") -> Tensor:
        """The embeddings of RGB pictures that make up one prompt, `1 k e`."""
        if self.image is None or not self.adapters:
            raise FileNotFoundError(
                "an image prompt needs an image encoder and an adapter; `make weights` trains the mini ones"
            )
        pixels = torch.stack([self.image.preprocess(picture, fit) for picture in pictures])
        like = next(self.image.parameters())
        return self.image(pixels.to(like))[None]

    @torch.no_grad()
    def contexts(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        embedding: Tensor | Sequence[Tensor] | None = None,
        scale: Lambda | Sequence[Lambda] = 1.0,
        fuse: Fuse = decoupled,
    ) -> tuple[Context, Context]:
        """(uncond, cond) for b prompts. `embedding`: `1 k e` or `b k e`; the unconditional side has the null image, zeros.

        With several adapters `embedding` is a sequence, one for each, and `scale` is one for all or a sequence too.
        """
        device = next(self.unet.parameters()).device
        text = self.text(self.text.tokenize([*negatives, *prompts]).to(device))
        uncond, cond = (Context(half, fuse=fuse) for half in text.split([len(negatives), len(prompts)]))
        if embedding is None:
            return uncond, cond
        embeddings = [embedding] if isinstance(embedding, Tensor) else list(embedding)
        scales: list[Any] = [scale] * len(embeddings)
        if isinstance(scale, Sequence) and not isinstance(embedding, Tensor):
            scales = list(scale)
        if not len(embeddings) == len(scales) == len(self.adapters):
            given = f"{len(embeddings)} embeddings and {len(scales)} scales"
            raise ValueError(f"this pipeline has {len(self.adapters)} adapters, but {given} are given")
        for adapter, one, lam in zip(self.adapters, embeddings, scales, strict=True):
            one = one.expand(len(prompts), -1, -1)
            uncond, cond = adapter(uncond, torch.zeros_like(one), lam), adapter(cond, one, lam)
        return uncond, cond

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        embedding: Tensor | Sequence[Tensor] | None = None,
        negatives: Sequence[str] | None = None,
        scale: Lambda | Sequence[Lambda] = 1.0,
        guidance: float = 7.5,
        steps: int = 50,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        fuse: Fuse = decoupled,
        watch: Callable[[State], None] | None = None,
        sampler: Sampler = ddim,
        edit: Edit | None = None,
    ) -> Tensor:
        """One picture for each prompt and seed, `b 3 H W`, about [-1, 1].

        `scale` is lambda (Eq. 8), `guidance` is w (Eq. 7), `size` is (height, width) in pixels, multiples of the VAE's factor.
        Picture i's noise comes from a CPU generator seeded `seeds[i]` alone. `watch` is called after every step. `sampler`
        is `ddim` or `dpm`. With `edit` a picture is changed, and `size` is its own.
        """
        uncond, cond = self.contexts(prompts, negatives or [""] * len(prompts), embedding, scale, fuse)
        size = size or (edit.size if edit else self.native_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        canvas = begin(edit, self.unet.config.in_channels, self.vae, self.schedule, steps, generators, size)
        denoise, x = canvas.denoiser(guided(self.unet, uncond, cond, guidance)), canvas.noise
        for state in sampler(denoise, x, self.schedule, steps, eta, generators, canvas.start, canvas.enter):
            x = state.x
            if watch is not None:
                watch(state)
        drawn = self.vae.decode(canvas.leave(x).to(next(self.vae.parameters())))
        return edit.finish(drawn) if edit else drawn

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the base model was trained at."""
        side = self.unet.config.sample_size * self.vae.config.factor
        return side, side


def compiled(unet: UNet) -> UNet:
    """The same network through `torch.compile`, its weights frozen into the code: minutes to start, then faster. For drawing only."""
    fast: UNet = torch.compile(unet, options={"freezing": True})  # type: ignore[assignment]
    return fast


def load(
    checkpoint: Path = WEIGHTS,
    adapter: Path | Sequence[Path] | None = None,
    image_encoder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Pipeline:
    """The pipeline of a base model: Stable Diffusion 1.x as a single file, a diffusers folder, or a folder of our own.

    A folder's own `image_encoder` and `ip_adapter` are taken where none is named; without them there is text alone. Raises
    FileNotFoundError, naming the command that makes them, when weights are missing, ValueError when files do not fit together.
    """
    files, image_encoder = prompt_files(checkpoint, adapter, image_encoder)
    schedule = schedule_of(weights_convert.scheduler_config(checkpoint))
    for file in files:  # what is no adapter is told before gigabytes are read
        weights_convert.adapter_sizes(weights_convert.adapter_file(file))
    base = weights_convert.load_base(checkpoint, dtype)
    image = weights_convert.load_image_encoder(image_encoder, dtype) if image_encoder else None
    image_dim = image.config.output_dim if image else None
    adapters = tuple(weights_convert.load_adapter(file, base.unet, image_dim, dtype) for file in files)
    for part in (base.unet, base.vae, base.text, image, *adapters):
        if part is not None:
            part.to(device)
    schedule = replace(schedule, prediction=base.unet.config.prediction)
    return Pipeline(base.unet, base.vae, base.text, schedule, image, adapters)


def prompt_files(
    checkpoint: Path, adapter: Path | Sequence[Path] | None, image_encoder: Path | None
) -> tuple[list[Path], Path | None]:
    """The adapters and the image encoder to use: those named (perhaps none), or else the folder's own, if it has them."""
    own = checkpoint / "ip_adapter.safetensors", checkpoint / "image_encoder.safetensors", checkpoint / "image_encoder"
    encoders = [image_encoder] if image_encoder else [path for path in own[1:] if path.exists()]
    if adapter is None:
        adapter = [path for path in own[:1] if path.exists()]
    return [adapter] if isinstance(adapter, Path) else list(adapter), encoders[0] if encoders else None
