"""Lambda as data: layers, steps and regions against diffusers and closed forms; nothing is mutated or compiled again."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_peers import IMAGE, adapter_for, official
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.loaders.ip_adapter import IPAdapterMixin
from peers import SMALL_ONE, SMALL_UNETS, UNetPair, max_error, randn, unet_pair
from torch import Tensor

from model import attention as attention_file
from model.attention import concatenated
from model.context import Context, pyramid
from model.layers import Downsample
from model.unet import MINI, SD15, SD21, SDXL
from sampling.dpm import dpm_times
from sampling.fields import check_range, inside
from sampling.guidance import guided
from sampling.lambdas import Lambda, keep_context, moving, set_lambda
from sampling.layer_weights import attention_layers, layer_weights, preset
from sampling.schedule import Schedule

TOLERANCE = 1e-12


# layers


@pytest.mark.parity("diffusers UNet2DConditionModel", 0)
def test_places_are_those_of_diffusers() -> None:
    """The layer at each place has the width of diffusers' attention of that name, and they are as many."""
    for name in SMALL_UNETS:
        both = unet_pair(*SMALL_UNETS[name])
        modules = {n: m for n, m in both.peer.named_modules() if n.endswith("attn2")}
        ours = both.ours.cross_attentions()
        assert len(attention_layers(both.ours.config)) == len(ours) == len(modules)
        seen: dict[tuple[str, str, int], int] = {}
        for layer, (part, block, a) in zip(ours, attention_layers(both.ours.config), strict=True):
            depth = seen[part, block, a] = seen.get((part, block, a), -1) + 1
            path = "mid_block" if part == "mid" else f"{part}_blocks.{block.removeprefix('block_')}"
            peer = modules[f"{path}.attentions.{a}.transformer_blocks.{depth}.attn2"]
            assert torch.equal(peer.to_q.weight, layer.to_q.weight)


def test_presets_name_the_published_blocks() -> None:
    assert preset("style", SDXL) == {"up": {"block_0": [0.0, 1.0, 0.0]}}  # diffusers' own example of InstantStyle
    assert preset("layout", SDXL) == {"down": {"block_2": [0.0, 1.0]}}
    for config in (SD15, SD21):  # InvokeAI's up_blocks.1, and down_blocks.2 with mid_block
        assert preset("style", config) == {"up": {"block_1": 1.0}}
        assert preset("layout", config) == {"down": {"block_2": 1.0}, "mid": 1.0}
    assert preset("style", MINI) == {"up": {"block_1": 1.0}}
    assert preset("layout", MINI) == {"down": {"block_1": 1.0}, "mid": 1.0}
    assert layer_weights("style", SD15) == [0.0] * 7 + [1.0] * 3 + [0.0] * 6
    assert layer_weights("layout", SD15) == [0.0] * 4 + [1.0] * 3 + [0.0] * 9
    assert layer_weights("style", MINI) == [0.0] * 3 + [1.0, 1.0, 0.0, 0.0]
    assert layer_weights("layout", MINI) == [0.0, 1.0, 1.0] + [0.0] * 4


DICTS: dict[str, list[Any]] = {
    "sd15": [
        "style",
        "layout",
        "finest",
        {"up": 1.0},
        {"down": [0.2, 0.7], "mid": 0.5},
        {"up": {"block_2": 0.3}, "mid": [0.4]},
    ],
    "sdxl": ["style", "layout", "finest", {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}}],
}


def with_adapter(name: str) -> tuple[UNetPair, Any]:
    both = unet_pair(*SMALL_UNETS[name])
    adapter = adapter_for(both.ours)
    both.peer._load_ip_adapter_weights([official(adapter, both.ours)], low_cpu_mem_usage=False)
    return both, adapter


