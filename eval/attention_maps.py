"""Attention you can see: where a drawing looks at each word and at each image token.  `python -m eval attention`

No line in the model: `record` hooks the cross-attention layers from outside and recomputes their maps from the (x, Context)
that they receive. Axes: `b h n m`, n queries (places of the picture), m keys (tokens). A guidance batch is [uncond, cond].
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from model.attention import CrossAttention, Fuse, Source, concatenated, decoupled
from model.context import Context
from model.text_encoder import TextEncoder, words_of
from model.unet import UNet
from sampling.images import open_image, save_image, to_images
from sampling.pipeline import Pipeline, load

CELL, GAP, COLUMNS = 152, 10, 7
HEAT = ((60, 10, 90), (170, 20, 90), (235, 85, 30), (255, 190, 40), (255, 255, 200))  # the colours of 0 to 1
WORDS_NOTE = (
    "Bright: what is drawn there takes much from the word. Each map is the mean over heads, timesteps and the finest layers, "
    "and is scaled to its own maximum: to compare two of them, compare the percentages, their shares of the attention to the text."
)
TOKENS_NOTE = (
    "The adapter makes these tokens of the image prompt. They have a softmax of their own, so their shares add up to 100% again; "
    "what is read from them is multiplied by lambda and added to what is read from the text."
)


def softmax_maps(q: Tensor, text: Source, image: Sequence[Source], fuse: Fuse) -> tuple[Tensor, ...]:
    """The maps of the text and of each image source, `b h n m`: what `fuse` itself reads where values are one-hot.

    `decoupled`: softmax(Q K^T / sqrt d) of each source, whatever its lambda; the rows of each sum to 1. `concatenated`: the
    columns of its one softmax, lambda inside; rows sum to 1 over all sources together. Another `fuse`: what it reads.
    """
    sources = [text, *(replace(source, scale=1.0) if fuse is decoupled else source for source in image)]
    keys = [source.k.shape[-2] for source in sources]
    one_hot = torch.eye(sum(keys), dtype=q.dtype, device=q.device).split(keys)
    read = [replace(s, v=v.expand(*s.k.shape[:2], -1, -1)) for s, v in zip(sources, one_hot, strict=True)]
    return fuse(q, read[0], read[1:]).split(keys, dim=-1)


def image_mass(q: Tensor, text: Source, image: Sequence[Source]) -> Tensor:
    """1 - g, the share of a joint softmax that image keys take, `b h n`:

    g = sigmoid(logsumexp(Q K^T / sqrt d) - logsumexp(Q K'^T / sqrt d) - log lambda); K' are the keys of all image sources,
    each with its lambda.
    """

    def logits(source: Source) -> Tensor:
        lam = torch.as_tensor(source.weight(q), dtype=q.dtype, device=q.device)
        return q @ source.k.mT / math.sqrt(q.shape[-1]) + lam.log()

    images = torch.cat([logits(source) for source in image], dim=-1)
    return torch.sigmoid(images.logsumexp(dim=-1) - logits(text).logsumexp(dim=-1))


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """What one cross-attention layer looked at in one call of the UNet; float32, on the CPU.

    `call` counts the calls within the `with` block, `t` is the timestep of each row, `grid` the (h, w) of the n queries.
    `text` and each of `image` are softmax maps `b h n m` (`softmax_maps`). By `weights`, a number or `b 1 n 1` for each image
    source, values are multiplied when they are read: lambda for `decoupled`, 1 for a joint softmax, whose maps hold it.
    `image_mass`: `b h n`, of a joint softmax with image sources only.
    """

    layer: int
    call: int
    t: tuple[int, ...]
    grid: tuple[int, int]
    text: Tensor
    image: tuple[Tensor, ...]
    weights: tuple[float | Tensor, ...]
    image_mass: Tensor | None

    def picture(self, maps: Tensor) -> Tensor:
        """`b h n m` as pictures of the tokens, `b h m y x`."""
        return rearrange(maps, "b h (y x) m -> b h m y x", y=self.grid[0])


@contextmanager
def record(unet: UNet) -> Iterator[list[LayerMaps]]:
    """`with record(unet) as maps:` fills the list with a LayerMaps for every layer and call, in execution order.

    The hooks go with the block, and what the UNet gives stays bit-equal. Grids are those of the latents' true (h, w),
    halved with rounding up, as in `pyramid`. A long run may empty the list as it goes. A backward pass with gradient
    checkpointing runs layers again, so it belongs outside the block. Raises ValueError for a compiled UNet.
    """
    if not isinstance(unet, UNet):
        raise ValueError("a compiled UNet does not run hooks: record the UNet that torch.compile was given")
    maps: list[LayerMaps] = []
    call, t, grids = -1, (), {}

    def begin(_: UNet, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal call, t, grids
        given = inspect.signature(UNet.forward).bind(unet, *args, **kwargs).arguments
        b, _, h, w = given["x"].shape
        call, t = call + 1, tuple(torch.as_tensor(given["t"]).expand(b).tolist())
        levels = [(-(-h // 2**i), -(-w // 2**i)) for i in range(len(unet.config.channels))]
        grids = {h * w: (h, w) for h, w in levels}

    @torch.no_grad()
    def look(layer: CrossAttention, args: tuple[Tensor, Context], _: Tensor) -> None:
        x, context = args
        exact = torch.promote_types(x.dtype, torch.float32)
        q, k = (layer.split(out).to(exact) for out in (layer.to_q(x), layer.to_k(context.text)))
        text = Source(k, k)
        image = [replace(source, k=source.k.to(exact)) for source in context.at(layer.layer)]
        of_text, *of_image = (part.float().cpu() for part in softmax_maps(q, text, image, context.fuse))
        joint = context.fuse is concatenated and image
        mass = image_mass(q, text, image).float().cpu() if joint else None
        weights = [source.weight(q) if context.fuse is decoupled else 1.0 for source in image]
        kept = tuple(w.float().cpu() if isinstance(w, Tensor) else w for w in weights)
        maps.append(LayerMaps(layer.layer, call, t, grids[q.shape[-2]], of_text, tuple(of_image), kept, mass))

    handles = [unet.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [layer.register_forward_hook(look) for layer in unet.cross_attentions()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def word_positions(encoder: TextEncoder, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt and where `encoder.tokenize` puts their tokens; a word that it leaves out or cuts off is not there."""
    words, end = [], 1
    for word, pieces in words_of(prompt):
        if not encoder.rows or all(piece in encoder.rows for piece in pieces):
            start, end = end, end + len(pieces)
            words.append((word, list(range(start, min(end, encoder.config.context_length - 1)))))
    return [(word, places) for word, places in words if places]


def finest(maps: Sequence[LayerMaps]) -> Tensor:
    """Text tokens, then image tokens, as pictures `m y x`: the mean over heads and the layers of the finest grid, of the last row."""
    grid = max((one.grid for one in maps), key=math.prod)
    fine = [one for one in maps if one.grid == grid]
    return torch.stack(
        [one.picture(torch.cat([one.text, *one.image], dim=-1)[-1:]).mean(dim=1)[0] for one in fine]
    ).mean(dim=0)


def draw(
    pipeline: Pipeline, prompt: str, embedding: Tensor | None, scale: float, guidance: float, seed: int, steps: int
) -> tuple[Image.Image, Tensor]:
    """A drawing, and its `finest` maps, the mean over the timesteps."""
    seen = []
    with record(pipeline.unet) as maps:

        def watch(_: object) -> None:
            seen.append(finest(maps))
            maps.clear()

        drawn = pipeline.draw([prompt], [seed], embedding, scale=scale, guidance=guidance, steps=steps, watch=watch)
    return to_images(drawn)[0], torch.stack(seen).mean(dim=0)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """A map `y x` over the picture in dim grey. For display it is divided by its own maximum, and upsampled bilinearly."""
    small = Image.fromarray((heat / heat.max().clamp(min=1e-12)).numpy())
    alpha = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR))
    grey = np.asarray(picture.convert("L").convert("RGB")) * 0.4
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(alpha, stops, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    mixed = grey + 0.85 * alpha[..., None] * (colour - grey)
    return Image.fromarray(mixed.round().astype(np.uint8))


Named = list[tuple[str, Tensor]]
Cells = list[tuple[Image.Image, str]]
Section = tuple[str, str, Cells]  # title, note, pictures with their labels


def sheet(sections: Sequence[Section]) -> Image.Image:
    """A labelled sheet: the key of the colours, and for each section a title, a note, rows of cells with their labels."""
    large, small = ImageFont.load_default(19), ImageFont.load_default(14)
    head, row = 72, CELL + 56
    rows = [-(-len(cells) // COLUMNS) for _, _, cells in sections]
    width = GAP + COLUMNS * (CELL + GAP)
    canvas = Image.new("RGB", (width, GAP + len(rows) * head + sum(rows) * row), "white")
    pen, top = ImageDraw.Draw(canvas), GAP
    key = overlay(Image.new("RGB", (CELL, 16), "grey"), torch.linspace(0, 1, CELL)[None])
    canvas.paste(key, (width - CELL - GAP, top))
    pen.text((width - CELL - GAP, top + 20), "no attention", fill="#555555", font=small)
    pen.text((width - GAP, top + 20), "most", fill="#555555", font=small, anchor="ra")
    for (title, note, cells), count in zip(sections, rows, strict=True):
        pen.text((GAP, top), title, fill="black", font=large)
        pen.text((GAP, top + 26), textwrap.fill(note, 140, max_lines=2), fill="#555555", font=small)
        for i, (picture, label) in enumerate(cells):
            left, y = GAP + i % COLUMNS * (CELL + GAP), top + head + i // COLUMNS * row
            canvas.paste(picture, (left, y))
            pen.text((left, y + CELL + 4), label, fill="black", font=small)
        top += head + count * row
    return canvas


def name_maps(encoder: TextEncoder, prompt: str, maps: Tensor) -> tuple[Named, Named]:
    """From `m y x` over all tokens: the map of each word, that of what is no word last, and the map of each image token.

    The maps of a word's tokens are added: scaled to its maximum that shows their mean, and its mean is the word's share.
    """
    length, words = encoder.config.context_length, word_positions(encoder, prompt)
    rest = sorted(set(range(length)) - {place for _, places in words for place in places})
    text = [(word, maps[places].sum(dim=0)) for word, places in [*words, ("start, end, padding", rest)]]
    return text, [(f"image token {i}", heat) for i, heat in enumerate(maps[length:], 1)]


def overlays(drawn: Image.Image, named: Named) -> Cells:
    """A cell for each map: its label and its share of the attention."""
    return [(overlay(drawn, heat), f"{name}\n{heat.mean():.1%} of the attention") for name, heat in named]


def attention_sheet(
    pipeline: Pipeline,
    pictures: Sequence[Image.Image],
    prompt: str,
    scale: float = 1.0,
    guidance: float = 4.0,
    seed: int = 0,
    steps: int = 20,
) -> Image.Image:
    """Draws once, and shows where the drawing looked. Raises ValueError where there is neither a text nor an image prompt."""
    if not (prompt or pictures):
        raise ValueError("there is nothing to look at: give --prompt, --image, or both")
    embedding = pipeline.embed(pictures) if pictures else None
    drawn, maps = draw(pipeline, prompt, embedding, scale, guidance, seed, steps)
    drawn = drawn.resize((CELL, CELL), Image.Resampling.LANCZOS)
    asked = [f'the text prompt "{prompt}"'] * bool(prompt) + [f"an image prompt, lambda {scale:g}"] * bool(pictures)
    cells = [(ImageOps.fit(picture, (CELL, CELL), Image.Resampling.LANCZOS), "image prompt") for picture in pictures]
    sections = [("What was asked, and what was drawn", " and ".join(asked), [*cells, (drawn, "the drawing")])]
    words, tokens = name_maps(pipeline.text, prompt, maps)
    if prompt:
        sections.append(("Where the drawing looks at each word", WORDS_NOTE, overlays(drawn, words)))
    if pictures:
        sections.append(("Where the drawing looks at the image prompt", TOKENS_NOTE, overlays(drawn, tokens)))
    return sheet(sections)


def run(args: argparse.Namespace) -> None:
    """`python -m eval attention`."""
    pictures = [open_image(path) for path in args.image]  # a bad picture is refused before the weights are read
    pipeline = load(args.checkpoint, args.ip_adapter, args.image_encoder)
    picture = attention_sheet(pipeline, pictures, args.prompt, args.scale, args.guidance, args.seed, args.steps)
    save_image(picture, args.out, {"arguments": json.loads(json.dumps(vars(args), default=str))})
    print(args.out)
