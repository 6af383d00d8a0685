"""The networks of Stable Diffusion XL that `python -m eval parity --base sdxl` compares."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.adapters import load_adapter
from checkpoints.clip import load_image_encoder, load_text_encoder
from checkpoints.stable_diffusion import load_unet
from eval.peers import official, official_xl
from eval.peers.parts import Network, Part, Suite, pixels
from model.context import Context
from model.text_encoder import END, START
from sampling.micro import DRAWING


def _peer_unet_xl(folder: Path, dtype: torch.dtype) -> Network:
    unet = official_xl.peer_unet(folder, dtype)

    def forward(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, image: Tensor) -> Tensor:
        height, width = (8 * n for n in x.shape[2:])
        times = torch.tensor([[height, width, 0, 0, height, width]] * len(x))
        added = {"text_embeds": pooled, "time_ids": times, "image_embeds": [image[:, None]]}
        output: Tensor = unet(x, t, text, added_cond_kwargs=added).sample
        return output

    return forward


def _our_unet_xl(folder: Path, dtype: torch.dtype) -> Network:
    unet = load_unet(folder / "unet", dtype)
    adapter = load_adapter(folder / official_xl.ADAPTER, unet, official_xl.IMAGE, dtype)

    def forward(x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, image: Tensor) -> Tensor:
        height, width = (8 * n for n in x.shape[2:])
        added = DRAWING.vector(pooled, (height, width), unet.config)
        return unet(x, t, adapter(Context(text, added=added), image))

    return forward


def _peer_text_xl(folder: Path, dtype: torch.dtype, name: str) -> Network:
    text = official_xl.peer_text(folder, dtype, name)
    return lambda tokens: text(tokens, output_hidden_states=True).hidden_states[-2]


def _our_text_xl(folder: Path, dtype: torch.dtype, name: str) -> Network:
    text = load_text_encoder(folder / name, dtype)
    return lambda tokens: text.hidden_states(tokens, skip=1, final_norm=False)


def _peer_pooled(folder: Path, dtype: torch.dtype) -> Network:
    text = official_xl.peer_text(folder, dtype, "text_encoder_2")
    return lambda tokens: text(tokens).text_embeds


def _peer_image_xl(folder: Path, dtype: torch.dtype) -> Network:
    image = official_xl.peer_image(folder, dtype)
    return lambda pixels: image(pixels).image_embeds


def _latents_xl(side: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """Latents, timesteps, text tokens, pooled text, and image embeddings."""
    width, pooled = official_xl.UNET.context_dim, official_xl.TEXTS["text_encoder_2"].output_dim
    x, text = torch.randn(2, 4, side, side, generator=g), torch.randn(2, 77, width, generator=g)
    return x, torch.tensor([981, 21]), text, torch.randn(2, pooled, generator=g), torch.randn(2, official_xl.IMAGE.output_dim, generator=g)


def _tokens(_: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """Two prompts, of 20 and of 75 words."""
    tokens = torch.randint(START, (2, 77), generator=g)
    tokens[:, 0], tokens[0, 21:], tokens[1, -1] = START, END, END
    return (tokens,)


SDXL = Suite(
    official_xl.write,
    {
        "UNet + adapter": Part(_peer_unet_xl, _our_unet_xl, _latents_xl),
        **{
            label: Part(partial(_peer_text_xl, name=name), partial(_our_text_xl, name=name), _tokens)
            for label, name in (("first text encoder", "text_encoder"), ("second text encoder", "text_encoder_2"))
        },
        "second text encoder, pooled": Part(
            _peer_pooled, lambda folder, dtype: load_text_encoder(folder / "text_encoder_2", dtype).pooled, _tokens
        ),
        "image encoder": Part(_peer_image_xl, lambda folder, dtype: load_image_encoder(folder / official.ENCODER, dtype), pixels),
    },
)
