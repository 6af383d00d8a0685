"""The fast UNet: equal to the plain one in float64, and in lower precision as near to float64 as diffusers is, within a factor of 2."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import SMALL_ONE, SMALL_SD15, SMALL_UNETS, Pair, max_error, randn, randomise
from torch import Tensor, nn

from eval.attention_maps import record
from model.adapter import IPAdapter
from model.attention import concatenated
from model.context import Context, pyramid, stack
from model.fast import FastUNet, fasten
from model.image_projection import ImageProjection
from model.kernels import POINTS, PackedConv, PackedLinear, Pointwise, Winograd, cook_toom, packs
from model.unet import Residuals, UNet, UNetConfig
from sampling.guidance import guided

SIZES = [(16, 16), (17, 13), (9, 5), (8, 33)]
oneDNN = pytest.mark.skipif(not packs(torch.float32), reason="this PyTorch has no oneDNN")


def conv(into: int, out: int, dtype: torch.dtype = torch.float64, size: int = 3, **options: Any) -> nn.Conv2d:
    return randomise(nn.Conv2d(into, out, size, padding=size // 2, **options)).to(dtype)


@pytest.mark.parametrize("m", POINTS)
def test_the_matrices_compute_a_filter(m: int) -> None:
    at, g, bt = cook_toom(POINTS[m])
    d, taps = randn(m + 2, seed=1), randn(3, seed=2)
    want = F.conv1d(d[None, None], taps[None, None])[0, 0]
    assert max_error(at @ ((g @ taps) * (bt @ d)), want) < 1e-14


def test_the_matrices_of_the_paper() -> None:
    """Eq. 7 of arXiv 1509.09308, whose points are 0, 1 and -1; signs and factors move freely between G and B^T."""
    at, g, bt = cook_toom(POINTS[2])
    assert at.tolist() == [[1, 1, 1, 0], [0, 1, -1, 1]]
    paper_g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    paper_bt = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
    ours, paper = (torch.einsum("ij,ik->ijk", one, two) for one, two in ((g, bt), (paper_g, paper_bt)))
    assert max_error(ours[:3], paper[:3]) < 1e-15 and max_error(ours[3], -paper[3]) < 1e-15


@pytest.mark.parametrize("m", POINTS)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 10), (33, 38), (64, 3)])
def test_winograd_is_a_convolution(m: int, size: tuple[int, int]) -> None:
    """Odd sizes, and sizes of several strips."""
    plain, x = conv(5, 7), randn(3, 5, *size, seed=1)
    fast = Winograd(plain, m)
    assert max_error(fast(x), plain(x)) < 1e-12
    assert max_error(fast(x.contiguous(memory_format=torch.channels_last)), plain(x)) < 1e-12


@pytest.mark.parametrize("m", POINTS)
def test_winograd_in_float32_loses_little(m: int) -> None:
    """Measured: 0.39e-6 and 1.4e-6 of the output's deviation; with the textbook's points F(4x4) has 2.5e-6."""
    plain, x = conv(320, 32), randn(1, 320, 32, 32, seed=1)
    want, got = plain(x), Winograd(plain.float(), m)(x.float())
    assert float((got - want).square().mean().sqrt() / want.std()) < (0.6e-6 if m == 2 else 2e-6)


def weights(bias: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    return randn(12, 20, seed=1).float(), randn(12, seed=2).float() if bias else None, randn(2, 9, 20, seed=3).float()


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=oneDNN)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_and_what_follows(packed: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.packs", lambda _: packed)
    (weight, b, x), other = weights(bias), randn(2, 9, 12, seed=4).float()
    layer, want = PackedLinear(weight, b, 18), F.linear(x, weight, b)
    assert layer.packed == packed
    for got, expected in (
        (layer(x), want),
        (layer(x, other), want + other),
        (layer.gelu(x), F.gelu(want)),
        (layer.times(x, other), want * other),
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@oneDNN
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [8, 11])
def test_packed_convolutions_take_any_size(stride: int, side: int) -> None:
    plain = conv(20, 12, torch.float32, stride=stride)
    fast, x = PackedConv(plain, 8), randn(3, 20, side, side + 2, seed=1).float()
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(fast(given), plain(given), atol=1e-5, rtol=1e-5)


def test_a_1x1_convolution_is_a_product() -> None:
    plain, x = conv(20, 12, size=1), randn(2, 20, 5, 4, seed=1)
    assert max_error(Pointwise(plain.weight.flatten(1), plain.bias, 20)(x), plain(x)) < 1e-13


def inputs(config: UNetConfig, h: int, w: int, batch: int = 2) -> tuple[Tensor, Tensor, Context]:
    """Latents, a timestep for each, and a text."""
    added = randn(batch, config.added_dim, seed=3) if config.added_dim else None
    text = randn(batch, 5, config.context_dim, seed=2)
    return randn(batch, 4, h, w, seed=1), torch.tensor([7, 981, 500])[:batch], Context(text, added=added)


@pytest.mark.parametrize("name", SMALL_UNETS)
def test_it_equals_the_plain_unet(pair: Pair, name: str) -> None:
    """In float64, at all sizes one after the other, with a timestep for each row or for all."""
    plain = pair(name).ours
    fast = fasten(plain)
    for h, w in SIZES:
        for batch in (1, 2):
            x, t, context = inputs(plain.config, h, w, batch)
            assert max_error(fast(x, t, context), plain(x, t, context)) < 1e-11
            assert max_error(fast(x, 500, context), plain(x, 500, context)) < 1e-11


def with_picture(unet: UNet, context: Context, lam: Any, fuse: Any = None) -> Context:
    adapter = randomise(IPAdapter(unet, ImageProjection(10, unet.config.context_dim, 4)), seed=5)
    context = context if fuse is None else Context(context.text, fuse=fuse)
    return adapter(context, randn(len(context.text), 10, seed=6), lam)


@pytest.mark.parametrize("scale", [0.7, "mask"])
@pytest.mark.parametrize("fuse", [None, concatenated])
def test_adapters_and_masks(scale: Any, fuse: Any) -> None:
    """One block only, since the mask is of one level."""
    plain = randomise(UNet(SMALL_ONE))
    x, t, context = inputs(SMALL_ONE, 17, 13)
    lam = pyramid(torch.rand(2, 40, 30).double(), 17, 13)[0] if scale == "mask" else scale
    down = with_picture(plain, context, 1.0, fuse)
    sources = [c.layer for c in plain.cross_attentions() if c.to_q.in_features == 8]
    prompt = tuple(
        source if i not in sources else type(source)(source.k, source.v, lam) for i, source in enumerate(down.image[0])
    )
    seen = Context(down.text, (prompt,), down.fuse)
    assert max_error(fasten(plain)(x, t, seen), plain(x, t, seen)) < 1e-12
    assert max_error(plain(x, t, seen), plain(x, t, down)) > 1e-3 or scale == 1.0


def test_an_adapter_is_made_for_either() -> None:
    plain = randomise(UNet(SMALL_ONE))
    x, t, context = inputs(SMALL_ONE, 8, 8)
    for own in (True, False):
        torch.manual_seed(0)
        one = IPAdapter(plain, ImageProjection(10, 6, 4), own).double()
        other = IPAdapter(fasten(plain), one.image_projection, own).double()
        contexts = [each(context, randn(2, 10, seed=6)) for each in (one, other)]
        assert torch.equal(plain(x, t, contexts[0]), plain(x, t, contexts[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(32, 32), (33, 21)])
@pytest.mark.parity("diffusers UNet2DConditionModel, float32 and bfloat16", "2 times the peer's own")
def test_the_error_is_at_most_twice_that_of_diffusers(pair: Pair, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Against float64. The small SD 1.5 has all forms: F(4x4) on two levels, F(2x2) below, and packed products."""
    both = pair("sd15")
    x, t, context = inputs(SMALL_SD15, *size)
    want = both.ours(x, t, context)
    fast, peer = fasten(copy.deepcopy(both.ours).to(dtype)), copy.deepcopy(both.peer).to(dtype)
    ours = fast(x.to(dtype), t, Context(context.text.to(dtype)))
    theirs = peer(x.to(dtype), t, context.text.to(dtype)).sample

    def error(out: Tensor) -> float:
        return float((out.double() - want).square().mean().sqrt())

    assert error(ours) < 2 * error(theirs)


