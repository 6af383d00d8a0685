"""What the parity tests share: random peaky weights, rename tables from other people's names to ours, pairs of equal networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

M = TypeVar("M", bound=nn.Module)
Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]
PEAKY = re.compile(r"(to_q|to_k|q_proj|k_proj|to_k_ip\.\d+)\.weight$")


def max_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a - b).detach().abs().max())


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomise(module: M, seed: int = 0, peaky: float = 2.0) -> M:
    """Random float64 weights, norms and biases too, so that nothing is trivially 0 or 1.

    Queries and keys are made times `peaky`, so that softmaxes are far from flat: 2 gives logits of deviation 4. With 4
    they have 16, and a deep network then turns its last bit (1e-15) into 1e-7: fit for single layers only.
    """
    generator = torch.Generator().manual_seed(seed)
    module.double().eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if weight.ndim > 1:
            weight.copy_(noise * weight[0].numel() ** -0.5 * (peaky if PEAKY.search(name) else 1.0))
        else:
            weight.copy_((1.0 if re.search(r"norm\w*\.weight$", name) else 0.0) + 0.3 * noise)
    return module


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Applies every rule to every name, and insists that no two names fall together."""
    out = {}
    for source, tensor in tensors.items():
        name = source
        for pattern, target in rules:
            name = re.sub(pattern, target, name)
        assert name not in out, f"{source} and another name both become {name}"
        out[name] = tensor
    return out


RES_BLOCK: Rules = [(r"time_emb_proj", "emb"), (r"conv_shortcut", "skip")]


def unet_rules(res_blocks: int) -> Rules:
    """diffusers' names to ours: its blocks of resnets, attentions and a change of size become one list of stages."""

    def stage(side: str, inside: str) -> Callable[[re.Match[str]], str]:
        def name(m: re.Match[str]) -> str:
            place = int(m[2]) if m.lastindex == 2 else res_blocks  # a change of size is a block's last
            return f"{side}.{int(m[1]) * (res_blocks + 1) + place}.{inside}."

        return name

    return [
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^add_embedding\.linear_1", "added_embed.0"),
        (r"^add_embedding\.linear_2", "added_embed.2"),
        (r"^conv_norm_out", "norm_out"),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", stage("down", "res")),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", stage("down", "attn")),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.", stage("down", "resample")),
        (r"^mid_block\.resnets\.(\d+)\.", r"mid.\1.res."),
        (r"^mid_block\.attentions\.0\.", r"mid.0.attn."),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)\.", stage("up", "res")),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)\.", stage("up", "attn")),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.", stage("up", "resample")),
        (r"transformer_blocks", "blocks"),
        (r"to_out\.0", "to_out"),
        (r"ff\.net\.0\.proj", "ff.proj_in"),
        (r"ff\.net\.2", "ff.proj_out"),
        *RES_BLOCK,
    ]


