"""Write a random ControlNet and T2I-Adapter of Stable Diffusion 1.5 at full size, and load the public networks from them.

The ControlNet is one file in the official layout, without a prefix, as ControlNet 1.1 has it. The T2I-Adapter is a folder of diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from checkpoints.control_configs import controlnet_diffusers, t2i_diffusers
from checkpoints.control_names import controlnet_rows, t2i_rows
from checkpoints.files import write_json, write_tensors
from checkpoints.names import map_names
from eval.peers.official import fill, random_tensors
from model.controlnet import CONTROLNET_SD15, ControlNet
from model.t2i import T2I_SD15, T2IAdapter

CONTROLNET, T2I = "control_v11p_sd15.safetensors", "t2iadapter"


def write(folder: Path, seed: int = 2) -> None:
    """Write both controls, unless they exist already."""
    if (folder / T2I / "config.json").exists():
        return
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        controlnet, t2i = ControlNet(CONTROLNET_SD15), T2IAdapter(T2I_SD15)
    names = map_names(controlnet.state_dict(), controlnet_rows(CONTROLNET_SD15), 2)
    write_tensors(folder / CONTROLNET, dict(random_tensors(controlnet, names, "", g)), None)
    names = map_names(t2i.state_dict(), t2i_rows(T2I_SD15), 1)
    write_tensors(folder / T2I / "diffusion_pytorch_model.safetensors", dict(random_tensors(t2i, names, "", g)), None)
    write_json(folder / T2I / "config.json", t2i_diffusers(T2I_SD15))


def peer_controlnet(folder: Path, dtype: torch.dtype) -> Any:
    """Load diffusers' ControlNet."""
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    control = ControlNetModel.from_config(controlnet_diffusers(CONTROLNET_SD15))
    return fill(control, convert_controlnet_checkpoint(load_file(folder / CONTROLNET), dict(control.config)), dtype)


def peer_t2i(folder: Path, dtype: torch.dtype) -> Any:
    """Load diffusers' T2I-Adapter."""
    from diffusers import T2IAdapter as Peer

    return Peer.from_pretrained(folder / T2I, torch_dtype=dtype).eval().requires_grad_(False)
