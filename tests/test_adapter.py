"""IP-Adapter: against diffusers with an adapter in the official layout, and what the paper says of its parts."""

from __future__ import annotations

import pytest
import torch
from adapter_peers import IMAGE, adapter_for, official
from diffusers.models.embeddings import ImageProjection as PeerProjection
from peers import SMALL_ONE, SMALL_UNETS, Pair, max_error, randn, randomise, unet_pair
from torch import Tensor

from model.adapter import IPAdapter
from model.attention import Fuse, concatenated, decoupled
from model.context import Context
from model.image_projection import ImageProjection
from model.unet import SD15, UNet
from sampling.lambdas import Lambda, set_lambda

TOLERANCE = 1e-12  # measured: 2e-14 and less


@pytest.mark.parity("diffusers ImageProjection", TOLERANCE)
def test_image_projection_equals_diffusers() -> None:
    ours = randomise(ImageProjection(IMAGE, 12, tokens=4))
    peer = PeerProjection(IMAGE, 12, num_image_text_embeds=4).double()
    peer.load_state_dict({k.replace("proj", "image_embeds"): v for k, v in ours.state_dict().items()})
    embedding = randn(3, IMAGE)
    assert max_error(ours(embedding[:, None]), peer(embedding)) < TOLERANCE


@pytest.mark.parity("diffusers UNet2DConditionModel with two IP-Adapters", TOLERANCE)
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_a_whole_unet_with_adapters_equals_diffusers(name: str, pictures: int) -> None:
    """Two adapters, with lambda 0.7 and 0.4; several pictures of one adapter share one softmax."""
    both = unet_pair(*SMALL_UNETS[name])
    config, adapters, scales = both.ours.config, [adapter_for(both.ours, seed) for seed in (3, 4)], [0.7, 0.4]
    both.peer._load_ip_adapter_weights([official(adapter, both.ours) for adapter in adapters], low_cpu_mem_usage=False)
    for processor in both.peer.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = scales
    x, t, text = randn(2, 4, 17, 13, seed=1), torch.tensor([7, 981]), randn(2, 5, config.context_dim, seed=2)
    embeddings = [randn(2, pictures, IMAGE, seed=5 + i) for i in range(2)]
    extra = (
        {"text_embeds": randn(2, config.added_dim - 48, seed=8), "time_ids": torch.zeros(2, 6)}
        if config.added_dim
        else {}
    )
    zeros = (
        torch.cat([torch.ones(2, 6, 4), torch.zeros(2, 6, 4)], dim=-1).reshape(2, 48).double()
    )  # the embedding of 0: cos 0, sin 0
    added = torch.cat([extra["text_embeds"], zeros], dim=1) if extra else None
    want = both.peer(x, t, text, added_cond_kwargs={"image_embeds": embeddings, **extra}).sample
    context = Context(text, added=added)
    for adapter, embedding, scale in zip(adapters, embeddings, scales, strict=True):
        context = adapter(context, embedding[:, :, None], scale)
    got = both.ours(x, t, context)
    assert max_error(got, want) < TOLERANCE
    assert max_error(got, both.ours(x, t, Context(text, added=added))) > 0.05


def test_projections_start_as_the_texts(pair: Pair) -> None:
    unet = pair("sd15").ours
    adapter = IPAdapter(unet, ImageProjection(IMAGE, unet.config.context_dim))
    for layer, (to_k, to_v) in zip(unet.cross_attentions(), adapter.projections(), strict=True):
        assert torch.equal(to_k.weight, layer.to_k.weight) and torch.equal(to_v.weight, layer.to_v.weight)
        assert to_k.weight.data_ptr() != layer.to_k.weight.data_ptr()


def test_an_untrained_adapter_reads_like_shared_projections(pair: Pair) -> None:
    """Because W'_k, W'_v start as W_k, W_v, the first step of IP-Adapter and of its ablation are the same network."""
    unet = pair("sd15").ours
    projection = randomise(ImageProjection(IMAGE, unet.config.context_dim))
    x, embedding = randn(2, 4, 9, 5), randn(2, IMAGE, seed=2)
    text = Context(randn(2, 5, unet.config.context_dim, seed=1))
    own, shared = (
        unet(x, 500, IPAdapter(unet, projection, own_projections=own)(text, embedding)) for own in (True, False)
    )
    assert max_error(own, shared) < TOLERANCE
    assert max_error(own, unet(x, 500, text)) > 0.05


@pytest.mark.parametrize("fuse", [decoupled, concatenated])
def test_gradients_reach_the_adapter_and_nothing_else(fuse: Fuse) -> None:
    unet = unet_pair(SMALL_ONE, linear=True).ours
    adapter = adapter_for(unet).requires_grad_(True)
    text = Context(randn(2, 5, SMALL_ONE.context_dim), fuse=fuse)
    unet(randn(2, 4, 9, 5, seed=1), 500, adapter(text, randn(2, IMAGE, seed=2), 0.7)).square().mean().backward()
    flat = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    assert flat == []
    assert all(p.grad is None for p in unet.parameters())


def test_shared_projections_are_not_the_adapters_parameters(pair: Pair) -> None:
    unet = pair("sd15").ours
    adapter = IPAdapter(unet, ImageProjection(IMAGE, unet.config.context_dim), own_projections=False)
    names = {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}
    assert (
        set(adapter.state_dict())
        == {f"image_projection.{name}" for name in names}
        == {name for name, _ in adapter.named_parameters()}
    )
    assert [pair[0] for pair in adapter.projections()] == [layer.to_k for layer in unet.cross_attentions()]