def vae_rules(res_blocks: int) -> Rules:
    def flat(per_block: int, inside: str = "") -> Callable[[re.Match[str]], str]:
        return lambda m: f"{m[1]}.{int(m[2]) * per_block + (int(m[3]) if m.lastindex == 3 else per_block - 1)}.{inside}"

    return [
        (r"^(encoder\.down)_blocks\.(\d+)\.resnets\.(\d+)\.", flat(res_blocks + 1)),
        (r"^(encoder\.down)_blocks\.(\d+)\.downsamplers\.0\.", flat(res_blocks + 1)),
        (r"^(decoder\.up)_blocks\.(\d+)\.resnets\.(\d+)\.", flat(res_blocks + 2)),
        (r"^(decoder\.up)_blocks\.(\d+)\.upsamplers\.0\.", flat(res_blocks + 2)),
        (r"mid_block\.resnets\.0", "mid.0"),
        (r"mid_block\.resnets\.1", "mid.2"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.1.norm"),
        (r"mid_block\.attentions\.0\.", "mid.1.attn."),
        (r"to_out\.0", "to_out"),
        (r"conv_norm_out", "norm_out"),
        *RES_BLOCK,
    ]


def as_matrices(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SD 1.5's 1x1 convolutions around a spatial transformer, as the matrices that they are."""
    return {
        k: v[:, :, 0, 0] if re.search(r"attn\.proj_(in|out)\.weight$", k) and v.ndim == 4 else v
        for k, v in tensors.items()
    }


@dataclass(frozen=True)
class UNetPair:
    """One network twice: diffusers' and ours, with equal weights, in float64."""

    peer: Any
    ours: UNet


def unet_pair(config: UNetConfig, linear: bool, seed: int = 0) -> UNetPair:
    """`linear`: the peer's 1x1 convolutions are matrices (SD 2, SDXL)."""
    kinds = [bool(depth) for depth in config.depth]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": config.added_dim,
    }
    peer = UNet2DConditionModel(
        block_out_channels=config.channels,
        down_block_types=["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in kinds],
        up_block_types=["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(kinds)],
        layers_per_block=config.res_blocks,
        norm_num_groups=config.groups,
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.heads,
        transformer_layers_per_block=[
            *(depth or 1 for depth in config.depth[:-1]),
            config.mid_depth,
        ],  # the last one is the mid block's too
        use_linear_projection=linear,
        **(added if config.added_dim else {}),
    )
    randomise(peer, seed)
    ours = UNet(config).double().eval().requires_grad_(False)
    ours.load_state_dict(as_matrices(rename(peer.state_dict(), unet_rules(config.res_blocks))))
    return UNetPair(peer, ours)


# Small relatives of the three base models: every rule of the big ones, at a few thousand weights a layer.
SMALL_SD15 = UNetConfig(channels=(16, 24, 32, 32), heads=(4, 4, 4, 4), context_dim=12, groups=4)
SMALL_SD21 = UNetConfig(channels=(16, 32, 48, 48), heads=(2, 4, 6, 6), context_dim=20, groups=8, prediction="v")
SMALL_SDXL = UNetConfig(
    channels=(16, 32, 48), depth=(0, 2, 3), mid_depth=3, heads=(2, 4, 6), context_dim=24, groups=8, added_dim=6 * 8 + 10
)
SMALL_ONE = UNetConfig(channels=(8, 16), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=6, groups=4)
SMALL_UNETS = {
    "sd15": (SMALL_SD15, False),
    "sd21": (SMALL_SD21, True),
    "sdxl": (SMALL_SDXL, True),
    "one_block": (SMALL_ONE, True),
}


def vae_pair(config: VAEConfig, seed: int = 0) -> tuple[Any, VAE]:
    levels = len(config.channels)
    peer = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=config.channels,
        layers_per_block=config.res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        scaling_factor=config.scale,
    )
    randomise(peer, seed)
    ours = VAE(config).double().eval().requires_grad_(False)
    ours.load_state_dict(rename(peer.state_dict(), vae_rules(config.res_blocks)))
    return peer, ours


CLIP_RULES: Rules = [
    (r"^(text|vision)_model\.", ""),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.class_embedding", "class_embedding"),
    (r"^embeddings\.patch_embedding", "conv1"),
    (r"^pre_layrnorm", "ln_pre"),
    (r"^post_layernorm", "ln_post"),
    (r"^final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^visual_projection\.weight", "proj"),
    (r"^", "clip."),
]


def clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIP as open_clip names it: q, k, v in one matrix, and projections transposed."""
    joined = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            joined[re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name)] = torch.cat(
                [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            )
        elif not re.search(r"\.[kv]_proj\.", name):
            joined[name] = tensor.T if re.match(r"(text|visual)_projection", name) else tensor
    return rename(joined, CLIP_RULES)


def number_of(module: nn.Module) -> tuple[int, int]:
    """How many parameters, in how many tensors."""
    return sum(p.numel() for p in module.parameters()), len(module.state_dict())
