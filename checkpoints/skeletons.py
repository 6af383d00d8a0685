"""Modules with the tensor names and shapes of CLIP's encoders, but no code.

They allow files to be inspected without importing open_clip, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model.image_encoder import ImageConfig
from model.text_encoder import TextConfig

Shapes = dict[str, tuple[int, ...]]


def text_skeleton(config: TextConfig) -> Any:
    """Build a module without `forward` whose state dict has the names and shapes of `TextEncoder(config)`."""
    width, rows = config.width, len(config.vocabulary) or config.vocab_size
    shapes = _transformer(width, config.layers, int(width * config.mlp_ratio)) | _norm("ln_final", width)
    shapes |= {"token_embedding.weight": (rows, width), "positional_embedding": (config.context_length, width)}
    return _module(shapes | ({"text_projection": (width, config.output_dim)} if config.output_dim else {}), config)


def image_skeleton(config: ImageConfig) -> Any:
    """Build a module without `forward` whose state dict has the names and shapes of `ImageEncoder(config)`."""
    return _module(_vit(config) if config.kind == "vit" else _resnet(config), config)


def _module(shapes: Mapping[str, tuple[int, ...]], config: Any) -> nn.Module:
    root = nn.Module()
    root.config = config
    for name, shape in shapes.items():
        *path, leaf = f"clip.{name}".split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, torch.empty(shape, dtype=torch.int64 if leaf == "num_batches_tracked" else None))
    return root


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _transformer(width: int, layers: int, inner: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _linear(f"{block}.mlp.c_fc", inner, width) | _linear(f"{block}.mlp.c_proj", width, inner)
    return shapes


def _vit(config: ImageConfig) -> Shapes:
    width, tokens = config.width, (config.image_size // config.patch) ** 2 + 1
    shapes = _transformer(width, config.layers[0], int(width * config.mlp_ratio))
    shapes |= _norm("ln_pre", width) | _norm("ln_post", width)
    shapes |= {"class_embedding": (width,), "positional_embedding": (tokens, width), "proj": (width, config.output_dim)}
    return shapes | {"conv1.weight": (width, 3, config.patch, config.patch)}


def _convolution(conv: str, norm: str, out_channels: int, in_channels: int, size: int) -> Shapes:
    shapes: Shapes = {f"{conv}.weight": (out_channels, in_channels, size, size), f"{norm}.num_batches_tracked": ()}
    return shapes | {f"{norm}.{leaf}": (out_channels,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def _resnet(config: ImageConfig) -> Shapes:
    """Return the shapes of CLIP's ModifiedResNet: three stem convolutions, bottleneck blocks (expansion 4), attention pooling."""
    width, dim = config.width, 32 * config.width
    shapes = _convolution("conv1", "bn1", width // 2, 3, 3) | _convolution("conv2", "bn2", width // 2, width // 2, 3)
    shapes |= _convolution("conv3", "bn3", width, width // 2, 3)
    channels = width
    for level, blocks in enumerate(config.layers):
        inner = width * 2**level
        for i in range(blocks):
            block = f"layer{level + 1}.{i}"
            shapes |= _convolution(f"{block}.conv1", f"{block}.bn1", inner, channels, 1)
            shapes |= _convolution(f"{block}.conv2", f"{block}.bn2", inner, inner, 3)
            shapes |= _convolution(f"{block}.conv3", f"{block}.bn3", 4 * inner, inner, 1)
            if i == 0:
                shapes |= _convolution(f"{block}.downsample.0", f"{block}.downsample.1", 4 * inner, channels, 1)
            channels = 4 * inner
    size = config.image_size * (1 if config.stem_pool else 2)
    shapes |= {"attnpool.positional_embedding": ((size // 32) ** 2 + 1, dim)}
    for name, rows in (("q", dim), ("k", dim), ("v", dim), ("c", config.output_dim)):
        shapes |= _linear(f"attnpool.{name}_proj", rows, dim)
    return shapes
