"""Tables of names that map ControlNets and T2I-Adapters to diffusers and to the official files, as checkpoints/names.py does."""

from __future__ import annotations

from checkpoints.names import Row, unet_rows
from model.controlnet import ControlNetConfig
from model.t2i import T2IConfig


def controlnet_rows(config: ControlNetConfig) -> list[Row]:
    """Return the rows for a ControlNet: those of its UNet, and its own. LDM counts the activations of the hint network too."""
    rows = unet_rows(config)
    last = 2 * (2 * len(config.hint) - 1)
    names = {0: "conv_in", last: "conv_out"} | {i: f"blocks.{i // 2 - 1}" for i in range(2, last, 2)}
    for i, theirs in names.items():
        rows.append((f"hint.{i}", f"controlnet_cond_embedding.{theirs}", f"input_hint_block.{i}"))
    for i in range(len(config.channels) * (config.res_blocks + 1)):
        rows.append((f"zero.{i}", f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0"))
    return [*rows, ("zero_mid", "controlnet_mid_block", "middle_block_out.0")]


def t2i_rows(config: T2IConfig) -> list[Row]:
    """Return the rows for a T2I-Adapter. The official full form numbers the blocks of all levels, the light form those of each level."""
    rows: list[Row] = [("conv_in", "adapter.conv_in", "conv_in")]
    for level in range(len(config.channels)):
        light, first = config.form == "light", level * config.blocks
        outer = f"body.{level if light else first}"
        for name in ("in_conv", "out_conv"):
            rows.append((f"body.{level}.{name}", f"adapter.body.{level}.{name}", f"{outer}.{name}"))
        for j in range(config.blocks):
            official = f"body.{level}.body.{j}" if light else f"body.{first + j}"
            for ours, theirs in (("conv1", "block1"), ("conv2", "block2")):
                own = f"body.{level}.blocks.{j}.{ours}"
                rows.append((own, f"adapter.body.{level}.resnets.{j}.{theirs}", f"{official}.{theirs}"))
    return rows
