"""Structure controls bound to the passes of the UNet: which run, what they read, how they are weighed and added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from control_peers import SMALL_CONTROLS, SMALL_T2I, controlnet_pair, t2i_pair
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.t2i_adapter.pipeline_stable_diffusion_adapter import _preprocess_adapter_image
from peers import SMALL_SD15, UNetPair, inputs, max_error, randn
from PIL import Image
from test_controlnet import hint_for, peers_residuals, tensors
from torch import Tensor

from model.adapter import IPAdapter
from model.context import Context
from model.image_projection import ImageProjection
from model.unet import Residuals
from sampling.control import Hint, bind, ladder, scale_residuals, to_pixels, total
from sampling.fields import from_json, to_json
from sampling.guidance import guided
from sampling.inputs import read_inputs
from sampling.options import parse
from sampling.request import HintFile, Model, Request

TOLERANCE = 1e-12  # measured: 3e-14 and less
SINGLE = 1e-6  # diffusers has its ladder in float32
H, W = 9, 5
TIMES = [900, 700, 500, 300, 100]


def contexts(batch: int = 2) -> dict[Any, Context]:
    uncond, cond = (Context(randn(batch, 5, SMALL_SD15.context_dim, seed=seed)) for seed in (5, 6))
    return {"uncond": uncond, "image": uncond, "cond": cond}


def pair(name: str, seed: int = 0) -> tuple[Any, Any, Tensor]:
    """diffusers' ControlNet, ours, and a hint."""
    peer, ours = controlnet_pair(*SMALL_CONTROLS[name], seed=seed)
    return peer, ours, hint_for(ours.config, H, W)


def bound(ours: Any, hints: Any, size: tuple[int, int] = (8 * H, 8 * W)) -> Callable[..., Residuals]:
    control = bind(ours, hints, SMALL_SD15, contexts(), size, TIMES)
    assert control is not None
    return control


def errors(got: Residuals, want: list[Tensor]) -> float:
    return max(max_error(a, b) for a, b in zip(tensors(got), want, strict=True))


@pytest.mark.parity("diffusers ControlNetModel, guess_mode", SINGLE)
def test_guess_mode_is_diffusers() -> None:
    peer, ours, hint = pair("sd15")
    x, _, _ = inputs(SMALL_SD15, H, W)
    control = bound([ours], [Hint(hint, 0.7, guess=True)])
    want = peers_residuals(peer, x, 500, contexts()["cond"].text, hint, conditioning_scale=0.7, guess_mode=True)
    assert errors(control(x, 500, "cond"), want) < SINGLE
    for side in ("uncond", "image"):
        assert control(x, 500, side) == Residuals([])


@pytest.mark.parity("torch logspace, as in diffusers", 1e-7)
def test_the_ladder_of_guess_mode() -> None:
    """diffusers' rule; the official code has powers of 0.825, which are up to 0.6 % lower."""
    for count in (13, 10, 5):
        assert max_error(torch.tensor(ladder(count)), torch.logspace(-1, 0, count)) < 1e-7
    official = [0.825 ** (12 - i) for i in range(13)]
    shares = [a / b - 1 for a, b in zip(ladder(13), official, strict=True)]
    assert 0.005 < max(shares) < 0.007 and min(shares) == 0


@pytest.mark.parity("diffusers ControlNetModel with global_pool_conditions", TOLERANCE)
def test_the_pooled_form_acts_on_the_conditional_pass_alone() -> None:
    peer, ours, hint = pair("shuffle")
    x, _, _ = inputs(SMALL_SD15, H, W)
    want = peers_residuals(peer, x, 500, contexts()["cond"].text, hint, conditioning_scale=0.7, guess_mode=True)
    for guess in (False, True):  # guess mode changes nothing
        control = bound([ours], [Hint(hint, 0.7, guess=guess)], (4 * H, 4 * W))
        assert errors(control(x, 500, "cond"), want) < TOLERANCE and want[0].shape[-2:] == (1, 1)
        assert control(x, 500, "uncond") == Residuals([])


@pytest.mark.parity("diffusers MultiControlNetModel", TOLERANCE)
@pytest.mark.parametrize("side", ["uncond", "cond"])
def test_several_controlnets_are_added(side: Any) -> None:
    (one, ours, hint), (other, second, _) = pair("sd15", 1), pair("sd15", 2)
    x, _, _ = inputs(SMALL_SD15, H, W)
    multi, hints = MultiControlNetModel([one, other]), [hint, 1 - hint]
    down, mid = multi(x, 500, contexts()[side].text, hints, [0.7, 1.3], return_dict=False)
    control = bound([ours, second], [Hint(hints[0], 0.7), Hint(hints[1], 1.3)])
    assert errors(control(x, 500, side), [*down, mid]) < TOLERANCE


