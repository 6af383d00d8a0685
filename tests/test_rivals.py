"""Tier C of the ablation: what the rivals compute, and a tiny study from end to end."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from peers import SMALL_SD15, randn
from PIL import Image
from tiny_world import write_world
from torch import Tensor

from checkpoints import cards
from checkpoints.files import write_json
from eval import __main__ as commands
from eval.ablation import rival_draws
from eval.ablation.memo import Unit
from eval.ablation.reference import ReferenceOnly, ReferenceUNet
from eval.ablation.rival import Rival, RivalPipeline, parameters_of, width
from eval.ablation.rival_draws import REFERENCE, RivalStudy, loss_of
from eval.ablation.rivals import LARGE, MLP, TRAINED, GlobalAdapter, ImageVariations, UnCLIP
from eval.ablation.rivals_table import NAMES, PAPER
from eval.ablation.rows import Results
from eval.ablation.shuffle import ControlNetShuffle, ShuffleUNet, flow, moved, shuffled
from model.context import Context, stack
from model.controlnet import ControlNet
from model.features import Features
from model.unet import UNet
from sampling.control import total
from sampling.loading import load
from sampling.micro import DRAWING
from sampling.schedule import Schedule
from train.encode import scenes_of
from train.pairs import Batch, Pairs
from train.setting import SAYS
from train.world import elsewhere, pictures

ROOT = Path(__file__).parent.parent
DIM = SMALL_SD15.context_dim


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SMALL_SD15).requires_grad_(False)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, text tokens and image embeddings for 3 rows."""
    x, text, image = (randn(3, *shape, seed=n).float() for n, shape in enumerate(((4, 8, 8), (7, DIM), (2 * DIM,))))
    return x, text, image


def rivals(unet: UNet, image_dim: int) -> Iterator[tuple[str, Rival]]:
    for name, build in TRAINED.items():
        yield name, build(unet, image_dim)


