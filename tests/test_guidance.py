"""Guidance: Eq. 7 from two separate passes, and which halves are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import randn
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from eval.ablation.forms import FORMS
from model.adapter import IPAdapter
from model.attention import Fuse
from model.context import Context, pyramid
from model.image_projection import ImageProjection
from model.source import Source
from model.unet import Residuals, UNet, UNetConfig
from sampling.guidance import Side, guided
from sampling.lambdas import Lambda, keep_context, moving, set_lambda

CONFIG = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=6, groups=4)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def contexts(unet: UNet) -> tuple[Context, Context]:
    """(uncond, cond), with the null image and a picture."""
    torch.manual_seed(1)
    adapter = IPAdapter(unet, ImageProjection(10, CONFIG.context_dim, 4)).double().requires_grad_(False)
    embedding = randn(2, 10, seed=2)
    uncond, cond = Context(randn(2, 5, 6, seed=3)), Context(randn(2, 5, 6, seed=4))
    return adapter(uncond, torch.zeros_like(embedding), 0.7), adapter(cond, embedding, 0.7)


class Counting:
    """Counts the calls of a UNet, and the rows of each."""

    def __init__(self, unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        forward = unet.forward

        def count(x: Tensor, *rest: object) -> Tensor:
            self.rows.append(len(x))
            return forward(x, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(unet, "forward", count)


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 1.0, 1.5, 7.5])
def test_equals_two_separate_passes(unet: UNet, contexts: tuple[Context, Context], w: float) -> None:
    uncond, cond = contexts
    x, t = randn(2, 4, 8, 8, seed=5), 500
    eps_u, eps_c = unet(x, t, uncond), unet(x, t, cond)
    assert float((eps_u - eps_c).abs().max()) > 1e-3
    torch.testing.assert_close(guided(unet, uncond, cond, w)(x, t), eps_u + w * (eps_c - eps_u), atol=1e-12, rtol=0)


def test_without_a_picture_it_is_eq_2(unet: UNet) -> None:
    uncond, cond, x = Context(randn(1, 5, 6, seed=6)), Context(randn(1, 5, 6, seed=7)), randn(1, 4, 8, 8, seed=8)
    expected = 3.0 * unet(x, 9, cond) - 2.0 * unet(x, 9, uncond)
    torch.testing.assert_close(guided(unet, uncond, cond, 3.0)(x, 9), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("w", "rows"), [(1.0, [2]), (1, [2]), (0.0, [4]), (7.5, [4])])
def test_which_rows_are_computed(
    unet: UNet, contexts: tuple[Context, Context], monkeypatch: pytest.MonkeyPatch, w: float, rows: list[int]
) -> None:
    counting = Counting(unet, monkeypatch)
    guided(unet, *contexts, w)(randn(2, 4, 8, 8, seed=5), 500)
    assert counting.rows == rows


def test_weight_one_is_the_conditional_pass(unet: UNet, contexts: tuple[Context, Context]) -> None:
    x = randn(2, 4, 8, 8, seed=5)
    assert torch.equal(guided(unet, *contexts, 1.0)(x, 3), unet(x, 3, contexts[1]))


def test_weight_zero_is_the_unconditional_pass(unet: UNet, contexts: tuple[Context, Context]) -> None:
    x = randn(2, 4, 8, 8, seed=5)
    torch.testing.assert_close(guided(unet, *contexts, 0.0)(x, 3), unet(x, 3, contexts[0]), atol=1e-13, rtol=0)


@pytest.mark.parametrize("w", [1.0, 7.5])
def test_solver_keeps_its_own_type(w: float) -> None:
    """A half-precision UNet is fed its own type, and gives back the solver's."""
    unet = UNet(CONFIG).bfloat16().requires_grad_(False)
    uncond, cond = (Context(randn(1, 5, 6, seed=seed).bfloat16()) for seed in (6, 7))
    assert guided(unet, uncond, cond, w)(randn(1, 4, 8, 8, seed=8).float(), 3).dtype == torch.float32


