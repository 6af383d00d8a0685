"""Convert a `config.json` of diffusers or transformers, given as a dict, to this project's configs.

The functions raise ValueError if a config needs a feature that our modules do not support, and KeyError if an entry is
missing. They do not read files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.image_encoder import ImageConfig
from model.text_encoder import END, TextConfig, vocabulary
from model.unet import EMPTY, UNetConfig
from model.vae import VAEConfig

# Settings with a single supported value, because our modules do not implement alternatives.
_UNET_SUPPORTED: dict[str, Any] = {
    "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "time_embedding_type": "positional",
    "resnet_time_scale_shift": "default", "only_cross_attention": False, "dual_cross_attention": False, "attention_type": "default",
    "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "time_cond_proj_dim": None, "timestep_post_act": None, "cross_attention_norm": None,
    "resnet_skip_time_act": False, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "resnet_out_scale_factor": 1.0, "reverse_transformer_layers_per_block": None,
    "mid_block_only_cross_attention": None,
}  # fmt: skip
_VAE_SUPPORTED: dict[str, Any] = {
    "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True, "in_channels": 3,
    "out_channels": 3, "latents_mean": None, "latents_std": None, "shift_factor": None,
}  # fmt: skip
_CLIP_SUPPORTED: dict[str, Any] = {"layer_norm_eps": 1e-5}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
}  # fmt: skip


_ALIASES = {"swish": "silu"}  # activations with two names


def _single_value(value: Any) -> Any:
    """Reduce a list of equal values, one per level, to a single value."""
    if isinstance(value, (list, tuple)) and value and all(each == value[0] for each in value):
        return value[0]
    return value


def _check(config: Mapping[str, Any], supported: dict[str, Any]) -> None:
    for key, value in supported.items():
        setting = config.get(key, value) if value is None else _single_value(config.get(key, value))
        if ((_ALIASES.get(setting, setting) if isinstance(setting, str) else setting) or None) != (value or None):
            raise ValueError(f"it sets {key} = {config[key]!r}, but only {value} is supported")


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
    """Expand a single number to one number per level. Lists are returned as tuples."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


_MINIMA = dict.fromkeys(("depth", "mid_depth"), EMPTY)
_MAXIMA = dict.fromkeys(("layers", "depth", "mid_depth", "res_blocks"), 200)  # more would take too long to build


def check_values(config: Any) -> None:
    """Raise ValueError unless each entry of a config has the right type and a plausible value."""
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
                type(n) is int and _MINIMA.get(name, 0) <= n <= _MAXIMA.get(name, n) for n in numbers
            )
        if not good:
            raise ValueError(f"its {name} is {value!r}, which is not a valid value")


def unet_config(c: Mapping[str, Any], prediction: str = "epsilon") -> UNetConfig:
    """Convert the config of diffusers' `UNet2DConditionModel`. `prediction`: the `prediction_type` of the scheduler's config."""
    encoder = encoder_config(c)
    if list(c["up_block_types"]) != [f"{'CrossAttnUp' if depth else 'Up'}Block2D" for depth in reversed(encoder["depth"])]:
        raise ValueError(f"it has blocks that are not supported: {c['down_block_types']!r}, {c['up_block_types']!r}")
    if EMPTY in (*encoder["depth"], encoder["mid_depth"]):
        raise ValueError("it has transformers without blocks, which are supported only in ControlNets")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"its prediction_type is {prediction!r}, but only epsilon and v_prediction are supported")
    return UNetConfig(
        **encoder,
        out_channels=c["out_channels"],
        prediction="v" if prediction == "v_prediction" else "epsilon",
        sample_size=c.get("sample_size") or 64,
    )


def encoder_config(c: Mapping[str, Any]) -> dict[str, Any]:
    """Read the encoder half from a config of diffusers, as entries of UNetConfig.

    `attention_head_dim` is the number of heads, despite its name.
    """
    _check(c, _UNET_SUPPORTED)
    kinds = [{"CrossAttnDownBlock2D": True, "DownBlock2D": False}.get(k) for k in c["down_block_types"]]
    if None in kinds:
        raise ValueError(f"it has blocks that are not supported: {c['down_block_types']!r}")
    if c.get("addition_embed_type") not in (None, "text_time"):
        raise ValueError(f"it sets addition_embed_type = {c['addition_embed_type']!r}, but only text_time is supported")
    depth = _per_level(c.get("transformer_layers_per_block", 1), len(kinds))
    return {
        "in_channels": c["in_channels"],
        "channels": tuple(c["block_out_channels"]),
        "depth": tuple((d or EMPTY) if cross else 0 for d, cross in zip(depth, kinds, strict=True)),
        "mid_depth": depth[-1] or EMPTY,
        "heads": _per_level(c.get("num_attention_heads") or c.get("attention_head_dim", 8), len(kinds)),
        "res_blocks": _single_value(c.get("layers_per_block", 2)),
        "context_dim": _single_value(c["cross_attention_dim"]),
        "groups": c.get("norm_num_groups", 32),
        "added_dim": c.get("projection_class_embeddings_input_dim") or 0,
        "added_time_dim": c.get("addition_time_embed_dim") or 256,
    }


