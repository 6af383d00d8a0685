"""The losses that train the parts of the mini world, against their definitions, and what each stage writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_train_adapter import pairs, randn
from torch import Tensor

from model.context import Context
from model.vae import VAE, VAEConfig
from sampling.schedule import Schedule
from train import clip, judge, probe, structure, style
from train import unet as unet_stage
from train import vae as vae_stage
from train.loss import diffusion_loss, noise_for
from train.pairs import Pairs
from train.randomness import generator
from train.spoiled import Labels
from train.unet import text_loss

__all__ = ["pairs"]  # a fixture


@pytest.mark.parity("open_clip ClipLoss", 1e-6)
def test_the_contrastive_loss() -> None:
    """Where two captions are the same, each is right for both pictures: the mean over what is right takes the place of one."""
    image, text, scale, own = randn(6, 8, seed=1), randn(6, 8, seed=2), torch.tensor(1.5), torch.eye(6, dtype=torch.bool)
    theirs = open_clip.loss.ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale.exp())
    torch.testing.assert_close(clip.contrastive(image, text, scale, own), theirs)
    same = own.clone()
    same[0, 1] = same[1, 0] = True
    logits = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    rows = [-(each.log_softmax(dim=1)[i][same[i]]).mean() for each in (logits, logits.T) for i in range(6)]
    torch.testing.assert_close(clip.contrastive(image, text, scale, same), torch.stack(rows).mean())


def test_the_loss_of_the_vae() -> None:
    """Errors and a little of the KL divergence of torch.distributions. A VAE that is not trained yet has a small variance, the same for
    all latents, and `unit_scale` gives its latents the deviation 1."""
    torch.manual_seed(0)
    vae, x = VAE(VAEConfig(channels=(8, 8), res_blocks=1, groups=4, scale=0.5)), randn(3, 3, 16, 16, seed=1)
    vae_stage.initialise(vae)
    mean, logvar = vae.moments(x)
    assert (logvar == vae_stage.LOGVAR).all() and mean.std() > 0
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    error = vae.decode((q.mean + q.stddev * torch.randn(mean.shape, generator=generator(0, 0))) * 0.5) - x
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    want = error.square().mean() + 0.5 * error.abs().mean() + 2 * F.avg_pool2d(error, 4).square().mean() + 2e-4 * kl
    torch.testing.assert_close(vae_stage.vae_loss(vae, x, generator(0, 0))["loss"], want)
    vae.config = replace(vae.config, scale=vae_stage.unit_scale(vae, [x]))
    assert float(vae.encode(x).std()) == pytest.approx(1, abs=1e-3)


def test_the_loss_of_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is a mean over the pictures that it is about: those whose concept, or background, is known, or that are not spoilt."""
    torch.manual_seed(0)
    model, (x, true) = judge.Judge(), judge.answers(6, 2, "cpu").at(torch.arange(8))
    masks = [1, 1, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 0, 0]
    known, ground, clean = (torch.tensor(mask).float() for mask in masks)
    monkeypatch.setattr(judge, "spoil", lambda x, concept, background, g: (x, Labels(concept, known, ground, clean)))
    monkeypatch.setattr(judge, "degrade", lambda x, g: x / 2)
    read = model(x / 2)

    def mean(error: Tensor, mask: Tensor) -> Tensor:
        return error[mask.bool()].mean()

    want = mean(F.cross_entropy(read.concept, true["concept"], reduction="none"), known)
    want = want + mean(F.cross_entropy(read.background, true["background"], reduction="none"), ground)
    want = want + mean((read.palette - true["palette"]).norm(dim=-1).mean(dim=-1), clean) / 20
    want = want + mean((read.placement - true["placement"]).abs().mean(dim=-1), clean) / 3
    torch.testing.assert_close(judge.judge_loss(model, (x, true), generator(0, 0))["loss"], want)


def test_the_loss_of_the_base(pairs: Pairs) -> None:
    """One caption in ten is empty, and errors have min-SNR weights of gamma 5. The held-out loss reads every caption."""
    batch, seen = pairs.at(torch.arange(6).repeat(500)), list[Context]()

    def net(x: Tensor, t: Tensor, context: Context, _: Any) -> Tensor:
        seen.append(context)
        return torch.zeros_like(x)

    loss, g = text_loss(net, Schedule(), batch, generator(0, 0)), generator(0, 0)  # type: ignore[arg-type]
    x0 = batch.latents(g)
    t, eps = noise_for(x0, g)
    assert float(loss) == pytest.approx(float(diffusion_loss(net, Schedule(), x0, Context(batch.text), t, eps, unet_stage.GAMMA).mean()))
    own = batch.text.ne(batch.empty).flatten(1).any(dim=1)
    assert seen[0].text[own].eq(batch.empty).flatten(1).all(dim=1).float().mean() == pytest.approx(0.1, abs=0.02)


def test_the_judge_and_the_probes_read_pictures_that_no_network_was_trained_on() -> None:
    assert min(judge.FIRST, probe.FIRST) >= max(stage.PICTURES for stage in (unet_stage, clip, structure, style))


def test_probes_read_held_out_rows() -> None:
    """A linear function is found; random labels are at chance level, though 200 columns fit 200 rows perfectly."""
    x = randn(400, 3, seed=0)
    assert probe.regress(x, x @ randn(3, 2, seed=1), 300) == pytest.approx(1, abs=1e-3)
    labels = torch.randint(5, (400,), generator=torch.Generator().manual_seed(0))
    assert probe.classify(randn(400, 200, seed=2), labels, 200) < 0.4
