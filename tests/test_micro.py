"""SDXL's added vector and negative prompts against diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peers import SMALL_SDXL, max_error, randn, unet_pair

from model.unet import SD15
from sampling.inputs import Inputs
from sampling.micro import DRAWING, Micro
from sampling.options import parse
from sampling.request import Request

SINGLE = 1e-6  # the peer computes the size embedding in float32


@pytest.mark.parity("diffusers StableDiffusionXLPipeline._get_add_time_ids, UNet2DConditionModel.get_aug_embed", SINGLE)
def test_the_vector_is_diffusers() -> None:
    peer: Any = unet_pair(SMALL_SDXL, linear=True).peer
    pooled, seen = randn(3, 10, seed=1), []
    peer.add_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = StableDiffusionXLPipeline._get_add_time_ids(
        type("Pipe", (), {"unet": peer})(), (1021, 768), (7, 33), (512, 640), torch.float64, 10
    )
    peer.get_aug_embed(randn(3, 64), None, {"text_embeds": pooled, "time_ids": ids.repeat(3, 1)})
    got = Micro((1021, 768), (7, 33), (512, 640)).vector(pooled, (64, 64), SMALL_SDXL)
    assert got.shape == (3, SMALL_SDXL.added_dim) and max_error(got, seen[0]) < SINGLE
    whole = Micro((64, 96), (0, 0), (64, 96)).vector(pooled, (8, 8), SMALL_SDXL)
    assert max_error(DRAWING.vector(pooled, (64, 96), SMALL_SDXL), whole) == 0


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_sizes_stay_exact_in_half_precision(dtype: torch.dtype, rounding: float) -> None:
    """1021 is 1020 in bfloat16 and 3001 is 3000 in float16: the embedding is computed first, and then rounded."""
    micro = Micro((1021, 3001))
    want = micro.vector(randn(1, 10, dtype=torch.float32), (8, 8), SMALL_SDXL)[:, 10:]
    assert max_error(micro.vector(randn(1, 10).to(dtype), (8, 8), SMALL_SDXL)[:, 10:].float(), want) <= rounding


def test_the_command_line_has_width_first() -> None:
    options = "--original-size 800 600 --crop-corner 3 5 --target-size 640 480 --zero-negative"
    micro = Inputs(parse(options.split()).request, (), None).micro
    assert micro == Micro((600, 800), (5, 3), (480, 640), True)
    assert Inputs(Request(), (), None).micro == DRAWING


def test_bad_settings_are_refused() -> None:
    for field, value in (("original_size", (1,)), ("crop_corner", (0, -1)), ("target_size", (1 << 20, 8))):
        with pytest.raises(ValueError, match=f"{field} must be two whole numbers"):
            Request(**{field: value})
    with pytest.raises(ValueError, match="is for an empty negative prompt"):
        Request(negative_prompt="rain", zero_negative=True)
    with pytest.raises(ValueError, match="are for Stable Diffusion XL: leave them out"):
        Micro(crop=(0, 1)).check(SD15)
    assert Request(crop_corner=(0, 3)).crop_corner == (0, 3)
    DRAWING.check(SD15)
    Micro(crop=(0, 1)).check(SMALL_SDXL)


def test_sd15_refuses_sizes_before_loading(tmp_path: Path) -> None:
    from sampling import __main__ as cli

    with pytest.raises(ValueError, match="are for Stable Diffusion XL"):
        cli.run(["--original-size", "64", "64", "--out", str(tmp_path / "out.png")])
    assert not list(tmp_path.iterdir())
