"""Where a picture meets the text: against diffusers' processor, naive softmaxes and closed forms, in float64."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention as PeerAttention
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peers import max_error, randn, randomise
from torch import Tensor

from model.attention import CrossAttention, Fuse, SelfAttention, attention, check_sign, concatenated, decoupled
from model.context import Context, pyramid, stack
from model.source import Source
from model.unet import UNet, UNetConfig

TOLERANCE = 1e-12  # measured: 8e-15 and less
DIM, CONTEXT, HEADS = 24, 12, 3
Scale = float | Tensor
PICTURES, TENSOR = torch.tensor([0.2, 1.5]).double().reshape(2, 1, 1, 1), torch.tensor(0.4).double()
FUSES = pytest.mark.parametrize("fuse", [decoupled, concatenated])


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def queries(batch: int = 2, n: int = 15, seed: int = 0) -> Tensor:
    return 4 * randn(batch, HEADS, n, 8, seed=seed)


def source(batch: int = 2, m: int = 4, scale: Scale = 1.0, seed: int = 1) -> Source:
    return Source(4 * randn(batch, HEADS, m, 8, seed=seed), randn(batch, HEADS, m, 8, seed=seed + 100), scale)


def layer_pair(scales: list[float]) -> tuple[Any, Any, CrossAttention]:
    """One cross-attention layer with an adapter for each scale: diffusers', and ours without adapters."""
    peer = PeerAttention(query_dim=DIM, cross_attention_dim=CONTEXT, heads=HEADS, dim_head=DIM // HEADS)
    peer.set_processor(IPAdapterAttnProcessor2_0(DIM, CONTEXT, num_tokens=[4] * len(scales), scale=scales))
    randomise(peer, peaky=4.0)
    ours = CrossAttention(DIM, CONTEXT, HEADS, layer=0).double()
    ours.load_state_dict(
        {k.replace("to_out.0", "to_out"): v for k, v in peer.state_dict().items() if "processor" not in k}
    )
    return peer, peer.processor, ours


def prompts(
    processor: Any, ours: CrossAttention, tokens: list[Tensor], scales: list[Any]
) -> tuple[tuple[Source, ...], ...]:
    """Image sources by the processor's own projections. `tokens`: one `b n c` an adapter."""
    pairs = zip(processor.to_k_ip, processor.to_v_ip, tokens, scales, strict=True)
    return tuple((Source(ours.split(to_k(t)), ours.split(to_v(t)), scale),) for to_k, to_v, t, scale in pairs)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 15, 77), (3, 45, 5)])
def test_attention_is_a_naive_softmax(shape: tuple[int, int, int]) -> None:
    batch, n, m = shape
    q, text = queries(batch, n), source(batch, m)
    assert max_error(attention(q, text.k, text.v), naive(q, text.k, text.v)) < TOLERANCE