def test_a_timestep_may_be_a_fraction() -> None:
    """As those of Euler's method."""
    _, ours, hint = pair("sd15")
    x, _, _ = inputs(SMALL_SD15, H, W)
    control = bind([ours], [Hint(hint)], SMALL_SD15, contexts(), (8 * H, 8 * W), [500.5, 500.0])
    assert control is not None
    half, whole = (control(x, t, "cond").mid for t in (500.5, 500.0))
    want = ours(x, torch.tensor([500.5]), contexts()["cond"], hint.expand(len(x), -1, -1, -1)).mid
    assert half is not None and whole is not None and want is not None
    assert max_error(half, want) < TOLERANCE < max_error(whole, want)


def test_a_control_acts_in_its_steps_alone() -> None:
    """start <= i / n and (i + 1) / n <= end. Where it does not act it does not run."""
    _, ours, hint = pair("sd15")
    x, _, _ = inputs(SMALL_SD15, H, W)
    calls: list[int] = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    control = bound([ours], [Hint(hint, start=0.2, end=0.7)])
    acting = [bool(control(x, t, "cond").skips) for t in TIMES]
    assert acting == [False, True, True, False, False] and len(calls) == 2


def test_a_control_acts_in_its_steps_where_a_timestep_is_repeated() -> None:
    _, ours, hint = pair("sd15")
    x, _, _ = inputs(SMALL_SD15, H, W)
    control = bind([ours], [Hint(hint, start=0.2, end=0.8)], SMALL_SD15, contexts(), (8 * H, 8 * W), [900, 500, 100, 100, 100])
    assert control is not None
    acting = [[bool(control(x, t, side).skips) for side in ("uncond", "cond")] for t in (900, 500, 100, 100, 100)]  # type: ignore[arg-type]
    assert acting == [[False] * 2, *[[True] * 2] * 3, [False] * 2]


def test_a_t2i_adapter_runs_once_and_on_every_side() -> None:
    _, ours = t2i_pair(SMALL_T2I["full"])
    calls: list[int] = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    x, _, _ = inputs(SMALL_SD15, H, W)
    hint = randn(1, 3, 4 * H, 4 * W, seed=4).sigmoid()
    control = bound([ours], [Hint(hint, 0.5)], (4 * H, 4 * W))
    residuals = [control(x, t, side) for t in TIMES for side in ("uncond", "cond")]
    assert len(calls) == 1
    features = ours(hint)
    for each in residuals:
        assert [*each.hidden] == [2, 5, 8, 11] and not each.skips and each.mid is None
        assert all(torch.equal(a, 0.5 * b.expand_as(a)) for a, b in zip(each.hidden.values(), features, strict=True))


def test_a_control_reads_the_text_and_no_image_prompt(pair_: Any) -> None:
    """Its Context has no sources, and an inpainting UNet's other channels are left out."""
    unet, adapter = pair_
    _, ours, hint = pair("sd15")
    x, _, _ = inputs(SMALL_SD15, H, W)
    plain = bind([ours], [Hint(hint)], SMALL_SD15, contexts(), (8 * H, 8 * W), TIMES)
    with_picture = {side: adapter(context, randn(2, 7, seed=8), 0.9) for side, context in contexts().items()}
    prompted = bind([ours], [Hint(hint)], SMALL_SD15, with_picture, (8 * H, 8 * W), TIMES)
    assert plain is not None and prompted is not None
    nine = torch.cat([x, randn(2, 5, H, W, seed=9)], dim=1)
    assert errors(prompted(nine, 500, "cond"), tensors(plain(x, 500, "cond"))) == 0
    # and guidance passes each side's residuals to its own rows
    denoise = guided(unet, with_picture["uncond"], with_picture["cond"], 3.0, control=prompted)
    eps = [unet(x, 500, with_picture[side], prompted(x, 500, side)) for side in ("uncond", "cond")]  # type: ignore[index]
    assert max_error(denoise(x, 500), eps[0] + 3.0 * (eps[1] - eps[0])) < TOLERANCE


@pytest.fixture
def pair_(pair: Callable[[str], UNetPair]) -> Any:
    """A UNet, and an adapter for it."""
    unet = pair("sd15").ours
    torch.manual_seed(3)
    return unet, IPAdapter(unet, ImageProjection(7, SMALL_SD15.context_dim, 4)).double().requires_grad_(False)


def test_the_sum_of_parts_that_lack_something() -> None:
    a, b = (Residuals([torch.full((1, 2, 3, 3), v)] * 2, torch.full((1, 2, 1, 1), v)) for v in (1.0, 2.0))
    pooled = scale_residuals(Residuals([torch.ones(1, 2, 1, 1)] * 2, torch.ones(1, 2, 1, 1)), [1.0, 2.0, 3.0])
    hidden = Residuals(hidden={1: torch.ones(1), 2: torch.ones(1)}, mid=torch.ones(1, 2, 1, 1))
    residuals = total([a, Residuals(), b, pooled, hidden])
    assert [float(skip.mean()) for skip in residuals.skips] == [4.0, 5.0] and residuals.skips[0].shape == (1, 2, 3, 3)
    assert residuals.mid is not None and float(residuals.mid.mean()) == 1 + 2 + 3 + 1
    assert [*residuals.hidden] == [1, 2]
    assert total([]) == Residuals([]) == total([Residuals()])


