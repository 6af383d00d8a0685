"""The configs of published networks, from a `config.json` of diffusers or transformers.

Nothing here reads a file. A config that asks for what these modules do not do raises ValueError, and one that lacks an entry
KeyError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.image_encoder import ImageConfig
from model.text_encoder import END, TextConfig, vocabulary
from model.unet import UNetConfig
from model.vae import VAEConfig

# What these modules do; a config that says otherwise is another network's.
_UNET_DOES: dict[str, Any] = {
    "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "time_embedding_type": "positional",
    "resnet_time_scale_shift": "default", "only_cross_attention": False, "dual_cross_attention": False, "attention_type": "default",
    "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "time_cond_proj_dim": None, "timestep_post_act": None, "cross_attention_norm": None,
    "resnet_skip_time_act": False, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "resnet_out_scale_factor": 1.0, "reverse_transformer_layers_per_block": None,
    "mid_block_only_cross_attention": None,
}  # fmt: skip
_VAE_DOES: dict[str, Any] = {
    "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True, "in_channels": 3,
    "out_channels": 3, "latents_mean": None, "latents_std": None, "shift_factor": None,
}  # fmt: skip
_CLIP_DOES: dict[str, Any] = {"layer_norm_eps": 1e-5}
_VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
}  # fmt: skip


_SAME = {"swish": "silu"}  # two names of one activation


def _one(value: Any) -> Any:
    """A setting that is the same at every level, where it is written once for each."""
    if isinstance(value, (list, tuple)) and value and all(each == value[0] for each in value):
        return value[0]
    return value


def _check(config: Mapping[str, Any], does: dict[str, Any]) -> None:
    for key, value in does.items():
        asked = config.get(key, value) if value is None else _one(config.get(key, value))
        if ((_SAME.get(asked, asked) if isinstance(asked, str) else asked) or None) != (value or None):
            raise ValueError(f"it asks for {key} = {config[key]!r}; this project's networks have {value}")


def _each(value: Any, levels: int) -> tuple[int, ...]:
    """A setting that is one number, or one for each level."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


_MOST = dict.fromkeys(("layers", "depth", "mid_depth", "res_blocks"), 200)  # of what costs time to build


def plausible(config: Any) -> None:
    """Raises ValueError unless each entry of a config is of its kind, because JSON can hold anything."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            good = value in get_args(kind)
        elif kind is bool:
            good = isinstance(value, bool)
        elif kind is float:
            good = type(value) in (int, float) and 0 < value < math.inf
        else:
            numbers = value if isinstance(value, tuple) else (value,)
            good = isinstance(value, tuple) == (kind is not int) and all(
                type(n) is int and 0 <= n <= _MOST.get(name, n) for n in numbers
            )
        if not good:
            raise ValueError(f"its {name} is {value!r}")


def unet_config(c: Mapping[str, Any], prediction: str = "epsilon") -> UNetConfig:
    """Of diffusers' `UNet2DConditionModel`; `prediction` stands in the scheduler's config. Its `attention_head_dim` counts heads."""
    _check(c, _UNET_DOES)
    kinds = [{"CrossAttnDownBlock2D": True, "DownBlock2D": False}.get(k) for k in c["down_block_types"]]
    ups = [{"CrossAttnUpBlock2D": True, "UpBlock2D": False}.get(k) for k in c["up_block_types"]]
    if None in kinds or ups != kinds[::-1]:
        raise ValueError(f"it has blocks that are not read: {c['down_block_types']!r}, {c['up_block_types']!r}")
    if c.get("addition_embed_type") not in (None, "text_time"):
        raise ValueError(f"it asks for addition_embed_type = {c['addition_embed_type']!r}; only text_time is read")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"its prediction_type {prediction} is not read, only epsilon and v_prediction")
    depth = _each(c.get("transformer_layers_per_block", 1), len(kinds))
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        channels=tuple(c["block_out_channels"]),
        depth=tuple(d if cross else 0 for d, cross in zip(depth, kinds, strict=True)),
        mid_depth=depth[-1],
        heads=_each(c.get("num_attention_heads") or c.get("attention_head_dim", 8), len(kinds)),
        res_blocks=_one(c.get("layers_per_block", 2)),
        context_dim=_one(c["cross_attention_dim"]),
        groups=c.get("norm_num_groups", 32),
        added_dim=c.get("projection_class_embeddings_input_dim") or 0,
        added_time_dim=c.get("addition_time_embed_dim") or 256,
        prediction="v" if prediction == "v_prediction" else "epsilon",
        sample_size=c.get("sample_size") or 64,
    )


def diffusers_config(c: UNetConfig) -> dict[str, Any]:
    """The other way round: the `config.json` of a UNet. SD 1.x has 1 x 1 convolutions around its transformers, later models matrices."""
    if c.depth[-1] not in (0, c.mid_depth):
        raise ValueError(f"diffusers has no UNet of depth {c.depth} with {c.mid_depth} in the middle")
    cross = [bool(depth) for depth in c.depth]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": c.added_time_dim,
        "projection_class_embeddings_input_dim": c.added_dim,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": c.channels,
        "down_block_types": ["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in reversed(cross)],
        "transformer_layers_per_block": [*(depth or 1 for depth in c.depth[:-1]), c.mid_depth],
        "layers_per_block": c.res_blocks,
        "attention_head_dim": c.heads,
        "cross_attention_dim": c.context_dim,
        "norm_num_groups": c.groups,
        "sample_size": c.sample_size,
        "use_linear_projection": len(set(c.heads)) > 1,
        **(added if c.added_dim else {}),
    }


def vae_config(c: Mapping[str, Any]) -> VAEConfig:
    """Of diffusers' `AutoencoderKL`."""
    _check(c, _VAE_DOES)
    return VAEConfig(
        channels=tuple(c["block_out_channels"]),
        res_blocks=_one(c.get("layers_per_block", 1)),
        latent_channels=c["latent_channels"],
        groups=c.get("norm_num_groups", 32),
        scale=c.get("scaling_factor", 0.18215),
    )


