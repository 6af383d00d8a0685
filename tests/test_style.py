"""A base model in another style: low-rank differences, the comic style, and the stage that trains it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import max_error, randn, randomise
from safetensors.torch import load_file
from torch import nn

from checkpoints.cards import read_card, save_tensors
from checkpoints.names import map_names, unet_rows
from checkpoints.stable_diffusion import load_unet
from eval.__main__ import main
from eval.style import LAMBDAS, table
from model.context import Context
from model.unet import UNet, UNetConfig
from train import loop, style
from train.comic import SHADOW, comic
from train.lora import LoRA
from train.world import World, render

ROOT = Path(__file__).parent.parent
CONFIG = UNetConfig(channels=(16, 32, 32), depth=(1, 1, 0), heads=(4, 4, 4), res_blocks=1, context_dim=24, groups=4)


def networks(rank: int, trained: bool = True) -> tuple[UNet, LoRA]:
    unet = randomise(UNet(CONFIG).double())
    torch.manual_seed(0)
    lora = LoRA(unet, rank).double()
    if trained:
        for b in lora.up:
            nn.init.normal_(b, std=0.05)
    return unet, lora


def inputs() -> tuple[torch.Tensor, torch.Tensor, Context]:
    return randn(3, 4, 12, 8), torch.tensor([0, 500, 999]), Context(randn(3, 7, 24, seed=1))


def test_before_training_nothing_changes() -> None:
    """B is zero: the output is equal bit for bit, and in the first step only B has a gradient."""
    unet, lora = networks(3, trained=False)
    unet.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(lora(unet, *inputs()), unet(*inputs()))
    lora(unet, *inputs()).square().mean().backward()
    assert not any(a.grad.any() for a in lora.down) and all(b.grad.any() for b in lora.up)
    assert all(p.grad is None for p in unet.parameters())


@pytest.mark.parametrize("rank", [1, 3, 1000])
def test_the_merged_unet_equals_the_unet_with_changed_weights(rank: int) -> None:
    unet, lora = networks(rank)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.no_grad():
        changed, merged = lora(unet, *inputs()), lora.merge(unet)
        assert torch.equal(changed, merged(*inputs()))
        assert max_error(changed, unet(*inputs())) > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    ranks = {
        name: int(torch.linalg.matrix_rank((tensor - before[name]).flatten(1), rtol=1e-9))
        for name, tensor in merged.state_dict().items()
        if tensor.ndim > 1
    }
    shapes = {name: tensor.flatten(1).shape for name, tensor in before.items() if tensor.ndim > 1}
    assert ranks == {name: min(rank, *shape) for name, shape in shapes.items()}


def test_the_file_has_the_differences_in_the_layout_of_peft() -> None:
    """A layer's difference is lora_B after lora_A, as layers of the same kind: computed here by running both on the identity."""
    unet, lora = networks(3)
    tensors, merged = style.peft_layout(lora, unet), lora.merge(unet).state_dict()
    theirs = map_names([name for name, p in unet.named_parameters() if p.ndim > 1], unet_rows(CONFIG), 1, "unet.")
    assert len(tensors) == 2 * len(theirs)
    for ours, (name,) in theirs.items():
        a, b = (tensors[name.replace(".weight", f".lora_{factor}.weight")] for factor in "AB")
        want = merged[ours] - unet.state_dict()[ours]
        if want.ndim == 2:
            actual = nn.functional.linear(nn.functional.linear(torch.eye(a.shape[1]).double(), a), b).T
        else:  # the response to an impulse in each input channel is the flipped kernel
            i, k = a.shape[1], a.shape[2]
            impulses = torch.zeros(i, i, 2 * k - 1, 2 * k - 1).double()
            impulses[range(i), range(i), k - 1, k - 1] = 1
            actual = nn.functional.conv2d(nn.functional.conv2d(impulses, a), b).flip(2, 3).transpose(0, 1)
        assert max_error(actual, want) < 1e-12, name


@pytest.mark.parametrize("index", range(8))
def test_the_comic_style_adds_a_shadow_and_changes_nothing_else(index: int) -> None:
    scene = World("test")[index]
    day, comical = render(scene).astype(int), comic(scene).astype(int)
    changed = (day != comical).any(axis=2)
    assert changed.any() and (comical <= day + 1).all(), "a shadow only darkens"
    ground = np.rint(255 * scene.background_rgb)
    shape = np.abs(day - ground).max(axis=2) > 0
    moved = np.zeros_like(shape)
    moved[SHADOW:, SHADOW:] = shape[:-SHADOW, :-SHADOW]
    assert not (changed & ~moved).any(), "it lies where the drawing, moved, lies"
    inside = moved & ~shape
    assert np.median(comical[inside]) == 0, "it is black"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_style_is_trained_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped ends with the same weights, bit for bit. The file is small enough to ship."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("unet", "vae", "text_encoder"):
        for end in (".safetensors", ".json"):
            (base / f"{name}{end}").symlink_to(ROOT / "weights" / f"{name}{end}")
    monkeypatch.setattr(style, "HELD_OUT", 4)
    phases = (replace(style.PHASES[0], steps=3, batch=4, warmup=1, validate_every=3),)
    ended = []
    for name, stops in (("whole", [None]), ("again", [2, None])):
        for until in stops:
            monkeypatch.setattr(style, "run", partial(loop.run, until=until))
            style.train(tmp_path / name, base, phases, pictures=8)
        ended.append(load_file(base / "comic.safetensors"))
    assert all(torch.equal(tensor, ended[1][key]) for key, tensor in ended[0].items())
    assert any(tensor.any() for name, tensor in ended[0].items() if "lora_B" in name)
    assert (base / "comic.safetensors").stat().st_size < 3e6
    assert read_card(base / "comic.safetensors")["rank"] == style.RANK and (tmp_path / "whole" / "comic.png").exists()


@pytest.mark.filterwarnings("ignore:these words are not in this model's vocabulary")
def test_the_style_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Untrained differences change nothing, so both bases draw the same; only the true comic pictures are darker."""
    weights, out = tmp_path / "weights", tmp_path / "style.json"
    shutil.copytree(ROOT / "weights", weights, ignore=shutil.ignore_patterns("comic.*"))
    command = ["eval", "--weights", str(weights), "style", "--n", "2", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match=r"comic\.safetensors is missing: run `python -m train style` first"):
        main()
    unet = load_unet(weights / "unet.safetensors")
    save_tensors(style.peft_layout(LoRA(unet, 2), unet), weights / "comic.safetensors", {})
    main()
    scores = json.loads(out.read_text())["scores"]
    for task in LAMBDAS:
        assert scores["comic"][task] == scores["base"][task]
    assert scores["comic"]["true"]["dark"][0] > 1.3 * scores["base"]["true"]["dark"][0]
    lines = table(json.loads(out.read_text())).splitlines()
    assert len(lines) == 2 + 2 * 5 and "\n".join(lines) in capsys.readouterr().out
