"""FaceID: the official sizes, and the description of every released file."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import number_of

from checkpoints.describe import inspect
from checkpoints.names import adapter_names, attention_order
from model.adapter import IPAdapter
from model.image_projection import (
    FacePlus,
    FaceProjection,
    ImageProjection,
    MLPProjection,
    Projection,
    RawFaceResampler,
    Resampler,
)
from model.unet import SD15, SDXL, UNet, UNetConfig

# The official sizes.

PARAMETERS: dict[str, tuple[UNetConfig, type[Projection], dict[str, Any], int, int, int]] = {
    # base, projection, its arguments; parameters of the projection, of the file without LoRA, and of its LoRA
    "faceid sd15": (SD15, FaceProjection, {}, 3_675_648, 6, 25_509_888),
    "faceid-plus sd15": (SD15, FacePlus, {}, 33_581_568, 56, 25_509_888),
    "portrait sd15": (SD15, FaceProjection, {"tokens": 16}, 13_122_048, 6, 0),
    "faceid sdxl": (SDXL, FaceProjection, {}, 8_926_208, 6, 185_794_560),
    "faceid-plusv2 sdxl": (SDXL, FacePlus, {"heads": 32}, 217_125_888, 56, 185_794_560),
    "portrait sdxl": (SDXL, FaceProjection, {"tokens": 16}, 34_116_608, 6, 0),
    "portrait unnorm sdxl": (SDXL, RawFaceResampler, {"image_dim": 512, "width": 1280, "heads": 20}, 81_978_624, 51, 0),
}
TOTALS = {
    "faceid sd15": (48_354_816, 294),
    "faceid-plus sd15": (78_260_736, 344),
    "portrait sd15": (32_291_328, 38),
    "faceid sdxl": (535_507_968, 1266),
    "faceid-plusv2 sdxl": (743_707_648, 1316),
    "portrait sdxl": (374_903_808, 146),
    "portrait unnorm sdxl": (422_765_824, 191),
}


@functools.cache
def true_size(config: UNetConfig) -> UNet:
    """A UNet without numbers."""
    with torch.device("meta"):
        return UNet(config)


@functools.cache
def lora_shapes(unet: UNet, rank: int = 128) -> dict[str, tuple[int, ...]]:
    """The shapes of the LoRA in a FaceID file: every attention layer, counted as diffusers counts its processors."""
    shapes = {}
    for n, name in enumerate(attention_order(unet)):
        for to in ("q", "k", "v", "out"):
            weight = unet.get_submodule(f"{name}.to_{to}").weight
            shapes[f"ip_adapter.{n}.to_{to}_lora.down.weight"] = (rank, weight.shape[1])
            shapes[f"ip_adapter.{n}.to_{to}_lora.up.weight"] = (weight.shape[0], rank)
    return shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_size(name: str) -> None:
    config, form, sizes, parameters, tensors, lora = PARAMETERS[name]
    unet = true_size(config)
    with torch.device("meta"):
        whole = IPAdapter(unet, form(context_dim=config.context_dim, **sizes))
    assert number_of(whole.image_projection) == (parameters, tensors)
    shapes = lora_shapes(unet) if lora else {}
    assert sum(a * b for a, b in shapes.values()) == lora
    count, number = number_of(whole)
    assert (count + lora, number + len(shapes)) == TOTALS[name]
    assert adapter_names(whole.state_dict(), unet).keys() == whole.state_dict().keys()


# All released layouts.


def header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write a safetensors file of float16 zeros as a sparse file: it has its full size, but takes no space on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


H, G = "ViT-H (1280-d)", "ViT-bigG (1280-d)"
FINE_H, FACE = f"the fine features of {H}", "the face embeddings of InsightFace (512-d)"
BOTH = f"the face embedding and its picture's fine features of {H}"
PLUS, SDXL_PLUS = (Resampler, {}), (Resampler, {"width": 1280, "heads": 20})
RELEASED: dict[str, tuple[UNetConfig, tuple[type[Projection], dict[str, Any]], bool, str, str]] = {
    # file: base, projection, whether it has a LoRA; the first line; a word of the third
    "ip-adapter_sd15": (SD15, (ImageProjection, {}), False, "IP-Adapter", "ViT-H (1024-d), 4 tokens"),
    "ip-adapter_sd15_light": (SD15, (ImageProjection, {}), False, "IP-Adapter", "ViT-H (1024-d), 4 tokens|follows the text more"),
    "ip-adapter_sd15_light_v11": (SD15, (ImageProjection, {}), False, "IP-Adapter", "ViT-H (1024-d), 4 tokens|follows the text more"),
    "ip-adapter_sd15_vit-G": (SD15, (ImageProjection, {"image_dim": 1280}), False, "IP-Adapter", f"{G}, 4 tokens"),
    "ip-adapter-plus_sd15": (SD15, PLUS, False, "IP-Adapter Plus", f"{FINE_H}, 16 tokens"),
    "ip-adapter-plus-face_sd15": (SD15, PLUS, False, "IP-Adapter Plus", f"{FINE_H}, 16 tokens|cropped to a face"),
    "ip-adapter-full-face_sd15": (SD15, (MLPProjection, {}), False, "IP-Adapter Full", f"{FINE_H}, one token|without its background"),
    "ip-adapter_sdxl": (SDXL, (ImageProjection, {"image_dim": 1280}), False, "IP-Adapter", f"{G}, 4 tokens"),
    "ip-adapter_sdxl_vit-h": (SDXL, (ImageProjection, {}), False, "IP-Adapter", "ViT-H (1024-d), 4 tokens"),
    "ip-adapter-plus_sdxl_vit-h": (SDXL, SDXL_PLUS, False, "IP-Adapter Plus", f"{FINE_H}, 16 tokens"),
    "ip-adapter-plus-face_sdxl_vit-h": (SDXL, SDXL_PLUS, False, "IP-Adapter Plus", f"{FINE_H}, 16 tokens|cropped to a face"),
    "ip-adapter-faceid_sd15": (SD15, (FaceProjection, {}), True, "IP-Adapter FaceID", f"{FACE}, 4 tokens|holds a LoRA"),
    "ip-adapter-faceid-plus_sd15": (SD15, (FacePlus, {}), True, "IP-Adapter FaceID Plus", f"{BOTH}, 4 tokens|holds a LoRA"),
    "ip-adapter-faceid-plusv2_sd15": (SD15, (FacePlus, {}), True, "IP-Adapter FaceID PlusV2", f"{BOTH}, 4 tokens|keep the name"),
    "ip-adapter-faceid-portrait_sd15": (SD15, (FaceProjection, {"tokens": 16}), False, "IP-Adapter FaceID Portrait", f"{FACE}, 16 tokens"),
    "ip-adapter-faceid-portrait-v11_sd15": (SD15, (FaceProjection, {"tokens": 16}), False, "IP-Adapter FaceID Portrait", f"{FACE}, 16"),
    "ip-adapter-faceid_sdxl": (SDXL, (FaceProjection, {}), True, "IP-Adapter FaceID", f"{FACE}, 4 tokens|holds a LoRA"),
    "ip-adapter-faceid-plusv2_sdxl": (SDXL, (FacePlus, {"heads": 32}), True, "IP-Adapter FaceID PlusV2", f"{BOTH}, 4 tokens|keep the"),
    "ip-adapter-faceid-portrait_sdxl": (SDXL, (FaceProjection, {"tokens": 16}), False, "IP-Adapter FaceID Portrait", f"{FACE}, 16"),
    "ip-adapter-faceid-portrait_sdxl_unnorm": (SDXL, (RawFaceResampler, {"image_dim": 512, "width": 1280, "heads": 20}), False,
                                               "IP-Adapter FaceID Portrait, unnorm", f"{FACE}, 16 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_inspect_names_every_released_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At the true sizes. That values are finite is not read again here, from gigabytes of zeros."""
    config, (form, sizes), has_lora, kind, words = RELEASED[name]
    unet = true_size(config)
    with torch.device("meta"):
        whole = IPAdapter(unet, form(context_dim=config.context_dim, **sizes))
    state = whole.state_dict()
    shapes = {theirs: tuple(state[ours].shape) for ours, (theirs,) in adapter_names(state, unet).items()}
    path = header(tmp_path / f"{name}.safetensors", shapes | (lora_shapes(unet) if has_lora else {}))
    monkeypatch.setattr("checkpoints.adapters.is_finite", lambda _: True)
    lines = inspect(path)
    base = "Stable Diffusion 1.5 (768-d)" if config is SD15 else "Stable Diffusion XL (2048-d)"
    assert lines[0].startswith(f"{kind} for {base}, reads {words.split('|')[0]}"), lines[0]
    assert words.split("|")[-1] in "\n".join(lines) and not any(line.startswith("odd") for line in lines)
    assert lines[1].startswith(f"{16 if config is SD15 else 70} cross-attention layers")
    assert f"goes with {base} and models that were tuned from it" in lines
    needs = next(line for line in lines if line.startswith("needs "))
    assert ("--image face.safetensors" in needs) == ("faceid" in name)
    assert ("--image-encoder" in needs) == ("faceid" not in name or "plus" in name)
