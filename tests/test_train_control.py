"""Training a structure control on the mini world: hints, gates, and runs that resume."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from checkpoints.cards import read_card
from checkpoints.controls import load_control
from checkpoints.describe import kind_of
from checkpoints.stable_diffusion import load_unet
from model.t2i import T2IAdapter
from sampling.loading import load
from train import control, loop, structure, t2i
from train.drawings import drawing, recolour
from train.errors import GateError
from train.outlines import HintedPairs, outline, outlines_of
from train.pairs import Pairs
from train.randomness import generator
from train.world import CONCEPT_NAMES, CONCEPTS, World, render

ROOT = Path(__file__).parent.parent
KINDS = {"control": control.KIND, "t2i": t2i.KIND}


def resvg(svg: str, size: int) -> np.ndarray:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    white = Image.new("RGBA", (size, size), "white")
    return np.asarray(Image.alpha_composite(white, Image.open(io.BytesIO(png)).convert("RGBA")).convert("L")).astype(int)


@pytest.mark.parity("resvg_py with every fill white", "4 levels of 255")
@pytest.mark.parametrize("index", range(12))
def test_outlines_are_the_drawings_black_lines(index: int) -> None:
    """The drawing with white fills on white has only its lines left."""
    scene = World("train")[index]
    svg, fills = drawing(CONCEPTS[CONCEPT_NAMES[scene.concept]][scene.drawing])
    want = 255 - resvg(recolour(svg, dict.fromkeys(fills, "#ffffff")), scene.size)
    want = want[:, ::-1] if scene.mirror else want
    outlines = outline(scene).astype(int)
    inside = outlines[scene.y : scene.y + scene.size, scene.x : scene.x + scene.size]
    assert np.abs(inside - want).max() <= 4 and outlines.sum() == inside.sum() > 0
    dark = render(scene).max(axis=2) < 40
    assert outlines[dark].min(initial=255) > 150  # black in the picture is a line in the hint


def test_outlines_do_not_depend_on_colours() -> None:
    scene = World("train")[3]
    assert (outline(scene) == outline(replace(scene, palette=scene.palette[::-1], background=0))).all()
    outlines = outlines_of("train", 5)
    assert outlines.shape == (5, 1, 64, 64) and outlines.dtype == torch.uint8
    assert (outlines[3, 0].numpy() == outline(scene)).all()


@pytest.fixture(scope="module")
def pool() -> HintedPairs:
    """Random latents and text of the mini model's sizes, with true outlines."""
    g = torch.Generator().manual_seed(0)
    mean, texts = torch.randn(6, 4, 16, 16, generator=g), torch.randn(3, 77, 128, generator=g)
    pairs = Pairs(mean, 0.1 * torch.ones_like(mean), torch.arange(6) % 3, texts, None)
    return HintedPairs(pairs, outlines_of("train", 6))


def steered(name: str) -> Any:
    kind, base = KINDS[name], load(ROOT / "weights", ())
    torch.manual_seed(0)
    made = kind.build(base.unet, base.vae.config.factor).requires_grad_(True)
    return structure.SteeredBase(kind, base.unet, made, base.schedule)


@pytest.mark.parametrize("name", KINDS)
def test_gates_pass_for_an_untrained_control(pool: HintedPairs, name: str) -> None:
    model = steered(name)
    model.check_gates(pool)
    assert all(p.grad is None for p in model.control.parameters())
    assert all(p.grad is None for p in model.unet.parameters())
    held = model.held_out(pool)
    assert set(held) == {"held_out", "gain_none", "gain_shuffled"}
    assert (held["gain_none"] == 0) == (name == "control")  # a neutral one changes no bit


def test_gates_see_what_is_wrong(pool: HintedPairs) -> None:
    model = steered("control")
    with torch.no_grad():
        model.control.zero_mid.bias[0] = 0.1
    with pytest.raises(GateError, match="changes the base model"):
        model.check_gates(pool)
    model = steered("control")
    model.control.zero[1].requires_grad_(False)
    with pytest.raises(GateError, match=r"first step these tensors .*: zero\.1\.weight, zero\.1\.bias"):
        model.check_gates(pool)
    model = steered("t2i")
    with torch.no_grad():
        for parameter in model.control.body[2].parameters():
            parameter.zero_()
    with pytest.raises(GateError, match=r"first step these tensors .*body\.2\."):
        model.check_gates(pool)
    model = steered("t2i")
    model.unet.conv_out.requires_grad_(True)
    with pytest.raises(GateError, match=r"reach the frozen base: conv_out\.weight"):
        model.check_gates(pool)


def test_half_of_the_pictures_lose_their_text(pool: HintedPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = steered("control"), list[torch.Tensor]()
    monkeypatch.setattr(structure, "diffusion_loss", lambda unet, schedule, x0, context, *_: seen.append(context.text) or x0)
    batch = pool.at(torch.arange(6).repeat(50))
    model.losses(batch, generator(0, 0), structure.DROP_TEXT, None, batch.hint)
    dropped = [bool(torch.equal(text, batch.pairs.empty)) for text in seen[0][batch.pairs.text.ne(batch.pairs.empty).flatten(1).any(1)]]
    assert 0.4 < np.mean(dropped) < 0.6
    model.losses(batch, generator(0, 0), 0.0, None, batch.hint)
    assert torch.equal(seen[1], batch.pairs.text)


def test_early_steps_are_drawn_more_often() -> None:
    """t = (1 - u^3) T: P(t < s) = 1 - (1 - s / T)^(1/3)."""
    t, eps = t2i.early_noise(torch.zeros(20_000, 1), generator(0, 0))
    assert int(t.min()) >= 0 and int(t.max()) == 999 and eps.shape == (20_000, 1)
    for s in (100, 500, 900):
        assert abs(float((t < s).double().mean()) - (1 - (1 - s / 1000) ** (1 / 3))) < 0.012


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the shipped base model."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("unet", "vae", "text_encoder"):
        for end in (".safetensors", ".json"):
            (folder / f"{name}{end}").symlink_to(ROOT / "weights" / f"{name}{end}")
    return folder


def tiny(stage: Any) -> tuple[Any]:
    return (replace(stage.PHASES[0], steps=3, batch=4, warmup=1, validate_every=3),)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_training_resumes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped ends with the same weights, bit for bit."""
    monkeypatch.setattr(structure, "HELD_OUT", 4)
    ended = []
    for name, stops in (("whole", [None]), ("again", [2, None])):
        for until in stops:
            monkeypatch.setattr(structure, "run", partial(loop.run, until=until))
            control.train(tmp_path / name, base, tiny(control), pictures=8)
        ended.append(load_file(base / control.KIND.file))
        (tmp_path / "again").mkdir(exist_ok=True)
        if name == "whole":
            (tmp_path / "whole" / "cache").rename(tmp_path / "again" / "cache")
    assert all(torch.equal(tensor, ended[1][key]) for key, tensor in ended[0].items())
    assert any(ended[0]["zero_mid.weight"].flatten())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_what_is_written_loads_as_a_control_of_the_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "HELD_OUT", 4)
    t2i.train(tmp_path, base, tiny(t2i), pictures=8)
    file = base / t2i.KIND.file
    card = read_card(file)
    assert card["results"].keys() >= {"held_out", "gain_none", "gain_shuffled"} and "licence" in card
    actual = load_control(file, load_unet(base / "unet.safetensors").config, factor=4)
    assert isinstance(actual, T2IAdapter) and kind_of(file) == "t2i"
