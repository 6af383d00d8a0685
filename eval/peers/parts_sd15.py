"""The networks of Stable Diffusion 1.5 that `python -m eval parity` compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.adapters import load_adapter
from checkpoints.clip import load_image_encoder
from checkpoints.controls import load_control
from checkpoints.single_file import load_single
from eval.peers import official, official_controls
from eval.peers.parts import Network, Part, Suite, pixels
from model.context import Context
from model.controlnet import ControlNet
from model.image_encoder import VIT_H
from model.t2i import T2IAdapter
from model.text_encoder import START


def _peer_unet(folder: Path, dtype: torch.dtype) -> Network:
    unet = official.peer_unet(folder, dtype)
    return lambda x, t, text, image: unet(x, t, text, added_cond_kwargs={"image_embeds": [image[:, None]]}).sample


def _our_unet(folder: Path, dtype: torch.dtype) -> Network:
    unet = load_single(folder / official.SINGLE, dtype).unet
    adapter = load_adapter(folder / official.ADAPTER, unet, VIT_H, dtype)
    return lambda x, t, text, image: unet(x, t, adapter(Context(text), image))


def _peer_encode(folder: Path, dtype: torch.dtype) -> Network:
    vae = official.peer_vae(folder, dtype)
    return lambda x: vae.encode(x).latent_dist.mean * vae.config.scaling_factor


def _peer_decode(folder: Path, dtype: torch.dtype) -> Network:
    vae = official.peer_vae(folder, dtype)
    return lambda z: vae.decode(z / vae.config.scaling_factor).sample


def _peer_text(folder: Path, dtype: torch.dtype) -> Network:
    text = official.peer_text(folder, dtype)
    return lambda tokens: text(tokens).last_hidden_state


def _peer_image(folder: Path, dtype: torch.dtype) -> Network:
    image = official.peer_image(folder, dtype)
    return lambda pixels: image(pixels).image_embeds


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the numbers of several tensors."""
    return torch.cat([part.flatten() for part in parts])


def _peer_controlnet(folder: Path, dtype: torch.dtype) -> Network:
    control = official_controls.peer_controlnet(folder, dtype)

    def forward(x: Tensor, t: Tensor, text: Tensor, hint: Tensor) -> Tensor:
        skips, mid = control(x, t, text, hint, return_dict=False)
        return flat([*skips, mid])

    return forward


def _our_controlnet(folder: Path, dtype: torch.dtype) -> Network:
    control = load_control(folder / official_controls.CONTROLNET, dtype=dtype)
    assert isinstance(control, ControlNet)

    def forward(x: Tensor, t: Tensor, text: Tensor, hint: Tensor) -> Tensor:
        made = control(x, t, Context(text), hint)
        assert made.mid is not None
        return flat([*made.skips, made.mid])

    return forward


def _peer_t2i(folder: Path, dtype: torch.dtype) -> Network:
    adapter = official_controls.peer_t2i(folder, dtype)
    return lambda hint: flat(adapter(hint))


def _our_t2i(folder: Path, dtype: torch.dtype) -> Network:
    adapter = load_control(folder / official_controls.T2I, dtype=dtype)
    assert isinstance(adapter, T2IAdapter)
    return lambda hint: flat(adapter(hint))


def _latents(side: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """Latents, timesteps and text tokens."""
    return torch.randn(2, 4, side, side, generator=g), torch.tensor([981, 21]), torch.randn(2, 77, 768, generator=g)


def _hint(side: int, g: torch.Generator) -> Tensor:
    return torch.rand(2, 3, 8 * side, 8 * side, generator=g)


def _write(folder: Path) -> None:
    official.write(folder)
    official_controls.write(folder)


SD15 = Suite(
    _write,
    {
        "UNet + adapter": Part(
            _peer_unet,
            _our_unet,
            lambda side, g: (*_latents(side, g), torch.randn(2, 1024, generator=g)),
        ),
        "VAE, encode": Part(
            _peer_encode,
            lambda folder, dtype: load_single(folder / official.SINGLE, dtype).vae.encode,
            lambda side, g: (torch.randn(1, 3, 8 * side, 8 * side, generator=g).clamp(-1, 1),),
        ),
        "VAE, decode": Part(
            _peer_decode,
            lambda folder, dtype: load_single(folder / official.SINGLE, dtype).vae.decode,
            lambda side, g: (torch.randn(1, 4, side, side, generator=g),),
        ),
        "text encoder": Part(
            _peer_text,
            lambda folder, dtype: load_single(folder / official.SINGLE, dtype).text,
            lambda _, g: (torch.randint(START, (2, 77), generator=g),),
        ),
        "image encoder": Part(_peer_image, lambda folder, dtype: load_image_encoder(folder / official.ENCODER, dtype), pixels),
        "ControlNet": Part(_peer_controlnet, _our_controlnet, lambda side, g: (*_latents(side, g), _hint(side, g))),
        "T2I-Adapter": Part(_peer_t2i, _our_t2i, lambda side, g: (_hint(side, g),)),
    },
)