def test_a_compiled_unet_is_one_graph_for_all_timesteps(unet: UNet) -> None:
    """And for all numbers lambda, 0 and 1 too: guidance makes them tensors."""
    adapter, graphs = IPAdapter(unet, ImageProjection(10, CONFIG.context_dim)).double(), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fast: Any = torch.compile(unet, backend=backend, fullgraph=True)
    x, text, picture = randn(1, 4, 8, 8, seed=1), randn(2, 1, 5, CONFIG.context_dim, seed=2), randn(1, 10, seed=3)
    uncond, cond = Context(text[0]), Context(text[1])
    for scale in (0.5, 0.7, 1.0, 0.0):
        contexts = adapter(uncond, 0 * picture, scale), adapter(cond, picture, scale)
        denoise, want = guided(fast, *contexts, 7.5), guided(unet, *contexts, 7.5)
        for t in (981, 501, 1):
            torch.testing.assert_close(denoise(x, t), want(x, t), atol=1e-12, rtol=0)
        assert len(graphs) == 1


LAMBDAS: dict[str, float | Tensor] = {
    "one": 1.0,
    "number": 0.7,
    "zero": 0.0,
    "tensor": torch.tensor(0.7, dtype=torch.float64),
    "rows": torch.tensor([0.7, 0.2], dtype=torch.float64).reshape(2, 1, 1, 1),
    "mask": torch.tensor(0.3, dtype=torch.float64),  # by level, below
}


FUSES = sorted({form.fuse for form in FORMS.values()}, key=lambda fuse: fuse.__name__)


def forms(unet: UNet, fuse: Fuse, lam: str) -> tuple[Context, Context]:
    """(uncond, cond) for latents of 8 x 8, batch 2, of one form of attention to a picture."""
    torch.manual_seed(1)
    adapter = IPAdapter(unet, ImageProjection(10, CONFIG.context_dim, 4)).double().requires_grad_(False)
    pair = (adapter(Context(randn(2, 5, 6, seed=3 + i), fuse=fuse), randn(2, 10, seed=i), LAMBDAS[lam]) for i in (0, 1))
    if lam != "mask":
        uncond, cond = pair
        return uncond, cond
    maps = pyramid(torch.rand(9, 9).double(), 8, 8, 2)
    levels = [maps[0] if layer.to_q.in_features == 8 else maps[1] for layer in unet.cross_attentions()]
    uncond, cond = (set_lambda(context, levels) for context in pair)
    return uncond, cond


@pytest.mark.parametrize("lam", ["number", "mask"])
@pytest.mark.parametrize("fuse", FUSES)
def test_every_form_is_one_graph_without_breaks(fuse: Fuse, lam: str) -> None:
    """Only the cross-attention depends on the form, so one layer of each level is compiled. K' and V' are computed outside of it."""
    unet = UNet(CONFIG).double().requires_grad_(False)
    contexts, x = forms(unet, fuse, lam), randn(2, 4, 8, 8, seed=5)
    want = guided(unet, *contexts, 7.5)(x, 500)
    torch._dynamo.reset()
    for layer in unet.cross_attentions()[:2]:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(guided(unet, *contexts, 7.5)(x, 500), want, atol=1e-12, rtol=0)


class OnOneDevice(TorchDispatchMode):
    """Fails on an operation that moves a tensor from or to the CPU, or reads a value back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        assert all(x.device.type == "meta" for x in tensors), f"{func} waits for the device"
        assert "_local_scalar_dense" not in str(func)
        return out


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("moves", [True, False])
def test_a_step_waits_for_nothing(fuse: Fuse, lam: str, moves: bool) -> None:
    """The meta device has no values, so a step that reads one fails there."""
    plain = UNet(CONFIG).double().requires_grad_(False)
    contexts = tuple(on_meta(context) for context in forms(plain, fuse, lam))
    move = moving([Lambda((0.5, 1.0))], [7, 3]) if moves else keep_context
    denoise = guided(plain.to("meta"), *contexts, 7.5, move=move)
    x = torch.empty(2, 4, 8, 8, dtype=torch.float64, device="meta")
    with OnOneDevice():
        for t in (7, 3):
            assert denoise(x, t).shape == x.shape


def on_meta(context: Context) -> Context:
    def moved(scale: float | Tensor) -> float | Tensor:
        return scale.to("meta") if isinstance(scale, Tensor) else scale

    image = tuple(
        tuple(Source(one.k.to("meta"), one.v.to("meta"), moved(one.scale)) for one in sources)
        for sources in context.image
    )
    return Context(context.text.to("meta"), image, context.fuse)


# text and picture with a weight each


@pytest.mark.parametrize(("w_t", "w_i"), [(7.5, 3.0), (1.0, 2.0), (2.0, 0.0), (0.0, 1.5), (-0.5, 1.0)])
def test_apart_equals_three_separate_passes(
    unet: UNet, contexts: tuple[Context, Context], monkeypatch: pytest.MonkeyPatch, w_t: float, w_i: float
) -> None:
    """InstructPix2Pix's sum (diffusers: `noise_pred_uncond + guidance (text - image) + image_guidance (image - uncond)`)."""
    uncond, cond = contexts
    x, t = randn(2, 4, 8, 8, seed=5), 500
    alone = Context(uncond.text, cond.image)
    eps_u, eps_i, eps_c = unet(x, t, uncond), unet(x, t, alone), unet(x, t, cond)
    assert min(float((a - b).abs().max()) for a, b in ((eps_u, eps_i), (eps_i, eps_c), (eps_u, eps_c))) > 1e-3
    want = eps_u + w_i * (eps_i - eps_u) + w_t * (eps_c - eps_i)
    counting = Counting(unet, monkeypatch)
    torch.testing.assert_close(guided(unet, uncond, cond, w_t, w_i)(x, t), want, atol=1e-12, rtol=0)
    assert counting.rows == [6]