# guidance


@pytest.mark.parametrize("name", SMALL_UNETS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sides", [2, 3])
def test_latents_of_all_passes_are_given_once(pair: Pair, name: str, batch: int, sides: int) -> None:
    plain = pair(name).ours
    x, t, _ = inputs(plain.config, 9, 13, batch)
    context = inputs(plain.config, 9, 13, batch * sides)[2]
    rows = torch.cat([x] * sides)
    assert max_error(fasten(plain)(x, 500, context), plain(rows, 500, context)) < 1e-11
    assert max_error(fasten(plain)(x, t, context), plain(rows, t.repeat(sides), context)) < 1e-11


def test_guidance_computes_the_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = randomise(UNet(SMALL_ONE))
    uncond, cond = (Context(randn(1, 5, 6, seed=seed)) for seed in (3, 4))
    uncond, cond = with_picture(plain, uncond, 0.5), with_picture(plain, cond, 0.5)
    fast, seen, x = fasten(plain), [], randn(1, 4, 9, 5, seed=5)
    for name in ("conv_in", "down.0.res.conv1", "down.0.attn.blocks.0.attn1", "down.0.attn.blocks.0.attn2", "conv_out"):
        fast.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    want = guided(plain, uncond, cond, 7.5)(x, 500)
    assert max_error(guided(fast, uncond, cond, 7.5)(x, 500), want) < 1e-11
    assert seen == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("stage", [None, 0, 1, 3])
def test_residuals_of_one_pass_only(stage: int | None) -> None:
    """Where the passes differ before the text enters, they are computed apart."""
    plain = randomise(UNet(SMALL_ONE))
    shapes = [(2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4), (2, 16, 4, 4)]
    skips = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    given = Residuals(skips, randn(2, 16, 4, 4, seed=9)) if stage is None else Residuals(hidden={stage: skips[stage]})
    x, context = randn(1, 4, 8, 8, seed=5), Context(randn(2, 5, 6, seed=6))
    want = plain(torch.cat([x, x]), 500, context, given)
    assert max_error(fasten(plain)(x, 500, context, given), want) < 1e-11


def test_rows_that_do_not_fit_are_refused() -> None:
    fast = fasten(randomise(UNet(SMALL_ONE)))
    with pytest.raises(ValueError, match="2 latents do not fit a Context of 3 rows"):
        fast(randn(2, 4, 8, 8), 5, Context(randn(3, 5, 6)))


# what it is


def test_the_plain_unet_does_not_change() -> None:
    plain = randomise(UNet(SMALL_ONE))
    before = {name: (type(module), dict(vars(module))) for name, module in plain.named_modules()}
    fast = fasten(plain)
    assert isinstance(fast, FastUNet) and type(plain) is UNet and fast.conv_in.weight is plain.conv_in.weight
    for name, module in plain.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind and all(vars(module)[key] is value for key, value in attributes.items())
    fast(*inputs(SMALL_ONE, 8, 8))


def test_attention_is_recorded() -> None:
    plain = randomise(UNet(SMALL_ONE))
    x, t, context = inputs(SMALL_ONE, 8, 8)
    context = stack(context, context) if len(context.text) == 1 else context
    maps = []
    for unet in (plain, fasten(plain)):
        with record(unet) as kept:
            unet(x, t, context)
        maps.append(kept)
    assert len(maps[0]) == len(maps[1]) == len(plain.cross_attentions())
    for a, b in zip(*maps, strict=True):
        assert max_error(a.text, b.text) < 1e-6


def test_what_it_does_not_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on a CPU in float32 or bfloat16, not on cpu in torch\.float16"):
        fasten(UNet(SMALL_ONE).half())
    with pytest.raises(ValueError, match=r"not on meta in torch\.float32"):
        fasten(UNet(SMALL_ONE).to("meta"))


def test_it_has_no_gradients() -> None:
    unet = UNet(SMALL_ONE)
    x, t, context = inputs(SMALL_ONE, 8, 8)
    out = fasten(unet)(x.float(), t, Context(context.text.float()))
    assert not out.requires_grad
