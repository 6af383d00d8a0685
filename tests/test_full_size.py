"""`python -m eval parity`: the networks of Stable Diffusion XL, its float64, and the controls of 1.5, at small size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peers import SMALL_SDXL, max_error, randn, unet_pair

from eval.__main__ import main
from eval.peers import official_controls, official_xl
from eval.peers.parity import measure
from eval.peers.parts import Suite
from eval.peers.parts_sd15 import SD15
from model.controlnet import ControlNetConfig
from model.image_encoder import ImageConfig
from model.t2i import T2IConfig
from model.text_encoder import SDXL_TEXT_2, TextConfig
from model.unet import UNetConfig

PARTS = ["UNet + adapter", "first text encoder", "second text encoder", "second text encoder, pooled", "image encoder"]


def test_float64_by_blocks_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of diffusers' UNet are converted one by one, and their weights are the old ones afterwards."""
    monkeypatch.setattr(official_xl, "LARGEST", 20_000)
    peer = unet_pair(SMALL_SDXL, linear=True).peer.half()
    before = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    x, t, text = randn(2, 4, 9, 7), torch.tensor([981, 21]), randn(2, 77, SMALL_SDXL.context_dim, seed=1)
    added = {"text_embeds": randn(2, 10, seed=2), "time_ids": torch.tensor([[72, 56, 0, 0, 72, 56]] * 2)}
    whole = unet_pair(SMALL_SDXL, linear=True).peer.half().double()
    want = whole(x, t, text, added_cond_kwargs=added).sample
    blocks = list(official_xl._blocks(peer))
    got = official_xl.in_float64(peer)(x, t, text, added_cond_kwargs=added).sample
    assert len(blocks) > 5 and got.dtype == torch.float64 and max_error(got, want) < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in peer.state_dict().items())


@pytest.mark.parity("diffusers and transformers from_pretrained, float32 and bfloat16", "2 times the peer's own")
def test_the_parts_of_sdxl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = TextConfig(width=8, layers=3, heads=2)
    texts = {"text_encoder": first, "text_encoder_2": replace(SDXL_TEXT_2, width=16, layers=3, heads=2, output_dim=10)}
    monkeypatch.setattr(official_xl, "UNET", SMALL_SDXL)
    monkeypatch.setattr(official_xl, "TEXTS", texts)
    monkeypatch.setattr(official_xl, "IMAGE", ImageConfig(width=16, layers=(3,), patch=56, heads=2, output_dim=12))
    options = f"--base sdxl --side 9 --state {tmp_path} --out {tmp_path / 'p.json'}"
    monkeypatch.setattr("sys.argv", ["eval", "parity", *options.split()])
    main()
    results = json.loads((tmp_path / "p.json").read_text())
    assert list(results["parts"]) == PARTS and results["command"] == "python -m eval parity --base sdxl --side 9"
    for errors in results["parts"].values():
        assert 0 < max(errors["float32"]) < 1e-4 < min(errors["bfloat16"]) < 0.3


@pytest.mark.parity("diffusers ControlNetModel and T2IAdapter, float32 and bfloat16", "2 times the peer's own")
def test_the_controls_of_sd15(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unet = UNetConfig(channels=(32, 64, 64, 64), res_blocks=1)
    monkeypatch.setattr(official_controls, "CONTROLNET_SD15", ControlNetConfig.of(unet, (4, 6, 8, 10)))
    monkeypatch.setattr(official_controls, "T2I_SD15", T2IConfig(unet.channels))
    suite = Suite(official_controls.write, {name: SD15.parts[name] for name in ("ControlNet", "T2I-Adapter")})
    for errors in measure(suite, tmp_path, side=9).values():
        for theirs, ours in errors.values():
            assert ours <= 2 * theirs
        assert 0 < max(errors["float32"]) < 1e-4 < min(errors["bfloat16"]) < 0.3
