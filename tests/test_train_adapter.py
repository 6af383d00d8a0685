"""The adapter's training: Eq. 1 and 6 by hand, condition dropping, its gates, and that it learns while the base stays."""

from __future__ import annotations

import contextlib
import copy
import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from own_pictures import base, command, write_pictures
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.adapters import load_adapter
from model.adapter import IPAdapter
from model.attention import attention, concatenated, decoupled
from model.context import Context
from model.features import Features
from model.image_projection import ImageProjection, Resampler
from model.source import Source
from model.unet import UNet, UNetConfig
from model.words import Prediction
from sampling.loading import load
from sampling.schedule import Schedule
from train import adapter as adapter_stage
from train import gains, preview
from train.__main__ import main
from train.adapter import Recipe
from train.data import ShuffledBatches
from train.errors import GateError
from train.gains import check_gates, held_out_losses, losses_of
from train.loss import diffusion_loss, drops, min_snr, noise_for, sample_inputs
from train.pairs import Batch, Pairs
from train.plan import Plan
from train.plus import initialise_from
from train.randomness import generator
from train.setting import Setting, TrainingSource
from train.world import Says

__all__ = ["base"]  # a fixture

CONFIG = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=8, groups=4)
EMBEDDING = 10
FILES = "ip_adapter.safetensors", "ip_adapter_plus.safetensors"


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(prediction: Prediction = "epsilon", own_projections: bool = True, tokens: int = 4) -> tuple[UNet, IPAdapter]:
    """A frozen random base, and a fresh adapter for it."""
    torch.manual_seed(0)
    unet = UNet(replace(CONFIG, prediction=prediction)).eval().requires_grad_(False)
    return unet, IPAdapter(unet, ImageProjection(EMBEDDING, CONFIG.context_dim, tokens), own_projections)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    n = 6
    return Pairs(
        randn(n, 4, 8, 8, seed=1),
        0.1 * torch.ones(n, 4, 8, 8),
        torch.arange(n) % 3,
        randn(3, 5, 8, seed=2),
        Features(randn(n, 1, 1, EMBEDDING, seed=3), torch.zeros(1, 1, 1, EMBEDDING)),
    )


# dropping


def test_drops_are_exclusive_and_five_percent_each() -> None:
    text, image = drops(100_000, torch.Generator().manual_seed(0))
    for share in (text & ~image, image & ~text, text & image):
        assert float(share.float().mean()) == pytest.approx(0.05, abs=0.003)
    assert float((~text & ~image).float().mean()) == pytest.approx(0.85, abs=0.005)