@pytest.mark.parametrize("small", [0, 2**16])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_trained_through_equals_a_naive_softmax(
    small: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value and all gradients, by the kernel and by the equation."""
    monkeypatch.setattr("model.kernels.SMALL", small)
    bias = randn(1, 1, 15, 4, seed=9) if biased else torch.zeros(1, 1, 15, 4).double()
    inputs = [x.requires_grad_() for x in (queries(), source().k, source().v)]
    own = attention(*inputs, bias=bias if biased else None)
    logits = torch.einsum("bhnd,bhmd->bhnm", *inputs[:2]) / math.sqrt(8) + bias
    true = torch.einsum("bhnm,bhmd->bhnd", logits.exp() / logits.exp().sum(-1, keepdim=True), inputs[2])
    weights = randn(*own.shape, seed=5)
    actual, wanted = (torch.autograd.grad((x * weights).sum(), inputs) for x in (own, true))
    assert max_error(own.detach(), true.detach()) < TOLERANCE
    assert all(max_error(a, b) < TOLERANCE for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parity("diffusers Attention", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
def test_self_attention_equals_diffusers(bias: bool) -> None:
    peer = randomise(PeerAttention(query_dim=DIM, heads=HEADS, dim_head=DIM // HEADS, bias=bias), peaky=4.0)
    ours = SelfAttention(DIM, HEADS, bias).double()
    ours.load_state_dict({k.replace("to_out.0", "to_out"): v for k, v in peer.state_dict().items()})
    x = randn(2, 17 * 13, DIM)
    assert max_error(ours(x), peer(x)) < TOLERANCE


def test_heads_that_do_not_divide_raise() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide a width of 24"):
        SelfAttention(24, heads=5)


@pytest.mark.parity("diffusers IPAdapterAttnProcessor2_0", TOLERANCE)
@pytest.mark.parametrize("scales", [[1.0], [0.7], [0.6, 1.3], [0.5, 0.0]])
@pytest.mark.parametrize("n", [1, 45, 17 * 13])
def test_decoupled_equals_diffusers(scales: list[float], n: int) -> None:
    peer, processor, ours = layer_pair(scales)
    x, text = randn(2, n, DIM), randn(2, 77, CONTEXT, seed=1)
    tokens = [randn(2, 4, CONTEXT, seed=2 + i) for i in range(len(scales))]
    got = ours(x, Context(text, prompts(processor, ours, tokens, scales)))
    assert max_error(got, peer(x, encoder_hidden_states=(text, [t[:, None] for t in tokens]))) < TOLERANCE
    assert max_error(got, ours(x, Context(text))) > 0.1


@pytest.mark.parity("diffusers IPAdapterAttnProcessor2_0 with masks", TOLERANCE)
@pytest.mark.parametrize("size", [(8, 8), (12, 8), (9, 5), (1, 4)])
def test_masks_equal_diffusers(size: tuple[int, int]) -> None:
    """Two adapters, each with a 0/1 mask on the layer's own grid, at sizes where diffusers' guess of that grid is right."""
    scales = [0.7, 1.2]
    peer, processor, ours = layer_pair(scales)
    x, text = randn(2, math.prod(size), DIM), randn(2, 7, CONTEXT, seed=1)
    tokens = [randn(2, 4, CONTEXT, seed=2 + i) for i in range(2)]
    masks = [(randn(*size, seed=5 + i) > 0).double() for i in range(2)]
    maps = [pyramid(mask, *size, levels=1)[0].double() * scale for mask, scale in zip(masks, scales, strict=True)]
    got = ours(x, Context(text, prompts(processor, ours, tokens, maps)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # diffusers warns when its guess is wrong
        want = peer(
            x,
            encoder_hidden_states=(text, [t[:, None] for t in tokens]),
            ip_adapter_masks=[mask[None, None] for mask in masks],
        )
    assert max_error(got, want) < TOLERANCE


@pytest.mark.parametrize("lam", [1.0, 0.3, 2.5, "map", "picture"])
def test_concatenated_is_a_mix_with_gate_g(lam: float | str) -> None:
    """Z = g A_text + (1 - g) A_image, g = sigmoid(lse_text - lse_image - log lambda)."""
    scale: Any = randn(2, 1, 15, 1, seed=9).abs() if lam == "map" else PICTURES if lam == "picture" else lam
    q, text, image = queries(), source(m=7), source(scale=scale, seed=3)
    lse_text, lse_image = ((q @ s.k.mT / math.sqrt(q.shape[-1])).logsumexp(-1, keepdim=True) for s in (text, image))
    g = torch.sigmoid(lse_text - lse_image - torch.as_tensor(image.scale_for(q), dtype=q.dtype).log())
    want = g * naive(q, text.k, text.v) + (1 - g) * naive(q, image.k, image.v)
    assert 0.1 < g.mean() < 0.9
    assert max_error(concatenated(q, text, [image]), want) < TOLERANCE


def test_the_papers_simple_adapter_reads_text_and_image_as_one_prompt() -> None:
    """Joint softmax with the text's own W_k, W_v equals plain cross-attention to the concatenated tokens."""
    layer = randomise(CrossAttention(DIM, CONTEXT, HEADS, layer=0), peaky=4.0)
    x, text, tokens = randn(2, 45, DIM), randn(2, 7, CONTEXT, seed=1), randn(2, 4, CONTEXT, seed=2)
    shared = Source(layer.split(layer.to_k(tokens)), layer.split(layer.to_v(tokens)))
    got = layer(x, Context(text, ((shared,),), concatenated))
    assert max_error(got, layer(x, Context(torch.cat([text, tokens], dim=1)))) < TOLERANCE


@pytest.mark.parametrize(
    "zero", [0, 0.0, torch.tensor(0.0), torch.zeros(2, 1, 15, 1)], ids=["int", "float", "tensor", "mask"]
)
def test_lambda_zero_is_no_picture_decoupled(zero: Scale) -> None:
    q, text = queries(), source(m=7)
    assert torch.equal(decoupled(q, text, [source(scale=zero, seed=3)]), decoupled(q, text, []))


def test_lambda_zero_is_no_picture_concatenated() -> None:
    q, text = queries(), source(m=7)
    alone = attention(q, text.k, text.v)
    assert torch.equal(concatenated(q, text, [source(scale=0.0, seed=3)]), alone)
    for zero in (torch.tensor(0.0), torch.zeros(2, 1, 15, 1)):
        assert max_error(concatenated(q, text, [source(scale=zero, seed=3)]), alone) < TOLERANCE


@FUSES
@pytest.mark.parametrize(
    "one", [torch.tensor(1.0), torch.ones(2, 1, 1, 1), torch.ones(1, 1, 15, 1)], ids=["number", "picture", "mask"]
)
def test_a_mask_of_ones_is_lambda_one(fuse: Fuse, one: Scale) -> None:
    q, text = queries(), source(m=7)
    assert max_error(fuse(q, text, [source(scale=one, seed=3)]), fuse(q, text, [source(seed=3)])) < TOLERANCE


@FUSES
def test_a_mask_speaks_only_where_it_is_not_zero(fuse: Fuse) -> None:
    q, text, lit = queries(), source(m=7), (torch.arange(15) % 2).double()
    got = fuse(q, text, [source(scale=lit.reshape(1, 1, 15, 1), seed=3)])
    with_picture, without = fuse(q, text, [source(seed=3)]), fuse(q, text, [])
    assert max_error(got, torch.where(lit[:, None] == 1, with_picture, without)) < TOLERANCE
    assert max_error(with_picture, without) > 0.1


@FUSES
@pytest.mark.parametrize(("a", "b"), [(0.25, 0.5), (1.0, 1.0)])
def test_the_same_picture_twice_is_the_sum_of_its_lambdas(fuse: Fuse, a: float, b: float) -> None:
    q, text = queries(), source(m=7)
    twice = fuse(q, text, [source(scale=a, seed=3), source(scale=b, seed=3)])
    assert max_error(twice, fuse(q, text, [source(scale=a + b, seed=3)])) < TOLERANCE


def test_decoupled_is_linear_in_lambda() -> None:
    q, text = queries(), source(m=7)
    term = naive(q, source(seed=3).k, source(seed=3).v)
    for lam in (-0.5, 0.3, 2.0):
        assert (
            max_error(decoupled(q, text, [source(scale=lam, seed=3)]), naive(q, text.k, text.v) + lam * term)
            < TOLERANCE
        )


@pytest.mark.parametrize(
    "lam",
    [-0.1, torch.tensor(-0.1), torch.tensor([0.5, -0.1]).reshape(2, 1, 1, 1)],
    ids=["number", "tensor", "picture"],
)
def test_negative_lambda_raises_in_a_joint_softmax(lam: Scale) -> None:
    """A number anywhere; a tensor where a Context is made, since a step may not wait for its values."""
    with pytest.raises(ValueError, match="lambda must not be negative"):
        check_sign(concatenated, lam)
    check_sign(decoupled, lam)
    if not isinstance(lam, Tensor):
        with pytest.raises(ValueError, match="lambda must not be negative"):
            concatenated(queries(), source(m=7), [source(scale=lam, seed=3)])


@FUSES
def test_a_mask_made_for_another_size_raises(fuse: Fuse) -> None:
    """So does a value for each picture that lacks its axes: `b` would be a value for each channel. And so do too many rows, heads or
    channels."""
    wrong = [(2,), (2, 1), (3, 1, 1, 1), (1, 5, 1, 1), (1, 1, 1, 4)]
    for scale in (pyramid(torch.ones(8, 8), 9, 5)[0], *map(torch.ones, wrong)):
        with pytest.raises(ValueError, match=r"does not broadcast .* true \(h, w\)"):
            fuse(queries(n=16), source(), [source(scale=scale)])


def context(fuse: Fuse, scale: Scale, seed: int) -> Context:
    """A text and one picture for a single layer, batch 2."""
    layer = randomise(CrossAttention(DIM, CONTEXT, HEADS, layer=0), peaky=4.0)
    tokens = randn(2, 4, CONTEXT, seed=seed)
    return Context(
        randn(2, 7, CONTEXT, seed=seed + 1),
        ((Source(layer.split(layer.to_k(tokens)), layer.split(layer.to_v(tokens)), scale),),),
        fuse,
    )


MASK, SOFT = pyramid((randn(2, 9, 5, seed=3) > 0).double(), 9, 5)[0], pyramid(randn(9, 5, seed=4).sigmoid(), 9, 5)[0]


@FUSES
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1.0, 1.0),
        (0.7, 0.7),
        (0.0, 0.7),
        (1.0, 0.3),
        (0.0, MASK),
        (0.5, SOFT),
        (MASK, SOFT),
        (PICTURES, 0.6),
        (SOFT, PICTURES),
        (TENSOR, 1),
    ],
    ids=[
        "ones",
        "equal",
        "zero_number",
        "numbers",
        "zero_mask",
        "number_soft",
        "mask_soft",
        "picture_number",
        "soft_picture",
        "tensor_number",
    ],
)
def test_a_stack_equals_two_calls(fuse: Fuse, a: Scale, b: Scale) -> None:
    layer = randomise(CrossAttention(DIM, CONTEXT, HEADS, layer=0), seed=7, peaky=4.0)
    x, uncond, cond = randn(2, 45, DIM), context(fuse, a, seed=10), context(fuse, b, seed=20)
    both = layer(torch.cat([x, x]), stack(uncond, cond))
    assert max_error(both, torch.cat([layer(x, uncond), layer(x, cond)])) < TOLERANCE


