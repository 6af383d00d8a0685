"""Map the tensor names of this project to those of diffusers, transformers, LDM and official adapters.

A table is a list of rows, one per module with weights. `map_names` converts a table to a map of tensor names.
tests/test_names.py checks that each map is a bijection. These functions do not read files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from model.attention import Attention, CrossAttention
from model.image_encoder import ImageConfig
from model.text_encoder import TextConfig
from model.unet import UNet, UNetConfig
from model.vae import VAEConfig

Row = tuple[str, str, str]  # names of a module: ours, that of diffusers or transformers, that of LDM
Names = dict[str, tuple[str, ...]]  # {our tensor: tensors in the file, which are concatenated along their first axis}

_RES: tuple[Row, ...] = (
    ("norm1", "norm1", "in_layers.0"),
    ("conv1", "conv1", "in_layers.2"),
    ("emb", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"),
    ("conv2", "conv2", "out_layers.3"),
    ("skip", "conv_shortcut", "skip_connection"),
)
_TRANSFORMER: tuple[Row, ...] = (
    *((name, name, name) for name in ("norm1", "norm2", "norm3")),
    *((f"{a}.{to}", f"{a}.{to}", f"{a}.{to}") for a in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v")),
    *((f"{a}.to_out", f"{a}.to_out.0", f"{a}.to_out.0") for a in ("attn1", "attn2")),
    ("ff.proj_in", "ff.net.0.proj", "ff.net.0.proj"),
    ("ff.proj_out", "ff.net.2", "ff.net.2"),
)
_VAE_RES: tuple[Row, ...] = (
    *((name, name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    ("skip", "conv_shortcut", "nin_shortcut"),
)
_VAE_ATTENTION: tuple[Row, ...] = (
    ("norm", "group_norm", "norm"),
    ("attn.to_q", "to_q", "q"),
    ("attn.to_k", "to_k", "k"),
    ("attn.to_v", "to_v", "v"),
    ("attn.to_out", "to_out.0", "proj_out"),
)
_CLIP: tuple[Row, ...] = (
    ("ln_1", "layer_norm1", ""),
    ("ln_2", "layer_norm2", ""),
    ("attn.out_proj", "self_attn.out_proj", ""),
    ("mlp.c_fc", "mlp.fc1", ""),
    ("mlp.c_proj", "mlp.fc2", ""),
)
_PROJECTION: tuple[Row, ...] = tuple(
    (f"image_projection.{name}", f"image_proj.{name}", "")
    for name in ("proj", "norm", "proj.0", "proj.2", "proj.3")
)
_PERCEIVER: tuple[Row, ...] = (
    ("norm_x", "0.norm1", ""),
    ("norm_z", "0.norm2", ""),
    *((name, f"0.{name}", "") for name in ("to_q", "to_kv", "to_out")),
    *((f"ff.{i}", f"1.{i}", "") for i in (0, 1, 3)),
)
_LAYER = re.compile(r"(to_[kv])\.(\d+)\.weight$")
TRANSPOSED = ("text_projection.weight", "visual_projection.weight")  # open_clip stores these transposed relative to transformers


def _inside(outer: Row, rows: Iterable[Row]) -> list[Row]:
    """Prefix the rows of a module's children with the module's own names."""
    return [(f"{outer[0]}.{a}", f"{outer[1]}.{b}", f"{outer[2]}.{c}") for a, b, c in rows]


def map_names(ours: Iterable[str], rows: Iterable[Row], column: int, prefix: str = "") -> Names:
    """Map our tensor names to those in the given column of a table: 1 = diffusers or transformers, 2 = LDM.

    Tensors of modules that are not in the table are omitted.
    """
    theirs = {row[0]: row[column] for row in rows}
    split = {tensor: tensor.rpartition(".") for tensor in ours}
    return {t: (f"{prefix}{theirs[module]}.{leaf}",) for t, (module, _, leaf) in split.items() if module in theirs}


def _res_rows(ours: str, block: str, i: int, ldm: str) -> list[Row]:
    return _inside((f"{ours}.res", f"{block}.resnets.{i}", ldm), _RES)


def _attn_rows(ours: str, block: str, i: int, ldm: str, depth: int) -> list[Row]:
    outer = (f"{ours}.attn", f"{block}.attentions.{i}", ldm)
    rows = _inside(outer, [(n, n, n) for n in ("norm", "proj_in", "proj_out")]) if depth else []
    for k in range(depth):
        rows += _inside(outer, _inside((f"blocks.{k}", inner := f"transformer_blocks.{k}", inner), _TRANSFORMER))
    return rows


def unet_rows(config: UNetConfig) -> list[Row]:
    """Return the rows for a UNet.

    LDM numbers all stages consecutively, starting with conv_in. diffusers numbers the levels, and the layers of each level.
    """
    rows: list[Row] = [
        ("time_embed.0", "time_embedding.linear_1", "time_embed.0"),
        ("time_embed.2", "time_embedding.linear_2", "time_embed.2"),
        ("added_embed.0", "add_embedding.linear_1", "label_emb.0.0"),
        ("added_embed.2", "add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "conv_in", "input_blocks.0.0"),
        ("norm_out", "conv_norm_out", "out.0"),
        ("conv_out", "conv_out", "out.2"),
    ]
    levels, per_level = len(config.channels), config.res_blocks + 1
    for level in range(levels):
        for i in range(config.res_blocks):
            n = level * per_level + i
            rows += _res_rows(f"down.{n}", f"down_blocks.{level}", i, f"input_blocks.{n + 1}.0")
            rows += _attn_rows(f"down.{n}", f"down_blocks.{level}", i, f"input_blocks.{n + 1}.1", config.depth[level])
        n = level * per_level + config.res_blocks
        ldm = f"input_blocks.{n + 1}.0.op"
        if level < levels - 1:
            rows.append((f"down.{n}.resample.conv", f"down_blocks.{level}.downsamplers.0.conv", ldm))
    rows += _res_rows("mid.0", "mid_block", 0, "middle_block.0")
    rows += _attn_rows("mid.0", "mid_block", 0, "middle_block.1", config.mid_depth)
    rows += _res_rows("mid.1", "mid_block", 1, "middle_block.2")
    for block in range(levels):
        depth = config.depth[levels - 1 - block]
        for i in range(per_level):
            n = block * per_level + i
            rows += _res_rows(f"up.{n}", f"up_blocks.{block}", i, f"output_blocks.{n}.0")
            rows += _attn_rows(f"up.{n}", f"up_blocks.{block}", i, f"output_blocks.{n}.1", depth)
        ldm = f"output_blocks.{n}.{2 if depth else 1}.conv"
        if block < levels - 1:
            rows.append((f"up.{n}.resample.conv", f"up_blocks.{block}.upsamplers.0.conv", ldm))
    return rows


def vae_rows(config: VAEConfig) -> list[Row]:
    """Return the rows for a VAE. LDM numbers the decoder's levels from the largest resolution to the smallest."""
    rows: list[Row] = [(name, name, name) for name in ("quant_conv", "post_quant_conv")]
    levels, n = len(config.channels), config.res_blocks
    for part in ("encoder", "decoder"):
        for name, theirs in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            rows.append((f"{part}.{name}", f"{part}.{theirs}", f"{part}.{name}"))
        for ours, i, ldm in (("mid.0", 0, "mid.block_1"), ("mid.2", 1, "mid.block_2")):
            rows += _inside((f"{part}.{ours}", f"{part}.mid_block.resnets.{i}", f"{part}.{ldm}"), _VAE_RES)
        outer = (f"{part}.mid.1", f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1")
        rows += _inside(outer, _VAE_ATTENTION)
    for side, blocks, change, count in (
        ("down", "encoder.down", "downsample", n),
        ("up", "decoder.up", "upsample", n + 1),
    ):
        for level in range(levels):
            theirs, ldm = f"{blocks}_blocks.{level}", f"{blocks}.{level if side == 'down' else levels - 1 - level}"
            first = level * (count + 1)
            for i in range(count):
                rows += _inside((f"{blocks}.{first + i}", f"{theirs}.resnets.{i}", f"{ldm}.block.{i}"), _VAE_RES)
            resample = f"{theirs}.{change}rs.0.conv"
            if level < levels - 1:
                rows.append((f"{blocks}.{first + count}.conv", resample, f"{ldm}.{change}.conv"))
    return rows


def clip_names(
    ours: Iterable[str], layers: int, prefix: str, modules: dict[str, str], tensors: dict[str, str]
) -> Names:
    """Map the names of a CLIP encoder to transformers' layout, which stores q, k and v separately.

    `modules`, `tensors`: names outside the transformer layers, {ours: theirs}.
    """
    rows: list[Row] = [(f"clip.{a}", f"{prefix}{b}", "") for a, b in modules.items()]
    names: Names = {
        f"clip.{a}": (b if b.endswith("projection.weight") else f"{prefix}{b}",) for a, b in tensors.items()
    }
    for i in range(layers):
        outer = (f"clip.transformer.resblocks.{i}", f"{prefix}encoder.layers.{i}", "")
        rows += _inside(outer, _CLIP)
        for leaf in ("weight", "bias"):
            qkv = tuple(f"{outer[1]}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            names[f"{outer[0]}.attn.in_proj_{leaf}"] = qkv
    return {**map_names(ours, rows, 1), **names}


def text_names(ours: Iterable[str], config: TextConfig, prefix: str = "text_model.") -> Names:
    """Map the names of a text encoder to transformers' layout. transformers 5 writes no prefix."""
    modules = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    tensors = {"positional_embedding": "embeddings.position_embedding.weight"}
    projection = {"text_projection": "text_projection.weight"} if config.output_dim else {}
    return clip_names(ours, config.layers, prefix, modules, tensors | projection)


def image_names(ours: Iterable[str], config: ImageConfig) -> Names:
    """Map the names of an image encoder (a ViT) to transformers' layout. `pre_layrnorm` is the spelling in transformers."""
    modules = {"conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    tensors = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "proj": "visual_projection.weight",
    }
    return clip_names(ours, config.layers[0], "vision_model.", modules, tensors)


def projection_names(ours: Iterable[str]) -> Names:
    """Map the names of an image projection of any kind to the official names.

    Names that do not start with `image_projection.` are omitted.
    """
    ours, queries, rows = list(ours), "image_projection.queries", list(_PROJECTION)
    face_plus = "image_projection.proj.0.weight" in ours and "image_projection.proj_in.weight" in ours
    inner = "image_proj.perceiver_resampler" if face_plus else "image_proj"
    rows += [(f"image_projection.{name}", f"{inner}.{name}", "") for name in ("proj_in", "proj_out", "norm_out")]
    for i in range(sum(name.endswith(".to_kv.weight") for name in ours)):
        rows += _inside((f"image_projection.layers.{i}", f"{inner}.layers.{i}", ""), _PERCEIVER)
    return map_names(ours, rows, 1) | ({queries: ("image_proj.latents",)} if queries in ours else {})


def attention_order(unet: UNet) -> list[str]:
    """Return the names of all attention modules in the order of diffusers' attention processors: down, up, **mid last**.

    Self-attention (even numbers) and cross-attention (odd numbers) alternate.
    """
    names = [name for name, module in unet.named_modules() if isinstance(module, Attention)]
    return sorted(names, key=lambda name: name.startswith("mid."))


def adapter_names(ours: Iterable[str], unet: UNet) -> Names:
    """Map the names of an adapter to the official names.

    The layers have the numbers 1, 3, 5, ... of `attention_order`.
    """
    cross = [(n, unet.get_submodule(name)) for n, name in enumerate(attention_order(unet))]
    key, ours = {module.layer: n for n, module in cross if isinstance(module, CrossAttention)}, list(ours)
    layers = {n: (f"ip_adapter.{key[int(m[2])]}.{m[1]}_ip.weight",) for n in ours if (m := _LAYER.match(n))}
    return projection_names(ours) | layers
