"""Load Stable Diffusion 1.x, 2.x and XL from a single file in the layout of LDM (CompVis's latent diffusion)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoints import ldm
from checkpoints.base import Base
from checkpoints.clip import assemble_open_clip, assemble_text
from checkpoints.files import naming, short_list
from checkpoints.fill import assemble, check, empty_module
from checkpoints.names import map_names, unet_rows, vae_rows
from checkpoints.reader import File
from model.text_encoder import TextConfig, TextEncoder, TextEncoderPair
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from model.words import Prediction

LDM = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}


@dataclass(frozen=True)
class Family:
    """A family of base models. `texts`: the prefixes of its text encoders in a single file; those that end in "model." hold
    open_clip's names, others transformers'. `settings`: what a file of this family does not say.
    """

    texts: tuple[str, ...]
    settings: ldm.Settings


FAMILIES = {
    "Stable Diffusion XL": Family(("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."), ldm.SDXL),
    "Stable Diffusion 2.x": Family(("cond_stage_model.model.",), ldm.SD2),
    "Stable Diffusion 1.x": Family((LDM["text"],), ldm.SD1),
}
_OTHERS = {  # a pattern of names that occur in no other kind of file
    "a ControlNet": r"control_model\.|controlnet_|input_hint_block\.",
    "a T2I-Adapter": r"(adapter\.)?body\.0\.(block1|body\.0|resnets\.0)\.|style_embedding$",
    "Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.",
    "Flux": r"(model\.diffusion_model\.)?double_blocks\.",
    "the refiner of Stable Diffusion XL": r"conditioner\.embedders\.0\.model\.",
    "Playground v2.5": r"edm_mean$",
}
_MARKERS = {  # tensors that only say how a model was trained
    "ztsnr": "a noise schedule that ends at zero SNR",
    "edm_vpred.sigma_max": "the continuous noise levels of EDM",
}


def single_kind(file: File) -> str:
    """Return the kind of model in a single file, by the names of its tensors."""
    for kind, pattern in _OTHERS.items():
        if any(re.match(pattern, name) for name in file):
            return kind
    if 2 * sum("lora" in name.lower() for name in file) > len(file):
        return "a LoRA"
    for kind, family in FAMILIES.items():
        if any(name.startswith(family.texts) for name in file):
            return kind
    return "Stable Diffusion 1.x" if any(name.startswith(LDM["unet"]) for name in file) else "not a base model"


def single_settings(path: Path) -> ldm.Settings:
    """Return the settings of the base model in a single file: of its family, and of the `.yaml` beside it, if any.

    A tensor `v_pred` says that the UNet predicts v. SDXL's `.yaml` has another form and says nothing that is needed.
    """
    return _settings(*open_single(path))


def _settings(file: File, kind: str, prediction: Prediction | None = None) -> ldm.Settings:
    default = FAMILIES[kind].settings
    settings = default if default == ldm.SDXL else ldm.settings_beside(file.path, default)
    said: Prediction | None = "v" if "v_pred" in file else settings.prediction
    settings = replace(settings, prediction=prediction or said)
    large = default == ldm.SD2 and settings.prediction == "v"  # of SD 2.x, the model that predicts v is the larger one
    return replace(settings, sample_size=96) if large else settings


def _with_ema(file: File) -> File:
    """Replace the UNet's weights with their EMA copy.

    LDM names it `model_ema.` plus the name without `model.` and without dots.
    """
    unet = [name for name in file if name.startswith(LDM["unet"])]
    ema = {name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in unet}
    if missing := ema.values() - file.keys():
        raise ValueError(f"{file.path} has no EMA copy of the UNet: it lacks {short_list(missing)}")
    return file.rename({name: ema.get(name, name) for name in file})


def open_single(path: Path) -> tuple[File, str]:
    """Open a single file; return it with its kind. Raises ValueError when it is not a base model that can be drawn with."""
    file = File(path)
    for marker, what in _MARKERS.items():
        if marker in file:
            raise ValueError(f"{path} was trained with {what}, as its tensor {marker} says, which is not supported: use another model")
    if (kind := single_kind(file)) not in FAMILIES:
        raise ValueError(f"{path} is {kind}; a base model can be Stable Diffusion 1.x, 2.x or XL: use one of these")
    return file, kind


def load_single(
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    ema: bool = False,
    vae: VAE | None = None,
    build: Callable[[TextConfig], TextEncoder] = TextEncoder,
    prediction: Prediction | None = None,
) -> Base:
    """Load Stable Diffusion 1.x, 2.x or XL from a single `.safetensors` or `.ckpt` file, with the settings of the `.yaml`
    beside it, if any.

    `ema` loads the EMA copy of the UNet. `vae` replaces the file's VAE, which may then be missing. `build` makes the
    text encoder from its config. `prediction` is what the UNet predicts, whatever the files say. Raises ValueError when a
    part is incomplete, and when nothing says what the UNet of SD 2.x predicts.
    """
    file, kind = open_single(path)
    settings, what = _settings(file, kind, prediction), f"a complete {kind} checkpoint"
    if settings.prediction is None:
        raise ValueError(
            f"{path} does not say what its UNet predicts: give --prediction v (for the model of 768 x 768) or --prediction epsilon "
            "(512 x 512), or put its .yaml beside it"
        )
    file = _with_ema(file) if ema else file
    unet_file = file.part(LDM["unet"])
    with naming(path, f"is not {what}"):
        unet = empty_module(UNet, ldm.ldm_unet(unet_file.shapes, settings))
    names = map_names(state := unet.state_dict(), unet_rows(unet.config), 2)
    check(state, names, unet_file, what)
    texts = [_load_text(file.part(prefix), prefix, what, dtype, build) for prefix in FAMILIES[kind].texts]
    return Base(
        vae=vae or load_ldm_vae(file.part(LDM["vae"]), settings, what, dtype),
        text=texts[0] if len(texts) == 1 else TextEncoderPair(*texts).eval(),
        unet=assemble(unet, names, unet_file, what, dtype),
    )


def _load_text(
    file: File, prefix: str, what: str, dtype: torch.dtype | None, build: Callable[[TextConfig], TextEncoder]
) -> TextEncoder:
    open_clip, pooled = prefix.endswith(".model."), prefix.startswith("conditioner.")
    file = file if open_clip else file.rename({name.removeprefix("text_model."): name for name in file})
    with naming(file.path, f"is not {what}"):
        config = ldm.open_clip_text(file.shapes, pooled) if open_clip else ldm.ldm_text(file.shapes)
        text = empty_module(build, config)
    return (assemble_open_clip if open_clip else assemble_text)(text, file, what, dtype)


def single_unet_config(path: Path) -> UNetConfig:
    """Return the config of the UNet in a single file, without loading its weights. It may not say what the UNet predicts."""
    with naming(path, "is not a complete base model"):
        return ldm.ldm_unet(open_single(path)[0].part(LDM["unet"]).shapes, single_settings(path))


_ATTENTION_NAMES = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_ATTENTION = re.compile(rf"(?<=mid\.attn_1\.)({'|'.join(map(re.escape, _ATTENTION_NAMES))})(?=\.(weight|bias)$)")


def load_ldm_vae(file: File, settings: ldm.Settings, what: str, dtype: torch.dtype | None) -> VAE:
    """Load a VAE under LDM's names. Accepts diffusers' names in its attention, and ignores a loss and an EMA copy."""
    file = file.without(r"loss\.|model_ema\.")
    file = file.rename({_ATTENTION.sub(lambda m: _ATTENTION_NAMES[m[1]], name): name for name in file})
    with naming(file.path, f"is not {what}"):
        vae = empty_module(VAE, ldm.ldm_vae(file.shapes, settings))
    return assemble(vae, map_names(vae.state_dict(), vae_rows(vae.config), 2), file, what, upcast(vae.config, dtype))


def upcast(config: VAEConfig, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype to compute a VAE in: float32 in place of float16 if its activations exceed float16 (SDXL)."""
    return torch.float32 if dtype == torch.float16 and config.force_upcast else dtype