@pytest.mark.parity("diffusers VaeImageProcessor; the T2I pipeline's _preprocess_adapter_image", 0)
@pytest.mark.parametrize("size", [(24, 40), (64, 16), (9, 9)])
def test_pixels_are_diffusers(pictures: list[Path], size: tuple[int, int]) -> None:
    control = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=True, do_normalize=False)
    for path in pictures:
        image = Image.open(path).convert("RGB")
        assert torch.equal(to_pixels(image, 3, size), control.preprocess(image, *size))
        assert torch.equal(to_pixels(image, 3, size), _preprocess_adapter_image(image, *size))
        assert torch.equal(to_pixels(image, 1, size), _preprocess_adapter_image(image.convert("L"), *size))
    pixels = to_pixels(Image.fromarray(np.array([[0, 255]], np.uint8)), 1, (1, 2))
    assert pixels.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_hints_of_any_mode_and_size(mode: str, tmp_path: Path) -> None:
    """Black and white in every mode are the same pixels; what is transparent is black."""
    levels = np.zeros((31, 57), np.uint8)
    levels[5:20, 8:30] = 255
    image = Image.fromarray(levels)
    if mode in ("I;16", "F"):
        image = Image.fromarray(levels.astype(np.uint16) * 257 if mode == "I;16" else levels / np.float32(255))
    else:
        image = image.convert("RGB").convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(levels))
    path = tmp_path / ("hint.tiff" if mode in ("CMYK", "F") else "hint.png")
    image.save(path)
    (hint,) = read_inputs(Request(hints=(HintFile(path),))).hints
    assert isinstance(hint.picture, Image.Image)
    for channels in (1, 3):
        want = to_pixels(Image.fromarray(levels), channels, (24, 40))
        assert max_error(to_pixels(hint.picture, channels, (24, 40)), want) <= 1 / 255


def test_inputs_that_do_not_match_are_rejected() -> None:
    _, ours, hint = pair("sd15")
    t2i, xl = t2i_pair(SMALL_T2I["full"])[1], t2i_pair(SMALL_T2I["xl"])[1]
    for networks, hints, size, message in (
        ([ours], [], (8, 8), "0 hints for 1 controls"),
        ([], [Hint(hint)], (8, 8), "1 hints for 0 controls"),
        ([ours], [Hint(hint)], (8, 8), r"hints of shape b 3 8 8, but one of \(2, 3, 72, 40\) is given"),
        ([t2i], [Hint(hint, guess=True)], (8, 8), "guess mode is for a ControlNet"),
        ([xl], [Hint(Image.new("RGB", (8, 8)))], (24, 24), "multiples of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            bind(networks, hints, SMALL_SD15, contexts(), size, TIMES)
    assert bind([], [], SMALL_SD15, contexts(), (8, 8), TIMES) is None
    for start, end in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="start and end of a control must satisfy"):
            Hint(hint, start=start, end=end)


def test_each_control_is_followed_by_its_options() -> None:
    words = "--control a --hint x.png --control-scale 0.8 --control-end 0.8 --control b --guess --hint y.png"
    command = parse([*words.split(), "--ip-adapter", "c.bin", "--image", "z.png", "--scale", "0.6"])
    assert command.model.controls == (Path("a"), Path("b"))
    assert command.request.hints == (HintFile(Path("x.png"), 0.8, end=0.8), HintFile(Path("y.png"), guess=True))
    (prompt,) = command.request.image_prompts
    assert prompt.scale == 0.6 and prompt.images == (Path("z.png"),)
    parts = ["--hint", "x.png"], ["--guess"], ["--control", "a"]
    orders = [parse([word for i in order for word in parts[i]]) for order in ((0, 1, 2), (2, 1, 0))]
    assert orders[0] == orders[1]


def test_a_request_with_controls_is_json_and_back() -> None:
    request = Request(hints=(HintFile(Path("x.png"), 0.5, 0.1, 0.9, True),))
    assert from_json(Request, to_json(request)) == request
    model = Model(controls=(Path("a"), Path("b")))
    assert from_json(Model, to_json(model)) == model
    wrongs = [{"scale": 1.0}, {"picture": 3}, *({"picture": "x"} | more for more in ({"guess": 1}, {"scale": "1"}, {"more": 1}))]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"picture|guess|scale|more"):
            from_json(HintFile, wrong)