@pytest.mark.parity("diffusers set_ip_adapter_scale", 0)
@pytest.mark.parametrize(("name", "layers"), [(name, layers) for name, each in DICTS.items() for layers in each])
def test_layer_weights_equal_diffusers(name: str, layers: Any) -> None:
    """The scale that diffusers' `set_ip_adapter_scale` puts on each processor."""
    both, _ = with_adapter(name)
    blocks = preset(layers, both.ours.config) if isinstance(layers, str) else layers
    IPAdapterMixin.set_ip_adapter_scale(SimpleNamespace(unet=both.peer, unet_name="unet"), blocks)
    peers = {n: p.scale[0] for n, p in both.peer.attn_processors.items() if hasattr(p, "scale")}
    order = {"down": 0, "mid": 1, "up": 2}
    want = [scale for _, scale in sorted(peers.items(), key=lambda one: order[one[0].split("_")[0]])]
    assert layer_weights(layers, both.ours.config) == want


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"up": {"block_0": 1.0}}, "no cross-attention in up block_0"),  # no attention in SD 1.5's first block
        ({"upp": 1.0}, "no cross-attention in upp, only in down block_0, .*, mid, up block_1, up block_2, up block_3"),
        ({"down": {"block_1": [1.0, 2.0, 3.0]}}, "down block_1 has 2 attentions"),
        ({"mid": [1.0, 2.0]}, "mid .*has 1 attentions"),
        ({"mid": "x"}, "mid"),
        ([1.0] * 15, "has 16 cross-attention layers"),
        (["a"] * 16, "has 16 cross-attention layers"),
        ("styles", "style, layout, finest, or weights"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_weights(layers, SD15)


def test_a_negative_lambda_of_a_joint_softmax_is_refused_before_it_is_used() -> None:
    both, adapter = with_adapter("sd15")
    text, embedding = Context(randn(1, 5, both.ours.config.context_dim), fuse=concatenated), randn(1, IMAGE)
    context, wrong = adapter(text, embedding), torch.tensor(-0.1)
    with pytest.raises(ValueError, match="lambda must not be negative"):
        adapter(text, embedding, wrong)
    with pytest.raises(ValueError, match="lambda must not be negative"):
        set_lambda(context, [wrong] * 16)
    with pytest.raises(ValueError, match="lambda must not be negative"):
        moving([Lambda((-0.5, 1.0))], [9, 1])(context, 9)


@pytest.mark.parity("diffusers set_ip_adapter_scale", TOLERANCE)
@pytest.mark.parametrize(("name", "layers"), [("sd15", "layout"), ("sdxl", "style")])
def test_a_whole_unet_with_blocks_equals_diffusers(name: str, layers: Any) -> None:
    both, adapter = with_adapter(name)
    config = both.ours.config
    IPAdapterMixin.set_ip_adapter_scale(SimpleNamespace(unet=both.peer, unet_name="unet"), preset(layers, config))
    x, text, embedding = randn(1, 4, 9, 7, seed=1), randn(1, 5, config.context_dim, seed=2), randn(1, 2, IMAGE, seed=3)
    extra, added = {}, None
    if config.added_dim:
        extra = {"text_embeds": randn(1, config.added_dim - 48, seed=8), "time_ids": torch.zeros(1, 6)}
        zeros = torch.cat([torch.ones(1, 6, 4), torch.zeros(1, 6, 4)], dim=-1).reshape(1, 48).double()
        added = torch.cat([extra["text_embeds"], zeros], dim=1)
    want = both.peer(x, 500, text, added_cond_kwargs={"image_embeds": [embedding], **extra}).sample
    scales = Lambda(layers=layers).by_layer(config, (9, 7))
    got = both.ours(x, 500, set_lambda(adapter(Context(text, added=added), embedding[:, :, None]), scales))
    assert max_error(got, want) < TOLERANCE
    assert max_error(got, both.ours(x, 500, adapter(Context(text, added=added), embedding[:, :, None]))) > 1e-3


# steps


@pytest.mark.parametrize(
    ("start", "end", "steps", "on"),
    [
        (0, 1, 3, [0, 1, 2]),
        (0, 0.5, 10, [0, 1, 2, 3, 4]),
        (0.5, 1, 10, [5, 6, 7, 8, 9]),
        (0.3, 0.7, 10, [3, 4, 5, 6]),
        (0, 0.5, 5, [0, 1]),  # step 2 lies across the end
        (0.5, 1, 5, [3, 4]),
        (0.4, 0.5, 3, []),
    ],
)
def test_a_step_is_on_where_all_of_it_is_in_the_range(start: float, end: float, steps: int, on: list[int]) -> None:
    lam = Lambda(0.7, start=start, end=end)
    assert [i for i in range(steps) if lam.at(i, steps)] == on
    # diffusers' rule of control_guidance_start and _end (pipeline_controlnet.py: controlnet_keep)
    assert on == [i for i in range(steps) if 1.0 - float(i / steps < start or (i + 1) / steps > end)]


def test_a_range_without_a_step_is_refused() -> None:
    """All ranges between shares of 20, and for each number of steps."""
    for steps, first, last in ((n, a, b) for n in range(1, 25) for a in range(20) for b in range(a + 1, 21)):
        start, end = first / 20, last / 20
        if any(inside(i, steps, start, end) for i in range(steps)):
            check_range("--image", start, end, steps)
        else:
            with pytest.raises(ValueError, match=f"between --image-start .* and --image-end .* there is no whole step of {steps}: widen"):
                check_range("--image", start, end, steps)


@pytest.mark.parity("diffusers IPAdapterScaleCutoffCallback", 0)
@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.5, 0.77])
@pytest.mark.parametrize("steps", [4, 7, 30])
def test_diffusers_cutoff_is_one_step_later(ratio: float, steps: int) -> None:
    """It is called after a step, so step int(n r) is still on; this end says the same."""
    scale, on = [1.0], []
    pipe = SimpleNamespace(num_timesteps=steps, set_ip_adapter_scale=lambda value: scale.append(value))
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=ratio, cutoff_step_index=None)
    for i in range(steps):
        if scale[-1]:
            on.append(i)
        callback.callback_fn(pipe, i, 0, {})
    lam = Lambda(end=(int(steps * ratio) + 1) / steps)
    assert [i for i in range(steps) if lam.at(i, steps)] == on


