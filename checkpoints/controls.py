"""Load and save ControlNets and T2I-Adapters: official files, diffusers folders, and this project's own format.

The layout is recognised by the names of the tensors. A config is read from a folder's `config.json` or a card; official
files have neither, so their sizes come from the shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints import control_configs as configs
from checkpoints import ldm
from checkpoints.adapters import BASES, display_name
from checkpoints.cards import module_from_card
from checkpoints.control_names import controlnet_rows, t2i_rows
from checkpoints.files import naming, read_json_if_there
from checkpoints.fill import assemble, check, empty_module
from checkpoints.folders import folder_of, module_from_config, weights_in, write_diffusers
from checkpoints.names import Names, Row, map_names
from checkpoints.reader import File
from checkpoints.single_file import single_kind
from model.controlnet import ControlNet, ControlNetConfig
from model.t2i import T2IAdapter, T2IConfig
from model.unet import UNetConfig

Control = ControlNet | T2IAdapter
OWN = {"hint": "controlnet", "unshuffle": "t2i"}  # an entry of its card tells a control in this project's own format
_OWN: dict[str, tuple[type[Any], type[Any]]] = {
    "controlnet": (ControlNet, ControlNetConfig),
    "t2i": (T2IAdapter, T2IConfig),
}
_COMPLETE = {"a ControlNet": "a complete ControlNet", "a T2I-Adapter": "a complete T2I-Adapter"}


class ControlFile(NamedTuple):
    """A control on the meta device, the file of its weights, and the names of its tensors there. `what` says what it is."""

    control: Control
    file: File
    names: Names
    what: str


def rows_of(control: Control) -> list[Row]:
    """Return the table of names of a control."""
    return controlnet_rows(control.config) if isinstance(control, ControlNet) else t2i_rows(control.config)


def own_kind(path: Path) -> str:
    """Return the kind of control in this project's own format, by its card; "" for other files."""
    config = read_json_if_there(path.with_suffix(".json")).get("config") if path.is_file() else None
    return next((kind for key, kind in OWN.items() if isinstance(config, dict) and key in config), "")


def open_control(path: Path) -> ControlFile:
    """Open a control of any layout and build it on the meta device, without reading its weights.

    Raises FileNotFoundError, and ValueError when it is not a supported control or not complete.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name a ControlNet or a T2I-Adapter")
    if kind := own_kind(path):
        control = module_from_card(path, *_OWN[kind])
        source = ControlFile(control, File(path), {n: (n,) for n in control.state_dict()}, "the control that its card describes")
    else:
        source = _open_foreign(path, weights_in(path))
    check(source.control.state_dict(), source.names, source.file, source.what)
    if (channels := source.control.config.hint_channels) not in (1, 3):
        raise ValueError(f"{path} reads hints of {channels} channels, but only pictures, of 1 or 3, can be given")
    return source


def _open_foreign(path: Path, file: File) -> ControlFile:
    """Open a control in the layout of diffusers, of LDM, or of the official T2I-Adapters."""
    kind = single_kind(file)
    if "style_embedding" in file:
        kind = "a T2I style adapter"
    if kind not in _COMPLETE:
        raise ValueError(f"{path} is {kind}; only ControlNets and T2I-Adapters can be used as a control")
    if any(name.startswith("controlnet_") or ".resnets." in name for name in file):
        return _open_diffusers(path, file, kind)
    control: Control
    with naming(path, f"is not {_COMPLETE[kind]}"):
        if kind == "a ControlNet":
            file = file.part("control_model.") if "control_model.input_hint_block.0.weight" in file else file
            settings = ldm.settings_beside(path, configs.without_yaml(file.shapes, path.name))
            control = empty_module(ControlNet, configs.ldm_controlnet(file.shapes, settings))
        else:
            file = file.rename({name.removeprefix("adapter."): name for name in file})
            control = empty_module(T2IAdapter, configs.official_t2i(file.shapes))
    return ControlFile(control, file, map_names(control.state_dict(), rows_of(control), 2), _COMPLETE[kind])


def _open_diffusers(path: Path, file: File, kind: str) -> ControlFile:
    folder = folder_of(path)
    control: Control
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} is {kind} in diffusers' layout: put its config.json beside it")
    if kind == "a ControlNet":
        control = module_from_config(folder, ControlNet, configs.controlnet_config, kind)
    else:
        control = module_from_config(folder, T2IAdapter, configs.t2i_config, kind)
    return ControlFile(control, file, map_names(control.state_dict(), rows_of(control), 1), f"{kind[2:]} of its config.json")


def load_control(
    path: Path, unet: UNetConfig | None = None, dtype: torch.dtype | None = torch.float32, factor: int | None = None
) -> Control:
    """Load a control. `unet`: the config of the UNet that it will act on; `factor`: that of the VAE. None skips a check.

    Raises ValueError when the file is not a supported control, or is for another base model.
    """
    source = open_control(path)
    if unet is not None:
        check_fit(source.control, unet, path)
    if factor is not None and (expected := source.control.config.factor) != factor:
        raise ValueError(f"{path} is a control for latents {expected} times smaller than the picture, but those here are {factor} times")
    return assemble(source.control, source.names, source.file, source.what, dtype)


def check_fit(control: Control, unet: UNetConfig, path: Path) -> None:
    """Raise ValueError unless the control was made for a base model with this UNet."""
    if fits(control, unet):
        return
    ours = control.config
    actual = display_name(BASES, unet.context_dim)
    if isinstance(ours, ControlNetConfig) and ours.context_dim != unet.context_dim:
        purpose = f"for {display_name(BASES, ours.context_dim)}"
    else:
        purpose = f"with feature maps of width {', '.join(map(str, ours.channels))}"
    raise ValueError(
        f"{path} is a control {purpose}, but you gave a base model of {actual}, with {', '.join(map(str, unet.channels))}: "
        "use a control made for this base model"
    )


def fits(control: Control, unet: UNetConfig) -> bool:
    """Return whether the residuals of a control have the number and the widths that this UNet's stages need."""
    if isinstance(control, ControlNet):
        fields = ("channels", "res_blocks", "context_dim", "added_dim")
        return all(getattr(control.config, name) == getattr(unet, name) for name in fields)
    levels, config = len(unet.channels), control.config
    half_size = levels > 1 and unet.depth[0] == 0  # as in SDXL, whose first feature map is at half the size
    extra = 1 if config.form == "xl" else 0
    return config.channels[:levels] == unet.channels and len(config.channels) == levels + extra and half_size == bool(extra)


def save_control_diffusers(control: Control, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a control to a folder that diffusers' `ControlNetModel` or `T2IAdapter` can load with `from_pretrained`.

    Raises OSError when a file can't be written, and ValueError when a value is too large for `dtype` or diffusers has no
    such control.
    """
    if isinstance(control, ControlNet):
        config = configs.controlnet_diffusers(control.config)
    else:
        config = configs.t2i_diffusers(control.config)
    write_diffusers(control, map_names(control.state_dict(), rows_of(control), 1), config, folder, dtype)