def test_drops_come_from_the_generator() -> None:
    a, b = (drops(1000, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# the loss


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr(gamma: float) -> None:
    t = torch.arange(1000)
    a = Schedule().alphas.double()
    snr = a / (1 - a)
    torch.testing.assert_close(min_snr(Schedule(), t, gamma).double(), snr.clamp(max=gamma) / snr, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        min_snr(Schedule(prediction="v"), t, gamma).double(), snr.clamp(max=gamma) / (snr + 1), rtol=1e-5, atol=0
    )


def test_min_snr_weighs_the_same_error_for_both_predictions() -> None:
    """||v - v'||^2 = (SNR + 1) ||eps - eps'||^2 for one x_t, so weights that differ by that factor are one weight."""
    t = torch.tensor([1, 100, 500, 981])
    x0, eps, wrong = randn(4, 4, 2, 2, seed=1), randn(4, 4, 2, 2, seed=2), randn(4, 4, 2, 2, seed=3)
    a = Schedule().alphas[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    wrong_x0 = (x_t - (1 - a).sqrt() * wrong) / a.sqrt()
    v, wrong_v = a.sqrt() * eps - (1 - a).sqrt() * x0, a.sqrt() * wrong - (1 - a).sqrt() * wrong_x0
    weigh = [min_snr(Schedule(prediction=p), t) for p in ("epsilon", "v")]
    errors = [(eps - wrong).square().mean(dim=(1, 2, 3)), (v - wrong_v).square().mean(dim=(1, 2, 3))]
    torch.testing.assert_close(weigh[0] * errors[0], weigh[1] * errors[1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_diffusion_loss_is_eq_1(prediction: Prediction, gamma: float | None) -> None:
    unet, _ = parts(prediction)
    schedule, t = Schedule(prediction=prediction), torch.tensor([0, 500, 999])
    x0, eps, text = randn(3, 4, 8, 8, seed=1), randn(3, 4, 8, 8, seed=2), Context(randn(3, 5, 8, seed=3))
    losses = diffusion_loss(unet, schedule, x0, text, t, eps, gamma)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
    for i, step in enumerate(t.tolist()):
        a = float(alphas[step])
        x_t = a**0.5 * x0[i] + (1 - a) ** 0.5 * eps[i]
        target = eps[i] if prediction == "epsilon" else a**0.5 * eps[i] - (1 - a) ** 0.5 * x0[i]
        expected = float((unet(x_t[None], step, Context(text.text[i : i + 1]))[0] - target).square().mean())
        if gamma is not None:
            snr = a / (1 - a)
            expected *= min(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
        assert float(losses[i]) == pytest.approx(expected, rel=1e-4)


def test_eq_6_is_eq_1_with_a_picture() -> None:
    unet, adapter = parts()
    x0, eps, t, text = (
        randn(2, 4, 8, 8, seed=1),
        randn(2, 4, 8, 8, seed=2),
        torch.tensor([3, 700]),
        Context(randn(2, 5, 8, seed=3)),
    )
    context = adapter(text, randn(2, EMBEDDING, seed=4))
    losses = diffusion_loss(unet, Schedule(), x0, context, t, eps)
    expected = (unet(Schedule().add_noise(x0, eps, t), t, context) - eps).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected)
    assert not torch.allclose(losses, diffusion_loss(unet, Schedule(), x0, text, t, eps))


def test_loss_is_summed_in_float32_for_a_half_precision_base() -> None:
    unet, _ = parts()
    unet = unet.bfloat16()
    x0, eps, text = (
        randn(2, 4, 8, 8, seed=1).bfloat16(),
        randn(2, 4, 8, 8, seed=2).bfloat16(),
        Context(randn(2, 5, 8, seed=3).bfloat16()),
    )
    assert diffusion_loss(unet, Schedule(), x0, text, torch.tensor([3, 700]), eps).dtype == torch.float32


def test_noise_offset_moves_whole_channels() -> None:
    """The noise differs from the plain one by one number per channel, N(0, o^2); latents, timesteps and drops stay."""
    n = 500
    features = Features(torch.zeros(n, 1, 1, 3), torch.zeros(1, 1, 1, 3))
    batch = Pairs(torch.zeros(n, 4, 5, 3), torch.ones(n, 4, 5, 3), torch.zeros(n, dtype=torch.long), torch.zeros(1, 77, 2), features)
    plain, moved = (
        sample_inputs(batch.at(torch.arange(n)), torch.Generator().manual_seed(0), dropping=True, offset=offset) for offset in (0.0, 0.5)
    )
    for name in ("x0", "t", "text", "image"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    offset = moved.eps - plain.eps
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6, rtol=0)
    assert float(offset[:, :, 0, 0].std()) == pytest.approx(0.5, abs=0.03)


def test_timesteps_are_uniform_and_noise_is_normal() -> None:
    t, eps = noise_for(torch.zeros(20_000, 1, 2, 2), torch.Generator().manual_seed(0))
    assert int(t.min()) == 0 and int(t.max()) == 999
    counts = torch.bincount(t // 100, minlength=10)
    assert counts.min() > 1800 and counts.max() < 2200
    assert float(eps.mean()) == pytest.approx(0, abs=0.01) and float(eps.std()) == pytest.approx(1, abs=0.01)


# the gates


@pytest.mark.parametrize("fuse", [decoupled, concatenated])
@pytest.mark.parametrize("own_projections", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_gates_let_a_fresh_adapter_pass(
    pairs: Pairs, prediction: Prediction, own_projections: bool, fuse: object
) -> None:
    unet, adapter = parts(prediction, own_projections)
    check_gates(unet=unet, adapter=adapter, schedule=Schedule(prediction=prediction), pairs=pairs, fuse=fuse)  # type: ignore[arg-type]
    assert all(p.grad is None for p in [*unet.parameters(), *adapter.parameters()])


def test_gates_see_the_gradients_of_float16(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are small, as those of large latents and late timesteps are, must not be rounded to zeros."""
    unet, adapter = parts()
    monkeypatch.setattr(gains, "diffusion_loss", lambda *given: 1e-4 * diffusion_loss(*given))
    for scale, passes in ((gains.SCALE, True), (1.0, False)):
        monkeypatch.setattr(gains, "SCALE", scale)
        with torch.autocast("cpu", torch.float16), contextlib.nullcontext() if passes else pytest.raises(GateError, match="no gradient"):
            check_gates(unet=unet.half(), adapter=adapter, schedule=Schedule(), pairs=pairs)


@pytest.mark.parametrize(("batch", "processes", "share"), [(8, 4, 2), (8, 1, 8), (2, 4, 1)])
def test_checks_read_as_many_pictures_as_a_process_trains_on(
    batch: int, processes: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_stage.processes, "team", lambda: SimpleNamespace(size=processes))
    assert adapter_stage.share_of(replace(adapter_stage.PLAN, batch=batch)) == share


def test_gates_refuse_a_base_that_is_not_frozen(pairs: Pairs) -> None:
    unet, adapter = parts()
    unet.conv_out.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"frozen.*conv_out\.weight"):
        check_gates(unet=unet, adapter=adapter, schedule=Schedule(), pairs=pairs)


def test_gates_refuse_a_tensor_that_nothing_reaches(pairs: Pairs) -> None:
    unet, adapter = parts()
    adapter.forgotten = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="forgotten"):
        check_gates(unet=unet, adapter=adapter, schedule=Schedule(), pairs=pairs)


def test_gates_refuse_a_fusion_that_forgets_lambda(pairs: Pairs) -> None:
    def careless(q: Tensor, text: Source, image: tuple[Source, ...]) -> Tensor:
        return attention(q, text.k, text.v) + sum(attention(q, source.k, source.v) for source in image)

    unet, adapter = parts()
    with pytest.raises(RuntimeError, match="scale 0"):
        check_gates(unet=unet, adapter=adapter, schedule=Schedule(), pairs=pairs, fuse=careless)  # type: ignore[arg-type]


# learning


def fit(module: nn.Module, loss: Callable[[], Tensor], steps: int) -> list[float]:
    optimizer, losses = torch.optim.AdamW(module.parameters(), 2e-2, weight_decay=0.01), []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def test_the_adapter_alone_overfits_a_batch() -> None:
    """Four pictures under nearly all noise. A base that learned to draw them from four texts gets one text for all: only
    the embeddings tell them apart, and only the adapter learns."""
    torch.manual_seed(0)
    n, schedule, unet = 4, Schedule(prediction="v"), UNet(replace(CONFIG, prediction="v"))
    x0, eps, t = randn(n, 4, 4, 4, seed=1), randn(n, 4, 4, 4, seed=4), torch.full((n,), 950)
    told, untold = Context(randn(n, 5, 8, seed=5)), Context(randn(1, 5, 8, seed=3).expand(n, 5, 8))
    fit(unet, lambda: diffusion_loss(unet, schedule, x0, told, t, torch.randn(eps.shape)).mean(), 50)
    unet.eval().requires_grad_(False)
    before, embedding = copy.deepcopy(unet.state_dict()), randn(n, EMBEDDING, seed=2)
    adapter = IPAdapter(unet, ImageProjection(EMBEDDING, CONFIG.context_dim, 4))

    def loss(embedding: Tensor) -> Tensor:
        return diffusion_loss(unet, schedule, x0, adapter(untold, embedding), t, eps).mean()

    losses = fit(adapter, lambda: loss(embedding), 50)
    assert losses[-1] < losses[0] / 3, (losses[0], losses[-1])
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    with torch.no_grad():
        assert float(loss(embedding.roll(1, dims=0))) > 3 * losses[-1]  # it is the picture that helps


def test_held_out_losses_are_what_they_say(pairs: Pairs) -> None:
    unet, adapter = parts()
    first, second = (held_out_losses(unet, adapter, Schedule(), pairs) for _ in range(2))
    assert first == second and set(first) == {"held_out", "gain_zero", "gain_shuffled"}
    deaf = copy.deepcopy(adapter)
    for to in deaf.to_v:
        nn.init.zeros_(to.weight)
    losses = held_out_losses(unet, deaf, Schedule(), pairs)
    assert losses["gain_zero"] == losses["gain_shuffled"] == 0  # V' = 0: no picture says anything
    assert first["gain_zero"] != 0 and first["gain_shuffled"] != 0
    means = {name: float(torch.cat(each).mean()) for name, each in losses_of(unet, adapter, Schedule(), pairs, decoupled, "cpu").items()}
    right = means["right"]
    want = {"held_out": right, "gain_zero": means["null"] - right, "gain_shuffled": means["wrong"] - right}
    assert first == pytest.approx(want, abs=1e-6)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("fuse", [decoupled, concatenated])
def test_a_form_is_trained_and_validated_with_its_own_attention(pairs: Pairs, tmp_path: Path, fuse: Any) -> None:
    """The log of a step, by hand: the loss of its batch before it, and that of the held-out pictures after it."""
    unet, adapter = trained_parts()
    first, plan = copy.deepcopy(adapter), Plan("form", steps=1, batch=6, lr=1e-2, warmup=1)
    setting = Setting(SimpleNamespace(unet=unet, schedule=Schedule()), pairs, pairs)  # type: ignore[arg-type]
    kept, log = adapter_stage.fit(setting, adapter, plan, tmp_path, fuse)

    @torch.no_grad()
    def loss(adapter: IPAdapter, batch: Batch, seed: int, dropping: bool) -> float:
        x = sample_inputs(batch, generator(seed, 0), dropping)
        context = adapter(Context(x.text, fuse=fuse), x.image)
        return float(diffusion_loss(unet, Schedule(), x.x0, context, x.t, x.eps).mean())

    assert log[0]["loss"] == pytest.approx(loss(first, pairs.batches(6, 0).batch(0), 0, True), rel=1e-5)
    assert log[0]["held_out"] == pytest.approx(loss(kept, pairs.at(torch.arange(6)), 1, False), rel=1e-5)


def test_a_training_drops_texts_and_pictures(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its noise has the offset that was asked for."""
    seen: list[tuple[bool, float]] = []

    def keep(batch: Any, g: torch.Generator, dropping: bool = False, offset: float = 0.0) -> Any:
        seen.append((dropping, offset))
        return sample_inputs(batch, g, dropping, offset)

    monkeypatch.setattr(adapter_stage, "sample_inputs", keep)
    write_pictures(tmp_path / "data", 6)
    main(command(tmp_path, base, "--noise-offset", "0.1"))
    assert set(seen) == {(True, 0.1)}


def test_the_average_of_the_weights_is_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` returns it; the module that was trained has other weights."""

    def kept(plan: Plan, module: nn.Module, *_: Any, **__: Any) -> tuple[nn.Module, list[dict[str, float]]]:
        average = copy.deepcopy(module)
        for parameter in average.parameters():
            nn.init.constant_(parameter, 0.25)
        return average, [{"step": 1, "seconds": 1.0}]

    monkeypatch.setattr(adapter_stage, "run", kept)
    write_pictures(tmp_path / "data", 6)
    main(command(tmp_path, base))
    assert all((tensor == 0.25).all() for tensor in load_file(tmp_path / "out" / "ip_adapter.safetensors").values())


def test_the_seed_makes_the_first_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "data", 6)
    first: list[Tensor] = []

    def keep(plan: Plan, module: IPAdapter, *_: Any, **__: Any) -> tuple[nn.Module, list[dict[str, float]]]:
        first.append(module.image_projection.proj.weight.detach().clone())  # type: ignore[union-attr,operator]
        return module, [{"step": 1, "seconds": 1.0}]

    monkeypatch.setattr(adapter_stage, "run", keep)
    for i, seed in enumerate((0, 1, 0)):
        main(command(tmp_path, base, "--seed", seed, "--state", tmp_path / str(i), "--weights", tmp_path / f"out{i}"))
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])


# Plus begins as a trained adapter of the base form


def fine_of(pairs: Pairs) -> Pairs:
    """The same pictures as fine features, which the embedding is a linear function of."""
    assert pairs.features is not None
    fine = (pairs.features.pictures @ randn(EMBEDDING, 3 * 12, seed=4)).view(-1, 1, 3, 12)
    return replace(pairs, features=Features(fine, torch.zeros(1, 1, 3, 12)))


def plus_of(unet: UNet, tokens: int) -> IPAdapter:
    torch.manual_seed(1)
    width = CONFIG.context_dim
    return IPAdapter(unet, Resampler(12, width, tokens, width=16, depth=2, heads=1))


def trained_parts() -> tuple[UNet, IPAdapter]:
    """As `parts`, but the adapter's W'_k, W'_v are no longer the UNet's W_k, W_v."""
    unet, known = parts(tokens=2)
    with torch.no_grad():
        for i, weight in enumerate(known.parameters()):
            weight.add_(0.3 * randn(*weight.shape, seed=10 + i))
    return unet, known


def test_plus_begins_with_the_drawing_of_the_adapter_that_it_begins_as(pairs: Pairs, tmp_path: Path) -> None:
    """Its tokens are fitted, those of the null picture too; then the UNet's noise is the same, and an untrained Plus's is not."""
    unet, known = trained_parts()
    fresh, plus = plus_of(unet, 6), plus_of(unet, 6)
    plan, fine = Plan("begin", steps=1500, batch=3, lr=3e-3, decay=0.7, validate_every=1500), fine_of(pairs)
    before = copy.deepcopy(known.state_dict())
    initialise_from(known, plus, plan, (pairs, pairs), (fine, fine), tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in known.state_dict().items())
    assert all(torch.equal(plus.state_dict()[n], before[n]) for n in before if n.startswith(("to_k", "to_v")))
    rows, none = torch.arange(len(pairs)), torch.zeros(len(pairs), dtype=torch.bool)
    batch = sample_inputs(pairs.at(rows), torch.Generator().manual_seed(0), "cpu")
    errors: dict[str, float] = {}
    for name, adapter in {"plus": plus, "fresh": fresh}.items():
        for drop in (none, ~none):
            with torch.no_grad():
                contexts = [
                    each(Context(batch.text), source.at(rows).images(drop), scale=2.0)
                    for each, source in ((known, pairs), (adapter, fine))
                ]
                wanted, own = (unet(batch.x0, batch.t, context) for context in contexts)
            errors[name] = max(errors.get(name, 0.0), float((wanted - own).abs().max()))
    assert errors["plus"] < 0.05 * errors["fresh"], errors
    explained = [json.loads(row) for row in (tmp_path / "begin.jsonl").read_text().splitlines()][-1]["explained"]
    with torch.no_grad():
        assert pairs.features and fine.features
        goal, own = known.tokens(pairs.features.pictures).repeat(1, 3, 1), plus.tokens(fine.features.pictures)
    share = 1 - float((own - goal).square().mean() / (goal - goal.mean(dim=0)).square().mean())
    assert explained == pytest.approx(share, abs=1e-5) and share > 0.99


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_command_trains_plus_from_the_base_folders_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That has to be there, before anything is computed; the card names both steps."""
    monkeypatch.setattr(preview, "draw_image_prompts", lambda *_: None)
    base, out, state = tmp_path / "base", tmp_path / "out", tmp_path / "state"
    shutil.copytree("weights", base)
    command = ["plus", "--steps", "2", "--batch", "4", "--pictures", "24"]
    command += [part for k, v in {"base": base, "weights": out, "state": state}.items() for part in (f"--{k}", str(v))]
    main(command)
    card = json.loads((out / "ip_adapter_plus.json").read_text())
    assert [each["name"] for each in card["settings"]] == ["ip_adapter_plus_begin", "ip_adapter_plus"]
    unet = load(base, ()).unet
    plus, known = (load_adapter(folder / name, unet) for folder, name in ((out, FILES[1]), (base, FILES[0])))
    for own, start in zip(plus.to_v, known.to_v, strict=True):
        assert float((own.weight - start.weight).abs().max()) < 5e-3  # two steps at a rate that still rises
    (base / FILES[0]).unlink()
    shutil.rmtree(state)
    with pytest.raises(FileNotFoundError, match=r"Plus is initialised from it: run `python -m train adapter` first"):
        main(command)
    assert not state.exists()
    monkeypatch.setattr("sys.argv", ["train", *command])
    with pytest.raises(SystemExit, match=r"^error: .*Plus is initialised from it"):  # the sentence alone, without a traceback
        runpy.run_path("train/__main__.py", run_name="__main__")


# the data


def test_an_epoch_shows_every_picture_once(pairs: Pairs) -> None:
    data = ShuffledBatches(pairs, 2, seed=0)
    seen = [data.rows(step).tolist() for step in range(6)]
    first, second = ([row for rows in epoch for row in rows] for epoch in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(6)) and first != second
    assert data.rows(4).tolist() == seen[4]


def test_the_seed_shuffles_the_pictures(pairs: Pairs) -> None:
    one, again, other = (torch.cat([pairs.batches(2, seed).batch(step).mean for step in range(3)]) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_latents_are_samples_of_the_posterior(pairs: Pairs) -> None:
    rows = torch.tensor([4, 1])
    drawn = torch.stack([pairs.at(rows).latents(torch.Generator().manual_seed(i)) for i in range(400)])
    torch.testing.assert_close(drawn.mean(dim=0), pairs.mean[rows], atol=0.03, rtol=0)
    assert float(drawn.std(dim=0).mean()) == pytest.approx(0.1, abs=0.005)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_every_phase_has_its_own_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same pictures and the same adapter, which goes on; the card tells what the captions said."""
    seen: list[tuple[Setting, Tensor]] = []
    fit = adapter_stage.fit

    def spy(setting: Setting, adapter: IPAdapter, plan: Plan, *args: Any, **options: Any) -> Any:
        seen.append((setting, adapter.image_projection.proj.bias.detach().clone()))
        return fit(setting, adapter, plan, *args, **options)

    monkeypatch.setattr(adapter_stage, "fit", spy)
    monkeypatch.setattr(preview, "draw_image_prompts", lambda *_: None)
    plan = Recipe("first", steps=1, batch=2, lr=1e-2, warmup=1, says=Says(0, 0, 0, 0))
    phases = plan, replace(plan, name="second", says=Says(1, 1, 0, 0))
    adapter_stage.train(tmp_path, tmp_path, phases, TrainingSource(Path("weights"), pictures=24))
    (first, before), (second, after) = seen
    assert len(first.pairs.texts) < 10 <= len(second.pairs.texts)  # no caption but colours; all kinds of captions
    assert first.pairs.features and second.pairs.features and not torch.equal(before, after)
    assert torch.equal(first.pairs.features.pictures, second.pairs.features.pictures)
    card = json.loads((tmp_path / "ip_adapter.json").read_text())
    assert [tuple(each["says"].values()) for each in card["settings"]] == [(0, 0, 0, 0), (1, 1, 0, 0)]