def test_a_stack_of_unlike_sides_raises() -> None:
    full = context(decoupled, 1.0, seed=10)
    with pytest.raises(ValueError, match="one side has 0 image prompts, the other 1"):
        stack(Context(full.text), full)


@FUSES
def test_a_lambda_for_each_picture_equals_separate_calls(fuse: Fuse) -> None:
    def row(source: Source, i: int, scale: float = 1.0) -> Source:
        return Source(source.k[i : i + 1], source.v[i : i + 1], scale)

    q, text, image = queries(), source(m=7), source(scale=PICTURES, seed=3)
    rows = [fuse(q[i : i + 1], row(text, i), [row(image, i, float(PICTURES[i]))]) for i in range(2)]
    assert max_error(fuse(q, text, [image]), torch.cat(rows)) < TOLERANCE


@pytest.mark.parametrize("size", [(16, 16), (17, 13), (65, 33), (9, 5), (1, 1), (3, 64), (31, 2)])
def test_pyramid_has_the_unets_own_grids(size: tuple[int, int]) -> None:
    """Every level of a UNet asks for its grid and finds it, at any size."""
    unet = UNet(
        UNetConfig(channels=(4, 4, 4, 4), depth=(1, 1, 1, 1), heads=(1, 1, 1, 1), res_blocks=1, context_dim=4, groups=2)
    ).eval()
    asked: list[int] = []
    for layer in unet.cross_attentions():
        layer.register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[1]))
    with torch.no_grad():
        unet(torch.zeros(1, 4, *size), 0, Context(torch.zeros(1, 2, 4)))
    grids = pyramid(torch.ones(24, 24), *size)
    assert sorted(set(asked), reverse=True) == list(dict.fromkeys(grid.shape[2] for grid in grids))
    assert all(torch.equal(grid, torch.ones(1, 1, grid.shape[2], 1)) for grid in grids)


def test_pyramid_averages_over_each_querys_area() -> None:
    mask = randn(2, 16, 24).sigmoid()
    grids = pyramid(mask, 8, 12, levels=3)
    for grid, n, block in zip(grids, (96, 24, 6), (2, 4, 8), strict=True):
        want = mask.reshape(2, 16 // block, block, 24 // block, block).mean((2, 4)).reshape(2, 1, n, 1)
        assert max_error(grid.double(), want) < 1e-6  # lambda is float32


def test_two_sides_that_differ_in_kind_are_not_stacked() -> None:
    text = randn(1, 5, CONTEXT)
    with pytest.raises(ValueError, match="combine text and image prompts differently"):
        stack(Context(text), Context(text, fuse=concatenated))
    with pytest.raises(ValueError, match="only one side has the added"):
        stack(Context(text), Context(text, added=randn(1, 4)))
