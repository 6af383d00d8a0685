"""Names of LoRA files: those of kohya's scripts, of diffusers and PEFT, and of the LoRA inside a FaceID adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from checkpoints.names import TRANSPOSED, attention_order, map_names, text_names, unet_rows
from model.unet import UNet

_KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
_ROLES = {"lora_down": "down", "down": "down", "lora_A": "down", "lora_up": "up", "up": "up", "lora_B": "up"}
_ROLE = re.compile(
    r"(?P<module>.+?)(?P<old>_lora|\.lora|\.lora_linear_layer)?"
    r"\.(?P<role>alpha|(?:lora_down|lora_up|lora_A|lora_B|down|up)(?:\.default)?\.weight)$"
)
PEFT = "base_model.model."  # the prefix of PEFT's own `save_pretrained`
CONFIG = "adapter_config.json"  # the file of its settings, beside the weights
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Target:
    """The weight that a module's update changes: the network's name, the tensor's, and which of `parts` equal parts of its rows."""

    network: str
    tensor: str
    part: int = 0
    parts: int = 1


def role_of(name: str) -> tuple[str, str]:
    """Return (module, role) of a tensor in a LoRA file. The role is "down", "up", "alpha", or "" for other tensors.

    The module has the name that `targets` gives it: kohya's, such as `lora_unet_mid_block_attentions_0_proj_in`, or that of
    diffusers or transformers after the name of the network, such as `unet.mid_block.attentions.0.proj_in`.
    """
    match = _ROLE.match(name)
    if match is None or (match["role"][:2] in ("do", "up") and not match["old"]):
        return name, ""
    module, role = match["module"].replace(".processor", ""), match["role"].partition(".")[0]
    if not module.startswith("lora_"):
        module = _modern(module, match["old"] == "_lora")
    return module, _ROLES.get(role, role)


def _modern(module: str, old: bool) -> str:
    """Return a module's name in today's diffusers.

    Old files have no `unet.`, and `to_out_lora` or `to_q_lora` in text encoders too. PEFT's own files hold one network, without its name.
    """
    if module.startswith(PEFT):
        module = module.removeprefix(PEFT)
        return f"text_encoder.{module}" if module.startswith(("text_model.", "encoder.")) else f"unet.{module}"
    if not module.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
        module = f"unet.{module.removeprefix('ip_adapter.')}"
    if old and module.startswith("text_"):
        outer, _, leaf = module.rpartition(".")
        return f"{outer}.{_TEXT.get(leaf, leaf)}"
    return f"{module}.0" if old and module.endswith("to_out") else module


def targets(networks: Mapping[str, nn.Module]) -> dict[str, Target]:
    """Return the target of every module that a LoRA can update, by each of its names in files.

    `networks`: the UNet and text encoders of a base model by the names of their folders, as in `Base.parts`.
    """
    by_name: dict[str, Target] = {}
    for network, module in networks.items():
        if network not in _KOHYA:
            continue
        for theirs, target in _modules(network, module).items():
            by_name[f"{network}.{theirs}"] = target
            by_name |= {prefix + theirs.replace(".", "_"): target for prefix in _KOHYA[network]}
    return by_name


def _modules(network: str, module: Any) -> dict[str, Target]:
    """Return {name of a module in files, without the network's: target}."""
    state = [name for name, tensor in module.state_dict().items() if name.endswith("weight") and tensor.ndim > 1]
    if isinstance(module, UNet):
        tables = [map_names(state, unet_rows(module.config), column) for column in (1, 2)]
        numbers = {
            f"{n}.{to}": Target(network, f"{name}.{to.removesuffix('.0')}.weight")
            for n, name in enumerate(attention_order(module))
            for to in ("to_q", "to_k", "to_v", "to_out.0")
        }
    else:
        tables, numbers = [text_names(state, module.config, prefix) for prefix in ("text_model.", "")], {}
    return numbers | {
        theirs.removesuffix(".weight"): Target(network, ours, part, len(parts))
        for table in tables
        for ours, parts in table.items()
        if ours in state
        for part, theirs in enumerate(parts)
        if theirs not in TRANSPOSED and "token_embedding" not in theirs
    }