def test_what_is_trained(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """The loss of each rival reaches all of its parameters and none of the base's; reference-only trains nothing."""
    x, text, image = inputs
    sizes, base = {}, sum(p.numel() for p in unet.parameters())
    for name, rival in rivals(unet, image.shape[1]):
        read = picture_bytes(3, 32).float() if name == "shuffle" else image
        rival.unet(x, 500, rival(text, read, torch.Generator().manual_seed(0))).square().mean().backward()
        trained = [p for p in rival.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained), name
        sizes[name] = parameters_of(rival)
    assert all(p.grad is None for p in unet.parameters())
    assert sizes["variations"] == base < sizes["unclip"]
    assert base / 4 < sizes["shuffle"] < base
    assert 0.98 < sizes["simple_mlp"] / sizes["ip_adapter"] <= 1
    assert parameters_of(ReferenceOnly(unet, Schedule())) == 0


def test_the_global_adapter_is_as_large_as_the_official_one() -> None:
    """47,213,568 parameters at Stable Diffusion's widths, as the official code has, and four tokens."""
    with torch.device("meta"):
        official = GlobalAdapter(768, 768)
    assert parameters_of(official) == 47_213_568
    assert GlobalAdapter(24, 8)(randn(2, 1, 24).float()).shape == (2, 4, 8)
    assert MLP(24, 8, 5_000)(randn(2, 1, 24).float()).shape == (2, 4, 8)


def test_variations_read_no_text(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, text, image = inputs
    rival = ImageVariations(unet)
    assert rival(text, image).text.shape == (3, 2, DIM)
    a, b, other = (rival.unet(x, 500, rival(words, picture)) for words, picture in ((text, image), (-text, image), (text, -image)))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, other)
    halves = torch.cat([image[:, DIM:], image[:, :DIM]], dim=1)
    assert not torch.allclose(a, rival.unet(x, 500, rival(text, halves)), atol=1e-4)
    assert not rival(text, torch.zeros_like(image)).text.any()


def test_shuffle(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """It starts as the base. Its residuals have no places; a dropped picture leaves the base as it was; other residuals are added."""
    x, text, _ = inputs
    rival, plain, seen = ControlNetShuffle(unet), unet(x, 500, Context(text)), picture_bytes(3, 32).float()
    hint = rearrange(seen / 255, "b (c h w) -> b c h w", c=3, h=32)
    torch.testing.assert_close(rival.unet(x, 500, Context(text, added=hint)), plain)
    with torch.no_grad():
        for number, parameter in enumerate(rival.control.parameters()):
            parameter.add_(0.1 * randn(*parameter.shape, seed=number).float())
    residuals = rival.control(x, 500, Context(text), hint)
    assert all(each.shape[2:] == (1, 1) for each in [*residuals.skips, residuals.mid])
    context = Context(text, added=hint * torch.tensor([1, 1, 0])[:, None, None, None])
    out = rival.unet(x, 500, context)
    assert not torch.allclose(out[:2], plain[:2], atol=1e-3)
    torch.testing.assert_close(out[2], plain[2])
    both = unet(x, 500, Context(text), total([residuals, residuals]))
    torch.testing.assert_close(rival.unet(x, 500, context, residuals)[:2], both[:2])
    copied = copy.deepcopy(rival)  # as for the moving average of the weights
    assert isinstance(copied.unet, ShuffleUNet) and copied.unet.control is copied.control and copied.control is not rival.control
    assert {name.partition(".")[0] for name, p in rival.unet.named_parameters() if p.requires_grad} == {"control"}


def picture_bytes(n: int, side: int) -> Tensor:
    """Random pictures in the shape that ControlNetShuffle reads, `n e`."""
    return torch.randint(256, (n, 3 * side * side), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


def cubic(size: int, out: int) -> Tensor:
    """OpenCV's cubic interpolation (Keys, a = -0.75, borders repeated) from `size` to `out` samples, as a matrix."""
    weights = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        centre = (i + 0.5) * size / out - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d, a = abs(centre - j), -0.75
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(j, 0), size - 1)] += w
    return weights


def test_the_flow_is_the_official_one() -> None:
    """`make_noise_disk` of ControlNet 1.1 with its cell of half the side: noise on a grid of side / cell + 2, resized by cubic
    interpolation to side + 2 cells, cut to the middle, and stretched to [0, 1]."""
    height, width = 12, 16
    noise = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    disk = (cubic(4, 2 * height) @ noise.double() @ cubic(4, 2 * width).T)[..., 6:18, 8:24]
    low, high = disk.amin(dim=(2, 3), keepdim=True), disk.amax(dim=(2, 3), keepdim=True)
    where = flow(2, height, width, torch.Generator().manual_seed(3))
    torch.testing.assert_close(where.double(), (disk - low) / (high - low), atol=1e-5, rtol=0)


def test_content_is_moved_along_a_flow() -> None:
    """By definition, position (i, j) gets the bilinear mean of the four pixels around (y, x), the flow in pixels."""
    where, x = flow(2, 12, 16, torch.Generator().manual_seed(0)).double(), randn(2, 3, 12, 16)
    expected = torch.empty_like(x)
    for n, i, j in itertools.product(range(2), range(12), range(16)):
        column, row = float(where[n, 0, i, j]) * 15, float(where[n, 1, i, j]) * 11
        left, top = min(int(column), 14), min(int(row), 10)
        a, b = column - left, row - top
        (p, q), (r, s) = (x[n, :, y, left : left + 2].unbind(1) for y in (top, top + 1))
        expected[n, :, i, j] = (1 - b) * ((1 - a) * p + a * q) + b * ((1 - a) * r + a * s)
    torch.testing.assert_close(moved(x, where), expected, atol=1e-6, rtol=0)


def test_what_shuffle_reads(unet: UNet) -> None:
    """The image prompts of the pairs: the drawings elsewhere. Each has a flow of its own. Held-out ones are shuffled once, those to train
    on in each step, and those to draw with by `look`."""
    rival, scenes = ControlNetShuffle(unet), scenes_of("train", 3, 0, SAYS)
    base = Pairs(torch.zeros(3, 4, 1, 1), torch.ones(3, 4, 1, 1), torch.arange(3), torch.zeros(3, 1, DIM), None)
    prompts = [Image.fromarray(picture) for picture in pictures(scenes, elsewhere)]
    rows, none = torch.arange(3), torch.zeros(3, dtype=torch.bool)
    seen, held_out = (rival.see(base, scenes, held_out=after).at(rows).images(none) for after in (False, True))
    whole = torch.from_numpy(np.stack([np.array(prompt) for prompt in prompts])).permute(0, 3, 1, 2)
    assert torch.equal(seen[:, 0, 0], whole.flatten(1).float())
    assert torch.equal(held_out[:, 0, 0], shuffled(whole, seed=1).flatten(1).float()) and not torch.equal(held_out, seen)
    trained, drawn = (rival(torch.zeros(3, 7, DIM), seen[:, 0, 0], g).added for g in (torch.Generator().manual_seed(1), None))
    assert trained is not None and drawn is not None and torch.equal(drawn, whole / 255) and not torch.allclose(trained, drawn)
    looked = rival.look(load(ROOT / "weights", ()), prompts)
    assert torch.equal(looked, shuffled(whole, seed=0).flatten(1).float())
    where = flow(3, 64, 64, torch.Generator().manual_seed(0))
    assert not torch.equal(where[0], where[1]) and torch.equal(looked[:2], rival.look(load(ROOT / "weights", ()), prompts[:2]))


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_dropped_in_training(unet: UNet, name: str) -> None:
    """Texts and pictures are dropped as often as `drop` says, in which order it says it, and at times together if a text is read."""
    rival, n = TRAINED[name](unet, 2 * DIM), 4000
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Rival):
        drop = rival.drop

        def forward(self, text: Tensor, image: Tensor, g: torch.Generator | None = None) -> Context:
            seen.append((text[:, 0, 0] == 0, (image == 0).all(dim=1)))
            return Context(text)

    features = Features(torch.ones(n, 1, 1, 2 * DIM), torch.zeros(1, 1, 1, 2 * DIM))
    batch = Batch(torch.zeros(n, 4, 1, 1), torch.ones(n, 4, 1, 1), torch.ones(n, 1, DIM), torch.zeros(1, DIM), features)
    base = Namespace(pipeline=Namespace(schedule=Schedule()), gamma=None)
    watched = Watched(unet)
    watched._base = (lambda x, *_: x,)  # type: ignore[assignment]
    loss_of(watched, base, batch, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    ((text, picture),) = seen
    shares = [float(each.float().mean()) for each in (text & ~picture, picture & ~text, text & picture)]
    assert shares == pytest.approx(rival.drop, abs=0.025)
    assert rival.drop[2] > 0 or name in ("variations", "shuffle")


def test_both_sides_of_guidance(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """The unconditional side has the empty text and no picture."""
    pipeline = load(ROOT / "weights", ())
    rival = UnCLIP(pipeline.unet, width(pipeline))
    sides = RivalPipeline(**vars(replace(pipeline, unet=rival.unet)), rival=rival).contexts(["a fox"], [""], torch.ones(1, width(pipeline)))
    texts = pipeline.texts(["a fox"], [""], (16, 16), DRAWING)
    assert all(torch.equal(side.text, text.text) for side, text in zip(sides, texts, strict=True))
    assert [bool(side.added.any()) for side in sides if side.added is not None] == [False, True]


def test_unclip_starts_as_the_base(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Its last layer is zero. A dropped picture is a zero vector, whatever the noise; the level decides how much of the picture is left."""
    x, text, image = inputs
    rival = UnCLIP(unet, image.shape[1])
    torch.testing.assert_close(rival.unet(x, 500, rival(text, image)), unet(x, 500, Context(text)))
    dropped = rival(text, torch.zeros_like(image), torch.Generator().manual_seed(1)).added
    assert dropped is not None and not dropped.any()
    rival.learn_scale(randn(50, image.shape[1]).float() * 3 + 2)
    noise = torch.randn(3, image.shape[1])
    first, last = (rival.noised(image, torch.full((3,), level), noise) for level in (0.0, 999.0))
    torch.testing.assert_close(first, image, atol=0.3, rtol=0)
    torch.testing.assert_close(last, rival.mean + rival.std * noise, atol=1e-3, rtol=1e-3)


@pytest.mark.parity("diffusers DDPMScheduler, squaredcos_cap_v2", 1e-4)
def test_the_noise_of_unclip_is_diffusers_cosine_schedule() -> None:
    """The levels of `squaredcos_cap_v2`, whose betas diffusers cuts off at 0.999."""
    from diffusers import DDPMScheduler

    official = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    unet = UNet(SMALL_SD15)
    rival = UnCLIP(unet, 4)
    ours = rival.noised(torch.zeros(1000, 4), torch.arange(1000.0), torch.ones(1000, 4))[:, 0] ** 2  # 1 - a_l
    torch.testing.assert_close(1 - ours, official, atol=1e-4, rtol=0)


def test_reference_only(unet: UNet, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """At fidelity 1 the unconditional half is the base's; the conditional half reads the picture. A picture equal to what is drawn
    doubles every key, which changes nothing."""
    x, text, _ = inputs
    latents, both = randn(3, 4, 8, 8, seed=9).float(), torch.cat([x, x])
    context = stack(Context(text, added=latents), Context(-text, added=latents))
    plain = unet(both, 500, Context(torch.cat([text, -text])))
    out = ReferenceUNet(unet, Schedule(), fidelity=1.0)(both, torch.tensor(500), context)
    torch.testing.assert_close(out[:3], plain[:3])
    assert not torch.allclose(out[3:], plain[3:], atol=1e-3)
    half = ReferenceUNet(unet, Schedule(), fidelity=0.5)(both, torch.tensor(500), context)
    assert not torch.allclose(half[:3], plain[:3], atol=1e-3)
    torch.testing.assert_close(half[3:], out[3:])
    with pytest.raises(ValueError, match="guidance other than 1"):
        ReferenceUNet(unet, Schedule())(both, torch.tensor(500), Context(context.text, added=randn(6, 4, 8, 8, seed=3).float()))
    schedule, times = Schedule(), torch.full((6,), 500)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    same = schedule.add_noise(torch.cat([latents, latents]), noise, times)
    again = ReferenceUNet(unet, schedule, fidelity=0.0)(same, torch.tensor(500), context)
    torch.testing.assert_close(again, unet(same, 500, Context(torch.cat([text, -text]))), atol=1e-4, rtol=1e-4)


EDGES: dict[str, tuple[dict[float, float], float, bool]] = {
    "in the middle": ({1e-4: 3, 3e-4: 1, 1e-3: 2}, 3e-4, False),
    "smallest, and no smaller one is better": ({1e-4 / 3: 2, 1e-4: 1, 3e-4: 2, 1e-3: 3}, 1e-4, False),
    "largest, and a larger one is better": ({1e-4: 3, 3e-4: 2, 1e-3: 1, 3e-3: 0.5}, 3e-3, True),
}


@pytest.mark.parametrize("case", EDGES)
def test_one_more_rate_is_tried_at_an_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    losses, chosen, at_edge = EDGES[case]
    tried = list[float]()

    def train(_: Any, name: str, rate: float) -> Unit:
        tried.append(rate)
        return Unit({"held_out": next(loss for each, loss in losses.items() if each == pytest.approx(rate))}, {})

    monkeypatch.setattr(rival_draws, "train_rival", train)
    workspace: Any = SimpleNamespace(work=tmp_path, study=RivalStudy())
    unit = rival_draws.choose(workspace, "unclip")
    assert unit.value["chosen"] == pytest.approx(chosen) and unit.value["at_edge"] == at_edge
    assert sorted(tried) == pytest.approx(sorted(losses))
    assert unit.value["losses"] == {f"{rate:.3g}": loss for rate, loss in losses.items()}


def test_a_tiny_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has every rival, and the paper's numbers beside those that the paper has. The finished file alone gives it again."""
    weights, path = write_world(tmp_path / "weights"), tmp_path / "results" / "rivals.json"
    cards.save(ControlNet.of(load(weights, ()).unet, (16, 32, 96)), weights / "controlnet.safetensors", {})

    def call() -> list[str]:
        given = ["--weights", str(weights), "rivals", "--out", str(tmp_path), "--smoke", "--jobs", "1"]
        commands.run(commands.parser().parse_args(given))
        lines = capsys.readouterr().out.splitlines()
        return lines[next(i for i, line in enumerate(lines) if line.startswith("|  | trained")) :]

    rows, results = call(), Results.of(path)
    names = [name for name in NAMES if name != "truth"], [name for name in NAMES if name in TRAINED]
    heads = [i for i, row in enumerate(rows) if row.startswith("|  | ")]
    shown = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert shown[2 : heads[1] - 1] == [*NAMES.values()] and shown[heads[1] + 2 : heads[2] - 1] == [NAMES[name] for name in names[0]]
    assert shown[heads[2] + 2 :] == [NAMES[name] for name in names[1]] and "0.001: " in rows[heads[2] + 2]
    assert all(f"{a:.3f}, {b:.3f}" in "\n".join(rows) for a, b in PAPER.values())
    assert set(results.data["summary"]) == {"none", *TRAINED, REFERENCE, "truth"}
    assert results.units["drawn-unclip-picture"].rows == 16 and results.units["drawn-unclip-complementary"].rows == 4
    assert {file.name for file in (tmp_path / "results" / "figures").iterdir()} == {f"figure_{number}.png" for number in (3, 6, 9)}
    assert {file.stem for file in (tmp_path / "results" / "rivals").glob("*.safetensors")} == TRAINED.keys() - set(LARGE)
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr("eval.ablation.rival_draws.run", None)
    assert call() == rows
    results.data["made_from"]["settings"]["code"] = "other"
    write_json(path, results.data)
    shutil.rmtree(tmp_path / "runs")
    assert call() == rows, "results by other code are reported"
