"""Pairs of equal structure controls, diffusers' and ours, in float64, and small configs of each kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import ControlNetModel, T2IAdapter
from peers import SMALL_ONE, SMALL_SD15, SMALL_SD21, SMALL_SDXL, from_peer, randomise

from checkpoints.control_configs import controlnet_diffusers, t2i_diffusers
from checkpoints.control_names import controlnet_rows, t2i_rows
from checkpoints.names import map_names
from model.controlnet import ControlNet, ControlNetConfig
from model.t2i import T2IAdapter as OurT2I
from model.t2i import T2IConfig
from model.unet import EMPTY

SMALL_CONTROLS = {
    "sd15": (ControlNetConfig.of(SMALL_SD15, (4, 6, 8, 10)), False),
    "sd21": (ControlNetConfig.of(SMALL_SD21, (4, 6)), True),
    "sdxl": (ControlNetConfig.of(SMALL_SDXL, (4, 6, 8, 10)), True),
    "sdxl_mid": (replace(ControlNetConfig.of(SMALL_SDXL, (4, 6)), depth=(0, EMPTY, 1), mid_depth=1), True),
    "sdxl_small": (replace(ControlNetConfig.of(SMALL_SDXL, (4, 6)), depth=(0, 0, 0), mid_depth=EMPTY), True),
    "one_block": (replace(ControlNetConfig.of(SMALL_ONE, (4,)), hint_channels=1), True),
    "shuffle": (ControlNetConfig.of(SMALL_SD15, (4, 6, 8), pooled=True), False),
}
SMALL_T2I = {
    "full": T2IConfig(SMALL_SD15.channels, unshuffle=4),
    "grey": T2IConfig(SMALL_SD15.channels, hint_channels=1, blocks=1),
    "light": T2IConfig(SMALL_SD15.channels, blocks=4, form="light"),
    "xl": T2IConfig((16, 32, 48, 48), unshuffle=16, form="xl"),
}


def controlnet_pair(config: ControlNetConfig, linear: bool, seed: int = 0) -> tuple[Any, ControlNet]:
    settings = controlnet_diffusers(config) | {"use_linear_projection": linear}
    peer, ours = randomise(ControlNetModel.from_config(settings), seed), ControlNet(config)
    return peer, from_peer(ours, map_names(ours.state_dict(), controlnet_rows(config), 1), peer.state_dict())


def t2i_pair(config: T2IConfig, seed: int = 0) -> tuple[Any, OurT2I]:
    peer, ours = randomise(T2IAdapter.from_config(t2i_diffusers(config)), seed), OurT2I(config)
    return peer, from_peer(ours, map_names(ours.state_dict(), t2i_rows(config), 1), peer.state_dict())