def test_a_number_for_each_step() -> None:
    lam = Lambda((0.1, 0.2, 0.3, 0.4), end=0.75)
    assert [lam.at(i, 4) for i in range(4)] == [0.1, 0.2, 0.3, 0.0]
    with pytest.raises(ValueError, match="4 values of lambda for 5 steps"):
        lam.at(0, 5)


def test_a_bad_range_or_mask_is_refused() -> None:
    for start, end in ((-0.1, 1), (0, 1.1), (0.5, 0.5), (0.6, 0.4), (float("nan"), 1)):
        with pytest.raises(ValueError, match="0 <= start < end <= 1"):
            Lambda(start=start, end=end)
    for mask in (
        torch.zeros(1, 2, 2),
        torch.full((2, 2), 1.5),
        torch.full((2, 2), -0.1),
        torch.full((2, 2), torch.nan),
    ):
        with pytest.raises(ValueError, match="the mask"):
            Lambda(mask=mask)


@pytest.fixture(scope="module")
def one() -> tuple[Any, Any, Tensor, Tensor]:
    """(unet, adapter, text, embedding), all small."""
    unet = unet_pair(SMALL_ONE, linear=True).ours
    return unet, adapter_for(unet), randn(2, 2, 5, SMALL_ONE.context_dim, seed=2), randn(2, IMAGE, seed=3)


def halves(one: tuple[Any, Any, Tensor, Tensor], scale: Any) -> tuple[Context, Context]:
    _, adapter, text, embedding = one
    sides = adapter(Context(text[0]), 0 * embedding), adapter(Context(text[1]), embedding)
    levels = scale if isinstance(scale, list) else [scale] * len(attention_layers(SMALL_ONE))
    return set_lambda(sides[0], levels), set_lambda(sides[1], levels)


TIMES = [901, 601, 301, 1]


@pytest.mark.parametrize("guidance", [(1.0, None), (4.0, None), (4.0, 2.0)])
@pytest.mark.parametrize("mask", [None, torch.rand(18, 14, generator=torch.Generator().manual_seed(5)).double()])
def test_every_step_is_that_of_a_plain_lambda(one: Any, guidance: Any, mask: Tensor | None) -> None:
    """A Lambda that moves is, step by step, as if that step's lambda had been given alone."""
    unet = one[0]
    layers = [float(i % 3) / 2 for i in range(len(attention_layers(SMALL_ONE)))]
    lam = Lambda((0.3, 0.9, 0.5, 1.2), layers, 0.25, 0.75, mask)
    x = randn(2, 4, 9, 7, seed=1)
    denoise = guided(unet, *halves(one, lam.by_layer(SMALL_ONE, (9, 7))), *guidance, moving([lam], TIMES))
    for t, value in zip(TIMES, (0.0, 0.9, 0.5, 0.0), strict=True):
        still = Lambda(value, layers, mask=mask)
        want = guided(unet, *halves(one, still.by_layer(SMALL_ONE, (9, 7))), *guidance)(x, t)
        assert max_error(denoise(x, t), want) < TOLERANCE
    assert max_error(denoise(x, TIMES[1]), denoise(x, TIMES[0])) > 1e-3


