"""Infer the configs of a single file in LDM's layout from the shapes of its tensors and the `.yaml` beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints.configs import mlp_ratio, vocab_size
from checkpoints.files import naming
from checkpoints.signatures import check_not_placeholder
from model.text_encoder import SD21_TEXT, TextConfig
from model.unet import UNetConfig
from model.vae import VAEConfig
from model.words import Prediction

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Settings:
    """Settings that cannot be inferred from the shapes in a single file. The defaults are those of Stable Diffusion 1.x.

    `prediction`: None if it is not known. `scheduler`: the noise schedule in the format of diffusers' `scheduler_config.json`; {}
    for that of SD 1.5. `pooled`: as in ControlNetConfig.
    """

    prediction: Prediction | None = "epsilon"
    heads: int = 8
    head_width: int = 0  # width of each head; if it is not 0, it determines the number of heads instead of `heads`
    scale: float = 0.18215
    force_upcast: bool = False
    sample_size: int = 64
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool = False


SD1 = Settings()
SD2 = Settings(prediction=None, head_width=64)
SDXL = Settings(
    head_width=64,
    scale=0.13025,
    force_upcast=True,
    sample_size=128,
    scheduler={
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
)


def yaml_beside(path: Path) -> Path | None:
    """Return the `.yaml` or `.yml` file beside a single file, with the same name, or None."""
    return next((file for end in (".yaml", ".yml") if (file := path.with_suffix(end)).is_file()), None)


def settings_beside(path: Path, default: Settings = SD1) -> Settings:
    """Read the settings from the LDM `.yaml` beside a single file, or return `default` if there is none.

    Raises ValueError if the `.yaml` is not an LDM config or has unsupported settings.
    """
    file = yaml_beside(path)
    if file is None:
        return default
    check_not_placeholder(file)
    with naming(file, "is not a supported LDM config"):
        import yaml  # only needed here

        params = yaml.safe_load(file.read_text())["model"]["params"]
        unet, kind = params["unet_config"]["params"], params.get("parameterization", "eps")
        if kind not in ("eps", "v"):
            raise ValueError(f"its parameterization is {kind!r}, but only eps and v are supported")
        width, heads = max(unet.get("num_head_channels", -1), 0), unet.get("num_heads", 8)
        betas = params.get("beta_schedule", "linear")
        scheduler = {
            "num_train_timesteps": params.get("timesteps", 1000),
            "beta_start": params.get("linear_start", 1e-4),
            "beta_end": params.get("linear_end", 2e-2),
            "beta_schedule": "scaled_linear" if betas == "linear" else betas,  # LDM's "linear" is linear in sqrt(beta)
            "prediction_type": "v_prediction" if kind == "v" else "epsilon",
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        return replace(
            default,
            prediction="v" if kind == "v" else "epsilon",
            heads=heads,
            head_width=width,
            scale=params.get("scale_factor", 0.18215),
            scheduler=scheduler,
            pooled=bool(params.get("global_average_pooling")),
        )


def count(shapes: Shapes, pattern: str) -> int:
    """Count the distinct values of the pattern's group, matched at the start of each name."""
    return len({m[1] for name in shapes if (m := re.match(pattern, name))})


def ldm_unet(shapes: Shapes, settings: Settings) -> UNetConfig:
    """Infer the config of the UNet in a single file. Raises KeyError if the shapes are not those of a UNet."""
    return UNetConfig(
        **ldm_encoder(shapes, settings),
        out_channels=shapes["out.2.weight"][0],
        prediction=settings.prediction or "epsilon",
        sample_size=settings.sample_size,
    )


def ldm_encoder(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    """Infer the encoder half of a UNet or a ControlNet, as entries of UNetConfig.

    LDM numbers the stages: the residual blocks of a level, then its `op`, which halves the resolution. The number of
    heads cannot be inferred from the weights, so it comes from `settings`. Raises KeyError if the shapes are those of neither.
    """
    channels, blocks, depth, i = [], [], [], 1
    while (res := f"input_blocks.{i}.0.out_layers.3.weight") in shapes:
        channels.append(shapes[res][0])
        depth.append(count(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\."))
        first = i
        while f"input_blocks.{i}.0.out_layers.3.weight" in shapes:
            i += 1
        blocks.append(i - first)
        i += 1
    if len(set(blocks)) != 1:
        raise KeyError(f"input_blocks.{i}.0.out_layers.3.weight")
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "channels": tuple(channels),
        "depth": tuple(depth),
        "mid_depth": count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        "heads": tuple(c // settings.head_width for c in channels)
        if settings.head_width
        else (settings.heads,) * len(channels),
        "res_blocks": blocks[0],
        "context_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "added_dim": shapes.get("label_emb.0.0.weight", (0, 0))[1],
    }


def ldm_vae(shapes: Shapes, settings: Settings) -> VAEConfig:
    """Infer the config of the VAE in a single file. Raises KeyError if the shapes are not those of a VAE."""
    levels = count(shapes, r"encoder\.down\.(\d+)\.block")
    return VAEConfig(
        channels=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        latent_channels=shapes["post_quant_conv.weight"][0],
        scale=settings.scale,
        force_upcast=settings.force_upcast,
    )


def ldm_text(shapes: Shapes) -> TextConfig:
    """Infer the config of the CLIP text encoder in a single file. The names must not have the prefix `text_model.`.

    Each head is assumed to be 64 wide.
    """
    rows, width = shapes["embeddings.token_embedding.weight"]
    inner, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    return TextConfig(
        width=width,
        layers=count(shapes, r"encoder\.layers\.(\d+)\."),
        heads=max(width // 64, 1),
        mlp_ratio=mlp_ratio(width, inner),
        vocab_size=vocab_size(rows),
    )


def open_clip_text(shapes: Shapes, pooled: bool) -> TextConfig:
    """Infer the config of an OpenCLIP text encoder in a single file. Each head is assumed to be 64 wide.

    `pooled`: keep all layers and the projection, as SDXL needs them. Otherwise leave out the last layer, which SD 2.x does not use:
    ViT-H's is the 24th, which not every file holds.
    """
    rows, width = shapes["token_embedding.weight"]
    layers = count(shapes, r"transformer\.resblocks\.(\d+)\.")
    if not pooled:
        layers = min(layers, SD21_TEXT.layers - 1) if width == SD21_TEXT.width else layers - 1
    inner, _ = shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    return TextConfig(
        width=width,
        layers=layers,
        heads=max(width // 64, 1),
        mlp_ratio=mlp_ratio(width, inner),
        output_dim=shapes["text_projection"][1] if pooled else 0,
        vocab_size=vocab_size(rows),
        activation="gelu",
        pad=0,
    )
