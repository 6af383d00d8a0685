"""From prompts to pictures: the parts of Figure 2, put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from checkpoints.controls import Control
from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.context import Context, rows
from model.features import NO_FACE, Features, as_features
from model.image_encoder import ImageEncoder
from model.image_projection import Projection
from model.text_encoder import Text
from model.unet import UNet
from model.vae import VAE
from model.words import Fit
from sampling.batch import check_finite, groups, rows_of
from sampling.control import Hint, bind
from sampling.ddim import DDIM
from sampling.dpm import DPM
from sampling.edit import Edit, begin
from sampling.embeddings import AdapterLambda, PictureWeights, load_embedding, of_prompts, parts, weigh_tokens
from sampling.euler import EULER
from sampling.faces import read_faces
from sampling.fields import check_seed
from sampling.guidance import Side, guided
from sampling.images import to_images
from sampling.inputs import Inputs, Picture, open_picture, read_inputs, size_of
from sampling.lambdas import moving, set_lambda
from sampling.lcm import LCM
from sampling.micro import DRAWING, Micro
from sampling.request import Request
from sampling.sampler import Sampler, State
from sampling.schedule import Schedule
from sampling.visit import visiting

SAMPLERS = {sampler.name: sampler for sampler in (DDIM, DPM, EULER, LCM)}
Given = Picture | str  # an image prompt: a picture, or the name of a file with a picture or an embedding


@dataclass(frozen=True)
class Pipeline:
    """A base model; for image prompts an image encoder and adapters; and controls. Immutable: its modules are never changed.

    `visits`: the device that each network visits only while it computes; None leaves them all where they are.
    """

    unet: UNet
    vae: VAE
    text: Text
    schedule: Schedule
    image: ImageEncoder | None = None
    adapters: tuple[IPAdapter, ...] = ()
    controls: tuple[Control, ...] = ()
    visits: str | None = None

    @property
    def device(self) -> torch.device:
        """The device that the networks compute on."""
        return torch.device(self.visits) if self.visits else next(self.unet.parameters()).device

    def on(self, *parts: nn.Module) -> AbstractContextManager[None]:
        """Keep these networks on the device for the body of a `with`."""
        return visiting(parts, self.visits) if self.visits else nullcontext()

    @torch.no_grad()
    def embed(self, pictures: Given | Sequence[Given], fit: Fit = "crop", adapter: int = 0) -> Tensor:
        """Encode the pictures of one prompt for an adapter: features `1 k m e`, with m = 1 for a global embedding.

        A picture is an RGB Pillow image, a picture file, a file of `save_embedding` or, for FaceID, a file of faces (`sampling.faces`).
        """
        items = [pictures] if isinstance(pictures, Image.Image | Path | str) else pictures
        inputs = [one if isinstance(one, Image.Image) else open_picture(Path(one)) for one in items]
        images = [one for one in inputs if isinstance(one, Image.Image)]
        if images and self.adapters and self.adapters[adapter].image_projection.reads.face:
            raise ValueError(NO_FACE)
        if not self.adapters or (images and self.image is None):
            raise FileNotFoundError(
                "an image prompt needs an image encoder and an adapter; `make weights` trains the mini ones"
            )
        projection, like = self.adapters[adapter].image_projection, next(self.adapters[adapter].parameters())
        features_of: Iterator[Tensor] = iter(())
        if self.image is not None and images:
            pixels = torch.stack([self.image.preprocess(image, fit) for image in images])
            with self.on(self.image):
                features = projection.reads(self.image, pixels.to(next(self.image.parameters())))
            features_of = iter(features[None].split(1, dim=1))
        return torch.cat(
            [
                self._read_features(one, projection, fit).to(self.device, like.dtype) if isinstance(one, Path) else next(features_of)
                for one in inputs
            ],
            dim=1,
        )

    def _read_features(self, path: Path, projection: Projection, fit: Fit) -> Tensor:
        """Read the features in a file of faces or of `save_embedding`, `1 k m e`."""
        faces = read_faces(path)
        return faces.features(projection, self.image, fit) if faces else load_embedding(path, projection)

    def null(self, adapter: IPAdapter, like: Tensor) -> Tensor:
        """Return the features of the null image (section 3.2.3), `1 1 m e`, in the width, dtype and device of `like`."""
        with self.on(*[self.image] if self.image else []):
            return adapter.image_projection.reads.null(self.image, like.shape[-1]).to(like)

    @torch.no_grad()
    def texts(
        self, prompts: Sequence[str], negatives: Sequence[str], grid: tuple[int, int], micro: Micro, fuse: Fuse = decoupled
    ) -> tuple[Context, Context]:
        """Encode the texts: Contexts (uncond, cond) without image prompts. `grid`: (height, width) of the latents, which SDXL reads."""
        micro.check(self.unet.config)
        tokens, xl, added = self.text.tokenize([*negatives, *prompts]).to(self.device), self.unet.config.added_dim > 0, None
        with self.on(self.text):
            text, pooled = self.text(tokens), self.text.pooled(tokens) if xl else None
        if pooled is not None:
            if micro.zero_negative:
                empty = torch.tensor([negative == "" for negative in negatives] + [False] * len(prompts), device=text.device)
                text, pooled = text.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
            height, width = (side * self.vae.config.factor for side in grid)
            added = micro.vector(pooled, (height, width), self.unet.config)
        both, n = Context(text, fuse=fuse, added=added), len(negatives)
        return rows(both, slice(0, n)), rows(both, slice(n, None))

    @torch.no_grad()
    def contexts(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        embedding: Tensor | Sequence[Tensor] | None = None,
        scale: AdapterLambda | Sequence[AdapterLambda] = 1.0,
        fuse: Fuse = decoupled,
        grid: tuple[int, int] | None = None,
        against: Sequence[Tensor | None] | None = None,
        weights: Sequence[PictureWeights] | None = None,
        micro: Micro = DRAWING,
    ) -> tuple[Context, Context]:
        """(uncond, cond) for b prompts. `embedding`: as `embed` gives it, or `b k m e`; the unconditional side has the null image.

        With several adapters `embedding` is a sequence, one for each, and `scale` is one for all or a sequence too. `grid` is
        (height, width) of the latents, for a mask. `against` has for each adapter embeddings that the unconditional side reads
        in place of the null image, or None; `weights` has the weights of its pictures. `micro` is for SDXL.
        """
        grid = grid or (self.unet.config.sample_size, self.unet.config.sample_size)
        uncond, cond = self.texts(prompts, negatives, grid, micro, fuse)
        if embedding is None:
            return uncond, cond
        embeddings = [embedding] if isinstance(embedding, Tensor) else list(embedding)
        scales = self.by_adapter(scale, embedding)
        against = [None] * len(embeddings) if against is None else against
        weights = [PictureWeights()] * len(embeddings) if weights is None else weights
        if not len(embeddings) == len(scales) == len(against) == len(weights) == len(self.adapters):
            counts = f"{len(embeddings)} embeddings and {len(scales)} scales"
            raise ValueError(f"this pipeline has {len(self.adapters)} adapters, but {counts} are given")
        each = zip(self.adapters, embeddings, against, scales, weights, strict=True)
        for adapter, pictures, negative, lam, of_pictures in each:
            pictures = as_features(pictures)
            features = Features(pictures, self.null(adapter, pictures) if negative is None else as_features(negative))
            with self.on(adapter):
                for part in parts(features, lam, of_pictures, self.unet.config, grid):
                    read = part.features.expand(len(prompts))
                    uncond = set_lambda(adapter(uncond, read.null), part.lambdas)
                    cond = set_lambda(weigh_tokens(adapter(cond, read.pictures), part.weights), part.lambdas)
        return uncond, cond

    def by_adapter(self, scale: AdapterLambda | Sequence[AdapterLambda], embedding: Tensor | Sequence[Tensor] | None) -> list[Any]:
        """Return lambda of each adapter. Beside one embedding, a sequence has lambda of each layer."""
        if isinstance(scale, Sequence) and not isinstance(embedding, Tensor):
            return list(scale)
        return [scale] * len(self.adapters)

    def draw(self, request: Request) -> Image.Image:
        """Draw one request. Raises ValueError if the request, its files and this model do not fit together."""
        return next(self.series(read_inputs(request)))

    def series(
        self, inputs: Inputs, num: int = 1, watch: Callable[[State], None] | None = None
    ) -> Iterator[Image.Image]:
        """Draw `num` pictures of one request, with seeds seed, seed + 1, ... Yield each batch as soon as it is drawn."""
        request, prompts = inputs.request, inputs.image_prompts
        check_seed(request.seed + num - 1)
        if prompts and len(prompts) != max(1, len(self.adapters)):
            raise ValueError(f"{len(prompts)} image prompts for {len(self.adapters)} adapters: give each adapter one")
        edit, size = size_of(inputs, self.native_size, self.vae.config.factor)
        embeddings = [self.embed(prompt.pictures, request.fit, i) for i, prompt in enumerate(prompts)]
        against = [
            self.embed(prompt.negatives, request.fit, i) if prompt.negatives else None
            for i, prompt in enumerate(prompts)
        ]
        pipeline = replace(self, schedule=replace(self.schedule, karras=True)) if request.schedule else self
        for seeds in self.batches(inputs, num):
            pictures = pipeline.sample(
                [request.prompt] * len(seeds),
                seeds,
                embeddings or None,
                [request.negative_prompt] * len(seeds),
                scale=[prompt.scale for prompt in prompts] or 1.0,
                guidance=request.guidance,
                steps=request.steps,
                eta=request.eta,
                size=size,
                watch=watch,
                sampler=SAMPLERS[request.sampler],
                edit=edit,
                image_guidance=request.image_guidance,
                against=against or None,
                weights=[prompt.weights for prompt in prompts] or None,
                hints=inputs.hints,
                micro=inputs.micro,
            )
            yield from to_images(pictures)

    def batches(self, inputs: Inputs, num: int) -> list[range]:
        """Group the seeds of `num` pictures into the batches that `series` draws."""
        _, (height, width) = size_of(inputs, self.native_size, self.vae.config.factor)
        return groups(inputs.request.seed, num, abs(height * width) // self.vae.config.factor**2)

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        embedding: Tensor | Sequence[Tensor] | None = None,
        negatives: str | Sequence[str] = "",
        scale: AdapterLambda | Sequence[AdapterLambda] = 1.0,
        guidance: float = Request.guidance,
        steps: int = Request.steps,
        eta: float = Request.eta,
        size: tuple[int, int] | None = None,
        fuse: Fuse = decoupled,
        watch: Callable[[State], None] | None = None,
        sampler: Sampler = DDIM,
        edit: Edit | None = None,
        image_guidance: float | None = None,
        against: Sequence[Tensor | None] | None = None,
        weights: Sequence[PictureWeights] | None = None,
        hints: Sequence[Hint] = (),
        micro: Micro = DRAWING,
    ) -> Tensor:
        """Draw a batch of pictures, one for each prompt and seed: `b 3 H W`, about [-1, 1]. `draw` is this for one Request.

        `guidance` is w (Eq. 7), of the text alone where the picture has its `image_guidance`. `size` is (height, width) in
        pixels, multiples of the VAE's factor. The noise of picture i comes from a CPU generator of its own, seeded with
        `seeds[i]`. `watch` is called after every step. `sampler` is one of `SAMPLERS`. `edit` is a picture to change, which sets
        the size. `hints` has one for each control. The rest is as in `contexts`. Raises ValueError where arguments do not fit, or
        the result is not finite.
        """
        prompts, seeds, negatives = rows_of(prompts, seeds, negatives)
        size = size or (edit.size if edit else self.native_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise, times = sampler.noise(eta, generators), sampler.times(self.schedule, steps)
        with self.on(self.vae):
            canvas = begin(edit, self.unet.config.in_channels, self.vae, steps, generators, size)
        x, dtype = canvas.noise, next(self.unet.parameters()).dtype
        grid = x.shape[-2], x.shape[-1]
        uncond, cond = self.contexts(prompts, negatives, embedding, scale, fuse, grid, against, weights, micro)
        lambdas = self.by_adapter(scale, embedding)
        running = [step.t for step in times[canvas.start :]]
        move = moving(of_prompts(lambdas, weights) if cond.image else [], running)
        sides: dict[Side, Context] = {"uncond": uncond, "image": uncond, "cond": cond}
        with self.on(self.unet, *self.controls):
            control = bind(self.controls, hints, self.unet.config, sides, size, running)
            denoise = canvas.denoiser(guided(self.unet, uncond, cond, guidance, image_guidance, move, control))
            states = sampler.draw(denoise, x, self.schedule, times, start=canvas.start, begin_step=canvas.begin_step, **noise)
            for state in states:
                x = check_finite(state.x, dtype)
                if watch is not None:
                    watch(state)
        with self.on(self.vae):
            picture = check_finite(self.vae.decode(canvas.final(x).to(next(self.vae.parameters()))), dtype)
        return edit.finish(picture) if edit else picture

    @property
    def native_size(self) -> tuple[int, int]:
        """Return the (height, width) in pixels of the pictures that the base model was trained on."""
        side = self.unet.config.sample_size * self.vae.config.factor
        return side, side
