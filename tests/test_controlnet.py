"""ControlNet against diffusers' ControlNetModel, in float64 with equal random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from control_peers import SMALL_CONTROLS, controlnet_pair
from diffusers import ControlNetModel
from peers import SMALL_ONE, SMALL_SD15, UNetPair, added_inputs, inputs, max_error, number_of, randn, randomise
from torch import Tensor, nn

from checkpoints.control_names import controlnet_rows
from checkpoints.names import map_names
from model.attention import SelfAttention
from model.context import Context
from model.controlnet import CONTROLNET_SD15, CONTROLNET_SD21, CONTROLNET_SDXL, ControlNet, ControlNetConfig
from model.unet import EMPTY, Residuals, UNet
from train.options import ALL_LEVELS

SIZES = [(16, 16), (17, 13), (9, 5)]
TOLERANCE = 1e-12  # measured: 2e-14 and less


@cache
def both(name: str) -> tuple[Any, ControlNet]:
    return controlnet_pair(*SMALL_CONTROLS[name])


def tensors(residuals: Residuals) -> list[Tensor]:
    assert residuals.mid is not None and not residuals.hidden
    return [*residuals.skips, residuals.mid]


def peers_residuals(peer: Any, *given: Any, **settings: Any) -> list[Tensor]:
    outputs = peer(*given, **settings)
    return [*outputs.down_block_res_samples, outputs.mid_block_res_sample]


def hint_for(config: ControlNetConfig, h: int, w: int, batch: int = 2) -> Tensor:
    return randn(batch, config.hint_channels, config.factor * h, config.factor * w, seed=4).sigmoid()


@pytest.mark.parity("diffusers ControlNetModel", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SMALL_CONTROLS)
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    config, (peer, ours) = SMALL_CONTROLS[name][0], both(name)
    x, t, text = inputs(config, *size)
    theirs, added = added_inputs(config)
    hint = hint_for(config, *size)
    want = peers_residuals(peer, x, t, text, hint, added_cond_kwargs=theirs)
    got = tensors(ours(x, t, Context(text, added=added), hint))
    assert len(got) == len(want) and min(float(each.std()) for each in want) > 0.01
    assert max(max_error(a, b) for a, b in zip(got, want, strict=True)) < TOLERANCE


@pytest.mark.parity("diffusers ControlNetModel, float32", "2 times the peer's own + 1e-06")
def test_float32_is_as_close_to_the_truth_as_diffusers() -> None:
    (peer, ours), config = controlnet_pair(*SMALL_CONTROLS["sd15"], seed=5), SMALL_CONTROLS["sd15"][0]
    x, t, text = inputs(config, 17, 13)
    hint = hint_for(config, 17, 13)
    truth = tensors(ours(x, t, Context(text), hint))
    x, text, hint = x.float(), text.float(), hint.float()
    theirs = peers_residuals(peer.float(), x, t, text, hint)
    actual = tensors(ours.float()(x, t, Context(text), hint))
    own, peers = (max(max_error(a.double(), b) for a, b in zip(each, truth, strict=True)) for each in (actual, theirs))
    assert own < 2 * peers + 1e-6


@torch.no_grad()
def test_of_a_unet_starts_as_its_copy_and_changes_no_bit() -> None:
    """Eq. 3."""
    unet = randomise(UNet(SMALL_SD15), 3)
    control = ControlNet.of(unet, (4, 6))
    x, t, text = inputs(SMALL_SD15, 17, 13)
    residuals = control(x, t, Context(text), hint_for(control.config, 17, 13))
    assert not any(each.any() for each in tensors(residuals))
    assert torch.equal(unet(x, t, Context(text), residuals), unet(x, t, Context(text)))
    control.conv_in.weight.zero_()
    assert unet.conv_in.weight.any()  # a copy, not the same tensor


@pytest.mark.parity("diffusers ControlNetModel.from_unet", 0)
def test_of_a_unet_copies_what_diffusers_copies(pair: Callable[[str], UNetPair]) -> None:
    unets = pair("sd15")
    control = ControlNet.of(unets.ours, (4, 6))
    peer = ControlNetModel.from_unet(unets.peer, conditioning_channels=3, conditioning_embedding_out_channels=(4, 6))
    names, state = map_names(control.state_dict(), controlnet_rows(control.config), 1), peer.state_dict()
    assert sorted(state) == sorted(name for (name,) in names.values())
    for name, tensor in control.state_dict().items():
        if not name.startswith("hint."):  # its random weights are their own
            assert torch.equal(tensor.float(), state[names[name][0]].reshape(tensor.shape)), name


def gradients(control: ControlNet, unet: UNet) -> set[str]:
    """The parts of a ControlNet that a step's gradient reaches."""
    x, t, text = inputs(SMALL_ONE, 16, 16)
    unet(x, t, Context(text), control(x, t, Context(text), hint_for(control.config, 16, 16))).square().mean().backward()
    return {name.partition(".")[0] for name, p in control.named_parameters() if p.grad is not None and p.grad.any()}