def test_steps_with_the_same_timestep_are_told_apart(one: Any) -> None:
    """DPM-Solver++ with Karras spacing rounds to whole timesteps, and repeats some. A second drawing counts from the start."""
    times = [step.t for step in dpm_times(Schedule(karras=True), 50)]
    assert len(set(times)) < len(times) == 50
    for lam in (Lambda(end=0.96), Lambda(tuple(float(i) for i in range(50)), start=0.9)):
        context, move = halves(one, lam.by_layer(SMALL_ONE, (9, 7)))[1], moving([lam], times)
        for _ in range(2):
            assert [float(move(context, t).image[0][0].scale) for t in times] == [lam.at(i, 50) for i in range(50)]


def test_a_still_lambda_is_the_plain_path_bit_for_bit(one: Any) -> None:
    unet, x = one[0], randn(2, 4, 9, 7, seed=1)
    assert moving([Lambda(0.7), 0.3], TIMES) is keep_context
    contexts = halves(one, Lambda(0.7).by_layer(SMALL_ONE, (9, 7)))
    assert torch.equal(guided(unet, *contexts, 7.5)(x, 9), guided(unet, *halves(one, 0.7), 7.5)(x, 9))


def test_it_is_immutable_and_changes_no_module(one: Any) -> None:
    unet, lam = one[0], Lambda(0.5, end=0.5)
    with pytest.raises(FrozenInstanceError):
        lam.scale = 1.0  # type: ignore[misc]
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    attributes = [dict(vars(module)) for module in unet.modules()]
    x, contexts = randn(2, 4, 9, 7, seed=1), halves(one, lam.by_layer(SMALL_ONE, (9, 7)))
    scales = [source.scale for source in contexts[1].image[0]]
    denoise = guided(unet, *contexts, 7.5, None, moving([lam], TIMES))
    first = denoise(x, TIMES[0])
    denoise(x, TIMES[-1])
    assert torch.equal(denoise(x, TIMES[0]), first)
    assert [source.scale for source in contexts[1].image[0]] == scales
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    for module, was in zip(unet.modules(), attributes, strict=True):
        assert vars(module).keys() == was.keys() and all(vars(module)[name] is value for name, value in was.items())


def test_a_compiled_layer_is_one_graph_for_all_lambdas(one: Any) -> None:
    """Only cross-attention reads lambda, so one layer is compiled."""
    graphs, unet = [], deepcopy(one[0])

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    unet.cross_attentions()[0].compile(backend=backend, fullgraph=True)
    x, mask = randn(2, 4, 8, 8, seed=1), torch.rand(16, 16).double()
    for most, masked in enumerate((None, mask), 1):  # numbers are one graph, maps another
        for scale in ((0.3, 0.9, 0.5, 1.2), (1.0, 0.0, 0.7, -1.0)):
            lam = Lambda(scale, start=0.25, mask=masked)
            contexts, move = halves(one, lam.by_layer(SMALL_ONE, (8, 8))), moving([lam], TIMES)
            denoise, want = guided(unet, *contexts, 7.5, None, move), guided(one[0], *contexts, 7.5, None, move)
            for t in TIMES:
                assert torch.equal(denoise(x, t), want(x, t))
            assert len(graphs) == most


# regions


