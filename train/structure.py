"""Train a structure control on the mini world. The stages `control` and `t2i` share this code.

Minimise Eq. 1 with min-SNR weights and a frozen base. The hints are the outlines of the drawings. Half of the pictures lose
their text, so that the control learns to draw from the hint alone (arXiv 2302.05543, section 3.3). The EMA of the weights
is kept.

The log shows whether the control learns: `gain_none` is the held-out loss without it minus the loss with the right hint,
`gain_shuffled` is the held-out loss with another picture's hint minus the loss with the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.clip import load_text_encoder
from checkpoints.files import check_output
from checkpoints.stable_diffusion import load_unet, load_vae
from model.context import Context
from model.unet import Residuals, UNet, UNetConfig
from sampling.schedule import Schedule
from train.card import WORLD_LICENCE, card
from train.data import ShuffledBatches
from train.encode import WorldPictures
from train.errors import GateError
from train.fingerprint import digest, fingerprint
from train.loop import run
from train.loss import diffusion_loss
from train.outlines import HintedBatch, HintedPairs, outlines_of
from train.plan import Plan, autocast
from train.randomness import generator, seeded
from train.unet import GAMMA

PICTURES, HELD_OUT, DROP_TEXT = 20_000, 512, 0.5
Times = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kind:
    """A kind of control.

    `file`: the name of its file. `build(unet, factor)`: make an untrained control for a UNet and a VAE that downsamples by
    `factor`. `steer(control, unet.config, x_t, t, context, hint)`: compute its residuals. `times(x_0, generator)`: draw timesteps
    and noise. `first(control)`: the tensors that get a gradient in the first step. `neutral`: whether an untrained control leaves
    the output of the base unchanged, bit for bit.
    """

    file: str
    build: Callable[[UNet, int], nn.Module]
    steer: Callable[[Any, UNetConfig, Tensor, Tensor, Context, Tensor], Residuals]
    times: Times
    first: Callable[[Any], list[nn.Parameter]]
    neutral: bool


@dataclass(frozen=True)
class SteeredBase:
    """A base, a control of one kind, and the loss of both."""

    kind: Kind
    unet: UNet
    control: nn.Module
    schedule: Schedule

    def losses(self, batch: HintedBatch, g: torch.Generator, drop: float, gamma: float | None, hint: Tensor | None) -> Tensor:
        """Return the loss of each picture, `b`, with `hint` instead of its own; with None, the control is left out."""
        x0 = batch.pairs.latents(g)
        t, eps = self.kind.times(x0, g)
        empty = torch.rand(len(x0), generator=g, device=g.device) < drop
        context = Context(torch.where(empty.view(-1, 1, 1), batch.pairs.empty, batch.pairs.text))

        def control(x_t: Tensor, t: Tensor) -> Residuals:
            return Residuals() if hint is None else self.kind.steer(self.control, self.unet.config, x_t, t, context, hint)

        return diffusion_loss(self.unet, self.schedule, x0, context, t, eps, gamma, control)

    @torch.no_grad()
    def held_out(self, pool: HintedPairs, seed: int = 1) -> dict[str, float]:
        """Return the mean loss with the right hint, and its increase without a hint and with another picture's hint."""
        sums, device = {"right": 0.0, "none": 0.0, "wrong": 0.0}, pool.hints.device
        for i, part in enumerate(pool.parts()):
            for name, hint in {"right": part.hint, "none": None, "wrong": part.hint.roll(1, dims=0)}.items():
                sums[name] += float(self.losses(part, generator(seed, i, str(device)), 0.0, None, hint).sum())
        right, none, wrong = (total / len(pool) for total in sums.values())
        return {"held_out": right, "gain_none": none - right, "gain_shuffled": wrong - right}

    def check_gates(self, pool: HintedPairs) -> None:
        """Raise `GateError` if an untrained control cannot be trained as it should.

        If it is `neutral`, the output must equal that of the base bit for bit. In the first step, the tensors of `kind.first` (for
        a ControlNet, its zero convolutions) must get a gradient, and no other tensor of the control or the base may get one.
        """
        device = str(pool.hints.device)
        batch = pool.at(torch.arange(min(4, len(pool))))

        def losses(hint: Tensor | None) -> Tensor:
            return self.losses(batch, generator(0, 0, device), 0.0, None, hint)

        with torch.no_grad():
            if self.kind.neutral and not torch.equal(losses(batch.hint), losses(None)):
                raise GateError("the untrained control changes the base model")
        losses(batch.hint).mean().backward()
        first = {id(p) for p in self.kind.first(self.control)}
        wrong = [n for n, p in self.control.named_parameters() if (p.grad is not None and bool(p.grad.any())) != (id(p) in first)]
        leaks = [name for name, p in self.unet.named_parameters() if p.grad is not None]
        self.control.zero_grad(set_to_none=True)
        if wrong:
            raise GateError(f"in the first step these tensors of the control have a gradient, or lack one, wrongly: {', '.join(wrong)}")
        if leaks:
            raise GateError(f"gradients reach the frozen base: {', '.join(leaks)}")


def train(kind: Kind, folder: Path, weights: Path, phases: tuple[Plan, ...], command: str, pictures: int) -> None:
    """Train a control for the base model in the folder `weights`; write `kind.file` there."""
    out, (plan,) = weights / kind.file, phases
    check_output(out)
    unet = load_unet(weights / "unet.safetensors").to(plan.device)
    vae = load_vae(weights / "vae.safetensors").to(plan.device)
    text = load_text_encoder(weights / "text_encoder.safetensors").to(plan.device)
    training, validation = WorldPictures("train", pictures), WorldPictures("val", min(HELD_OUT, pictures))
    parts = {"base": fingerprint(unet), "vae": fingerprint(vae), "text encoder": fingerprint(text)}
    made_from = {**training.made_from(), **parts, "outlines": digest(outlines_of("val", 8).flatten().tolist())}

    def with_hints(part: WorldPictures) -> HintedPairs:
        pairs = part.pairs(vae, text, None, folder / "cache")
        return HintedPairs(pairs, outlines_of(part.split, part.count).to(pairs.mean.device))

    pool, held_out = with_hints(training), with_hints(validation)
    with seeded(plan.seed):
        control = kind.build(unet, vae.config.factor).to(plan.device).train().requires_grad_(True)
    model = SteeredBase(kind, unet, control, Schedule(prediction=unet.config.prediction))
    model.check_gates(pool)

    def loss(batch: HintedBatch, g: torch.Generator) -> dict[str, Tensor]:
        return {"loss": model.losses(batch, g, DROP_TEXT, GAMMA, batch.hint).mean()}

    def validate(module: nn.Module) -> dict[str, float]:
        with autocast(plan):
            return SteeredBase(kind, unet, module, model.schedule).held_out(held_out)

    result, log = run(plan, control, ShuffledBatches(pool, plan.batch, plan.seed), loss, validate, folder, workers=0, made_from=made_from)
    details = {"data": f"the mini world, {pictures} pictures; hints: outlines of the drawings", "made_from": made_from}
    cards.save(result, out, card(phases, log, command, details, WORLD_LICENCE))
