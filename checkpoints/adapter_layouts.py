"""Map two other adapter layouts to the official names: the checkpoints of the official trainer, and Plus in diffusers."""

from __future__ import annotations

import re

from checkpoints.reader import File


def with_official_names(file: File) -> File:
    """Rename an adapter's tensors to the official names. Other files keep their names."""
    if any(name.startswith("image_proj_model.") for name in file):
        file = file.rename(_trainer_names(file))
    return file.rename(_diffusers_names(file))


_PROCESSOR = re.compile(r"(unet\.(?:down|up|mid)_block.*\.processor)\.to_[kv]_ip\.weight$")


def _trainer_names(file: File) -> dict[str, str]:
    """Return {official name: name in the file} for a checkpoint of the official trainer, which contains the whole model.

    The projection has the prefix `image_proj_model.`, and the layers have `adapter_modules.<n>.`. If accelerate dropped the
    latter as duplicates, the layers are inside the UNet, as `...attn2.processor.`. The UNet's own weights are omitted.
    """
    parts = (("image_proj_model.", "image_proj."), ("adapter_modules.", "ip_adapter."))
    names = {new + name.removeprefix(old): name for old, new in parts for name in file if name.startswith(old)}
    if not any(name.startswith("ip_adapter.") for name in names):
        layers = {m[1] for name in file if (m := _PROCESSOR.match(name))}
        for position, layer in enumerate(sorted(layers, key=_processor_order)):
            for to in ("to_k_ip.weight", "to_v_ip.weight"):
                if f"{layer}.{to}" in file:
                    names[f"ip_adapter.{2 * position + 1}.{to}"] = f"{layer}.{to}"
    return names


def _processor_order(layer: str) -> tuple[bool, bool, list[int]]:
    """Return a sort key for the order of attention processors in diffusers: down, up, mid."""
    return "mid_block" in layer, "up_blocks" in layer, [int(n) for n in re.findall(r"\d+", layer)]


_DIFFUSERS = {
    "ln0": "0.norm1", "ln1": "0.norm2", "attn.norm1": "0.norm1", "attn.norm2": "0.norm2", "attn.to_q": "0.to_q", "attn.to_kv": "0.to_kv",
    "attn.to_out": "0.to_out", "attn.to_out.0": "0.to_out", "ff.0": "1.0", "ff.1.net.0.proj": "1.1", "ff.1.net.2": "1.3",
}  # fmt: skip
_PLUS_LAYER = re.compile(r"(image_proj\.layers\.\d+)\.(.+)\.(weight|bias)$")


def _diffusers_names(file: File) -> dict[str, str | tuple[str, ...]]:
    """Return {official name: name in the file} for Plus in diffusers.

    Its layers are `layers.N.attn.*`, with K and V in one matrix or in two.
    """
    names: dict[str, str | tuple[str, ...]] = {}
    for name in file:
        layer = _PLUS_LAYER.match(name)
        if layer and layer[2] == "attn.to_k" and (v := name.replace("to_k", "to_v")) in file:
            names[f"{layer[1]}.0.to_kv.weight"] = (name, v)
        elif not (layer and layer[2] == "attn.to_v"):
            names[f"{layer[1]}.{_DIFFUSERS.get(layer[2], layer[2])}.{layer[3]}" if layer else name] = name
    return names