def test_several_pictures_share_one_softmax(pair: Pair) -> None:
    unet = pair("sd15").ours
    adapter, text = adapter_for(unet), Context(randn(2, 5, unet.config.context_dim))
    embedding = randn(2, 3, 1, IMAGE, seed=1)
    tokens = adapter.tokens(embedding)
    assert max_error(tokens, torch.cat([adapter.tokens(embedding[:, i : i + 1]) for i in range(3)], dim=1)) < TOLERANCE
    assert {source.k.shape[-2] for source in adapter(text, embedding).image[0]} == {12}
    x = randn(2, 4, 9, 5, seed=2)
    once = unet(x, 500, adapter(text, embedding[:, :1]))
    assert (
        max_error(unet(x, 500, adapter(text, embedding[:, :1].expand(2, 3, 1, IMAGE))), once) < TOLERANCE
    )  # the same picture thrice


def test_a_dropped_picture_is_the_norms_answer_to_the_bias(pair: Pair) -> None:
    unet = pair("sd15").ours
    adapter, width = adapter_for(unet), unet.config.context_dim
    projection = adapter.image_projection
    bias = projection.proj.bias.reshape(1, 4, width)
    want = (bias - bias.mean(-1, keepdim=True)) / (
        bias.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt() * projection.norm.weight + projection.norm.bias
    tokens = adapter.tokens(torch.zeros(1, IMAGE).double())
    assert max_error(tokens, want) < TOLERANCE
    assert tokens.abs().max() > 0.1


def test_a_lambda_for_each_layer(pair: Pair) -> None:
    unet = pair("sd15").ours
    adapter, text, embedding = adapter_for(unet), Context(randn(1, 5, unet.config.context_dim)), randn(1, IMAGE, seed=1)
    lambdas = [0.1 * i for i in range(len(adapter.heads))]
    plain = adapter(text, embedding)
    assert [source.scale for source in set_lambda(plain, lambdas).image[0]] == lambdas
    x = randn(1, 4, 9, 5, seed=2)
    alike = unet(x, 500, set_lambda(plain, [0.7] * len(lambdas)))
    assert torch.equal(alike, unet(x, 500, adapter(text, embedding, 0.7)))
    assert torch.equal(unet(x, 500, set_lambda(plain, [0.0] * len(lambdas))), unet(x, 500, text))


def test_adapters_chain_and_leave_the_context_as_it_was(pair: Pair) -> None:
    unet = pair("sd15").ours
    text = Context(randn(1, 5, unet.config.context_dim), fuse=concatenated)
    first = adapter_for(unet, 3)(text, randn(1, IMAGE, seed=1), 0.5)
    both = adapter_for(unet, 4)(first, randn(1, IMAGE, seed=2), 0.6)
    assert [len(context.image) for context in (text, first, both)] == [0, 1, 2]
    assert both.image[0] is first.image[0] and both.text is text.text and both.fuse is concatenated


@pytest.mark.parametrize("size", [(17, 13), (9, 5)])
def test_masks_of_zeros_and_ones_in_a_whole_unet(pair: Pair, size: tuple[int, int]) -> None:
    unet = pair("sd15").ours
    adapter, text, embedding = adapter_for(unet), Context(randn(2, 5, unet.config.context_dim)), randn(2, IMAGE, seed=1)
    x = randn(2, 4, *size, seed=2)

    def masked(mask: Tensor) -> Tensor:
        levels = Lambda(mask=mask).by_layer(unet.config, size)
        return unet(x, 500, set_lambda(adapter(text, embedding), levels))

    none, full = (masked(torch.full((8, 8), value)) for value in (0.0, 1.0))
    assert torch.equal(none, unet(x, 500, text))
    assert max_error(full, unet(x, 500, adapter(text, embedding))) < TOLERANCE
    assert max_error(masked(torch.tensor([[1.0, 0.0]]).expand(2, 2)), full) > 0.01


def test_wrong_widths_raise(pair: Pair) -> None:
    unet = pair("sd15").ours
    with pytest.raises(ValueError, match="tokens are 13 wide, but this UNet reads a context of 12"):
        IPAdapter(unet, ImageProjection(IMAGE, 13))
    adapter, text = adapter_for(unet), Context(randn(1, 5, 12))
    for shape in ((1, IMAGE + 1), (1, 2, 1, IMAGE + 1)):
        with pytest.raises(ValueError, match=r"width 10, .* gives 11"):
            adapter(text, randn(*shape))
    with pytest.raises(ValueError, match=r"features are `b k m e`, .* not \(1, 2, 10\)"):
        adapter(text, randn(1, 2, IMAGE))
    with pytest.raises(ValueError, match="3 scales for 16 cross-attention layers"):
        set_lambda(adapter(text, randn(1, IMAGE)), [1.0, 1.0, 1.0])


def test_official_size() -> None:
    with torch.device("meta"):
        adapter = IPAdapter(UNet(SD15), ImageProjection())
    projection = sum(p.numel() for p in adapter.image_projection.parameters())
    total = sum(p.numel() for p in adapter.parameters())
    assert (projection, total - projection, total) == (3_150_336, 19_169_280, 22_319_616)
    assert len(adapter.state_dict()) == 36