def diffusers_config(c: UNetConfig) -> dict[str, Any]:
    """Return the `config.json` of a UNet in the format of diffusers' `UNet2DConditionModel`. Inverse of `unet_config`.

    As in SD 1.x, the projections around the transformers are 1x1 convolutions when all levels have the same number of
    heads; otherwise they are linear layers. Raises ValueError for depths that diffusers can't describe.
    """
    if c.depth[-1] not in (0, c.mid_depth):
        raise ValueError(f"diffusers has no UNet of depth {c.depth} with depth {c.mid_depth} in the middle")
    cross = [bool(depth) for depth in c.depth]
    conditioning = {
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
        "transformer_layers_per_block": [*(max(depth, 0) if depth else 1 for depth in c.depth[:-1]), max(c.mid_depth, 0)],
        "layers_per_block": c.res_blocks,
        "attention_head_dim": c.heads,
        "cross_attention_dim": c.context_dim,
        "norm_num_groups": c.groups,
        "sample_size": c.sample_size,
        "use_linear_projection": len(set(c.heads)) > 1,
        **(conditioning if c.added_dim else {}),
    }


def vae_config(c: Mapping[str, Any]) -> VAEConfig:
    """Convert the config of diffusers' `AutoencoderKL`."""
    _check(c, _VAE_SUPPORTED)
    return VAEConfig(
        channels=tuple(c["block_out_channels"]),
        res_blocks=_single_value(c.get("layers_per_block", 1)),
        latent_channels=c["latent_channels"],
        groups=c.get("norm_num_groups", 32),
        scale=c.get("scaling_factor", 0.18215),
        force_upcast=c.get("force_upcast", False),
    )


def vocab_size(rows: int) -> int:
    """Return the number of rows of a token embedding. Raises ValueError if it is smaller than CLIP's vocabulary.
    """
    if rows <= END:
        raise ValueError(f"it has rows for {rows} tokens, but CLIP's vocabulary has {END + 1}")
    return rows


def mlp_ratio(width: int, inner: int) -> float:
    """Return the ratio for which int(width * ratio), the hidden width of open_clip's MLPs, is exactly `inner`."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


def text_config(c: Mapping[str, Any], pad: int = END) -> TextConfig:
    """Convert the config of transformers' `CLIPTextModel`, with or without projection.

    `pad` is the tokenizer's padding token.
    """
    _check(c, _CLIP_SUPPORTED | {"hidden_act": _activation(c)})
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
    """Convert the config of transformers' `CLIPVisionModelWithProjection`, or of a full `CLIPModel`."""
    if "vision_config" in c:  # a full CLIP model, whose config leaves out transformers' defaults
        c = _VISION_DEFAULTS | c["vision_config"] | {"projection_dim": c.get("projection_dim", 512)}
    _check(c, _CLIP_SUPPORTED | {"hidden_act": _activation(c)})
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


_CLIP_VOCABULARY = (
    "fb857eb256f62e0a626663481fa2225ef03220ac81f66f2302c29de8e3deaa47"  # the fingerprint of CLIP's vocabulary
)


def _fingerprint(words: Mapping[str, int]) -> str:
    return hashlib.sha256("\n".join(f"{token} {word}" for word, token in sorted(words.items())).encode()).hexdigest()


def pad_token(words: Mapping[str, int] | None, settings: Mapping[str, Any], special: Mapping[str, Any]) -> int:
    """Return the padding token of a tokenizer, given its vocabulary (None means CLIP's) and the contents of two files.

    `settings`: `tokenizer_config.json`. `special`: `special_tokens_map.json`, which takes precedence unless `settings`
    has an `added_tokens_decoder`, as in transformers. Raises ValueError if the vocabulary is not CLIP's, and KeyError if
    it lacks the padding token.
    """
    if words is not None and _fingerprint(words) != _CLIP_VOCABULARY:
        raise ValueError("its vocabulary is not CLIP's, and no other is supported")
    pad = settings.get("pad_token")
    if "added_tokens_decoder" not in settings:
        pad = special.get("pad_token") or pad
    word = pad["content"] if isinstance(pad, dict) else pad
    if word in (None, "", "<|endoftext|>"):
        return END
    return (words or vocabulary())[word]
