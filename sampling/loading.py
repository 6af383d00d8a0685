"""Load a pipeline from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from checkpoints.adapters import adapter_file, adapter_sizes, check_fit, load_adapter, own_updates, projection_of
from checkpoints.base import Base
from checkpoints.clip import load_image_encoder
from checkpoints.controls import load_control, open_control
from checkpoints.files import naming
from checkpoints.fill import copy_weights
from checkpoints.hub import locate
from checkpoints.lora import merge, open_lora, read_updates
from checkpoints.stable_diffusion import load_base, scheduler_config, scheduler_file
from model.adapter import IPAdapter
from model.image_encoder import ImageConfig
from model.image_projection import FacePlus
from model.unet import UNet
from model.words import Prediction
from sampling.pipeline import Pipeline
from sampling.request import WEIGHTS
from sampling.scheduler_file import schedule_of
from sampling.strips import in_strips


def load(
    checkpoint: Path | str = WEIGHTS,
    adapter: Path | str | Sequence[Path | str] | None = None,
    image_encoder: Path | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    prediction: Prediction | None = None,
    vae: Path | str | None = None,
    controls: Sequence[Path | str] = (),
    copy: bool = False,
    low_memory: bool = False,
    loras: Sequence[tuple[Path | str, float]] = (),
    face_lora_scale: float = 1.0,
    face_structure_scale: float = 1.0,
) -> Pipeline:
    """Load the pipeline of a base model: Stable Diffusion as a single file, a diffusers folder, or a folder of our own.

    The first three files may be names in the Hugging Face cache (`checkpoints.hub.locate`). By default the folder's own `image_encoder`
    and `ip_adapter` are used, if they exist. `prediction` overrides what the files say about the UNet; `vae` replaces the model's own;
    `loras` and `face_lora_scale` are as in `with_loras`, `face_structure_scale` as in `FacePlus`. `copy` copies weights that would stay
    mapped. `low_memory` keeps one network at a time on the device. Raises OSError or ValueError for unsuitable files.
    """
    checkpoint = locate(Path(checkpoint))
    files, encoder = prompt_files(checkpoint, adapter, image_encoder)
    config = scheduler_config(checkpoint)
    with naming(scheduler_file(checkpoint), "is not a schedule that is read"):
        schedule = schedule_of(config)
    open_all(files, controls, [path for path, _ in loras], face_lora_scale, face_structure_scale)
    base = load_base(checkpoint, dtype, prediction, Path(vae) if vae else None)
    image = load_image_encoder(encoder, dtype) if encoder else None
    sizes = image.config if image else None
    base = with_loras(base, loras, files, face_lora_scale, sizes)
    adapters = load_adapters(files, base.unet, sizes, dtype, face_structure_scale)
    models = tuple(load_control(Path(path), base.unet.config, dtype, base.vae.config.factor) for path in controls)
    for part in (base.unet, base.vae, base.text, *([image] if image else []), *adapters, *models):
        if copy:
            copy_weights(part)
        part.to("cpu" if low_memory else device)
    pipeline = Pipeline(base.unet, base.vae, base.text, replace(schedule, prediction=base.unet.config.prediction), image, adapters, models)
    return replace(pipeline, vae=in_strips(base.vae), visits=device) if low_memory else pipeline


def load_adapters(
    files: Sequence[Path], unet: UNet, encoder: ImageConfig | None, dtype: torch.dtype, structure_scale: float
) -> tuple[IPAdapter, ...]:
    """Load adapters, and set the structure scale of FaceID PlusV2."""
    adapters = tuple(load_adapter(file, unet, encoder, dtype) for file in files)
    for adapter in adapters:
        if isinstance(adapter.image_projection, FacePlus):
            adapter.image_projection.structure_scale = structure_scale
    return adapters


def open_all(
    adapters: Sequence[Path], controls: Sequence[Path | str], loras: Sequence[Path | str], lora_scale: float, structure_scale: float
) -> None:
    """Reject files that are not adapters, controls or LoRAs, and a scale that none reads, before the base model is loaded."""
    sizes = [adapter_sizes(adapter_file(file)) for file in adapters]
    if structure_scale != 1 and not any(each.get("shortcut") for each in sizes):
        raise ValueError("--face-structure-scale is for IP-Adapter FaceID PlusV2: leave it out")
    if lora_scale != 1 and not any(own_updates(adapter_file(file)) for file in adapters):
        raise ValueError("--face-lora-scale is for an IP-Adapter FaceID that holds a LoRA: leave it out")
    for path in controls:
        open_control(Path(path))
    for path in loras:
        open_lora(Path(path))


def with_loras(
    base: Base,
    loras: Sequence[tuple[Path | str, float]],
    adapters: Sequence[Path],
    face_lora_scale: float,
    encoder: ImageConfig | None = None,
) -> Base:
    """Merge LoRAs, (file, scale), and those inside FaceID adapters, times `face_lora_scale`, into a copy of a base model.

    Raises ValueError if one of the files does not fit the base model, or an adapter does not fit the image encoder.
    """
    for file in adapters:
        check_fit(file, projection_of(adapter_file(file)), base.unet.config, encoder)
    updates = [(Path(path), read_updates(open_lora(Path(path))), scale) for path, scale in loras]
    updates += [(file, own, face_lora_scale) for file in adapters if (own := own_updates(adapter_file(file)))]
    return merge(base, updates) if updates else base


def prompt_files(
    checkpoint: Path, adapter: Path | str | Sequence[Path | str] | None, image_encoder: Path | str | None
) -> tuple[list[Path], Path | None]:
    """Return the adapters and the image encoder to use: the named ones, or those in the checkpoint's folder."""
    own = checkpoint / "ip_adapter.safetensors", checkpoint / "image_encoder.safetensors", checkpoint / "image_encoder"
    encoders = [Path(image_encoder)] if image_encoder else [path for path in own[1:] if path.exists()]
    if adapter is None:
        adapter = [path for path in own[:1] if path.exists()]
    files = [adapter] if isinstance(adapter, Path | str) else adapter
    return [locate(Path(file)) for file in files], locate(encoders[0]) if encoders else None


def compile_unet(unet: UNet, mode: str = "max-autotune") -> UNet:
    """Compile a UNet with `torch.compile`. Starting takes minutes, then drawing is faster.

    On a CPU the weights are frozen into the code. On other devices `mode` is as in torch.compile; the default measures which kernels are
    fastest, and records a step as one CUDA graph.
    """
    on_cpu = unet.conv_in.weight.device.type == "cpu"
    fast = torch.compile(unet, options={"freezing": True}) if on_cpu else torch.compile(unet, mode=mode)
    return cast(UNet, fast)
