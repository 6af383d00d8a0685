"""From prompts to pictures: the parts of Figure 2, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from checkpoints.adapters import adapter_file, adapter_sizes, load_adapter
from checkpoints.stable_diffusion import load_base, load_image_encoder, scheduler_config
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.context import Context
from model.image_encoder import Fit, ImageEncoder
from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE
from sampling.ddim import Sampler, State, ddim
from sampling.edit import Edit, begin
from sampling.embeddings import Strength, parts, weigh_tokens
from sampling.guidance import guided
from sampling.lambdas import moving
from sampling.schedule import Schedule, schedule_of

WEIGHTS = Path(__file__).parent.parent / "weights"


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
    def embed(self, pictures: Sequence[Image.Image], fit: Fit = "crop", adapter: int = 0) -> Tensor:
        """What an adapter reads of RGB pictures that make up one prompt: embeddings `1 k e`, or fine features `1 k m e`."""
        if self.image is None or not self.adapters:
            raise FileNotFoundError(
                "an image prompt needs an image encoder and an adapter; `make weights` trains the mini ones"
            )
        pixels = torch.stack([self.image.preprocess(picture, fit) for picture in pictures])
        like = next(self.image.parameters())
        read = self.image.fine if self.adapters[adapter].image_projection.fine else self.image
        return read(pixels.to(like))[None]

    def null(self, adapter: IPAdapter, like: Tensor) -> Tensor:
        """No picture (section 3.2.3), for pictures such as `like`: zeros, `1 1 e`, or the fine features of zero pixels, `1 1 m e`."""
        if not adapter.image_projection.fine:
            return torch.zeros_like(like[:1, :1])
        if self.image is None:
            raise ValueError("to leave its picture out, an adapter of fine features needs the image encoder too")
        size = self.image.config.image_size
        pixels = torch.zeros(1, 3, size, size).to(next(self.image.parameters()))
        return self.image.fine(pixels)[None].to(like)

    @torch.no_grad()
    def contexts(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        embedding: Tensor | Sequence[Tensor] | None = None,
        scale: Strength | Sequence[Strength] = 1.0,
        fuse: Fuse = decoupled,
        grid: tuple[int, int] | None = None,
        against: Sequence[Tensor | None] | None = None,
    ) -> tuple[Context, Context]:
        """(uncond, cond) for b prompts. `embedding`: as `embed` gives it, or `b k ...`; the unconditional side has the null image.

        With several adapters `embedding` is a sequence, one for each, and `scale` is one for all or a sequence too. `grid` is
        (height, width) of the latents, for a mask. `against` has for each adapter embeddings that the unconditional side reads
        in place of the null image, or None.
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
        against = [None] * len(embeddings) if against is None else against
        if not len(embeddings) == len(scales) == len(against) == len(self.adapters):
            given = f"{len(embeddings)} embeddings and {len(scales)} scales"
            raise ValueError(f"this pipeline has {len(self.adapters)} adapters, but {given} are given")
        grid = grid or (self.unet.config.sample_size, self.unet.config.sample_size)
        for adapter, pictures, no, lam in zip(self.adapters, embeddings, against, scales, strict=True):
            no = self.null(adapter, pictures) if no is None else no
            for part in parts(pictures, no, lam, self.unet.config, grid):
                one = part.embedding.expand(len(prompts), *part.embedding.shape[1:])
                uncond = adapter(uncond, part.against.expand_as(one), part.scale)
                cond = weigh_tokens(adapter(cond, one, part.scale), part.weights)
        return uncond, cond

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        embedding: Tensor | Sequence[Tensor] | None = None,
        negatives: Sequence[str] | None = None,
        scale: Strength | Sequence[Strength] = 1.0,
        guidance: float = 7.5,
        steps: int = 50,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        fuse: Fuse = decoupled,
        watch: Callable[[State], None] | None = None,
        sampler: Sampler = ddim,
        edit: Edit | None = None,
        image_guidance: float | None = None,
        against: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """One picture for each prompt and seed, `b 3 H W`, about [-1, 1].

        `scale` is lambda (Eq. 8), `guidance` is w (Eq. 7), and of the text alone where the picture has its `image_guidance`.
        `size` is (height, width) in pixels, multiples of the VAE's factor. Picture i's noise comes from a CPU generator seeded
        `seeds[i]` alone. `watch` is called after every step. `sampler` is `ddim` or `dpm`. With `edit` a picture is changed,
        and `size` is its own. `against` are negative image prompts, as `contexts` takes them.
        """
        size = size or (edit.size if edit else self.native_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        canvas = begin(edit, self.unet.config.in_channels, self.vae, self.schedule, steps, generators, size)
        x, negatives = canvas.noise, negatives or [""] * len(prompts)
        uncond, cond = self.contexts(prompts, negatives, embedding, scale, fuse, (x.shape[-2], x.shape[-1]), against)
        # a network of one number tells which timesteps the sampler visits
        times = [state.t for state in sampler(lambda x, t: x, torch.zeros(1), self.schedule, steps, start=canvas.start)]
        lambdas = scale if isinstance(scale, Sequence) else [scale] * len(self.adapters)
        move = moving(lambdas if cond.image else [], times)
        denoise = canvas.denoiser(guided(self.unet, uncond, cond, guidance, image_guidance, move))
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
    schedule = schedule_of(scheduler_config(checkpoint))
    for file in files:  # what is no adapter is told before gigabytes are read
        adapter_sizes(adapter_file(file))
    base = load_base(checkpoint, dtype)
    image = load_image_encoder(image_encoder, dtype) if image_encoder else None
    widths = (image.config.output_dim, image.config.fine_dim) if image else (None, None)
    adapters = tuple(load_adapter(file, base.unet, widths[0], dtype, widths[1]) for file in files)
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
