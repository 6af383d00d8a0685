"""Attention maps, compared with diffusers' scores, naive softmaxes, closed forms, and keys with known positions."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from adapter_peers import IMAGE, adapter_for, official
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from einops import rearrange
from peers import SMALL_SD15, clip_tokenizer, max_error, randn, unet_pair
from PIL import Image
from test_attention import queries, source
from torch import Tensor

from eval.attention_maps import finest, image_mass, name_maps, record, softmax_maps, word_positions
from eval.attention_sheet import overlay
from model.attention import Fuse, concatenated, decoupled
from model.context import Context, pyramid
from model.source import Source
from model.text_encoder import TextEncoder
from model.unet import UNet, UNetConfig
from sampling.guidance import guided
from sampling.lambdas import Lambda, set_lambda
from train.clip import MINI_TEXT

EXACT = 1e-13  # float64; measured: 8e-15 and less
STORED = 1e-7  # maps and lambdas are kept in float32; measured: 6e-8 and less
SEVERAL = 1e-6  # sums of such numbers; measured: 1.3e-7 and less
MASK = torch.linspace(0, 2, 9 * 7).double().reshape(9, 7)
Scale = float | Tensor
PICTURES = torch.tensor([0.2, 1.5]).double().reshape(2, 1, 1, 1)
SCALES: list[Scale] = [1.0, 0.6, 0.0, PICTURES, pyramid(MASK, 9, 7)[0]]


def naive(q: Tensor, *keys: Tensor, log_lambda: Tensor | float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt d) over all keys together; `log_lambda` is added to the logits of all but the first."""
    logits = [torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1]) for k in keys]
    joined = torch.cat([logits[0], *(part + log_lambda for part in logits[1:])], dim=-1)
    odds = (joined - joined.amax(-1, keepdim=True)).exp()
    return odds / odds.sum(-1, keepdim=True)


def check(maps: Tensor, q: Tensor, k: Tensor) -> None:
    """What a map of one source has to be."""
    assert max_error(maps.sum(dim=-1), torch.ones(maps.shape[:-1]).double()) < EXACT, "rows do not sum to 1"
    assert maps.min() >= 0, "negative attention"
    assert max_error(maps, naive(q, k)) < EXACT


@pytest.mark.parametrize("scale", SCALES, ids=["1", "0.6", "0", "pictures", "mask"])
def test_decoupled_maps_are_softmaxes_whatever_lambda(scale: Scale) -> None:
    q, text, pictures = queries(n=63), source(m=77), [source(m=4, scale=scale), source(m=16, seed=2)]
    of_text, *of_image = softmax_maps(q, text, pictures, decoupled)
    for maps, one in zip([of_text, *of_image], [text, *pictures], strict=True):
        check(maps, q, one.k)


def test_the_official_formula_is_not_a_map() -> None:
    """attention_processor.py:391 of the released code: the softmax binds to the keys, and 1 / sqrt d is missing."""
    q, text = queries(n=63), source(m=4)
    wrong = q @ text.k.transpose(-2, -1).softmax(dim=-1)
    assert wrong.min() < 0 and (wrong.sum(dim=-1) - 1).abs().min() > 1e-3
    with pytest.raises(AssertionError, match="rows do not sum to 1"):
        check(wrong, q, text.k)
    with pytest.raises(AssertionError):  # with the brackets set right, the logits are still sqrt d too large
        check((q @ text.k.transpose(-2, -1)).softmax(dim=-1), q, text.k)


@pytest.mark.parametrize("scale", SCALES, ids=["1", "0.6", "0", "pictures", "mask"])
def test_joint_maps_and_image_mass(scale: Scale) -> None:
    q, text, pictures = queries(n=63), source(m=77), [source(m=4, scale=scale)]
    of_text, of_image = softmax_maps(q, text, pictures, concatenated)
    log_lambda = torch.as_tensor(scale, dtype=torch.float64).log()
    assert max_error(torch.cat([of_text, of_image], -1), naive(q, text.k, pictures[0].k, log_lambda=log_lambda)) < EXACT
    assert max_error(image_mass(q, text, pictures), of_image.sum(dim=-1)) < EXACT