def test_only_the_zero_convolutions_get_a_gradient_in_the_first_step() -> None:
    """Everything else follows in the second and third."""
    unet = randomise(UNet(SMALL_ONE), 3)
    control = ControlNet.of(unet, (4, 6)).requires_grad_(True)
    optimizer = torch.optim.SGD(control.parameters(), lr=0.1)
    assert gradients(control, unet) == {"zero", "zero_mid"}
    assert len(control.zero_convolutions()) == 2 * 5
    optimizer.step()
    second = gradients(control, unet)
    assert second == {"zero", "zero_mid", "time_embed", "conv_in", "down", "mid", "hint"}
    silent = [name for name, p in control.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent and all(name.startswith("hint.") for name in silent)  # all but its last layer, which was 0
    optimizer.step()
    gradients(control, unet)
    assert all(p.grad is not None and p.grad.any() for p in control.parameters())


@pytest.mark.parametrize("levels", [1, 2, ALL_LEVELS])
def test_checkpointing_changes_no_gradient(levels: int) -> None:
    """The stages of the first `levels` levels run twice, and the others once."""
    unet, runs, found = randomise(UNet(SMALL_ONE), 3), list[int](), []
    for checkpointing in (0, levels):
        control = randomise(ControlNet.of(unet, (4, 6)), 1).requires_grad_(True)
        for stage in (*control.down, *control.mid):
            stage.register_forward_pre_hook(lambda stage, _: runs.append(stage.level))
        control.checkpointing = checkpointing
        gradients(control, unet)
        found.append([p.grad for p in control.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    once = [stage.level for stage in (*control.down, *control.mid)]
    assert sorted(runs) == sorted(2 * once + [level for level in once if level < levels])


def test_a_hint_for_the_whole_batch() -> None:
    ours, config = both("sd15")[1], SMALL_CONTROLS["sd15"][0]
    x, t, text = inputs(config, 9, 5)
    hint = hint_for(config, 9, 5, batch=1)
    one, two = (tensors(ours(x, t, Context(text), each)) for each in (hint, hint.expand(2, -1, -1, -1)))
    assert all(max_error(a, b) < 1e-12 for a, b in zip(one, two, strict=True))


def test_a_hint_of_another_size_is_refused() -> None:
    ours, config = both("sd15")[1], SMALL_CONTROLS["sd15"][0]
    x, t, text = inputs(config, 9, 5)
    with pytest.raises(ValueError, match="the hint is 48 x 72: resize it to 40 x 72"):
        ours(x, t, Context(text), hint_for(config, 9, 6))


@pytest.mark.parametrize(
    ("config", "parameters", "keys"),
    [
        (CONTROLNET_SD15, 361_279_120, 340),
        (CONTROLNET_SD21, 364_228_240, 340),
        (CONTROLNET_SDXL, 1_251_014_160, 844),
        (replace(CONTROLNET_SDXL, depth=(0, EMPTY, 1), mid_depth=1), 272_586_000, 224),  # controlnet-*-sdxl-1.0-mid
        (replace(CONTROLNET_SDXL, depth=(0, 0, 0), mid_depth=EMPTY), 160_111_120, 140),  # controlnet-*-sdxl-1.0-small
    ],
)
def test_official_sizes(config: ControlNetConfig, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        control = ControlNet(config)
    assert number_of(control) == (parameters, keys)
    assert sum(p.numel() for p in control.hint.parameters()) == 1_086_480
    assert config.factor == 8


def other_heads(control: ControlNet) -> None:
    for module in control.modules():
        if isinstance(module, SelfAttention):
            module.heads //= 2


def hint_everywhere(control: ControlNet) -> None:
    encode = control.encode

    def late(x: Tensor, emb: Tensor, context: Context, hidden: dict[int, Tensor]) -> Any:
        return encode(x, emb, context, {1: hidden[0]})

    control.encode = late  # type: ignore[method-assign]


def relu(control: ControlNet) -> None:
    for i, layer in enumerate(control.hint):
        if isinstance(layer, nn.SiLU):
            control.hint[i] = nn.ReLU()


@pytest.mark.parity("diffusers ControlNetModel", TOLERANCE)
@pytest.mark.parametrize("wrong", [other_heads, hint_everywhere, relu])
def test_mutants_are_rejected(wrong: Any) -> None:
    (peer, ours), config = controlnet_pair(*SMALL_CONTROLS["sd15"]), SMALL_CONTROLS["sd15"][0]
    x, t, text = inputs(config, 9, 5)
    hint = hint_for(config, 9, 5)
    want = peers_residuals(peer, x, t, text, hint)
    wrong(ours)
    got = tensors(ours(x, t, Context(text), hint))
    assert max(max_error(a, b) for a, b in zip(got, want, strict=True)) > 100 * TOLERANCE
