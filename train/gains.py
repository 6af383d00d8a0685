"""Check an adapter before training, and measure whether it learns: held-out losses with the right, no and another picture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.adapter import IPAdapter
from model.attention import Fuse, decoupled
from model.unet import UNet
from sampling.schedule import Schedule
from train.errors import GateError
from train.loss import diffusion_loss, sample_inputs
from train.pairs import EncodedPairs
from train.randomness import generator

SCALE = 2.0**16  # so that no gradient of float16 is rounded to 0


@torch.no_grad()
def losses_of(
    unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: EncodedPairs, fuse: Fuse, device: str, most: int = 64, seed: int = 1
) -> dict[str, list[Tensor]]:
    """Return the unweighted losses of each pair with the `right`, the `null` and a `wrong` picture, as lists of batches.

    All three use the same noise and timesteps, which depend only on `seed`, so their differences are paired. `most`: pictures that the
    UNet reads at once.
    """
    losses: dict[str, list[Tensor]] = {"right": [], "null": [], "wrong": []}
    for i, part in enumerate(pairs.parts(device)):
        batch = sample_inputs(part, generator(seed, i, device))
        null = part.images(torch.ones(len(part), dtype=torch.bool, device=device))
        for name, image in {"right": batch.image, "null": null, "wrong": batch.image.roll(1, dims=0)}.items():
            for x in replace(batch, image=image).split(most):
                context = adapter(x.context(unet.config, fuse), x.image)
                losses[name].append(diffusion_loss(unet, schedule, x.x0, context, x.t, x.eps))
    return losses


def held_out_losses(
    unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: EncodedPairs, fuse: Fuse = decoupled, device: str = "cpu", most: int = 64
) -> dict[str, float]:
    """Return the mean loss with the right picture, and its increase with the null image and with another picture."""
    losses = losses_of(unet, adapter, schedule, pairs, fuse, device, most)
    right, null, wrong = (sum(float(part.sum()) for part in losses[k]) / len(pairs) for k in ("right", "null", "wrong"))
    return {"held_out": right, "gain_zero": null - right, "gain_shuffled": wrong - right}


def verdict(unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: EncodedPairs, device: str, most: int = 64) -> str:
    """Write a sentence about whether the adapter learned.

    It did if the right picture lowers the held-out loss by more than twice the standard error over pictures. If there are few
    pictures, the loss is averaged over several noises and timesteps.
    """
    rounds = range(100, 100 + max(1, 64 // len(pairs)))
    losses = [losses_of(unet, adapter, schedule, pairs, decoupled, device, most, seed) for seed in rounds]
    gains = torch.stack([torch.cat(each["wrong"]) - torch.cat(each["right"]) for each in losses]).mean(dim=0)
    gain, error = float(gains.mean()), float(gains.std() / len(gains) ** 0.5)
    claim = "it learned to read pictures" if gain > 2 * error else "it has not learned to read pictures yet"
    return (
        f"{claim}: on {len(pairs)} held-out pictures, the loss with another picture minus that with the right one "
        f"is {gain:.2g} ± {2 * error:.2g}"
    )


def check_gates(
    unet: UNet, adapter: IPAdapter, schedule: Schedule, pairs: EncodedPairs, fuse: Fuse = decoupled, device: str = "cpu", most: int = 4
) -> None:
    """Raise `GateError` if an adapter cannot be trained as it should, on at most `most` pictures.

    At scale 0, the output must equal that of the base model bit for bit. Every trainable tensor must get a gradient, and no frozen
    tensor may get one.
    """
    batch = sample_inputs(next(pairs.parts(device, most)), generator(0, 0, device))
    text = batch.context(unet.config, fuse)
    with torch.no_grad():
        if not torch.equal(unet(batch.x0, batch.t, text), unet(batch.x0, batch.t, adapter(text, batch.image, 0.0))):
            raise GateError("at scale 0 the adapter changes the base model")
    loss = diffusion_loss(unet, schedule, batch.x0, adapter(text, batch.image), batch.t, batch.eps).mean()
    (SCALE * loss).backward()
    silent = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    leaks = [name for name, p in unet.named_parameters() if p.grad is not None]
    adapter.zero_grad(set_to_none=True)
    if silent:
        raise GateError(f"no gradient reaches these tensors of the adapter: {', '.join(silent)}")
    if leaks:
        raise GateError(f"gradients reach the frozen base: {', '.join(leaks)}")