def test_image_mass_of_several_sources_and_its_gate() -> None:
    q, text, pictures = queries(n=15), source(m=5), [source(m=4, scale=0.3), source(m=16, scale=1.7, seed=2)]
    _, *of_image = softmax_maps(q, text, pictures, concatenated)
    mass = image_mass(q, text, pictures)
    assert max_error(mass, sum(part.sum(dim=-1) for part in of_image)) < EXACT  # type: ignore[arg-type]
    one = pictures[:1]
    gate = image_mass(q, text, one)[..., None]
    mixed = (1 - gate) * decoupled(q, text, []) + gate * decoupled(q, Source(one[0].k, one[0].v), [])
    assert max_error(mixed, concatenated(q, text, one)) < EXACT


def keep(maps: list[Tensor], scores: Callable[..., Tensor], heads: int, *args: Any) -> Tensor:
    """Record diffusers' attention scores of one layer."""
    maps.append(rearrange(probs := scores(*args), "(b h) n m -> b h n m", h=heads))
    return probs


@pytest.mark.parity("diffusers IPAdapterAttnProcessor, get_attention_scores", STORED)
@pytest.mark.parametrize("size", [(65, 33), (9, 7)])
def test_a_whole_unet_against_diffusers_scores(size: tuple[int, int]) -> None:
    """All maps (text and two image prompts) equal diffusers' `get_attention_scores`, and the grids are right."""
    both = unet_pair(replace(SMALL_SD15, res_blocks=1), linear=False)
    adapters = [adapter_for(both.ours, seed) for seed in (3, 4)]
    both.peer._load_ip_adapter_weights([official(adapter, both.ours) for adapter in adapters], low_cpu_mem_usage=False)
    scores: dict[str, list[Tensor]] = defaultdict(list)
    for name, layer in both.peer.named_modules():
        if name.endswith("attn2"):
            fast = layer.processor  # the classic processor, unlike this one, asks the layer for its scores
            classic = IPAdapterAttnProcessor(fast.hidden_size, fast.cross_attention_dim, (4, 4), [0.7, 0.4]).double()
            classic.load_state_dict(fast.state_dict())
            layer.set_processor(classic)
            layer.get_attention_scores = partial(keep, scores[name], layer.get_attention_scores, layer.heads)
    x, t, text = randn(2, 4, *size, seed=1), torch.tensor([7, 981]), randn(2, 77, SMALL_SD15.context_dim, seed=2)
    embeddings = [randn(2, 1, IMAGE, seed=5 + i) for i in range(2)]
    want = both.peer(x, t, text, added_cond_kwargs={"image_embeds": embeddings}).sample
    context = Context(text)
    for adapter, embedding, scale in zip(adapters, embeddings, (0.7, 0.4), strict=True):
        context = adapter(context, embedding[:, :, None], scale)
    with record(both.ours) as maps:
        got = both.ours(x, t, context)
    assert max_error(got, want) < EXACT
    assert [one.layer for one in maps] == list(range(len(both.ours.cross_attentions())))
    order = {"d": 0, "m": 1, "u": 2}  # down, mid, up
    theirs = [scores[name] for name in sorted(scores, key=lambda name: (order[name[0]], name))]
    for one, (their_text, *their_image) in zip(maps, theirs, strict=True):
        ours = [one.text, *one.image]
        assert max(max_error(a.double(), b) for a, b in zip(ours, [their_text, *their_image], strict=True)) < STORED
        assert {part.dtype for part in ours} == {torch.float32} and one.t == (7, 981) and one.call == 0
        assert one.weights == (0.7, 0.4) and one.image_mass is None
    h, w = size
    halves = [(h, w), ((h + 1) // 2, (w + 1) // 2), ((h + 3) // 4, (w + 3) // 4), ((h + 7) // 8, (w + 7) // 8)]
    assert [one.grid for one in maps] == [halves[i] for i in (0, 1, 2, 3, 2, 2, 1, 1, 0, 0)]


ONE = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=8, groups=4)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(ONE).double().eval().requires_grad_(False)


def context_for(unet: UNet, scale: Scale = 0.6, fuse: Fuse = decoupled, batch: int = 2) -> Context:
    text, embedding = Context(randn(batch, 5, 8), fuse=fuse), randn(batch, IMAGE, seed=1)
    if scale is not SCALES[-1]:
        return adapter_for(unet)(text, embedding, scale)
    levels = Lambda(2.0, mask=MASK / 2).by_layer(unet.config, (9, 7))  # each layer has its own level of the mask
    return set_lambda(adapter_for(unet)(text, embedding), levels)


@pytest.mark.parametrize("fuse", [decoupled, concatenated])
def test_a_planted_key_appears_at_its_position(unet: UNet, fuse: Fuse) -> None:
    """Rows 2-4, columns 1-2 of a 9 x 7 picture are made to attend to text token 3 and image token 2. The maps show them there."""
    place = torch.zeros(9, 7, dtype=torch.bool)
    place[2:5, 1:3] = True
    planted = torch.where(place.reshape(1, 63, 1), 1.0, -1.0).double().expand(1, 63, 8)
    layer = unet.cross_attentions()[0]
    layer.to_q.weight.copy_(torch.eye(8))
    layer.to_k.weight.copy_(torch.zeros(8, 8)).data[:, 0] = 1.0  # a key is its token's first number, on every axis
    text, keys = torch.zeros(1, 5, 8).double(), torch.zeros(1, 2, 4, 4).double()
    text[0, 3, 0] = keys[:, :, 2] = 10.0
    context = context_for(unet, scale=1.0, fuse=fuse, batch=1)
    context = replace(context, text=text, image=((Source(keys, keys), *context.image[0][1:]),))
    layer.register_forward_pre_hook(lambda _, args: (planted, args[1]))
    with record(unet) as maps:
        unet(randn(1, 4, 9, 7), 500, context)
    seen = 1.0 if fuse is decoupled else 0.5  # they share a joint softmax
    for part, token in ((maps[0].text, 3), (maps[0].image[0], 2)):
        picture = maps[0].picture(part)[0, :, token]
        assert picture.shape == (2, 9, 7)
        assert max_error(picture, seen * place.float().expand(2, 9, 7)) < SEVERAL


def hooks_of(module: torch.nn.Module) -> list[dict[int, Any]]:
    """A module's hooks by kind. Convolutions have one that lays out their weights."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [dict(getattr(module, kind)) for kind in kinds]


def test_recording_does_not_change_the_output_and_removes_its_hooks(unet: UNet) -> None:
    x, context = randn(2, 4, 9, 7), context_for(unet)
    before = {name: dict(vars(module)) for name, module in unet.named_modules()}
    hooks = {name: hooks_of(module) for name, module in unet.named_modules()}
    plain = unet(x, 500, context)
    with record(unet) as maps:
        assert torch.equal(unet(x, 500, context), plain)
    assert len(maps) == len(unet.cross_attentions())
    with pytest.raises(RuntimeError, match="stop"), record(unet):
        raise RuntimeError("stop")
    assert torch.equal(unet(x, 500, context), plain) and len(maps) == len(unet.cross_attentions())
    for name, module in unet.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert hooks_of(module) == hooks[name], name


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rows_calls_and_timesteps_of_guided_steps(unet: UNet, guidance: float) -> None:
    """A guidance batch is [uncond, cond]; without guidance there is only cond."""
    uncond, cond = context_for(unet, batch=1), context_for(unet, scale=0.9, batch=1)
    cond = replace(cond, text=cond.text.flip(1))
    denoise, x = guided(unet, uncond, cond, guidance), randn(1, 4, 9, 7)
    with record(unet) as maps:
        denoise(x, 981)
        denoise(x, 7)
    layers = len(unet.cross_attentions())
    assert [one.call for one in maps] == [0] * layers + [1] * layers
    rows = 1 if guidance == 1 else 2
    assert [one.t for one in maps] == [(981,) * rows] * layers + [(7,) * rows] * layers
    for half, row in ((uncond, 0), (cond, -1))[2 - rows :]:
        with record(unet) as alone:
            unet(x, 981, half)
        for one, both in zip(alone, maps[:layers], strict=True):
            assert max_error(one.text, both.text[row][None]) < STORED
            assert max_error(one.image[0], both.image[0][row][None]) < STORED


def test_keyword_arguments_and_a_cleared_list(unet: UNet) -> None:
    x, context = randn(2, 4, 9, 7), context_for(unet)
    with record(unet) as maps:
        unet(x=x, t=7, context=context)
        maps.clear()
        unet(x, context=context, t=torch.tensor([3, 4]))
    assert {(one.call, one.t) for one in maps} == {(1, (3, 4))}


@pytest.mark.parametrize("fuse", [decoupled, concatenated])
@pytest.mark.parametrize("scale", SCALES, ids=["1", "0.6", "0", "pictures", "mask"])
def test_maps_and_weights_reproduce_the_attention_output(unet: UNet, scale: Scale, fuse: Fuse) -> None:
    """Maps and weights reproduce the output of the attention: A_text V + sum of weight A_image V'. For `decoupled`, lambda is in
    the weights and does not change the maps. A joint softmax includes it in the maps."""
    x, one, context = randn(2, 4, 9, 7), context_for(unet, 1.0, fuse), context_for(unet, scale, fuse)
    layer, inputs = unet.cross_attentions()[0], []
    handle = layer.to_out.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with record(unet) as maps:
        unet(x, 500, context)
    handle.remove()
    first = maps[0]
    with record(unet) as plain:
        unet(x, 500, one)
    v, w = layer.split(layer.to_v(context.text)), first.weights[0]
    read = first.text.double() @ v + w * (first.image[0].double() @ context.at(0)[0].v)
    assert max_error(read, layer.split(inputs[0])) < SEVERAL
    if fuse is decoupled:
        assert torch.equal(first.image[0], plain[0].image[0]) and torch.equal(first.text, plain[0].text)
        want = torch.as_tensor(scale, dtype=torch.float64)
        assert max_error(torch.as_tensor(w, dtype=torch.float64) + torch.zeros_like(want), want) < STORED
        assert first.image_mass is None
    else:
        assert w == 1 and first.image_mass is not None
        assert max_error(first.image_mass, first.image[0].sum(dim=-1)) < SEVERAL
        assert (scale is SCALES[0]) == torch.equal(first.image[0], plain[0].image[0])


def test_half_precision_maps_are_exact_softmaxes_of_its_queries(unet: UNet) -> None:
    context = context_for(unet)
    half = Context(
        context.text.bfloat16(), (tuple(replace(s, k=s.k.bfloat16(), v=s.v.bfloat16()) for s in context.image[0]),)
    )
    with record(unet.bfloat16()) as maps:
        unet(randn(2, 4, 9, 7).bfloat16(), 500, half)
    for one in maps:
        for part in (one.text, *one.image):
            assert (part.sum(dim=-1) - 1).abs().max() < SEVERAL


def test_text_alone_has_no_image_maps(unet: UNet) -> None:
    with record(unet) as maps:
        unet(randn(1, 4, 9, 7), 500, Context(randn(1, 5, 8), fuse=concatenated))
    assert all(one.image == () and one.image_mass is None for one in maps)


def test_a_compiled_unet_is_refused(unet: UNet) -> None:
    fast: Any = torch.compile(unet)
    with pytest.raises(ValueError, match="compiled UNet does not run hooks"), record(fast):
        pass


def test_finest_is_the_last_row_of_the_finest_layers(unet: UNet) -> None:
    with record(unet) as maps:
        unet(randn(2, 4, 9, 7), 500, context_for(unet))
    got = finest(maps)
    fine = [one for one in maps if one.layer != 1]  # layer 1 is the middle, 5 x 4
    want = np.mean([np.concatenate([one.text[1], one.image[0][1]], -1).mean(0) for one in fine], 0)  # n m
    assert got.shape == (9, 9, 7)
    assert max_error(got, torch.from_numpy(want.T.reshape(9, 9, 7))) < STORED
    assert max(max_error(part.sum(0), torch.ones(9, 7)) for part in (got[:5], got[5:])) < SEVERAL


@pytest.mark.parity("transformers CLIPTokenizer", 0)
@pytest.mark.parametrize(
    "prompt", ["a fox on a pink background", "antidisestablishmentarianism, 42 foxes", "", "fox " * 90]
)
def test_words_are_where_transformers_puts_them(prompt: str) -> None:
    tokenizer = clip_tokenizer()
    encoded = tokenizer(prompt, truncation=True)
    with torch.device("meta"):
        encoder = TextEncoder()
    want: dict[int, list[int]] = defaultdict(list)
    for place, word in enumerate(encoded.word_ids()):
        if word is not None and 0 < place < len(encoded.input_ids) - 1:
            want[word].append(place)
    got = word_positions(encoder, prompt)
    assert [places for _, places in got] == list(want.values())
    for word, places in got[:-1]:
        assert tokenizer.decode([encoded.input_ids[place] for place in places]).strip() == word


def test_unknown_words_have_no_position() -> None:
    encoder = TextEncoder(replace(MINI_TEXT, width=8, layers=1, heads=2))
    with warnings.catch_warnings(record=True):
        rows = encoder.tokenize(["a marvellous fox on pink"])[0]
    places = word_positions(encoder, "a marvellous fox on pink")
    assert [word for word, _ in places] == ["a", "fox", "on", "pink"]
    assert [encoder.tokenize([word])[0, 1] for word, _ in places] == [rows[place] for _, (place,) in places]


def test_named_maps_sum_to_all_attention() -> None:
    with torch.device("meta"):
        encoder = TextEncoder()
    maps = torch.cat([randn(77, 9, 7).softmax(0), randn(4, 9, 7, seed=1).softmax(0)])
    words, tokens = name_maps(encoder, "antidisestablishmentarianism rocks", maps)
    assert [name for name, _ in words] == ["antidisestablishmentarianism", "rocks", "start, end, padding"]
    assert [name for name, _ in tokens] == [f"image token {i}" for i in (1, 2, 3, 4)]
    places = word_positions(encoder, "antidisestablishmentarianism rocks")[0][1]
    assert len(places) > 2 and max_error(words[0][1] / len(places), maps[places].mean(0)) < EXACT
    for named in (words, tokens):
        assert max_error(sum(heat for _, heat in named), torch.ones(9, 7).double()) < EXACT  # type: ignore[arg-type]


def test_an_overlay_is_bright_where_the_map_is() -> None:
    """The picture is white, so that only the heat shows. It is upsampled bilinearly as in torch, and does not depend on the scale."""
    heat = torch.rand(9, 7, generator=torch.Generator().manual_seed(0))
    white, odd = Image.new("RGB", (70, 45), "white"), Image.new("RGB", (13, 29), "white")
    for picture in (white, odd):
        drawn = np.asarray(overlay(picture, 0.01 * heat)).astype(int)
        assert np.array_equal(drawn, np.asarray(overlay(picture, heat)))
        size = picture.size[::-1]
        want = torch.nn.functional.interpolate(
            heat[None, None] / heat.max(), size, mode="bilinear", align_corners=False
        )
        alpha = want[0, 0].double().numpy()
        red = np.interp(alpha, np.linspace(0, 1, 256), 255 * np.array(matplotlib.colormaps["inferno"].colors)[:, 0])
        assert np.abs(drawn[..., 0] - (102 + 0.85 * alpha * (red - 102))).max() <= 2  # it has 256 colours
    assert np.asarray(overlay(white, torch.zeros(9, 7))).max() == 102  # dimmed, no heat and no division by 0