@pytest.mark.parametrize("w", [0.0, 1.0, 7.5])
def test_equal_weights_are_eq_7(unet: UNet, contexts: tuple[Context, Context], w: float) -> None:
    """The plain path bit for bit, and the three passes' own sum at a weight next to it."""
    x = randn(2, 4, 8, 8, seed=5)
    want = guided(unet, *contexts, w)(x, 500)
    assert torch.equal(guided(unet, *contexts, w, w)(x, 500), want)
    torch.testing.assert_close(guided(unet, *contexts, w, w + 1e-13)(x, 500), want, atol=1e-11, rtol=0)


def test_without_a_picture_the_text_has_its_weight(unet: UNet) -> None:
    uncond, cond, x = Context(randn(1, 5, 6, seed=6)), Context(randn(1, 5, 6, seed=7)), randn(1, 4, 8, 8, seed=8)
    assert torch.equal(guided(unet, uncond, cond, 3.0, 9.0)(x, 9), guided(unet, uncond, cond, 3.0)(x, 9))


# structure control


def residuals_of(kind: str, seed: int) -> Residuals:
    """Of CONFIG's UNet at 8 x 8: its skips are conv_in, a block, a downsampling and a block."""
    shapes = [(2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4), (2, 16, 4, 4)]
    skips = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    mid = randn(2, 16, 4, 4, seed=seed + 9)
    return {
        "skips and mid": Residuals(skips, mid),
        "hidden": Residuals(hidden={1: skips[1], 3: skips[3]}),
        "all": Residuals(skips, mid, {2: skips[2]}),
        "none": Residuals(),
    }[kind]


@pytest.mark.parametrize("weights", [(7.5, None), (1.0, None), (7.5, 3.0)])
@pytest.mark.parametrize("acts_on", [("cond",), ("uncond", "cond"), ("uncond", "image", "cond")])
@pytest.mark.parametrize("kind", ["skips and mid", "hidden", "all", "none"])
def test_control_acts_on_each_pass_by_itself(
    unet: UNet,
    contexts: tuple[Context, Context],
    kind: str,
    acts_on: tuple[Side, ...],
    weights: tuple[float, float | None],
) -> None:
    """The batch with residuals equals separate passes, each with its own residuals, or with none."""
    (uncond, cond), (w, w_i), x, asked = contexts, weights, randn(2, 4, 8, 8, seed=5), []

    def control(x: Tensor, t: int, side: Side) -> Residuals:
        asked.append((side, len(x), t))
        return residuals_of(kind if side in acts_on else "none", seed=len(side))

    got = guided(unet, uncond, cond, w, w_i, control=control)(x, 500)
    seen: dict[Side, Context] = {"uncond": uncond, "image": Context(uncond.text, cond.image), "cond": cond}
    sides: list[Side] = ["uncond", "image", "cond"] if w_i else ["cond"] if w == 1 else ["uncond", "cond"]
    assert asked == [(side, 2, 500) for side in sides]
    eps = {side: unet(x, 500, seen[side], control(x, 500, side)) for side in sides}
    if w_i:
        want = eps["uncond"] + w_i * (eps["image"] - eps["uncond"]) + w * (eps["cond"] - eps["image"])
    else:
        want = eps["cond"] if w == 1 else eps["uncond"] + w * (eps["cond"] - eps["uncond"])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    if kind != "none":
        assert not torch.equal(got, guided(unet, uncond, cond, w, w_i)(x, 500))
