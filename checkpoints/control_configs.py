"""Configs of ControlNets and T2I-Adapters: from and to a `config.json` of diffusers, and from the shapes in a single file.

The functions raise ValueError when a file needs something that these modules do not support, and KeyError when an entry or
a tensor is missing. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.configs import diffusers_config, encoder_config
from checkpoints.ldm import Settings, Shapes, count, ldm_encoder
from model.controlnet import HINT, ControlNetConfig
from model.t2i import T2IConfig

_FORMS = {"full_adapter": "full", "light_adapter": "light", "full_adapter_xl": "xl"}


def controlnet_config(c: Mapping[str, Any]) -> ControlNetConfig:
    """Return the config of diffusers' `ControlNetModel`."""
    if (order := c.get("controlnet_conditioning_channel_order", "rgb")) != "rgb":
        raise ValueError(f"it reads its hint as {order!r}, but only rgb is supported")
    return ControlNetConfig(
        **encoder_config(c),
        hint=tuple(c.get("conditioning_embedding_out_channels") or HINT),
        hint_channels=c.get("conditioning_channels", 3),
        pooled=bool(c.get("global_pool_conditions")),
    )


def controlnet_diffusers(config: ControlNetConfig) -> dict[str, Any]:
    """Return the `config.json` of a ControlNet, as diffusers' `ControlNetModel` writes it: the inverse of `controlnet_config`."""
    decoder = ("out_channels", "up_block_types", "sample_size")
    return {key: value for key, value in diffusers_config(config).items() if key not in decoder} | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": config.hint,
        "global_pool_conditions": config.pooled,
    }


def ldm_controlnet(shapes: Shapes, settings: Settings) -> ControlNetConfig:
    """Return the config of a ControlNet in LDM's layout. `settings`: what the shapes don't say."""
    encoder, widths, i = ldm_encoder(shapes, settings), [shapes["input_hint_block.0.weight"][0]], 4
    while f"input_hint_block.{i + 2}.weight" in shapes:
        widths.append(shapes[f"input_hint_block.{i}.weight"][0])
        i += 4
    return ControlNetConfig(**encoder, hint=tuple(widths), hint_channels=shapes["input_hint_block.0.weight"][1], pooled=settings.pooled)


def without_yaml(shapes: Shapes, name: str) -> Settings:
    """Return the settings of a ControlNet in LDM's layout that has no `.yaml` beside it.

    Those for SD 2.x and SDXL have heads of width 64, others 8 heads. Shuffle, which is pooled, is known by the `name` of its file.
    """
    context_dim = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    return Settings(head_width=64 if context_dim in (1024, 2048) else 0, pooled="shuffle" in name.lower())


def t2i_config(c: Mapping[str, Any]) -> T2IConfig:
    """Return the config of diffusers' `T2IAdapter`, which leaves out the last level of the light form."""
    form: Any = _FORMS.get(c.get("adapter_type", "full_adapter"))
    if form is None:
        raise ValueError(f"its adapter_type is {c['adapter_type']!r}, but only {', '.join(_FORMS)} are supported")
    channels = tuple(c.get("channels", (320, 640, 1280, 1280)))
    return T2IConfig(
        channels=(*channels, channels[-1]) if form == "light" else channels,
        hint_channels=c.get("in_channels", 3),
        blocks=c.get("num_res_blocks", 2),
        unshuffle=c.get("downscale_factor", 8),
        form=form,
    )


def t2i_diffusers(config: T2IConfig) -> dict[str, Any]:
    """Return the `config.json` of a T2I-Adapter, as diffusers writes it. Raises ValueError for a light form that it can't describe."""
    light = config.form == "light"
    if light and config.channels[-1:] != config.channels[-2:-1]:
        raise ValueError("diffusers has no light T2I-Adapter whose last two levels differ in width")
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": next(name for name, form in _FORMS.items() if form == config.form),
        "channels": config.channels[:-1] if light else config.channels,
        "in_channels": config.hint_channels,
        "num_res_blocks": config.blocks,
        "downscale_factor": config.unshuffle,
    }


def official_t2i(shapes: Shapes) -> T2IConfig:
    """Return the config of an official T2I-Adapter, by its names and shapes. It unshuffles by 8, or for SDXL by 16."""
    if "conv_in.weight" not in shapes:
        levels, inputs = count(shapes, r"body\.(\d+)\."), shapes["body.0.in_conv.weight"][1]
        widths, blocks = [shapes[f"body.{i}.out_conv.weight"][0] for i in range(levels)], count(shapes, r"body\.0\.body\.(\d+)\.")
        return T2IConfig(tuple(widths), _channels(inputs, 8), blocks, form="light")
    blocks = next((i for i in range(1, 100) if f"body.{i}.in_conv.weight" in shapes), 2)
    widths = [shapes[f"body.{i}.block1.weight"][0] for i in range(0, count(shapes, r"body\.(\d+)\."), blocks)]
    inputs = shapes["conv_in.weight"][1]
    if inputs in (256, 768):
        return T2IConfig(tuple(widths), _channels(inputs, 16), blocks, 16, "xl")
    return T2IConfig(tuple(widths), _channels(inputs, 8), blocks)


def _channels(inputs: int, unshuffle: int) -> int:
    """Return the channels of the hint, given those after `unshuffle`."""
    if inputs % unshuffle**2:
        raise ValueError(f"its first convolution reads {inputs} channels, which are not a hint unshuffled by {unshuffle}")
    return inputs // unshuffle**2