def test_the_grid_is_right_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 16,641 sizes from 512 to 1536 in steps of 8: the grid that the strided convolutions leave, height and width."""
    asked: list[tuple[int, int]] = []

    def record(mask: Tensor, size: tuple[int, int], mode: str) -> Tensor:
        asked.append(size)
        return mask[:, :, :1, :1].expand(-1, -1, *size)

    def strided(side: int) -> int:
        return (side + 2 * 1 - 3) // 2 + 1  # kernel 3, stride 2, padding 1 (torch.nn.Conv2d's rule)

    down = Downsample(1).to("meta")
    for side in (192, 65, 33, 7, 2, 1):
        assert down(torch.empty(1, 1, side, 3, device="meta")).shape[-2] == strided(side)
    monkeypatch.setattr(attention_file.F, "interpolate", record)
    wrong, mask = [], torch.zeros(1, 1)
    sides = range(512 // 8, 1536 // 8 + 1)
    for h in sides:
        for w in sides:
            asked.clear()
            queries = [level.shape[2] for level in pyramid(mask, h, w, len(SD15.channels))]
            want = [(h, w)]
            for _ in SD15.channels[1:]:
                want.append((strided(want[-1][0]), strided(want[-1][1])))
            if asked != want or queries != [a * b for a, b in want]:
                wrong.append((8 * h, 8 * w))
    assert len(sides) ** 2 == 16641 and wrong == []


def test_a_mask_is_read_with_its_rows_as_rows() -> None:
    """520 x 512, where a grid guessed from the number of queries is sheared: 33 rows of 32 in the second level.

    Each layer has the map of its own level: two layers of each block down, one in the middle, three of each block up.
    """
    rows = torch.arange(520.0)[:, None].expand(520, 512) / 519
    scales: Any = Lambda(mask=rows).by_layer(SD15, (65, 64))
    heights, widths = (65, 33, 17, 9), (64, 32, 16, 8)
    levels = [0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    for scale, level in zip(scales, levels, strict=True):
        grid = scale.reshape(heights[level], widths[level])
        assert bool((grid == grid[:, :1]).all()) and bool((grid[1:] > grid[:-1]).all())


@pytest.mark.parity("diffusers ip_adapter_masks", TOLERANCE)
@pytest.mark.parametrize("layers", [None, "layout"])
def test_masks_equal_diffusers(layers: Any) -> None:
    """Two pictures, each in its region: diffusers gives each its own softmax, here they are two image prompts.

    The regions are blocks of the coarsest query, and binary: there bicubic and area agree.
    """
    both, adapter = with_adapter("sd15")
    config, (h, w) = both.ours.config, (16, 8)
    masks = torch.zeros(2, 8 * h, 8 * w, dtype=torch.float64)
    masks[0, :64], masks[1, 64:] = 1, 1
    blocks = 0.7 if layers is None else preset(layers, config)
    IPAdapterMixin.set_ip_adapter_scale(SimpleNamespace(unet=both.peer, unet_name="unet"), blocks)
    x, text, embeddings = randn(1, 4, h, w, seed=1), randn(1, 5, config.context_dim, seed=2), randn(1, 2, IMAGE, seed=3)
    want = both.peer(
        x,
        500,
        text,
        added_cond_kwargs={"image_embeds": [embeddings]},
        cross_attention_kwargs={"ip_adapter_masks": [masks[None]]},
    ).sample
    context = Context(text)
    for i, mask in enumerate(masks):
        lam = Lambda(0.7 if layers is None else 1.0, layers, mask=mask)
        context = set_lambda(adapter(context, embeddings[:, i]), lam.by_layer(config, (h, w)))
    got = both.ours(x, 500, context)
    assert max_error(got, want) < TOLERANCE
    assert max_error(got, both.ours(x, 500, adapter(Context(text), embeddings[:, :, None]))) > 1e-3


def test_a_soft_mask_is_lambda_at_each_place(one: Any) -> None:
    """Half a mask is half of lambda, and 0 is no picture."""
    unet, adapter, text, embedding = one
    x = randn(2, 4, 9, 7, seed=1)

    def drawn(lam: Lambda) -> Tensor:
        return unet(x, 500, set_lambda(adapter(Context(text[0]), embedding), lam.by_layer(SMALL_ONE, (9, 7))))

    half = Lambda(0.8, mask=torch.full((18, 14), 0.5, dtype=torch.float64))
    assert max_error(drawn(half), drawn(Lambda(0.4))) < TOLERANCE
    none = Lambda(0.8, mask=torch.zeros(18, 14, dtype=torch.float64))
    assert max_error(drawn(none), unet(x, 500, Context(text[0]))) < TOLERANCE