def vocab_size(rows: int) -> int:
    if rows <= END:
        raise ValueError(f"it has rows for {rows} tokens, but CLIP's vocabulary has {END + 1}")
    return rows


def mlp_ratio(width: int, inner: int) -> float:
    """What open_clip multiplies the width of a tower by, and cuts off, for the width of its MLPs."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


def text_config(c: Mapping[str, Any], pad: int = END) -> TextConfig:
    """Of transformers' `CLIPTextModel`, with or without its projection; `pad` is the tokenizer's."""
    _check(c, _CLIP_DOES | {"hidden_act": _activation(c)})
    return TextConfig(
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_ratio=mlp_ratio(c["hidden_size"], c["intermediate_size"]),
        output_dim=c["projection_dim"] if "CLIPTextModelWithProjection" in (c.get("architectures") or ()) else 0,
        vocab_size=vocab_size(c["vocab_size"]),
        context_length=c["max_position_embeddings"],
        activation=_activation(c),
        pad=pad,
    )


def image_config(c: Mapping[str, Any]) -> ImageConfig:
    """Of transformers' `CLIPVisionModelWithProjection`, or of a whole `CLIPModel`."""
    if "vision_config" in c:  # a whole CLIP, which names only what differs from transformers' defaults
        c = _VISION | c["vision_config"] | {"projection_dim": c.get("projection_dim", 512)}
    _check(c, _CLIP_DOES | {"hidden_act": _activation(c)})
    return ImageConfig(
        image_size=c["image_size"],
        patch=c["patch_size"],
        width=c["hidden_size"],
        layers=(c["num_hidden_layers"],),
        heads=c["num_attention_heads"],
        mlp_ratio=mlp_ratio(c["hidden_size"], c["intermediate_size"]),
        activation=_activation(c),
        output_dim=c["projection_dim"],
    )


def _activation(c: Mapping[str, Any]) -> Any:
    return "gelu" if c.get("hidden_act") == "gelu" else "quick_gelu"


_VOCABULARY = (
    "fb857eb256f62e0a626663481fa2225ef03220ac81f66f2302c29de8e3deaa47"  # of CLIP's vocabulary, as `_fingerprint` has it
)


def _fingerprint(words: Mapping[str, int]) -> str:
    return hashlib.sha256("\n".join(f"{token} {word}" for word, token in sorted(words.items())).encode()).hexdigest()


def pad_token(words: Mapping[str, int] | None, settings: Mapping[str, Any], special: Mapping[str, Any]) -> int:
    """The token that fills up a prompt: from a tokenizer's vocabulary (None: CLIP's), its `tokenizer_config.json` and its
    `special_tokens_map.json`, which counts unless the first has an `added_tokens_decoder` (transformers' rule)."""
    if words is not None and _fingerprint(words) != _VOCABULARY:
        raise ValueError("its vocabulary is not CLIP's, which is the only one that is read")
    pad = settings.get("pad_token")
    if "added_tokens_decoder" not in settings:
        pad = special.get("pad_token") or pad
    word = pad["content"] if isinstance(pad, dict) else pad
    if word in (None, "", "<|endoftext|>"):
        return END
    return (words or vocabulary())[word]
