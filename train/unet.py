"""Stage 3: the text-to-image base model.  `python -m train unet`

Minimise Eq. 1 with min-SNR weights, which balance the timesteps. (The paper starts from a pretrained base model.) One caption in ten is
replaced by the empty one, for classifier-free guidance. The EMA of the weights is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.clip import load_text_encoder
from checkpoints.files import check_output
from checkpoints.stable_diffusion import load_vae
from model.context import Context
from model.layers import ResBlock, SpatialTransformer
from model.unet import MINI, UNet
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule
from train import preview
from train.card import WORLD_LICENCE, card
from train.data import ShuffledBatches
from train.encode import WorldPictures
from train.fingerprint import fingerprint
from train.loop import run
from train.loss import diffusion_loss, noise_for
from train.pairs import Batch, Pairs
from train.plan import Plan
from train.randomness import generator, seeded

PHASES = (Plan("unet", 40_000, 32, 1e-3, 1000, 0.6, ema=0.9995, bf16=True, validate_every=5_000),)
PICTURES, HELD_OUT, GAMMA, DROP_TEXT = 60_000, 512, 5.0, 0.1


def initialise(unet: UNet) -> None:
    """Zero the last layer of each ResBlock and SpatialTransformer, and the output layer (as in LDM).

    So each block starts as its skip, and the UNet predicts 0.
    """
    for module in unet.modules():
        last = {ResBlock: "conv2", SpatialTransformer: "proj_out", UNet: "conv_out"}.get(type(module))
        if last:
            nn.init.zeros_(getattr(module, last).weight)
            nn.init.zeros_(getattr(module, last).bias)


def fresh(seed: int, channels: Sequence[int] = MINI.channels) -> UNet:
    """Build an untrained UNet; its weights depend only on the seed. Raises ValueError if it cannot have these channels."""
    if len(channels) != len(MINI.channels) or any(c % MINI.groups for c in channels):
        raise ValueError(f"--channels needs {len(MINI.channels)} multiples of {MINI.groups}, one for each level of the UNet")
    with seeded(seed):
        unet = UNet(replace(MINI, channels=tuple(channels)))
    initialise(unet)
    return unet


def text_loss(unet: Callable[..., Tensor], schedule: Schedule, batch: Batch, g: torch.Generator) -> Tensor:
    """Compute the mean loss of a batch, with min-SNR weights. The share `DROP_TEXT` of the captions is replaced by the empty one."""
    x0 = batch.latents(g)
    t, eps = noise_for(x0, g)
    drop = torch.rand(len(batch), generator=g, device=g.device) < DROP_TEXT
    tokens = torch.where(drop.view(-1, 1, 1), batch.empty, batch.text)
    return diffusion_loss(unet, schedule, x0, Context(tokens), t, eps, GAMMA).mean()


@torch.no_grad()
def held_out_loss(unet: UNet, schedule: Schedule, pairs: Pairs, seed: int = 1) -> float:
    """Return the unweighted loss on held-out pictures, at fixed noise and timesteps."""
    losses, device = [], str(next(unet.parameters()).device)
    for i, batch in enumerate(pairs.parts(device)):
        g = generator(seed, i, device)
        x0 = batch.latents(g)
        t, eps = noise_for(x0, g)
        losses.append(diffusion_loss(unet, schedule, x0, Context(batch.text), t, eps))
    return float(torch.cat(losses).mean())


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train unet",
    pictures: int = PICTURES,
    channels: Sequence[int] = MINI.channels,
) -> None:
    """Train with the VAE and the text encoder in the folder `weights`; write unet.safetensors there. `channels`: of each level."""
    out, device = weights / "unet.safetensors", phases[0].device
    unet = fresh(phases[0].seed, channels)
    check_output(out)
    vae = load_vae(weights / "vae.safetensors").to(device)
    text = load_text_encoder(weights / "text_encoder.safetensors").to(device)
    training, validation = WorldPictures("train", pictures), WorldPictures("val", min(HELD_OUT, pictures))
    made_from = {**training.made_from(), "vae": fingerprint(vae), "text encoder": fingerprint(text)}
    pairs, held_out = (each.pairs(vae, text, None, folder / "cache") for each in (training, validation))
    unet, schedule = unet.to(device), Schedule(prediction=MINI.prediction)

    def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        return {"loss": text_loss(unet, schedule, batch, g)}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, UNet)
        preview.draw_captions(Pipeline(module, vae, text, schedule), folder / "unet.png")
        return {"held_out": held_out_loss(module, schedule, held_out)}

    log: list[dict[str, Any]] = []
    for plan in phases:
        data = ShuffledBatches(pairs, plan.batch, plan.seed)
        result, rows = run(plan, unet, data, loss, validate, folder, workers=0, made_from=made_from)
        unet.load_state_dict(result.state_dict())
        log += rows
    details = {"data": f"the mini world, {pictures} pictures"}
    cards.save(unet, out, card(phases, log, command, details, WORLD_LICENCE))
