"""Another base model: the UNet in the comic style, stored as low-rank differences.  `python -m train style`

Train differences of rank `RANK` to the frozen UNet of train/unet.py on the same scenes in another style (train/comic.py). The loss is
that of train/unet.py. The file comic.safetensors has the layout of diffusers and PEFT; `python -m sampling --lora` merges it. Adapters
and controls that were trained with the original base are used with the new one without change (Figure 4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.clip import load_text_encoder
from checkpoints.files import check_output
from checkpoints.names import unet_rows
from checkpoints.stable_diffusion import load_unet, load_vae
from model.unet import UNet
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule
from train import preview
from train.card import WORLD_LICENCE, card
from train.comic import comic
from train.data import ShuffledBatches
from train.encode import WorldPictures
from train.fingerprint import fingerprint
from train.loop import run
from train.lora import LoRA
from train.pairs import Batch
from train.plan import Plan
from train.randomness import seeded
from train.unet import HELD_OUT, held_out_loss, text_loss

RANK, PICTURES = 16, 20_000
PHASES = (Plan("comic", 2_000, 32, 2e-3, 100, 0.8, ema=0.995, bf16=True, validate_every=500),)


def peft_layout(lora: LoRA, unet: UNet) -> dict[str, Tensor]:
    """Name the factors as diffusers and PEFT do: lora_A is A and lora_B is B, shaped as convolutions in convolution layers."""
    theirs = {row[0]: row[1] for row in unet_rows(unet.config)}
    layers, tensors = dict(unet.named_modules()), dict[str, Tensor]()
    for name, a, b in zip(lora.layers, lora.down, lora.up, strict=True):
        kernel = tuple(layers[name].weight.shape[2:])
        tensors[f"unet.{theirs[name]}.lora_A.weight"] = a.detach().view(len(a), -1, *kernel)
        tensors[f"unet.{theirs[name]}.lora_B.weight"] = b.detach().view(*b.shape, *(1 for _ in kernel))
    return tensors


def train(
    folder: Path,
    weights: Path,
    phases: tuple[Plan, ...] = PHASES,
    command: str = "python -m train style",
    pictures: int = PICTURES,
) -> None:
    """Train with the base model in the folder `weights`; write comic.safetensors there."""
    out, (plan,) = weights / "comic.safetensors", phases
    check_output(out)
    unet = load_unet(weights / "unet.safetensors").to(plan.device)
    vae = load_vae(weights / "vae.safetensors").to(plan.device)
    text = load_text_encoder(weights / "text_encoder.safetensors").to(plan.device)
    sets = WorldPictures("train", pictures, style=comic), WorldPictures("val", min(HELD_OUT, pictures), style=comic)
    parts = {"base": fingerprint(unet), "vae": fingerprint(vae), "text encoder": fingerprint(text)}
    made_from = {**sets[0].made_from(), **parts}
    pairs, held_out = (each.pairs(vae, text, None, folder / "cache") for each in sets)
    schedule = Schedule(prediction=unet.config.prediction)
    with seeded(plan.seed):
        lora = LoRA(unet, RANK).to(plan.device)

    def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        model: Callable[..., Tensor] = partial(lora, unet)
        return {"loss": text_loss(model, schedule, batch, g)}

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, LoRA)
        model = module.merge(unet)
        preview.draw_captions(Pipeline(model, vae, text, schedule), folder / "comic.png")
        return {"held_out": held_out_loss(model, schedule, held_out)}

    data = ShuffledBatches(pairs, plan.batch, plan.seed)
    result, log = run(plan, lora, data, loss, validate, folder, workers=0, made_from=made_from)
    assert isinstance(result, LoRA)
    details = {"data": f"the mini world in the comic style, {pictures} pictures", "rank": RANK, "made_from": made_from}
    cards.save_tensors(peft_layout(result, unet), out, card(phases, log, command, details, WORLD_LICENCE))
